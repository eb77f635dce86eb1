"""Attention over packed sequences, at random: values, gradients, dropout, memory."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import kept_for_backward
from torch.utils.checkpoint import checkpoint

from spafit.errors import ConfigError
from spafit.kernels import packed_attention, reference
from spafit.kernels.dropout import draw_bits, scale_of, threshold
from spafit.kernels.packed_attention import Bundle, make_bundles
from spafit.layout import Packed

CPU = torch.device("cpu")
A, Dh = 5, 3
D = A * Dh
MODULE = sys.modules["spafit.kernels.packed_attention"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def one_by_one(
    QKV: torch.Tensor, lengths: Sequence[int], masks: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Eq. (4) on each sequence by itself, with masks (A, T, T) that are scaled already."""
    outputs = []
    for i, rows in enumerate(QKV[: sum(lengths)].split(list(lengths))):
        Q, K, V = rows.view(len(rows), 3, A, -1).permute(1, 2, 0, 3)[:, None]  # (1, A, T, Dh)
        if masks is None:
            H1 = reference.attention(Q, K, V)
        else:
            scores = Q @ K.transpose(2, 3) / math.sqrt(Q.shape[-1])
            H1 = (torch.softmax(scores, -1) * masks[i]) @ V
        outputs.append(H1[0].transpose(0, 1).flatten(1))
    outputs.append(QKV.new_zeros(len(QKV) - sum(lengths), QKV.shape[1] // 3))
    return torch.cat(outputs)


@contextmanager
def caught() -> Iterator[list[torch.Tensor]]:
    """Catch the random numbers as they are drawn."""
    found: list[torch.Tensor] = []

    def spy(shape: tuple[int, ...]) -> torch.Tensor:
        found.append(draw_bits(shape))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "draw_bits", spy)
        yield found


def masks_of(
    bits: Sequence[torch.Tensor], bundles: Sequence[Bundle], lengths: Sequence[int], rate: float
) -> list[torch.Tensor]:
    """Return the scaled mask (A, T, T) of each sequence."""
    found: list[torch.Tensor] = []
    for drawn, bundle in zip(bits, bundles, strict=True):
        kept = (drawn >= threshold(rate)).double() * scale_of(rate, CPU)
        for each in kept.view(bundle.count, A, bundle.longest, bundle.longest):
            T = lengths[len(found)]
            found.append(each[:, :T, :T])
    return found


@st.composite
def divided(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Draw lengths, how many sequences each bundle takes, and rows that belong to none."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=7))
    cuts = sorted(draw(st.sets(st.integers(1, len(lengths)))) | {len(lengths)})
    counts = [end - start for start, end in itertools.pairwise([0, *cuts])]
    return lengths, counts, draw(st.integers(0, 3))


class TestIsTheEquation:
    """Oracle: ``reference.attention`` on each sequence by itself."""

    @settings(max_examples=100, deadline=None)
    @given(divided(), st.sampled_from([torch.float64, torch.float32]), st.booleans())
    def test_values_and_gradients(
        self, drawn: tuple[list[int], list[int], int], dtype: torch.dtype, by_columns: bool
    ) -> None:
        lengths, counts, tail = drawn
        N = sum(lengths) + tail
        QKV = 1.5 * draw(N, 3 * D, dtype=dtype)
        pull = draw(N, D, seed=1, dtype=dtype)
        if by_columns:
            QKV, pull = QKV.t().contiguous().t(), pull.t().contiguous().t()
        QKV.requires_grad_()
        bundles = make_bundles(lengths, counts, CPU)
        expected = one_by_one(QKV, lengths)
        [true] = torch.autograd.grad((expected * pull).sum(), QKV)
        for impl in ("fused", "sdpa", "reference", "auto"):
            H1 = packed_attention(QKV, bundles, A, impl=impl)
            [mine] = torch.autograd.grad((H1 * pull).sum(), QKV)
            assert (H1 - expected).abs().max() <= TOLERANCE[dtype], impl
            assert (mine - true).abs().max() <= 5 * TOLERANCE[dtype], impl
            assert torch.count_nonzero(H1[sum(lengths) :]) == 0
            assert torch.count_nonzero(mine[sum(lengths) :]) == 0

    @settings(max_examples=60, deadline=None)
    @given(divided(), st.sampled_from([0.1, 0.5, 0.9]))
    def test_with_dropout(self, drawn: tuple[list[int], list[int], int], rate: float) -> None:
        """The masks are caught as they are drawn, and the equation is written out with them."""
        lengths, counts, tail = drawn
        QKV = draw(sum(lengths) + tail, 3 * D).requires_grad_()
        pull = draw(len(QKV), D, seed=1)
        bundles = make_bundles(lengths, counts, CPU)
        with caught() as bits:
            H1 = packed_attention(QKV, bundles, A, rate, "fused")
            [mine] = torch.autograd.grad((H1 * pull).sum(), QKV, retain_graph=True)
            [again] = torch.autograd.grad((H1 * pull).sum(), QKV)
        assert len(bits) == len(bundles)  # nothing is drawn in backward
        expected = one_by_one(QKV, lengths, masks_of(bits, bundles, lengths, rate))
        [true] = torch.autograd.grad((expected * pull).sum(), QKV)
        scale = max(1.0, float(true.abs().max()))
        assert (H1 - expected).abs().max() <= 1e-12 * scale
        assert (mine - true).abs().max() <= 1e-12 * scale
        assert torch.equal(mine, again)

    def test_gradients_are_finite_differences(self) -> None:
        bundles = make_bundles([2, 3, 1], [2, 1], CPU)
        QKV = draw(7, 3 * D).requires_grad_()

        def form(QKV: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return packed_attention(QKV, bundles, A, 0.3, "fused")

        assert torch.autograd.gradcheck(form, (QKV,))

    def test_checkpointing_repeats_the_draw(self) -> None:
        bundles = make_bundles([2, 5, 4], [1, 2], CPU)
        results = []
        for recompute in (False, True):
            QKV = draw(11, 3 * D).requires_grad_()
            torch.manual_seed(3)
            given_ = (QKV, bundles, A, 0.3, "fused")
            H1 = (
                checkpoint(packed_attention, *given_, use_reentrant=False)
                if recompute
                else packed_attention(*given_)
            )
            results.append((H1, *torch.autograd.grad(H1.square().sum(), QKV)))
        assert all(map(torch.equal, *results))

    def test_large_scores_do_not_overflow(self) -> None:
        QKV = (300 * draw(9, 3 * D, dtype=torch.float32)).requires_grad_()
        bundles = make_bundles([4, 5], [2], CPU)
        H1 = packed_attention(QKV, bundles, A, impl="fused")
        [mine] = torch.autograd.grad(H1.sum(), QKV)
        assert torch.isfinite(H1).all()
        assert torch.isfinite(mine).all()
        assert (H1 - one_by_one(QKV, [4, 5])).abs().max() <= 1e-5 * QKV.abs().max()

    @pytest.mark.parametrize("counts", [[3], [1, 2], [1, 1, 1]], ids=str)
    @pytest.mark.parametrize("impl", ["fused", "sdpa", "reference"])
    def test_no_sequence_sees_another(self, impl: str, counts: list[int]) -> None:
        """NaN in one: the others' outputs and gradients stay as they are, bit for bit."""
        lengths = [3, 6, 4]
        bundles = make_bundles(lengths, counts, CPU)
        found = []
        for value in (1.0, float("nan")):
            QKV = draw(13, 3 * D)
            QKV[3:9] = value
            QKV.requires_grad_()
            H1 = packed_attention(QKV, bundles, A, impl=impl)
            [mine] = torch.autograd.grad(H1[[*range(3), *range(9, 13)]].sum(), QKV)
            found.append((H1, mine))
        for plain, spoilt in zip(*found, strict=True):
            assert torch.equal(plain[:3], spoilt[:3])
            assert torch.equal(plain[9:], spoilt[9:])
        assert found[1][0][3:9].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("counts", [(5,), (1,) * 5, (2, 3)], ids=str)
    @pytest.mark.parametrize("impl", ["auto", "fused", "sdpa", "reference"])
    def test_fixed_divisions(self, impl: str, counts: tuple[int, ...], dtype: torch.dtype) -> None:
        """With the bound on gradients that small sizes keep; without a gradient, the same bits."""
        lengths = (4, 4, 7, 1, 6)
        QKV = (1.5 * draw(sum(lengths) + 2, 3 * D)).to(dtype).requires_grad_()
        pull = draw(len(QKV), D, seed=2).to(dtype)
        bundles = make_bundles(lengths, counts, CPU)
        forms = (packed_attention(QKV, bundles, A, impl=impl), one_by_one(QKV, lengths))
        results = [(y, torch.autograd.grad((y * pull).sum(), QKV)[0]) for y in forms]
        for ours, expected in zip(*results, strict=True):
            assert (ours - expected).abs().max() <= TOLERANCE[dtype]
        with torch.no_grad():
            assert torch.equal(packed_attention(QKV, bundles, A, impl=impl), results[0][0])

    @pytest.mark.parametrize("rate", [0.0, 0.25])
    @pytest.mark.parametrize("amp", [False, True])
    @pytest.mark.parametrize("counts", [(5,), (1,) * 5, (2, 3)], ids=str)
    def test_bfloat16_errs_at_most_twice_as_much_as_the_plain_form(
        self, counts: tuple[int, ...], amp: bool, rate: float
    ) -> None:
        """With the same masks; autocast, forward and backward, changes nothing."""
        lengths = (4, 4, 7, 1, 6)
        QKV = (1.5 * draw(sum(lengths) + 2, 3 * D)).bfloat16().requires_grad_()
        pull = draw(len(QKV), D, seed=2)
        bundles = make_bundles(lengths, counts, CPU)
        with caught() as bits, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            H1 = packed_attention(QKV, bundles, A, rate, impl="fused")
            assert H1.dtype == torch.bfloat16
            ours = [H1, *torch.autograd.grad((H1 * pull.bfloat16()).sum(), QKV)]
        masks = masks_of(bits, bundles, lengths, rate) if rate else None
        wide = QKV.detach().double().requires_grad_()
        results = []
        for x in (QKV, wide):
            own = None if masks is None else [each.to(x.dtype) for each in masks]
            y = one_by_one(x, lengths, own)
            results.append([y, *torch.autograd.grad((y * pull.to(y.dtype)).sum(), x)])
        for mine, plain, true in zip(ours, *results, strict=True):
            assert (mine - true).norm() <= 2 * (plain - true).norm()

    def test_refusals(self) -> None:
        QKV = draw(9, 3 * D).requires_grad_()
        bundles = make_bundles((4, 5), (2,), CPU)
        with pytest.raises(ConfigError, match=r"no impl='flush'"):
            packed_attention(QKV, bundles, A, impl="flush")
        with pytest.raises(ConfigError, match=r"impl='flash'\) needs the sequences' spans"):
            packed_attention(QKV, bundles, A, impl="flash")
        spans = Packed([4, 5]).spans
        for impl in ("flash", "efficient"):
            with pytest.raises(ConfigError, match=rf"impl='{impl}'\) is not available: .*CUDA|GPU"):
                packed_attention(QKV, bundles, A, impl=impl, spans=spans)
        with pytest.raises(ConfigError, match=r"float32 and float64.*sdpa"):
            packed_attention(QKV.half(), bundles, A, impl="fused")
        assert packed_attention(QKV.half(), bundles, A).dtype == torch.float16
        y = packed_attention(QKV, bundles, A)
        with pytest.raises(ConfigError, match="differentiated twice"):
            torch.autograd.grad(y.sum(), QKV, create_graph=True)


class TestChoiceOnACpu:
    """Oracle: which operation of PyTorch's is called."""

    @pytest.mark.parametrize(
        ("lengths", "change", "is_called"),
        [
            ([7], {}, True),
            ([65], {}, False),
            ([7, 7], {}, False),
            ([7], {"learns": True}, False),
            ([7], {"dropout": 0.5}, False),
            ([7], {"dtype": torch.bfloat16}, False),  # it would round the probabilities
        ],
    )
    def test_one_short_sequence_alone(
        self,
        lengths: list[int],
        change: dict[str, Any],
        is_called: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        called = []
        whole = torch.nn.functional.scaled_dot_product_attention

        def spy(*given: Any, **more: Any) -> torch.Tensor:
            called.append(1)
            return whole(*given, **more)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        QKV = draw(sum(lengths), 3 * D, dtype=change.get("dtype", torch.float64))
        QKV.requires_grad_(change.get("learns", False))
        bundles = make_bundles(lengths, [len(lengths)], CPU)
        H1 = packed_attention(QKV, bundles, A, change.get("dropout", 0.0))
        assert bool(called) == is_called
        if is_called:
            torch.testing.assert_close(H1, one_by_one(QKV, lengths), rtol=0, atol=1e-12)


class TestProbabilities:
    """V the identity: H1 shows the probabilities. Oracle: softmax, zero or scaled."""

    T = 6

    def make(self, copies: int) -> tuple[torch.Tensor, torch.Tensor, tuple[Bundle, ...]]:
        """Return QKV of so many copies of a sequence, P (A, T, T) and the bundles."""
        T = self.T
        Q, K = draw(A, T, T), draw(A, T, T, seed=1)  # Dh = T
        P = torch.softmax(Q @ K.transpose(1, 2) / math.sqrt(T), -1)
        fields = torch.stack([Q, K, torch.eye(T, dtype=torch.float64).expand(A, T, T)])
        QKV = fields.permute(2, 0, 1, 3).reshape(T, 3 * A * T)
        bundles = make_bundles([T] * copies, [copies], CPU)
        return QKV.repeat(copies, 1), P, bundles

    @pytest.mark.parametrize("rate", [1e-6, 0.1, 0.5, 0.9, 0.999999])
    def test_rate_scale_and_independence(self, rate: float) -> None:
        T, copies = self.T, 3000
        QKV, P, bundles = self.make(copies)
        exact = min(round(rate * 65536), 65535) / 65536
        torch.manual_seed(2)
        H1 = packed_attention(QKV, bundles, A, rate, "fused")
        shown = H1.view(copies, T, A, T).transpose(1, 2)  # (copies, A, T, T)
        kept = (shown != 0).double()
        assert (shown - kept * P / (1 - exact)).abs().max() <= 1e-12 / (1 - exact)
        deviation = (exact * (1 - exact)) ** 0.5
        share = 1 - kept
        assert abs(float(share.mean()) - exact) <= 5 * deviation / kept.numel() ** 0.5
        # The rate of each head, query and key alone: 180 shares, 5 standard errors each.
        if 0.01 < exact < 0.99:
            assert ((share.mean(0) - exact).abs() <= 5 * deviation / copies**0.5).all()
            signs = ((share - exact) / deviation).flatten(1)  # (copies, 180)
            together = signs.T @ signs / copies - torch.diag((signs**2).mean(0))
            assert together.abs().max() <= 6.5 / copies**0.5  # 16,110 pairs
            rows = signs[:200] @ signs[:200].T / signs.shape[1]
            rows.fill_diagonal_(0.0)
            assert rows.abs().max() <= 6.5 / signs.shape[1] ** 0.5 * (1 if exact == 0.5 else 1.5)

    @pytest.mark.parametrize("impl", ["fused", "sdpa", "reference"])
    def test_mean_is_preserved(self, impl: str) -> None:
        T, copies, rate = self.T, 4000, 0.25
        QKV, P, bundles = self.make(copies)
        torch.manual_seed(3)
        H1 = packed_attention(QKV, bundles, A, rate, impl)
        shown = H1.view(copies, T, A, T).transpose(1, 2)
        error = P * math.sqrt(rate / (1 - rate) / copies)
        assert ((shown.mean(0) - P).abs() <= 5 * error).all()

    def test_what_was_dropped_pulls_at_nothing(self) -> None:
        """By dV = Pᵀ dH1: where a probability was dropped, its value has no share of the pull."""
        T, rate = self.T, 0.5
        QKV, _, bundles = self.make(1)
        QKV.requires_grad_()
        torch.manual_seed(4)
        H1 = packed_attention(QKV, bundles, A, rate, "fused")
        shown = H1.detach().view(T, A, T).transpose(0, 1)  # (A, query, key)
        assert 0 < int((shown == 0).sum()) < shown.numel()
        for query in range(T):
            pull = torch.zeros_like(H1)
            pull[query] = 1.0
            [mine] = torch.autograd.grad(H1, QKV, pull, retain_graph=True)
            dV = mine.view(T, 3, A, T)[:, 2]  # (key, A, T)
            expected = shown[:, query].T[..., None].expand(T, A, T)
            assert (dV - expected).abs().max() < 1e-14
            assert torch.equal(dV == 0, expected == 0)

    def test_all_but_all_dropped(self) -> None:
        """At the highest rate rows without any probability are 0, and so is their gradient."""
        QKV, _, bundles = self.make(2)
        QKV.requires_grad_()
        torch.manual_seed(5)
        H1 = packed_attention(QKV, bundles, A, 0.999999, "fused")
        [mine] = torch.autograd.grad(H1.sum(), QKV)
        assert torch.count_nonzero(H1) == 0
        assert torch.count_nonzero(mine) == 0


class TestKept:
    """Oracle: bytes that autograd is given."""

    @pytest.mark.parametrize("rate", [0.0, 0.1])
    def test_is_qkv_and_one_number_a_probability(self, rate: float) -> None:
        lengths = [16, 16, 9]
        QKV = draw(sum(lengths), 3 * D, dtype=torch.float32).requires_grad_()
        bundles = make_bundles(lengths, [2, 1], CPU)
        kept = {}
        for impl in ("fused", "reference"):
            with kept_for_backward() as sizes:
                packed_attention(QKV, bundles, A, rate, impl)
            kept[impl] = sum(sizes.values())
        assert kept["fused"] == 4 * (41 * 3 * D + A * (2 * 16**2 + 9**2))
        # Without dropout the plain form keeps the same; with it, masks and probabilities besides.
        assert kept["fused"] < kept["reference"] if rate else kept["fused"] == kept["reference"]

    def test_without_a_gradient_nothing(self) -> None:
        kept: list[torch.Tensor] = []
        bundles = make_bundles([3, 4], [2], CPU)
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
            packed_attention(draw(7, 3 * D), bundles, A, 0.1, "fused")
            with torch.no_grad():
                packed_attention(draw(7, 3 * D).requires_grad_(), bundles, A, 0.1, "fused")
        assert not kept


class TestFirstTokens:
    """Oracle: the first row of each sequence's attention."""

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
    def test_attend_first(self, lengths: list[int]) -> None:
        layout = Packed(lengths)
        QKV = draw(layout.rows, 3 * D).requires_grad_()
        Q, KV = QKV.split([D, 2 * D], dim=1)
        pull = draw(len(lengths), D, seed=1)
        forms = (
            layout.attend_first(layout.first(Q), KV, A),
            layout.first(layout.attend(QKV, A)),
            layout.first(one_by_one(QKV, lengths)),
        )
        results = [(H1, *torch.autograd.grad((H1 * pull).sum(), QKV)) for H1 in forms]
        for ours, whole, expected in zip(*results, strict=True):
            assert (ours - expected).abs().max() <= 1e-12
            assert (whole - expected).abs().max() <= 1e-12

    def test_bfloat16_errs_at_most_twice_as_much_as_the_plain_form(self) -> None:
        lengths = [4, 7, 1, 6]
        layout = Packed(lengths)
        QKV = (1.5 * draw(layout.rows, 3 * D)).bfloat16().requires_grad_()
        wide = QKV.detach().double().requires_grad_()
        pull = draw(len(lengths), D, seed=1)
        results = []
        for x, is_plain in ((QKV, False), (QKV, True), (wide, True)):
            with torch.autocast("cpu", torch.bfloat16, enabled=not is_plain):
                if is_plain:
                    H1 = layout.first(one_by_one(x, lengths))
                else:
                    Q, KV = x.split([D, 2 * D], dim=1)
                    H1 = layout.attend_first(layout.first(Q), KV, A)
                    assert H1.dtype == torch.bfloat16
            results.append([H1, *torch.autograd.grad((H1 * pull.to(H1.dtype)).sum(), x)])
        for mine, plain, true in zip(*results, strict=True):
            assert (mine - true).norm() <= 2 * (plain - true).norm()
