"""Merging and undoing it.

Oracle: the adapter's own logits in float64 to 1e-12; after undoing it, and for what must not
change, every bit.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.end_gain import end_gains
from support.tiny_bert import ROWS, L, logits, some_steps, tiny_bert

from spafit.adapters import BiasDelta, LayerNormGain
from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError
from spafit.kernels.stacking import are_together
from spafit.methods import plan
from spafit.plans import Plan, Stratum
from spafit.strata import adapt, adapters_disabled, frozen_stored_in, use
from spafit.trunk.merging import merge, merged_state_dict, unmerge
from spafit.weights.adapter_files import load_adapter, save_adapter

PLANS = {
    **{row: ROWS[row][0] for row in ("spafit ii", "spafit direct", "mixed", "full", "bitfit")},
    "ia3": plan("ia3", L),
    "norms": Plan(
        "norms",
        L,
        [Stratum("all", 0, 5, {"layer.output.LayerNorm": [LayerNormGain(), BiasDelta()]})],
    ),
    "probe": plan("linear-probe", L),
}


@pytest.fixture(scope="module", params=PLANS)
def trained(request: pytest.FixtureRequest) -> BertForSequenceClassification:
    model = tiny_bert()
    adapt(model, PLANS[request.param], name="a", num_labels=3)
    some_steps(model, 2)
    adapt(model, PLANS["spafit ii"], name="b", seed=1)
    use(model, "a")
    return model


@pytest.fixture
def model(trained: BertForSequenceClassification) -> BertForSequenceClassification:
    return copy.deepcopy(trained)


def bits(model: BertForSequenceClassification) -> dict[str, bytes]:
    return {name: each.detach().numpy().tobytes() for name, each in model.named_parameters()}


class TestMerge:
    def test_it_is_a_plain_bert_with_the_same_logits(
        self, model: BertForSequenceClassification
    ) -> None:
        expected, state = logits(model), merged_state_dict(model)
        merge(model)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
        assert list(model.state_dict()) == list(tiny_bert().state_dict())
        plain = tiny_bert(seed=3)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(logits(plain), logits(model))
        assert {k: v.numpy().tobytes() for k, v in state.items()} == bits(model)
        assert not any(parameter.requires_grad for parameter in model.bert.parameters())
        attention = model.bert.encoder.layer[-1].attention.self
        assert all(are_together(each) for each in attention._matrices() if each)

    def test_twice_is_once(self, model: BertForSequenceClassification) -> None:
        before = bits(model)
        merge(model)
        once = bits(model)
        merge(model)
        assert bits(model) == once
        assert {k: v.numpy().tobytes() for k, v in merged_state_dict(model).items()} == once
        unmerge(model)
        assert bits(model) == before

    def test_a_hundred_cycles_change_no_bit(self, model: BertForSequenceClassification) -> None:
        before, shown = bits(model), logits(model)
        merge(model)
        merged = bits(model)
        for _ in range(99):
            unmerge(model)
            merge(model)
        assert bits(model) == merged
        unmerge(model)
        assert bits(model) == before
        assert torch.equal(logits(model), shown)
        use(model, None)
        assert bits(model) == bits(tiny_bert())

    def test_others_are_used_between(self, model: BertForSequenceClassification) -> None:
        before = {}
        for name in ("a", "b", None):
            use(model, name)
            before[name] = bits(model)
        use(model, "a")
        merge(model)
        merged = bits(model)
        for name in ("b", None):
            use(model, name)
            assert bits(model) == before[name]
        use(model, "a")
        assert bits(model) == merged
        unmerge(model)
        assert bits(model) == before["a"]
        some_steps(model, 1)

    def test_moved_while_it_is_merged(self, model: BertForSequenceClassification) -> None:
        other = copy.deepcopy(model).float()
        merge(model)
        model.float()
        unmerge(model)
        assert bits(model) == bits(other)
        use(model, "b")
        use(other, "b")
        assert bits(model) == bits(other)


def test_memory_is_taken_only_where_something_changes() -> None:
    model = tiny_bert()
    adapt(model, PLANS["spafit ii"], name="a")
    pointers = {name: each.data_ptr() for name, each in model.named_parameters()}
    changed = {name.rpartition(".")[0] for name in model.adaptation.trainable}  # type: ignore[union-attr]
    some_steps(model, 1)
    merge(model)
    for name, each in model.named_parameters():
        owner = name.rpartition(".")[0]
        if not any(owner.startswith(one.removesuffix(".bias_delta")) for one in changed):
            assert each.data_ptr() == pointers[name]


def test_what_is_refused(tmp_path: Path) -> None:
    model = tiny_bert()
    with pytest.raises(PlanError, match="no adapter is in use"):
        merge(model)
    with pytest.raises(PlanError, match=r"no merged adapter is in use; spafit\.merge"):
        unmerge(model)
    adapt(model, plan("houlsby", L), name="houlsby")
    before = bits(model)
    with pytest.raises(PlanError, match="series stands beside its maps"):
        merge(model)
    assert bits(model) == before
    adapt(model, PLANS["bitfit"], name="bitfit")
    with pytest.raises(PlanError, match="no merged adapter"):
        unmerge(model)
    save_adapter(model, tmp_path / "a.safetensors")
    merge(model)
    for refused in (
        lambda: save_adapter(model, tmp_path / "b.safetensors"),
        lambda: load_adapter(model, tmp_path / "a.safetensors"),
        lambda: adapters_disabled(model).__enter__(),
    ):
        with pytest.raises(PlanError, match=r"merged here; call spafit\.unmerge"):
            refused()
    assert not (tmp_path / "b.safetensors").exists()
    full = tiny_bert()
    adapt(full, "full")
    with pytest.raises(PlanError, match="the model before training is gone"):
        merge(full)


def test_a_tensor_trained_below_its_place_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    adapt(model, end_gains(L, monkeypatch), name="a")
    some_steps(model, 2)
    shown, before = logits(model), bits(model)
    merge(model)
    assert torch.equal(logits(model), shown)
    use(model, None)
    assert torch.equal(logits(model), logits(tiny_bert()))
    use(model, "a")
    unmerge(model)
    assert bits(model) == before


def test_others_are_loaded_beside_a_merged_one(
    model: BertForSequenceClassification, tmp_path: Path
) -> None:
    save_adapter(model, tmp_path / "a.safetensors")
    shown = logits(model)
    merge(model)
    load_adapter(model, tmp_path / "a.safetensors", name="again")
    assert torch.equal(logits(model), shown)
    use(model, "a")
    with frozen_stored_in(model, torch.bfloat16):
        pass
    load_adapter(model, tmp_path / "a.safetensors", name="once more")
