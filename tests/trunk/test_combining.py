"""Adapters that begin with another, and sums of several.

Oracle: the merged tensors in float64: of a sum, θ_0 + Σ w (θ - θ_0) of the merged tensors of each.
"""

from __future__ import annotations

import pytest
import torch
from support.tiny_bert import HEAD, ROWS, L, logits, some_steps, tiny_bert

from spafit.adapters import BiasDelta, LayerNormGain, LoRA
from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError, PlanError
from spafit.methods import plan
from spafit.plans import Plan, Stratum
from spafit.strata import adapt, use
from spafit.trunk.combining import combine, copy_adapter
from spafit.trunk.merging import merge, merged_state_dict

PLANS = {
    "spafit": ROWS["spafit ii"][0],
    "lora": Plan(
        "ranks",
        L,
        [
            Stratum("a", 0, 2, {"query": [LoRA(2, 5.0, rank_stabilised=True)]}),
            Stratum("b", 3, 5, {"layer.output.LayerNorm": [LayerNormGain(), BiasDelta()]}),
        ],
    ),
    "full": ROWS["full"][0],
    "direct": ROWS["spafit direct"][0],
    "mixed": ROWS["mixed"][0],
}


def many() -> BertForSequenceClassification:
    model = tiny_bert()
    for name, one in PLANS.items():
        adapt(model, one, name=name, seed=len(name))
        some_steps(model, 2)
    return model


def merged_of(model: BertForSequenceClassification, name: str | None) -> dict[str, torch.Tensor]:
    use(model, name)
    return {k: v for k, v in merged_state_dict(model).items() if k not in HEAD}


@pytest.mark.parametrize(
    "weights",
    [
        {"spafit": 0.5, "lora": -2.0},
        {"direct": 1.5},
        {"full": 0.7, "other": -0.3},
        {"lora": 1.5},
    ],
    ids=str,
)
def test_a_sum_changes_the_base_by_the_sum(weights: dict[str, float]) -> None:
    model = many()
    adapt(model, PLANS["full"], name="other", seed=9)
    some_steps(model, 3)
    base = merged_of(model, None)
    each = {name: merged_of(model, name) for name in weights}
    combine(model, weights, name="sum", head="spafit")
    found = merged_of(model, "sum")
    for key, start in base.items():
        expected = start + sum(w * (each[name][key] - start) for name, w in weights.items())
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-12)
    use(model, "spafit")
    head = [model.get_parameter(key).clone() for key in sorted(HEAD)]
    use(model, "sum")
    for key, value in zip(sorted(HEAD), head, strict=True):
        assert torch.equal(model.get_parameter(key), value)


def test_a_sum_is_an_adapter_like_others() -> None:
    """It trains, merges, and is one of equal strata where the layers are alike."""
    model = many()
    model.adaptations["lora"].labels = ("yes", "no", "perhaps")
    combine(model, {"spafit": 1.0, "lora": 1.0}, name="sum", head="lora")
    assert model.adaptation is model.adaptations["sum"]
    assert model.adaptation.labels == ("yes", "no", "perhaps")
    assert model.adaptation.plan.name == "1 spafit + 1 lora"
    assert len(model.adaptation.plan.strata) <= 4
    before = logits(model)
    some_steps(model, 1)
    assert not torch.equal(logits(model), before)
    merge(model)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(weight: float) -> None:
    model = many()
    with pytest.raises(PlanError, match="the weight of 'lora' must be a finite number"):
        combine(model, {"lora": weight}, name="sum", head="lora")


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel", "ia3"])
def test_what_has_no_sum_is_named(method: str) -> None:
    model = many()
    adapt(model, plan(method, L), name="x")
    names = list(model.adaptations)
    kind = {"houlsby": "series"}.get(method, method)
    with pytest.raises(PlanError, match=f"{kind} has no sum"):
        combine(model, {"x": 0.5, "spafit": 0.5}, name="sum", head="x")
    assert list(model.adaptations) == names
    assert model.adaptation is model.adaptations["x"]


def test_what_else_is_refused() -> None:
    model = many()
    for weights, name, head, said in (
        ({}, "sum", "lora", "nothing to combine"),
        ({"lora": 1.0}, "spafit", "lora", "has an adapter 'spafit' already"),
        ({"rte": 1.0}, "sum", "lora", "no adapter 'rte'"),
        ({"lora": 1.0}, "sum", "rte", "no adapter 'rte'"),
        ({"spafit": 1.0, "direct": 1.0}, "sum", "lora", "layer 2, .*attention.*cannot be attached"),
    ):
        with pytest.raises(PlanError, match=said):
            combine(model, weights, name=name, head=head)
    use(model, "lora")
    merge(model)
    with pytest.raises(PlanError, match="merged here"):
        copy_adapter(model, "lora", "sum")


class TestCopy:
    def test_with_its_head(self) -> None:
        model = many()
        for name in PLANS:
            use(model, name)
            expected = logits(model)
            copy_adapter(model, name, f"{name} again")
            assert torch.equal(logits(model), expected)
            some_steps(model, 1)
            use(model, name)
            assert torch.equal(logits(model), expected)

    def test_with_a_new_head(self) -> None:
        model = many()
        model.adaptations["spafit"].labels = ("a", "b", "c")
        copy_adapter(model, "spafit", "new", num_labels=2)
        assert model.num_labels == 2
        assert model.adaptation is not None and model.adaptation.labels is None
        merged = merged_of(model, "new")
        for key, value in merged_of(model, "spafit").items():
            assert torch.equal(merged[key], value)


def test_a_head_of_a_users_own_is_not_copied() -> None:
    model = tiny_bert()
    for name in ("a", "b"):
        adapt(model, PLANS["lora"], name=name)
    use(model, "a")
    model.classifier = torch.nn.Sequential(torch.nn.Linear(20, 2))  # type: ignore[assignment]
    for used in ("a", "b"):
        use(model, used)
        for refused in (
            lambda: copy_adapter(model, "a", "c"),
            lambda: combine(model, {"b": 1.0}, name="c", head="a"),
        ):
            with pytest.raises(PlanError, match="head of 'a' was replaced by a Sequential"):
                refused()
        with pytest.raises(ConfigError, match="num_labels must be"):
            copy_adapter(model, "a", "c", num_labels=0)
        assert list(model.adaptations) == ["a", "b"]
        assert model.adaptation is model.adaptations[used]
    copy_adapter(model, "a", "c", num_labels=4)
    assert model.num_labels == 4
