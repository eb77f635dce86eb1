"""Packed batches through the whole model: the numbers of padded ones, for any mask and plan."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tensors import assert_near, kept_for_backward
from support.tiny_bert import CONFIG, ROWS, C, D, L, names, short, tiny_bert
from torch import nn

from spafit import layout as layout_module
from spafit.adaptable import LayerNorm, Linear
from spafit.bert import BertForSequenceClassification, SelfAttention, set_impl
from spafit.errors import ConfigError, SpafitError
from spafit.kernels import products
from spafit.layout import Packed, PackedBatch, Padded
from spafit.plans import Plan, Stratum
from spafit.strata import adapt
from spafit.text.tokenization import Encodings

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LONG = dataclasses.replace(CONFIG, max_position_embeddings=512, num_hidden_layers=2)
DROPPING = dataclasses.replace(CONFIG, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
HEAD_ALONE = Plan("head alone", L, [Stratum("all", 0, L - 1)])
KERNEL = sys.modules["spafit.kernels.lora_linear"]
LENGTHS = [3, 11, 7, 7, 1, 16, 9, 13]  # 67 tokens, 72 rows

Results = dict[str, torch.Tensor]


def make_encodings(lengths: Sequence[int], seed: int = 0) -> Encodings:
    draw = random.Random(seed)
    ids = [[draw.randrange(1, CONFIG.vocab_size) for _ in range(n)] for n in lengths]
    types = [[int(place >= n // 2) for place in range(n)] for n in lengths]
    return Encodings(ids, types, 0)


def adapted(
    plan: Plan, config: object = CONFIG, dtype: torch.dtype = torch.float64
) -> BertForSequenceClassification:
    """Build the tiny model, adapted by a plan, with updates that are not zero."""
    model = tiny_bert(dtype, config=config)
    adapt(model, plan)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B", "bias_delta.delta")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def noise_like(y: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def gradients(output: torch.Tensor, model: nn.Module, pull: torch.Tensor | None = None) -> Results:
    """Of Σ output ⊙ pull, noise by default, for all that trains; 0 where nothing arrives."""
    pull = noise_like(output) if pull is None else pull
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        (output * pull).sum(), list(named.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(named, found, strict=True))


def assert_same(ours: Results, expected: Results) -> None:
    """Hold each against the largest of all: a key's gradient is a small difference of large ones.

    (A softmax does not see what is added to all its scores.)
    """
    assert ours.keys() == expected.keys()
    scale = max(float(tensor.detach().abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        assert_near(ours[name], tensor, TOLERANCE, name, scale)


def results(logits: torch.Tensor, model: nn.Module) -> Results:
    """Return the logits and all gradients under one roof."""
    return {"logits": logits, **gradients(logits, model)}


@contextmanager
def products_counted() -> Iterator[list[tuple[int, int, int]]]:
    """Count the matrix products of the linear maps by (rows, inner, columns)."""
    calls: list[tuple[int, int, int]] = []
    product = KERNEL.product

    def counted(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        calls.append((x.shape[0], x.shape[1], W.shape[0]))
        result: torch.Tensor = product(x, W, b)
        return result

    with pytest.MonkeyPatch.context() as patch:
        for module in (KERNEL, products):
            patch.setattr(module, "product", counted)
        yield calls


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    """Draw a mask (B, T) with gaps anywhere but at the first place, which the pooler looks at."""
    B, T = draw(st.integers(1, 7)), draw(st.integers(1, 17))
    rows = st.lists(st.booleans(), min_size=T - 1, max_size=T - 1)
    return torch.tensor([[True, *draw(rows)] for _ in range(B)]).long()


class TestAnyMask:
    """Oracle: the padded reference form."""

    @settings(max_examples=20, deadline=None)
    @given(masks(), st.integers(0, 99), st.sampled_from([torch.float64, torch.float32]))
    @example(torch.ones(5, 17).long(), 0, torch.float64)  # of so many tokens that filler follows
    @example(torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0]]), 1, torch.float32)
    def test_logits_hidden_states_and_gradients(
        self, mask: torch.Tensor, seed: int, dtype: torch.dtype
    ) -> None:
        """The pull is on every hidden state and the pooled output at once."""
        model = tiny_bert(dtype)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, CONFIG.vocab_size, mask.shape, generator=generator)
        types = torch.randint(2, mask.shape, generator=generator)
        keep = mask[..., None].to(dtype)
        found = []
        for impl in ("reference", "auto", "fused"):
            set_impl(model, impl)
            output = model.bert(ids, mask, types, output_hidden_states=True)
            states = [state * keep for state in output.hidden_states]
            if impl != "reference":
                assert all(map(torch.equal, states, output.hidden_states))  # 0 at padding
            assert torch.equal(output.last_hidden_state * keep, states[-1])
            flat = torch.cat([each.flatten() for each in (output.pooler_output, *states)])
            logits = model(ids, mask, types)
            whole = torch.cat([flat, logits.flatten()])
            found.append({"values": whole, **gradients(whole, model)})
        assert_same(found[1], found[0])
        assert_same(found[2], found[0])

    def test_none_is_all(self) -> None:
        model = tiny_bert()
        ids = torch.randint(1, 50, (5, 13), generator=torch.Generator().manual_seed(0))
        ours = results(model(ids), model)
        assert_same(results(model(ids, torch.ones(5, 13)), model), ours)
        set_impl(model, "reference")
        assert_same(ours, results(model(ids), model))

    @pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32], ids=str)
    def test_any_type_of_mask(self, kind: torch.dtype) -> None:
        model = tiny_bert()
        ids, mask, types = make_encodings(LENGTHS).batch([3, 0, 5])
        assert torch.equal(model(ids, mask.to(kind), types), model(ids, mask, types))

    def test_what_stands_at_padding_is_not_read(self) -> None:
        model = tiny_bert()
        ids, mask, types = make_encodings(LENGTHS).batch(range(8))
        other = torch.where(mask.bool(), ids, 7)
        assert torch.equal(model(other, mask, types), model(ids, mask, types))


class TestEncodings:
    """Oracle: the padded batch of the same examples."""

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.integers(1, 17), min_size=1, max_size=12).flatmap(
            lambda lengths: st.tuples(
                st.just(lengths), st.lists(st.integers(0, len(lengths) - 1), min_size=1)
            )
        )
    )
    def test_any_rows_in_any_order(self, drawn: tuple[list[int], list[int]]) -> None:
        lengths, rows = drawn
        model, encodings = tiny_bert(), make_encodings(lengths)
        ours = results(model.forward_packed(encodings.packed(rows)), model)
        assert_same(ours, results(model(*encodings.batch(rows)), model))
        set_impl(model, "reference")
        assert_same(ours, results(model(*encodings.batch(rows)), model))

    @pytest.mark.parametrize(
        ("dtype", "count"),
        [
            (torch.float64, 12),
            (torch.float32, 64),
            pytest.param(torch.float64, 64, marks=pytest.mark.full),
        ],
        ids=str,
    )
    def test_sequences_of_1_to_512(self, dtype: torch.dtype, count: int) -> None:
        """The oracle is padded eight sequences at a time, which takes less memory, and summed."""
        draw = random.Random(2)
        lengths = [512, 1, 511, *(draw.randint(1, 512) for _ in range(count - 3))]
        model, encodings = tiny_bert(dtype, config=LONG), make_encodings(lengths)
        logits = model.forward_packed(encodings.packed(range(count)))
        pull = noise_like(logits)
        ours = gradients(logits, model, pull)
        set_impl(model, "reference")
        order = sorted(range(count), key=lengths.__getitem__)
        total: Results = {}
        for start in range(0, count, 8):
            rows = order[start : start + 8]
            plain = model(*encodings.batch(rows))
            assert_near(logits[rows], plain, TOLERANCE)
            for name, gradient in gradients(plain, model, pull[rows]).items():
                total[name] = total[name] + gradient if name in total else gradient
        assert_same(ours, total)

    @pytest.mark.parametrize("method", ROWS)
    def test_every_plan_on_the_whole_of_a_rounded_batch(self, method: str) -> None:
        model, encodings = adapted(ROWS[method][0]), make_encodings(LENGTHS)
        batch = encodings.packed(range(8))
        assert (batch.layout.tokens, batch.layout.rows) == (67, 72)
        ours = results(model.forward_packed(batch), model)
        set_impl(model, "reference")
        assert_same(ours, results(model(*encodings.batch(range(8))), model))


class TestFiller:
    """Rows that belong to no sequence. Oracle: zero, and the same batch filled otherwise."""

    @pytest.mark.parametrize("method", ["spafit ii", "full"])
    def test_other_ids_change_nothing_and_no_gradient_comes_back(self, method: str) -> None:
        model = adapted(ROWS[method][0])
        batch = make_encodings(LENGTHS).packed(range(8))
        found = []
        for fill in (0, 5):
            filled = PackedBatch(*(each.clone() for each in batch[:3]), batch.layout)
            filled.input_ids[67:] = fill
            filled.token_type_ids[67:] = fill % 2
            filled.position_ids[67:] = fill
            inputs: list[torch.Tensor] = []
            arriving: list[torch.Tensor] = []

            def watch(
                _: nn.Module, arguments: tuple[torch.Tensor, ...], inputs: list = inputs
            ) -> None:
                inputs.append(arguments[0])

            handles = [layer.register_forward_pre_hook(watch) for layer in model.bert.encoder.layer]
            logits = model.forward_packed(filled)
            for X in inputs:
                assert len(X) == 72
                if X.requires_grad:
                    X.register_hook(arriving.append)
            found.append(results(logits, model))
            for handle in handles:
                handle.remove()
            assert len(arriving) == sum(X.requires_grad for X in inputs) > 0
            for dX in arriving:
                assert torch.count_nonzero(dX[67:]) == 0
                assert dX[:67].abs().sum(1).min() > 0
        for name, tensor in found[0].items():
            assert torch.equal(tensor, found[1][name]), name

    def test_filler_that_is_not_finite_stays_where_it_is(self) -> None:
        """A row of NaN behind the last token: attention neither reads it nor passes it on."""
        QKV = torch.randn(72, 3 * D, dtype=torch.float64)
        expected = Packed(LENGTHS).attend(QKV, 5)
        QKV[67:] = float("nan")
        assert torch.equal(Packed(LENGTHS).attend(QKV, 5), expected)


class TestGroups:
    """Oracle: one group a sequence, and any other division."""

    @settings(max_examples=12, deadline=None)
    @given(st.lists(st.integers(1, 17), min_size=1, max_size=9), st.data())
    def test_any_division_gives_the_same(self, lengths: list[int], data: st.DataObject) -> None:
        model, batch = tiny_bert(), make_encodings(lengths).packed(range(len(lengths)))
        expected = results(model.forward_packed(batch), model)
        cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths)))) | {len(lengths)})
        counts = [end - start for start, end in itertools.pairwise([0, *cuts])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout_module, "bundling", lambda _: counts)
            again = batch._replace(layout=Packed(lengths))
            assert [bundle.count for bundle in again.layout.bundles] == counts
            assert_same(results(model.forward_packed(again), model), expected)


class TestLastLayer:
    """Oracle: the whole last layer, of which the first tokens are then taken."""

    @pytest.mark.parametrize("method", ROWS)
    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_first_tokens_alone(self, method: str, impl: str) -> None:
        model, encodings = adapted(ROWS[method][0]), make_encodings(LENGTHS)
        set_impl(model, impl)
        batch = encodings.packed(range(8))
        ours = results(model.forward_packed(batch), model)
        X, _ = model.bert.encoder(model.bert.embeddings(*batch[:3]), batch.layout)
        whole = model.classifier(model.bert.pooler(batch.layout.first(X)))
        assert_same(ours, results(whole, model))

    def test_padded_too(self) -> None:
        model, encodings = adapted(ROWS["spafit ii"][0]), make_encodings(LENGTHS)
        ids, mask, types = encodings.batch(range(8))
        layout, X = Padded(mask.bool()), model.bert.embeddings(ids, types)
        firsts, _ = model.bert.encoder(X, layout, first_only=True)
        whole, _ = model.bert.encoder(X, layout)
        assert_same(
            {"X": firsts, **gradients(firsts, model)},
            {"X": whole[:, 0], **gradients(whole[:, 0], model)},
        )

    def test_it_computes_fewer_rows(self) -> None:
        model, batch = tiny_bert(), make_encodings(LENGTHS).packed(range(8))
        layer = model.bert.encoder.layer[L - 1]
        X = torch.randn(72, D, dtype=torch.float64)
        with torch.no_grad(), products_counted() as calls:
            layer(X, batch.layout, True)
        assert calls == [(8, D, D), (72, D, 2 * D), (8, D, D), (8, D, 37), (8, 37, D)]


class TestPrefix:
    """Oracle: the whole pass from the embeddings on."""

    @pytest.mark.parametrize("method", [*ROWS, "SPAFIT-3-4-I"])
    def test_goes_on_where_it_ends(self, method: str) -> None:
        plan = ROWS[method][0] if method in ROWS else short(method)
        model = adapted(plan, DROPPING)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, SelfAttention):
                module.dropout = 0.0
        batch = make_encodings(LENGTHS).packed(range(8))
        prefix = model.bert.prefix(batch)
        assert prefix.shape == (72, D)
        assert not prefix.requires_grad
        if model.bert.frozen_depth == 0 and any(
            p.requires_grad for p in model.bert.embeddings.parameters()
        ):
            return  # what trains is below; a kept prefix would cut it off
        assert torch.equal(
            model.bert.pooled_packed(batch, prefix=prefix), model.bert.pooled_packed(batch)
        )
        ours = results(model.forward_packed(batch, prefix), model)
        assert_same(ours, results(model.forward_packed(batch), model))

    def test_with_dropout_above_it(self) -> None:
        """Group 1 in evaluation mode draws nothing, so that both draw the same above it."""
        model = adapted(short("SPAFIT-1-3-II"), DROPPING).train()
        model.bert.freeze_dropout()
        batch = make_encodings(LENGTHS).packed(range(8))
        prefix = model.bert.prefix(batch)
        assert torch.equal(prefix, model.bert.prefix(batch))
        found = []
        for kept in (None, prefix):
            torch.manual_seed(1)
            found.append(results(model.forward_packed(batch, kept), model))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    def test_where_nothing_trains_but_the_head(self) -> None:
        model, batch = adapted(HEAD_ALONE), make_encodings(LENGTHS).packed(range(8))
        assert model.bert.frozen_depth == L
        prefix = model.bert.prefix(batch)
        assert_near(model.forward_packed(batch, prefix), model.forward_packed(batch), TOLERANCE)

    @pytest.mark.parametrize(
        ("trained", "depth"),
        [
            ({"bert.encoder.layer.0.output.LayerNorm.bias"}, 0),
            ({"bert.encoder.layer.3.attention.self.key.bias"}, 3),
            (names([2, 4], ["intermediate.dense"], "bias"), 2),
            ({"bert.encoder.layer.5.output.dense.weight"}, 5),
            ({"bert.embeddings.LayerNorm.bias", "bert.encoder.layer.5.output.dense.weight"}, 0),
            ({"bert.embeddings.position_embeddings.weight"}, 0),
            ({"classifier.bias"}, L),
            ({"bert.pooler.dense.bias"}, L),
            (set(), L),
        ],
        ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
    )
    def test_frozen_depth(self, trained: set[str], depth: int) -> None:
        model = tiny_bert()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        assert model.bert.frozen_depth == depth
        model.train()
        model.bert.freeze_dropout()
        modes = [layer.training for layer in model.bert.encoder.layer]
        assert modes == [number >= depth for number in range(L)]
        assert model.bert.embeddings.training == (depth == 0)


class TestNoGraphBelow:
    """Oracle: requires_grad of what goes into each layer, and the products of backward."""

    @pytest.mark.parametrize(
        ("method", "first", "recomputed"),
        [
            ("SPAFIT-1-3-II", 2, ()),
            ("SPAFIT-1-3-I", 2, range(L)),
            ("SPAFIT-3-4-II", 4, ()),
            ("bitfit", 0, ()),
            ("lora-ii", 0, ()),
        ],
        ids=str,
    )
    def test_nothing_below_the_first_layer_that_trains(
        self, method: str, first: int, recomputed: Sequence[int]
    ) -> None:
        model = adapted(short(method))
        model.bert.encoder.recomputed = set(recomputed)
        seen: list[bool] = []
        for layer in model.bert.encoder.layer:
            layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].requires_grad))
        logits = model.forward_packed(make_encodings(LENGTHS).packed(range(8)))
        assert seen == [number > first for number in range(L)]
        found = gradients(logits, model)
        assert all(gradient.abs().max() > 0 for gradient in found.values())

    @pytest.mark.parametrize(("method", "first"), [("SPAFIT-1-3-II", 2), ("SPAFIT-3-4-I", 4)])
    def test_no_dx_at_the_first_map_that_trains(self, method: str, first: int) -> None:
        """The dX of query, key and value together is (72, 3·D) · (3·D, D): one a layer above."""
        model = adapted(short(method))
        logits = model.forward_packed(make_encodings(LENGTHS).packed(range(8)))
        with products_counted() as calls:
            logits.sum().backward()
        assert calls.count((72, 3 * D, D)) == max(0, L - 2 - first)
        assert calls.count((72, 2 * D, D)) == (first < L - 1)  # the last layer's key and value

    def test_a_bias_above_the_matrices_asks_for_no_product_below_it(self) -> None:
        model = tiny_bert()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "bert.encoder.layer.5.output.LayerNorm.bias")
        logits = model.forward_packed(make_encodings(LENGTHS).packed(range(8)))
        with products_counted() as calls:
            logits.sum().backward()
        assert calls == [(8, C, D), (8, D, D)]  # dx of the classifier and of the pooler


class TestRecomputed:
    """Oracle: the same pass that keeps everything, from the same seed."""

    @staticmethod
    def run(
        model: BertForSequenceClassification, kept_prefix: bool, layers: set[int]
    ) -> tuple[Results, int]:
        """Return the results of a step, and the bytes that were kept for backward."""
        batch = make_encodings(LENGTHS).packed(range(8))
        torch.manual_seed(2)
        prefix = model.bert.prefix(batch) if kept_prefix else None
        model.bert.encoder.recomputed = layers
        torch.manual_seed(1)
        with kept_for_backward(model.parameters()) as sizes:
            logits = model.forward_packed(batch, prefix)
        return results(logits, model), sum(sizes.values())

    @pytest.mark.parametrize("kept_prefix", [False, True])
    @pytest.mark.parametrize("method", ["SPAFIT-1-3-II", "lora-i", "full"])
    def test_same_gradients_for_less_memory(self, method: str, kept_prefix: bool) -> None:
        if kept_prefix and method == "full":
            return  # the embeddings train
        model = adapted(short(method), DROPPING).train()
        model.bert.freeze_dropout()
        expected, most = self.run(model, kept_prefix, set())
        assert all(tensor.abs().max() > 0 for tensor in expected.values())
        kept = []
        for layers in ({2, 3}, {2, 3, 4}, set(range(L))):
            found, size = self.run(model, kept_prefix, layers)
            kept.append(size)
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), name
        assert most > kept[0] > kept[1] > kept[2]

    def test_without_a_gradient_nothing_is_computed_twice(self) -> None:
        model, batch = tiny_bert(), make_encodings(LENGTHS).packed(range(8))
        counts = []
        for layers in (set(), set(range(L))):
            model.bert.encoder.recomputed = layers
            with torch.no_grad(), products_counted() as calls:
                model.forward_packed(batch)
            counts.append(len(calls))
        assert counts[0] == counts[1]


class TestSetImpl:
    """Oracle: the flags of the modules, and the forms' numbers."""

    @pytest.mark.parametrize("impl", ["auto", "fused", "reference"])
    def test_every_module_hears_of_it(self, impl: str) -> None:
        model = adapted(ROWS["spafit ii"][0])
        set_impl(model, impl)
        told = [m for m in model.modules() if isinstance(m, (Linear, LayerNorm, SelfAttention))]
        assert len(told) == 1 + L * (6 + 2 + 1) + 2
        assert {module.impl for module in told} == {impl}
        assert model.bert.packed == (impl != "reference")

    def test_adapting_afterwards_keeps_the_choice(self) -> None:
        model = tiny_bert()
        set_impl(model, "reference")
        adapt(model, ROWS["spafit ii"][0])
        told = [m for m in model.modules() if isinstance(m, (Linear, LayerNorm, SelfAttention))]
        assert {module.impl for module in told} == {"reference"}

    def test_forth_and_back(self) -> None:
        model, batch = adapted(ROWS["mixed"][0]), make_encodings(LENGTHS).batch(range(8))
        before = model(*batch)
        set_impl(model, "reference")
        plain = model(*batch)
        set_impl(model, "auto")
        assert torch.equal(model(*batch), before)
        assert_near(before, plain, TOLERANCE)

    def test_the_reference_can_be_differentiated_twice_and_the_fused_form_says_so(self) -> None:
        model, batch = adapted(ROWS["spafit ii"][0]), make_encodings(LENGTHS).batch(range(8))
        trained = [p for p in model.parameters() if p.requires_grad]
        with pytest.raises(ConfigError, match=r"set_impl\(model, 'reference'\)"):
            torch.autograd.grad(model(*batch).square().sum(), trained, create_graph=True)
        set_impl(model, "reference")
        found = torch.autograd.grad(model(*batch).square().sum(), trained, create_graph=True)
        penalty = torch.stack([gradient.square().sum() for gradient in found]).sum()
        second = torch.autograd.grad(penalty, trained)
        assert all(torch.isfinite(each).all() and each.abs().max() > 0 for each in second)


class TestDropout:
    """Oracle: mean and variance of the padded reference over many draws."""

    def test_same_distribution(self) -> None:
        """A batch holds 1,500 copies of a sequence, each with draws of its own."""
        copies, batches = 1500, 6
        config = dataclasses.replace(DROPPING, num_hidden_layers=2)
        model = tiny_bert(torch.float32, config=config).train()
        model.bert.pooler = nn.Identity()  # tanh would push the moments towards its ends
        encodings, rows = make_encodings([5]), [0] * copies
        packed, padded = encodings.packed(rows), encodings.batch(rows)
        moments = []
        for impl in ("auto", "reference"):
            set_impl(model, impl)
            torch.manual_seed(4)
            with torch.no_grad():
                drawn = [
                    model.bert.pooled_packed(packed)
                    if impl == "auto"
                    else model.bert.pooled(*padded)
                    for _ in range(batches)
                ]
            hidden = torch.cat(drawn).double()
            squares = (hidden - hidden.mean(0)) ** 2
            moments.append((hidden.mean(0), hidden.var(0), squares.mean(0), squares.var(0)))
        (mean, variance, square, spread), (true_mean, true_variance, true_square, true_spread) = (
            moments
        )
        draws = copies * batches
        error = ((variance + true_variance) / draws).sqrt()
        assert ((mean - true_mean).abs() < 5 * error).all()
        assert ((square - true_square).abs() < 5 * ((spread + true_spread) / draws).sqrt()).all()
        assert (true_variance / draws).sqrt().max() < 0.01  # what a wrong rate would exceed

    def test_copies_of_a_sequence_draw_for_themselves(self) -> None:
        model = tiny_bert(torch.float32, config=DROPPING).train()
        with torch.no_grad():
            pooled = model.bert.pooled_packed(make_encodings([5]).packed([0] * 9))
        distances = torch.cdist(pooled, pooled) + torch.eye(9)
        assert distances.min() > 1e-3


class TestWrongInput:
    """Oracle: one of spafit's own errors, which says what is wrong."""

    @pytest.mark.parametrize(
        "wrong",
        ["too long", "id", "type", "prefix", "float", "short", "position", "float position"],
    )
    def test_a_packed_batch_that_does_not_fit(self, wrong: str) -> None:
        model = adapted(short("SPAFIT-1-3-II"))
        batch = make_encodings([3, 18 if wrong == "too long" else 17]).packed([0, 1])
        prefix = None
        if wrong == "id":
            batch.input_ids[4] = CONFIG.vocab_size
        elif wrong == "type":
            batch.token_type_ids[4] = 2
        elif wrong == "prefix":
            prefix = model.bert.prefix(batch)[:-1]
        elif wrong == "float":
            batch = batch._replace(input_ids=batch.input_ids.float())
        elif wrong == "short":  # would be broadcast
            batch = batch._replace(token_type_ids=batch.token_type_ids[:1])
        elif wrong == "position":
            batch.position_ids[4] = CONFIG.max_position_embeddings
        elif wrong == "float position":
            batch = batch._replace(position_ids=batch.position_ids.float())
        with pytest.raises(SpafitError):
            model.forward_packed(batch, prefix)

    @pytest.mark.parametrize(
        ("mask", "says"),
        [
            ([[1, 1, 1], [0, 0, 0]], "at least one real token"),
            ([[1, 1, 1], [1, -10000, 0]], "1 at real tokens and 0 at padding"),
            ([[1, 1], [1, 1]], "the shape of input_ids"),
        ],
        ids=str,
    )
    def test_a_mask_that_is_none(self, mask: list[list[int]], says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            tiny_bert()(torch.ones(2, 3, dtype=torch.long), torch.tensor(mask))

    def test_moving_a_batch_to_where_it_is(self) -> None:
        batch = make_encodings([3, 5]).packed([0, 1])
        assert batch.to("cpu") is batch
        moved = batch.to("meta")
        assert moved.layout.lengths == batch.layout.lengths
        assert moved.input_ids.is_meta
        assert moved.position_ids.is_meta
