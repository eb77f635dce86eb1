"""Packed attention by Triton kernels: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from support.triton_compiler import compiling_for
from torch.utils.checkpoint import checkpoint

from spafit.errors import ConfigError
from spafit.kernels import reference
from spafit.kernels.gpu import triton_attention
from spafit.kernels.gpu.triton_attention import LEVELS, packed_attention_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (5, 1, 33)
A, DH, FILLER = 2, 20, 3
HALF_TYPES = (torch.bfloat16, torch.float16)

SMALL = [(16, 32, 4, 1)] * 5
"""The longest sequence takes three of these tiles in rows and two in keys, each last of one."""
SMALL_TILES = {"forward": SMALL, "query": SMALL, "key": SMALL, "all_keys": [(16, 16, 4, 1)] * 5}


@pytest.fixture(params=["own tiles", "small tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernels' own tiles, which may hold a sequence; or small ones, and so dQ apart."""
    if request.param == "small tiles":
        monkeypatch.setattr(triton_attention, "_TILES", SMALL_TILES)


def in_one_size(size: str) -> pytest.MarkDecorator:
    """Take tiles of one size only, where the other shows no more but by chance."""
    other = {"own tiles": "small tiles", "small tiles": "own tiles"}[size]
    sizes = [size, pytest.param(other, marks=pytest.mark.full)]
    return pytest.mark.parametrize("tiles", sizes, indirect=True)


def boundaries_of(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def draw(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype).to(DEVICE)


def make(lengths=LENGTHS, filler=FILLER, num_heads=A, head_size=DH, dtype=torch.float32):
    """Draw QKV and dH1."""
    rows, D = sum(lengths) + filler, num_heads * head_size
    return draw(rows, 3 * D, dtype, seed=1), draw(rows, D, dtype, seed=2)


def run(QKV, dH1, lengths=LENGTHS, dropout=0.0, num_heads=A, longest=None):
    """Return H1 and dQKV."""
    QKV = QKV.detach().requires_grad_()
    longest = max(lengths, default=0) if longest is None else longest
    H1 = packed_attention_triton(
        QKV, boundaries_of(lengths), sum(lengths), longest, num_heads, dropout
    )
    H1.backward(dH1)
    return H1.detach(), QKV.grad


def plain(QKV, dH1, dtype, lengths=LENGTHS, num_heads=A):
    """Return H1 and dQKV of the plain form in a type."""
    QKV = QKV.detach().to(dtype, copy=True).requires_grad_()
    H1 = reference.packed_attention(QKV, lengths, num_heads)
    H1.backward(dH1.to(dtype))
    return H1.detach(), QKV.grad


def masked(QKV, dH1, mask, dtype, dropout, lengths=LENGTHS, num_heads=A):
    """Write the equation out in a type, with masks (A, T, T) a sequence; give H1 and dQKV."""
    QKV = QKV.detach().to(dtype, copy=True).requires_grad_()
    scale = LEVELS / (LEVELS - round(dropout * LEVELS))
    outputs, start = [], 0
    for length, keep in zip(lengths, mask, strict=True):
        Q, K, V = QKV[start : start + length].view(length, 3, num_heads, -1).permute(1, 2, 0, 3)
        P = torch.softmax(Q @ K.mT / math.sqrt(Q.shape[-1]), dim=-1)
        H1 = (P * keep * scale) @ V  # (A, T, Dh)
        outputs.append(H1.transpose(0, 1).flatten(1))
        start += length
    outputs.append(QKV.new_zeros(len(QKV) - start, QKV.shape[1] // 3))
    H1 = torch.cat(outputs)
    H1.backward(dH1.to(dtype))
    return H1.detach(), QKV.grad


def recover_mask(
    lengths: Sequence[int], dropout: float, seed: int, num_heads: int = A, filler: int = FILLER
) -> list[torch.Tensor]:
    """Return what the kernel keeps, bool (A, T, T) a sequence.

    With Q = K = 0 all probabilities of a row are 1/T, and with one-hot values column c of H1 shows
    that of the key that has its one there. As many calls as the keys need, of the same seed.
    """
    width = 64
    rows, D = sum(lengths) + filler, num_heads * width
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    place = torch.cat([torch.arange(length) for length in lengths])
    found = [[] for _ in lengths]
    for first in range(0, max(lengths), width):
        V = torch.zeros(rows, num_heads, width)
        shown = (place[:, None] - first == torch.arange(width)).float()  # (tokens, width)
        V[: len(place)] = shown[:, None]
        QKV = torch.zeros(rows, 3 * D)
        QKV[:, 2 * D :] = V.flatten(1)
        torch.manual_seed(seed)
        H1 = packed_attention_triton(
            QKV.to(DEVICE), boundaries_of(lengths), sum(lengths), max(lengths), num_heads, dropout
        )
        H1 = H1.cpu().view(rows, num_heads, width)
        for index, length in enumerate(lengths):
            part = H1[starts[index] : starts[index] + length, :, : max(0, length - first)]
            found[index].append(part.transpose(0, 1) > 0)  # (A, T, keys)
    return [torch.cat(parts, dim=2).to(DEVICE) for parts in found]


def parts(results):
    """Split H1, dQKV into H1, dQ, dK, dV."""
    H1, dQKV = results
    return dict(zip(("H1", "dQ", "dK", "dV"), (H1, *dQKV.chunk(3, dim=1)), strict=True))


def assert_errs_at_most_twice(found, low, exact, dtype):
    """Hold that the largest error of each result is at most twice the plain form's in its type.

    In float32 that error is a few roundings, of which either may by chance have fewer; so 8 units
    in the last place of the largest number are granted on top.
    """
    slack = 8 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0
    found, low, exact = parts(found), parts(low), parts(exact)
    for name, true in exact.items():
        assert found[name].dtype == dtype
        error = (found[name].double() - true).abs().max()
        allowed = 2 * (low[name].double() - true).abs().max() + slack * true.abs().max()
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@pytest.mark.usefixtures("tiles")
class TestWithoutDropout:
    """Oracle: the plain form in float64; the yardstick is its error in the kernel's type."""

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
    def test_output_and_gradients(self, dtype):
        QKV, dH1 = make(dtype=dtype)
        assert_errs_at_most_twice(
            run(QKV, dH1), plain(QKV, dH1, dtype), plain(QKV, dH1, torch.float64), dtype
        )

    def test_large_scores_neither_overflow_nor_vanish(self):
        QKV, dH1 = make()
        QKV[:, : 2 * A * DH] *= 8
        found, exact = parts(run(QKV, dH1)), parts(plain(QKV, dH1, torch.float64))
        for name, true in exact.items():
            # Scores of hundreds, and so the logarithm of their sum, are rounded to 2e-5.
            atol = 6e-5 * float(true.abs().max())
            torch.testing.assert_close(found[name].double(), true, rtol=0, atol=atol)

    def test_very_negative_scores_and_no_keys_after_the_sequence(self):
        QKV, dH1 = make()
        D = A * DH
        # All scores lie about -160: a key that is not there would have e to the 160 as its P.
        QKV[:, :D] = 6 + 0.1 * QKV[:, :D]
        QKV[:, D : 2 * D] = -6 + 0.1 * QKV[:, D : 2 * D]
        found, exact = parts(run(QKV, dH1)), parts(plain(QKV, dH1, torch.float64))
        for name, true in exact.items():
            torch.testing.assert_close(found[name].double(), true, rtol=0, atol=1e-3)

    def test_rows_of_no_sequence_give_0_and_touch_nothing(self):
        QKV, dH1 = make(filler=37)
        expected = run(QKV, dH1)
        QKV[sum(LENGTHS) :] = math.nan
        dH1[sum(LENGTHS) :] = math.nan
        for found, right in zip(run(QKV, dH1), expected, strict=True):
            assert torch.equal(found, right)
            assert not found[sum(LENGTHS) :].any()

    def test_no_sequence_at_all(self):
        QKV, dH1 = make(lengths=(), filler=5)
        H1, dQKV = run(QKV, dH1, lengths=())
        assert H1.shape == (5, A * DH) and not H1.any() and not dQKV.any()

    def test_no_rows_at_all(self):
        QKV, dH1 = make(lengths=(), filler=0)
        H1, dQKV = run(QKV, dH1, lengths=())
        assert H1.shape == (0, A * DH) and dQKV.shape == (0, 3 * A * DH)

    @in_one_size("own tiles")
    def test_empty_sequences_change_nothing(self):
        QKV, dH1 = make()
        with_empty = (0, *LENGTHS[:2], 0, 0, *LENGTHS[2:], 0)
        for found, right in zip(run(QKV, dH1, with_empty), run(QKV, dH1), strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-5)

    @in_one_size("small tiles")
    def test_longest_may_be_more_than_any_has(self):
        QKV, dH1 = make()
        for found, right in zip(run(QKV, dH1, longest=70), run(QKV, dH1), strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-5)

    @in_one_size("small tiles")
    def test_repeats_bit_for_bit(self):
        QKV, dH1 = make(dtype=torch.bfloat16)
        for found, right in zip(run(QKV, dH1), run(QKV, dH1), strict=True):
            assert torch.equal(found, right)


class TestShapes:
    """Oracle: the plain form."""

    @pytest.mark.parametrize(
        ("head_size", "dtype"),
        [
            (1, torch.float32),
            (16, torch.bfloat16),
            (33, torch.float32),
            (64, torch.bfloat16),
            (96, torch.bfloat16),
            pytest.param(1, torch.bfloat16, marks=pytest.mark.full),
            pytest.param(16, torch.float32, marks=pytest.mark.full),
            pytest.param(33, torch.bfloat16, marks=pytest.mark.full),
            pytest.param(64, torch.float32, marks=pytest.mark.full),
            pytest.param(96, torch.float32, marks=pytest.mark.full),
        ],
    )
    def test_sizes_of_a_head(self, head_size, dtype):
        lengths = (1, 67)
        QKV, dH1 = make(lengths, 2, 2, head_size, dtype)
        assert_errs_at_most_twice(
            run(QKV, dH1, lengths, num_heads=2),
            plain(QKV, dH1, dtype, lengths, 2),
            plain(QKV, dH1, torch.float64, lengths, 2),
            dtype,
        )

    def test_one_token(self):
        QKV, dH1 = make((1,), 0)
        H1, dQKV = run(QKV, dH1, (1,))
        _, _, V = QKV.chunk(3, dim=1)
        assert torch.equal(H1, V)
        torch.testing.assert_close(dQKV[:, 2 * A * DH :], dH1)

    def test_a_sequence_of_several_blocks_of_the_own_tiles(self):
        lengths = (3, 150)
        QKV, dH1 = make(lengths, 1, 1, 16, torch.bfloat16)
        assert_errs_at_most_twice(
            run(QKV, dH1, lengths, num_heads=1),
            plain(QKV, dH1, torch.bfloat16, lengths, 1),
            plain(QKV, dH1, torch.float64, lengths, 1),
            torch.bfloat16,
        )

    def test_heads_too_large_are_refused(self):
        with pytest.raises(ConfigError, match="heads of at most 128, found 129"):
            packed_attention_triton(draw(4, 3 * 129), boundaries_of([4]), 4, 4, 1)


class TestMemoryLayout:
    """Oracle: the same numbers, contiguous."""

    @pytest.mark.usefixtures("tiles")
    @pytest.mark.parametrize(
        ("tiles", "layout"),
        [
            # Each kernel is told how far rows lie apart; what is transposed is copied before.
            ("small tiles", "rows apart"),
            ("own tiles", "transposed"),
            pytest.param("own tiles", "rows apart", marks=pytest.mark.full),
            pytest.param("small tiles", "transposed", marks=pytest.mark.full),
        ],
        indirect=["tiles"],
    )
    def test_of_the_input(self, layout):
        QKV, dH1 = make()
        if layout == "transposed":
            other = QKV.t().contiguous().t()
        else:
            other = torch.cat((QKV, QKV), dim=1)[:, : QKV.shape[1]]
        assert not other.is_contiguous()
        for found, right in zip(run(other, dH1), run(QKV, dH1), strict=True):
            assert torch.equal(found, right)

    @pytest.mark.usefixtures("tiles")
    @pytest.mark.parametrize(
        ("tiles", "layout"),
        [
            ("small tiles", "rows apart"),
            ("own tiles", "expanded"),
            ("own tiles", "transposed"),
            pytest.param("own tiles", "rows apart", marks=pytest.mark.full),
            pytest.param("small tiles", "expanded", marks=pytest.mark.full),
            pytest.param("small tiles", "transposed", marks=pytest.mark.full),
        ],
        indirect=["tiles"],
    )
    def test_of_the_gradient(self, layout):
        QKV, dH1 = make()
        if layout == "transposed":
            other = dH1.t().contiguous().t()
        elif layout == "rows apart":
            other = torch.cat((dH1, dH1), dim=1)[:, : dH1.shape[1]]
        else:
            other = torch.ones((), device=DEVICE).expand(dH1.shape)
        right = run(QKV, other.clone(memory_format=torch.contiguous_format))[1]
        assert torch.equal(run(QKV, other)[1], right)


class TestWithDropout:
    """Oracle: the equation with the mask that the kernel drew, in float64."""

    RATE = 0.3

    @pytest.mark.usefixtures("tiles")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_output_and_gradients(self, dtype):
        QKV, dH1 = make(dtype=dtype)
        mask = recover_mask(LENGTHS, self.RATE, seed=3)
        torch.manual_seed(3)
        found = run(QKV, dH1, dropout=self.RATE)
        assert_errs_at_most_twice(
            found,
            masked(QKV, dH1, mask, dtype, self.RATE),
            masked(QKV, dH1, mask, torch.float64, self.RATE),
            dtype,
        )

    def test_the_mask_does_not_depend_on_the_tiles(self, monkeypatch):
        own = recover_mask(LENGTHS, self.RATE, seed=3)
        monkeypatch.setattr(triton_attention, "_TILES", SMALL_TILES)
        small = recover_mask(LENGTHS, self.RATE, seed=3)
        assert all(map(torch.equal, own, small))

    def test_rate_and_independence(self):
        keep = torch.stack(recover_mask((64, 64), 0.1, seed=4, num_heads=4, filler=0))
        keep = keep.float().cpu()  # (sequences, A, rows, keys)
        variance = 0.1 * 0.9

        def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
            """Give it in standard deviations of its estimate."""
            return float(((a - 0.9) * (b - 0.9)).mean()) / variance * math.sqrt(a.numel())

        assert abs(float(keep.mean()) - 0.9) < 4 * math.sqrt(variance / keep.numel())
        assert abs(correlation(keep[0], keep[1])) < 4
        for shift in (1, 2):
            assert abs(correlation(keep[:, shift:], keep[:, :-shift])) < 4
        for shift in (1, 2, 8):
            assert abs(correlation(keep[:, :, shift:], keep[:, :, :-shift])) < 4
        for shift in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32):
            assert abs(correlation(keep[..., shift:], keep[..., :-shift])) < 4

    @pytest.mark.parametrize("rate", [0.5, 0.999999])
    def test_what_is_kept_is_scaled_by_the_rate_as_drawn(self, rate):
        QKV = torch.zeros(64, 3 * 16, device=DEVICE)
        QKV[:, 32:] = torch.eye(64, 16)
        H1 = packed_attention_triton(QKV, boundaries_of([64]), 64, 64, 1, rate)
        scale = LEVELS / (LEVELS - min(round(rate * LEVELS), LEVELS - 1))
        assert torch.isfinite(H1).all()
        assert set(H1.unique().tolist()) <= {0.0, scale / 64}

    def test_the_generator_decides(self):
        lengths = (5, 33)
        QKV, dH1 = make(lengths, num_heads=1)

        def with_seed(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(seed)
            return run(QKV, dH1, lengths, self.RATE, num_heads=1)

        first, again, other = with_seed(5), with_seed(5), with_seed(6)
        assert all(map(torch.equal, first, again))
        assert not torch.equal(first[0], other[0])
        assert not torch.equal(first[0], run(QKV, dH1, lengths, self.RATE, num_heads=1)[0])

    def test_checkpointing_draws_the_same_again(self):
        lengths = (5, 2)
        QKV, dH1 = make(lengths)
        torch.manual_seed(7)
        right = run(QKV, dH1, lengths, self.RATE)
        QKV.requires_grad_()
        torch.manual_seed(7)
        H1 = checkpoint(
            packed_attention_triton,
            *(QKV, boundaries_of(lengths), sum(lengths), max(lengths), A, self.RATE),
            use_reentrant=False,
        )
        H1.backward(dH1)
        assert torch.equal(H1, right[0]) and torch.equal(QKV.grad, right[1])

    def test_no_rate_draws_nothing(self):
        QKV, dH1 = make()
        torch.manual_seed(8)
        before = torch.get_rng_state()
        run(QKV, dH1)
        assert torch.equal(torch.get_rng_state(), before)


class TestAutograd:
    """Oracle: what autograd promises."""

    def test_without_gradient_nothing_is_kept_or_run_backward(self, monkeypatch):
        monkeypatch.setattr(triton_attention, "_backward", None)
        QKV, _ = make()
        arguments = (boundaries_of(LENGTHS), sum(LENGTHS), max(LENGTHS), A)
        assert packed_attention_triton(QKV, *arguments).grad_fn is None
        with torch.no_grad():
            assert packed_attention_triton(QKV.requires_grad_(), *arguments).grad_fn is None

    def test_what_is_kept_has_the_size_of_the_rows(self):
        QKV, _ = make()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            packed_attention_triton(
                QKV.requires_grad_(), boundaries_of(LENGTHS), sum(LENGTHS), max(LENGTHS), A, 0.1
            )
        rows = len(QKV)
        shapes = sorted(tuple(tensor.shape) for tensor in kept)
        assert shapes == sorted(
            [(rows, 3 * A * DH), (rows, A * DH), (A, rows), (len(LENGTHS) + 1,), (1,)]
        )

    def test_a_second_derivative_is_refused(self):
        QKV, _ = make()
        H1 = packed_attention_triton(
            QKV.requires_grad_(), boundaries_of(LENGTHS), sum(LENGTHS), max(LENGTHS), A
        )
        with pytest.raises(ConfigError, match="cannot be differentiated twice"):
            torch.autograd.grad(H1.sum(), QKV, create_graph=True)


# A card's capability, a type, the longest sequence and rates of dropout. In bfloat16 with dropout
# the kernels take most registers.
CARDS, LONGEST, RATES = (80, 90), (64, 128, 512), (0.1,)
COMPILED = [
    (90, torch.bfloat16, 64, RATES),
    (80, torch.bfloat16, 128, RATES),
    (90, torch.bfloat16, 512, RATES),
    (80, torch.float32, 512, (0.0,)),
]


def compile_some() -> None:
    compile_them(COMPILED)


def compile_all() -> None:
    compile_them(itertools.product(CARDS, [torch.bfloat16], LONGEST, [RATES]))


def compile_every_type() -> None:
    compile_them(itertools.product(CARDS, [torch.float32, *HALF_TYPES], LONGEST, [(0.0, *RATES)]))


def compile_them(cases: Iterable[tuple[int, torch.dtype, int, Sequence[float]]]) -> None:
    """Compile the kernels of BERT-large: no register spilled, at most 99 KiB of shared memory."""
    names = set()
    for capability, dtype, longest, rates in cases:
        QKV = torch.zeros(2 * longest, 3 * 1024, dtype=dtype, requires_grad=True)
        boundaries = torch.tensor([0, longest, 2 * longest], dtype=torch.int32)
        with compiling_for(capability) as kernels:
            for rate in rates:
                H1 = packed_attention_triton(QKV, boundaries, 2 * longest, longest, 16, rate)
                H1.backward(H1.detach())
        for kernel in kernels:
            case = f"{kernel.name} sm_{capability} {dtype} longest={longest}"
            print(case, kernel.registers, kernel.spilled_bytes, kernel.shared_bytes)
            assert kernel.spilled_bytes == 0, case
            assert kernel.shared_bytes <= 99 * 1024, case
        names |= {kernel.name for kernel in kernels}
    assert names == {"_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel"}
