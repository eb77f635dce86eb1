"""Several adapters on the sequences of one batch.

Oracle: each adapter by itself, in the plain form of the model, in float64 to 1e-12 and in float32
to 1e-5.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.end_gain import end_gains
from support.tiny_bert import CONFIG, ROWS, L, batches, tiny_bert

from spafit import adaptable
from spafit.adapters import IA3, BiasDelta, LoRA
from spafit.bert import BertForSequenceClassification, Layer, set_impl
from spafit.errors import ConfigError, PlanError
from spafit.layout import pack
from spafit.methods import plan
from spafit.plans import Plan, Stratum
from spafit.strata import adapt, remove_adapter, use
from spafit.trunk import batches as trunk_batches
from spafit.trunk.batches import forward_rows, forward_tasks

PLANS = {
    "deep": ROWS["spafit ii"][0],
    "direct": ROWS["spafit direct"][0],
    "mixed": ROWS["mixed"][0],
    "full": ROWS["full"][0],
    "houlsby": plan("houlsby", L),
    "parallel": plan("parallel", L),
    "ia3": plan("ia3", L),
    "scaled": Plan(
        "scaled",
        L,
        [
            Stratum("still", 0, 1),
            Stratum("all", 2, 5, {"query": [IA3(), LoRA(3, 2.0), BiasDelta()]}),
        ],
    ),
    "probe": plan("linear-probe", L),
    "pooled": Plan("pooled", L, [Stratum("still", 0, 5, {})], pooler="full"),
}
LABELS = dict(zip(PLANS, (2, 3, 1, 4, 5, 2, 3, 2, 6, 3), strict=True))


def many(dtype: torch.dtype, names: Any = tuple(PLANS)) -> BertForSequenceClassification:
    """Return a model with these adapters, all values of what they train drawn anew."""
    model = tiny_bert(dtype)
    for name in names:
        adapt(model, PLANS[name], name=name, num_labels=LABELS[name])
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(0.1 * noise.to(dtype))
    return model


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def model(request: pytest.FixtureRequest) -> BertForSequenceClassification:
    return many(request.param)


def plain(
    model: BertForSequenceClassification,
    name: str,
    rows: list[int],
    inputs: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Return the logits of an adapter by itself, in the plain form."""
    use(model, name)
    set_impl(model, "reference")
    with torch.no_grad():
        found: torch.Tensor = model(**{key: each[rows] for key, each in inputs.items()})
    set_impl(model, "auto")
    use(model, None)
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    exact = expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if exact else 1e-5)


SEQUENCES = {
    "all for all": {name: [0, 1, 2, 3] for name in PLANS},
    "one each": {"deep": [2], "direct": [0], "houlsby": [3], "full": [1]},
    "some for some": {
        "probe": [1, 3],
        "deep": [3],
        "scaled": [0, 1, 2],
        "mixed": [2, 2],
        "ia3": [1],
    },
    "one adapter": {"deep": [3, 0]},
    "no layer of theirs": {"probe": [0, 2], "pooled": [1, 2]},
    "without the embeddings": {"parallel": [1], "scaled": [2, 3]},
}


@pytest.mark.parametrize("mixed", [False, True], ids=["in turn", "mixed"])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_the_logits_are_each_adapters(
    model: BertForSequenceClassification, kind: str, mixed: bool
) -> None:
    [(inputs, _)] = batches(1, seed=5)
    batch, back = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    use(model, "ia3")
    places = back.sequences.tolist()
    wanted = {name: [places[row] for row in rows] for name, rows in SEQUENCES[kind].items()}
    with torch.no_grad():
        found = forward_tasks(model, batch, wanted, mixed=mixed)
    assert model.adaptation is model.adaptations["ia3"]
    assert list(found) == list(wanted)
    for name, rows in SEQUENCES[kind].items():
        assert found[name].shape == (len(rows), LABELS[name])
        close(found[name], plain(model, name, rows, inputs))


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_padded_batch(model: BertForSequenceClassification, seed: int) -> None:
    [(inputs, _)] = batches(1, B=9, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    names = [list(PLANS)[int(i)] for i in torch.randint(len(PLANS), (9,), generator=generator)]
    expected = [plain(model, name, [row], inputs)[0] for row, name in enumerate(names)]
    for impl in ("auto", "reference"):
        set_impl(model, impl)
        with torch.no_grad():
            found = forward_rows(model, names, **inputs)
        for each, right in zip(found, expected, strict=True):
            close(each, right)
    set_impl(model, "auto")


def test_rows_that_begin_with_padding(model: BertForSequenceClassification) -> None:
    [(inputs, _)] = batches(1, seed=5)
    turned = {key: each.flip(1) for key, each in inputs.items()}
    names = ["deep", "probe", "deep", "full"]
    with torch.no_grad():
        found = forward_rows(model, names, **turned)
    for row, name in enumerate(names):
        close(found[row], plain(model, name, [row], turned)[0])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the rows of every call of a layer."""
    rows: list[int] = []
    forward = Layer.forward

    def counting(self: Layer, X: torch.Tensor, *arguments: Any) -> torch.Tensor:
        rows.append(len(X))
        return forward(self, X, *arguments)

    monkeypatch.setattr(Layer, "forward", counting)
    yield rows


class TestSharing:
    """Oracle: the numbers of layers and products, counted by hand."""

    def test_layers_below_the_adapters_are_computed_once(self, counted: list[int]) -> None:
        """Of six layers, the first adapted ones are 4, 2 and none."""
        last = Plan("last", L, [Stratum("s", 0, 3), Stratum("t", 4, 5, {"query": [LoRA(2, 2.0)]})])
        model = tiny_bert()
        for name, one in {"last": last, "mid": PLANS["scaled"], "head": PLANS["probe"]}.items():
            adapt(model, one, name=name)
        assert [each.depth for each in model.adaptations.values()] == [4, 2, 6]
        [(inputs, _)] = batches(1)
        batch, _ = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
        every = {name: range(4) for name in model.adaptations}
        with torch.no_grad():
            forward_tasks(model, batch, every, mixed=False)
        assert len(counted) == 6 + (6 - 2) + (6 - 4)
        counted.clear()
        with torch.no_grad():
            forward_tasks(model, batch, every, mixed=True)
        assert (
            counted == [batch.layout.rows] * 2 + [batch.taken([0, 1, 2, 3] * 3)[0].layout.rows] * 4
        )

    def test_mixed_a_product_with_a_pretrained_matrix_is_computed_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = ("deep", "houlsby", "parallel")
        model = many(torch.float64, names)
        weights: list[int] = []
        for module in (adaptable, trunk_batches):
            product = module.stacked_linear

            def counting(x: Any, parts: Any, *, _product: Any = product, **more: Any) -> Any:
                weights.extend(id(each.weight) for each in parts)
                return _product(x, parts, **more)

            monkeypatch.setattr(module, "stacked_linear", counting)
        [(inputs, _)] = batches(1)
        batch, _ = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
        with torch.no_grad():
            forward_tasks(model, batch, {name: [0, 1] for name in names}, mixed=True)
        use(model, None)
        pretrained = {
            id(each) for name, each in model.named_parameters() if "dense" in name or "self" in name
        }
        of_base = [each for each in weights if each in pretrained]
        assert len(of_base) == len(set(of_base)) == 6 * L + 1  # and the pooler

    def test_without_gradients_a_map_writes_into_its_product(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Oracle: the addresses of the products, and the members called one by one."""
        model = many(torch.float64, ("deep", "parallel", "ia3", "scaled"))
        use(model, None)
        mix = trunk_batches._mix_of(model)
        products: list[torch.Tensor] = []
        product = trunk_batches.stacked_linear

        def recorded(*arguments: Any, **more: Any) -> torch.Tensor:
            products.append(product(*arguments, **more))
            return products[-1]

        monkeypatch.setattr(trunk_batches, "stacked_linear", recorded)
        mix.rows.divide([[2], [1, 2], [3], [4]])
        maps = [each.adapted for each in mix.places]
        maps = [each for each in maps if isinstance(each, trunk_batches._MixedLinear)]
        # (IA)³ scales the input of layer.output.dense, which then is no product of all rows.
        maps = [each for each in maps if getattr(each.members[2].ia3, "of", "") != "input"]
        assert len(maps) > 3 * L, len(maps)
        for one in maps:
            products.clear()
            x = torch.randn(12, one.base[0].weight.shape[1], dtype=torch.float64)
            with torch.no_grad():
                found = one(x)
                parts = zip(one.members, x.split([2, 3, 3, 4]), strict=True)
                close(found, torch.cat([member(part) for member, part in parts]))
                assert products[0].data_ptr() == found.data_ptr()
            learnt = one(x)
            close(learnt, found)
            assert products[-1].data_ptr() != learnt.data_ptr()

    @pytest.mark.parametrize(
        "names", [("deep", "houlsby", "direct", "scaled"), ("scaled", "parallel", "deep")]
    )
    def test_gradients(self, names: tuple[str, ...]) -> None:
        model = many(torch.float64, names)
        [(inputs, _)] = batches(1)
        batch, _ = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
        found = []
        for mixed in (False, True):
            logits = forward_tasks(model, batch, {name: [1, 2] for name in names}, mixed=mixed)
            gradients = {}
            for name in names:
                use(model, name)
                trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
                got = torch.autograd.grad(
                    logits[name].square().sum(), list(trained.values()), retain_graph=True
                )
                gradients |= {f"{name} {k}": g for k, g in zip(trained, got, strict=True)}
            use(model, None)
            found.append(gradients)
        for name, gradient in found[0].items():
            close(found[1][name], gradient)


def test_the_first_mixed_batch_leaves_the_mode_as_it_is() -> None:
    """Oracle: in turn, with dropout that the mode alone keeps off."""
    model = tiny_bert(config=dataclasses.replace(CONFIG, hidden_dropout_prob=0.5))
    for name in ("deep", "full"):
        adapt(model, PLANS[name], name=name)
    use(model, None)
    [(inputs, _)] = batches(1)
    batch, _ = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    every = {"deep": range(4), "full": range(4)}
    with torch.no_grad():
        found = [forward_tasks(model, batch, every, mixed=mixed) for mixed in (True, False)]
    assert not any(module.training for module in model.modules())
    for name in every:
        close(found[0][name], found[1][name])


def test_what_changes_later_is_followed(model: BertForSequenceClassification) -> None:
    """Other types, forms, values, adapters and modules than when it was first mixed."""
    [(inputs, _)] = batches(1)
    one = many(torch.float32, ("deep", "houlsby"))
    batch, back = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    places = back.sequences.tolist()

    def check() -> None:
        with torch.no_grad():
            found = forward_tasks(one, batch, dict.fromkeys(one.adaptations, places), mixed=True)
        for name in one.adaptations:
            close(found[name], plain(one, name, [0, 1, 2, 3], inputs))

    check()
    one.double()
    check()
    adapt(one, PLANS["ia3"], name="ia3")
    check()
    use(one, "deep")
    with torch.no_grad():
        one.bert.encoder.layer[-1].output.dense.bias_delta.delta.add_(0.5)
    check()


def test_in_half_precision() -> None:
    """Oracle: float32. Mixed, the error is at most twice that of the adapters in turn."""
    names = ("deep", "scaled", "houlsby", "ia3")
    model = many(torch.float32, names)
    [(inputs, _)] = batches(1)
    batch, _ = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    with torch.no_grad():
        exact = forward_tasks(model, batch, dict.fromkeys(names, range(4)), mixed=False)
    for learns in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(learns):
            one, other = (
                forward_tasks(model, batch, dict.fromkeys(names, range(4)), mixed=mixed)
                for mixed in (False, True)
            )
        for name in names:
            in_turn, mixed = (float((x[name].detach() - exact[name]).norm()) for x in (one, other))
            assert 0 < mixed <= 2 * in_turn < 0.2


def test_what_is_refused(model: BertForSequenceClassification) -> None:
    [(inputs, _)] = batches(1)
    batch, _ = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    with pytest.raises(PlanError, match="no adapter 'rte'; it has 'deep'"):
        forward_tasks(model, batch, {"deep": [0], "rte": [1]})
    for wrong in ([4], [-1], []):
        with pytest.raises(ConfigError, match="'deep' needs one or more sequences from 0 to 3"):
            forward_tasks(model, batch, {"deep": wrong})
    with pytest.raises(ConfigError, match="4 rows need an adapter each, found 2"):
        forward_rows(model, ["deep", "ia3"], **inputs)


def test_what_is_trained_below_the_end_of_a_sub_layer_is_not_mixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = many(torch.float64, ("houlsby", "deep"))
    adapt(model, end_gains(L, monkeypatch), name="e")
    with torch.no_grad():
        model.bert.encoder.layer[5].output.LayerNorm.weight.mul_(1.5)
    [(inputs, _)] = batches(1, seed=5)
    expected = plain(model, "e", [2], inputs)[0]
    close(forward_rows(model, ["deep", "deep", "e", "houlsby"], **inputs)[2], expected)
    batch, _ = pack(*inputs.values())
    with pytest.raises(PlanError, match="one of them changes the whole of"):
        forward_tasks(model, batch, {"deep": [0], "e": [1]}, mixed=True)


def test_hooks_and_modules_of_the_base_are_used_by_those_who_leave_it() -> None:
    model = many(torch.float64, ("deep", "houlsby"))
    [(inputs, _)] = batches(1, seed=5)
    names = ["deep", "houlsby", "deep", "houlsby"]
    forward_rows(model, names, **inputs)
    use(model, None)
    attention = model.bert.encoder.layer[4].attention.self
    attention.query.register_forward_hook(lambda module, _, y: 1.5 * y)
    for replaced in (False, True):
        if replaced:  # "deep" keeps what it was made of
            attention.query = copy.deepcopy(attention.query)
            attention.query.weight.data *= 2
        found = forward_rows(model, names, **inputs)
        for row, name in enumerate(names):
            close(found[row], plain(model, name, [row], inputs)[0])


def test_training() -> None:
    model = many(torch.float64, ("deep", "houlsby"))
    [still, *rest] = PLANS["deep"].strata
    adapt(model, replace(PLANS["deep"], strata=[replace(still, dropout=0.5), *rest]), name="own")
    [(inputs, _)] = batches(1, seed=5)
    batch, _ = pack(*inputs.values())
    model.train()
    one, other = (forward_tasks(model, batch, {"own": [0], "deep": [1]}) for _ in range(2))
    assert torch.equal(one["deep"], other["deep"]) and not torch.equal(one["own"], other["own"])
    with pytest.raises(PlanError, match=r"call model\.eval\(\)"):
        forward_tasks(model, batch, {"own": [0], "deep": [1]}, mixed=True)


@pytest.mark.parametrize("mixed", [False, True, None])
def test_nothing_of_nobody(model: BertForSequenceClassification, mixed: bool | None) -> None:
    [(inputs, _)] = batches(1, seed=5)
    batch, _ = pack(*inputs.values())
    assert forward_tasks(model, batch, {}, mixed=mixed) == {}


def test_a_removed_adapter_is_freed() -> None:
    """What was mixed with it holds it no longer."""
    model = many(torch.float32, ("deep", "houlsby"))
    [(inputs, _)] = batches(1)
    with torch.no_grad():
        forward_rows(model, ["deep", "houlsby", "deep", "houlsby"], **inputs)
    head = weakref.ref(model.adaptations["deep"].head)
    remove_adapter(model, "deep")
    gc.collect()
    assert head() is None
