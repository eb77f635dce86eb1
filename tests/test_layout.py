"""Packed batches: the same numbers as padded ones, with less work."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import assert_near
from support.tiny_bert import CONFIG, C, tiny_bert
from torch import nn

from spafit.bert import BertForSequenceClassification, set_impl
from spafit.errors import ConfigError, DataError
from spafit.kernels import reference
from spafit.kernels.packed_attention import (
    bundling,
    make_bundles,
    packed_attention,
)
from spafit.layout import Packed, Padded, pack
from spafit.text.tokenization import Encodings

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LONG = dataclasses.replace(CONFIG, max_position_embeddings=512, num_hidden_layers=2)
CPU = torch.device("cpu")


def make_encodings(lengths: list[int], seed: int = 0) -> Encodings:
    draw = random.Random(seed)
    ids = [[draw.randrange(1, CONFIG.vocab_size) for _ in range(n)] for n in lengths]
    types = [[int(place >= n // 2) for place in range(n)] for n in lengths]
    return Encodings(ids, types, 0)


def gradients(output: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """Of Σ output ⊙ noise, for all that trains."""
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((output * noise).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def hold_against_padded(
    model: BertForSequenceClassification, lengths: list[int], seed: int = 0
) -> None:
    """Logits and gradients by the plain padded model, the packed one, and a packed batch."""
    encodings = make_encodings(lengths, seed)
    rows = list(range(len(lengths)))
    set_impl(model, "reference")
    plain = model(*encodings.batch(rows))
    expected = gradients(plain, model)
    set_impl(model, "auto")
    for logits in (
        model(*encodings.batch(rows)),
        model.forward_packed(encodings.packed(rows)),
    ):
        assert_near(logits, plain, TOLERANCE, "logits")
        for name, gradient in gradients(logits, model).items():
            assert_near(gradient, expected[name], TOLERANCE, name)


class TestSameNumbers:
    """Oracle: the padded reference form, which is held against Hugging Face's."""

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(0, 99))
    def test_any_mixture_of_lengths(self, lengths: list[int], seed: int) -> None:
        hold_against_padded(tiny_bert(config=LONG), lengths, seed)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(1, 60), min_size=1, max_size=20))
    def test_in_float32(self, lengths: list[int]) -> None:
        hold_against_padded(tiny_bert(torch.float32, config=LONG), lengths)

    @pytest.mark.parametrize(
        "lengths",
        [
            [512, 1, 2, 511, 64],
            [512],
            [1],
            [1] * 64,
            [7] * 64,
            list(range(1, 65)),
            [random.Random(1).randint(1, 300) for _ in range(9)],
        ],
        ids=lambda lengths: f"{len(lengths)} of {min(lengths)} to {max(lengths)}",
    )
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_extremes(self, lengths: list[int], dtype: torch.dtype) -> None:
        hold_against_padded(tiny_bert(dtype, config=LONG), lengths)

    def test_a_sequence_that_begins_with_padding(self) -> None:
        """The pooler looks at the first place whatever it is, in Hugging Face's model too."""
        model = tiny_bert()
        ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(3, 7)
        mask[1, :3] = 0
        ours = model(ids, mask)
        set_impl(model, "reference")
        assert_near(ours, model(ids, mask), TOLERANCE)


class TestGrouping:
    """Oracle: every division of the sequences, tried."""

    @staticmethod
    def cost(lengths: list[int]) -> float:
        n, T = len(lengths), max(lengths)
        return n * T**2 + 850 + (12 * n * T if min(lengths) < T else 0)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 70), min_size=1, max_size=8))
    def test_is_the_cheapest_division(self, lengths: list[int]) -> None:
        counts = bundling(lengths)
        assert sum(counts) == len(lengths)

        def total(counts: list[int]) -> float:
            ends = list(itertools.accumulate(counts))
            return sum(
                self.cost(lengths[end - n : end]) for n, end in zip(counts, ends, strict=True)
            )

        n = len(lengths)
        cheapest = min(
            total([b - a for a, b in itertools.pairwise([0, *cuts, n])])
            for size in range(n)
            for cuts in itertools.combinations(range(1, n), size)
        )
        assert total(counts) == cheapest

    @pytest.mark.parametrize("counts", [[6], [1] * 6, [2, 4], [1, 3, 2]], ids=str)
    @pytest.mark.parametrize("impl", ["fused", "sdpa", "reference"])
    def test_any_division_gives_the_same(self, counts: list[int], impl: str) -> None:
        lengths, A, Dh = [1, 2, 2, 5, 9, 9], 5, 3
        generator = torch.Generator().manual_seed(0)
        QKV = torch.randn(31, 3 * A * Dh, generator=generator, dtype=torch.float64)
        QKV.requires_grad_()
        pull = torch.randn(31, A * Dh, generator=generator, dtype=torch.float64)
        ours = packed_attention(QKV, make_bundles(lengths, counts, CPU), A, impl=impl)
        expected = reference.packed_attention(QKV, lengths, A)
        assert (ours - expected).abs().max() < 1e-12
        assert torch.count_nonzero(ours[28:]) == 0
        mine, true = (torch.autograd.grad((y * pull).sum(), QKV)[0] for y in (ours, expected))
        assert (mine - true).abs().max() < 1e-12
        assert torch.count_nonzero(mine[28:]) == 0


class TestPacking:
    """Oracle: the padded batch, token by token."""

    def test_tokens_positions_and_the_way_back(self) -> None:
        ids = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0], [1, 0, 2, 0]])
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]])
        types = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]])
        batch, unpacking = pack(ids, mask, types)
        assert batch.layout.lengths == (2, 2, 4)
        assert batch.input_ids.tolist() == [8, 9, 1, 2, 4, 5, 6, 7]
        assert batch.token_type_ids.tolist() == [0, 1, 0, 1, 0, 0, 1, 1]
        assert batch.position_ids.tolist() == [0, 1, 0, 2, 0, 1, 2, 3]
        assert batch.layout.first_rows.tolist() == [0, 2, 4]
        hidden = unpacking.hidden(batch.input_ids[:, None].double())[..., 0]
        assert hidden.tolist() == (ids * mask).tolist()
        assert unpacking.per_sequence(torch.tensor([[8.0], [1.0], [4.0]])).tolist() == [
            [4.0],
            [8.0],
            [1.0],
        ]

    @pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (63, 63), (64, 64), (65, 72), (73, 80)])
    def test_rows_are_rounded_up(self, tokens: int, rows: int) -> None:
        assert Packed([tokens]).rows == rows

    @pytest.mark.parametrize("lengths", [[], [3, 0], [-1]], ids=str)
    def test_no_sequence_or_an_empty_one(self, lengths: list[int]) -> None:
        with pytest.raises(ConfigError, match="at least one token each"):
            Packed(lengths)

    @pytest.mark.parametrize("rows", [[], [3], [-1]], ids=str)
    def test_rows_that_are_none(self, rows: list[int]) -> None:
        with pytest.raises(DataError, match="row numbers from 0 to 2"):
            make_encodings([1, 2, 3]).packed(rows)

    def test_a_model_without_a_pooler(self) -> None:
        model = tiny_bert()
        model.bert.pooler = None
        with pytest.raises(ConfigError, match="without a pooler"):
            model(torch.ones(2, 3, dtype=torch.long))

    def test_an_unknown_form(self) -> None:
        with pytest.raises(ConfigError, match=r"no impl='fast'"):
            set_impl(tiny_bert(), "fast")

    @pytest.mark.parametrize(
        "path", ["attention.self.value", "attention.output.LayerNorm", "output.dropout"]
    )
    @pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "global hook"])
    def test_whoever_watches_a_part_sees_it_called(self, path: str, how: str) -> None:
        """A part whose function is inside a fused operation; and the embeddings' dropout."""
        model = tiny_bert()
        for part in (
            model.bert.encoder.layer[1].get_submodule(path),
            model.bert.embeddings.dropout,
        ):
            seen: list[nn.Module] = []

            def note(module: nn.Module, *_: object, seen: list[nn.Module] = seen) -> None:
                seen.append(module)

            handle = None
            if how == "hook":
                handle = part.register_forward_hook(note)
            elif how == "pre-hook":
                handle = part.register_forward_pre_hook(note)
            elif how == "global hook":
                handle = nn.modules.module.register_module_forward_hook(note)
            else:
                forward = part.forward
                part.forward = lambda x, part=part, forward=forward, note=note: (
                    note(part) or forward(x)
                )
            model(torch.ones(2, 3, dtype=torch.long))
            if handle is None:
                del part.forward
            else:
                handle.remove()
            assert sum(each is part for each in seen) == 1

    def test_whoever_replaces_a_map_sees_it_called(self) -> None:
        class Doubled(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * x

        model = tiny_bert()
        layer = model.bert.encoder.layer[0]
        X = torch.randn(6, CONFIG.hidden_size, dtype=torch.float64)
        plain = layer.attention.self(X, Packed([2, 4]))
        layer.attention.self.value = Doubled()
        assert (layer.attention.self(X, Packed([2, 4])) - plain).abs().max() > 1e-3
        seen = []
        layer.attention.self.query.register_forward_hook(lambda *_: seen.append(1))
        layer.attention.self(X, Padded() if X.dim() == 3 else Packed([6]))
        assert seen == [1]
        assert model(torch.ones(2, 3, dtype=torch.long)).shape == (2, C)
