"""Trained parameters agree in optimizer, checkpoints, best values, record and adapter file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.interruptions import differences, everything, interrupted
from support.small_runs import METHODS, SmallRun, trained

from spafit.bert import BertForSequenceClassification, set_impl
from spafit.errors import CheckpointError, PlanError
from spafit.strata import adapt, adapters_disabled
from spafit.training.optimisation import make_optimizer, trained_parameters
from spafit.weights.adapter_files import load_adapter, name_in_files, save_adapter
from spafit.weights.pretrained import load_pretrained

# Of every kind: a bias delta of group 2, one matrix of a LoRA, the other of another, of the head.
FROZEN = (
    "bert.encoder.layer.1.intermediate.dense.bias_delta.delta",
    "bert.encoder.layer.2.attention.self.query.lora_A",
    "bert.encoder.layer.3.attention.output.dense.lora_B",
    "classifier.bias",
)


def partly_frozen(
    small: SmallRun, names: tuple[str, ...] = FROZEN, method: str = "spafit"
) -> BertForSequenceClassification:
    model = small.model(method)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


class TestTrainedParameters:
    """Oracle: the names that the plan declares, less those that were frozen here."""

    @pytest.mark.parametrize("method", ["spafit", "spafit-direct", "full"])
    def test_what_the_plan_declares(self, small: SmallRun, method: str) -> None:
        model = small.model(method)
        assert model.adaptation is not None
        assert set(trained_parameters(model)) == set(model.adaptation.trainable)

    def test_less_what_was_frozen(self, small: SmallRun) -> None:
        model = partly_frozen(small)
        assert model.adaptation is not None
        found = trained_parameters(model)
        assert set(found) == set(model.adaptation.trainable) - set(FROZEN)
        assert all(found[name] is model.get_parameter(name) for name in found)
        groups = make_optimizer(model, learning_rate=1.0, weight_decay=0.5).param_groups
        moved = {id(each) for group in groups for each in group["params"]}
        assert moved == {id(each) for each in found.values()}

    def test_nothing_that_trains_is_refused(self, small: SmallRun) -> None:
        model = small.model()
        model.requires_grad_(False)
        with pytest.raises(PlanError, match=r"nothing trains.*requires_grad_"):
            small.fit(model)

    def test_a_model_whose_adapters_are_disabled_is_refused(self, small: SmallRun) -> None:
        """Nothing added would train, and the head that did would be written over afterwards."""
        model = small.model()
        before = trained(model)
        with adapters_disabled(model), pytest.raises(PlanError, match="leave the with block first"):
            small.fit(model)
        assert all(torch.equal(each, before[name]) for name, each in trained(model).items())

    def test_a_model_that_was_not_adapted_is_refused(self, small: SmallRun) -> None:
        with pytest.raises(PlanError, match="not adapted"):
            trained_parameters(load_pretrained(small.folder, num_labels=2))


class TestAnotherModel:
    """Oracle: the message, which names what was given or what is gone."""

    @pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.nn.Sequential])
    def test_a_wrapped_one(self, small: SmallRun, wrap: Callable[[Any], Any]) -> None:
        with pytest.raises(PlanError, match="give the model itself, without what was wrapped"):
            small.fit(wrap(small.model()))

    def test_a_head_without_a_bias(self, small: SmallRun) -> None:
        """Whether it was put in before the model was adapted, or after."""
        before = load_pretrained(small.folder)
        before.classifier = torch.nn.Linear(24, 2, bias=False)
        adapt(before, METHODS["spafit"])
        after = small.model()
        after.classifier = torch.nn.Linear(24, 2, bias=False)
        for model in (before, after):
            with pytest.raises(PlanError, match=r"the model lacks classifier\.bias: a module was"):
                small.fit(model)

    def test_a_layer_of_another_group(self, small: SmallRun, tmp_path: Path) -> None:
        model = small.model()
        model.bert.encoder.layer[3] = model.bert.encoder.layer[1]
        with pytest.raises(PlanError, match=r"lacks bert\.encoder\.layer\.3\..* and \d+ more: a"):
            small.fit(model)
        with pytest.raises(PlanError, match=r"lacks bert\.encoder\.layer\.3\."):
            save_adapter(model, tmp_path / "adapter.safetensors")


class TestUnfrozen:
    """Oracle: the names of what was unfrozen after ``adapt``, and the model before."""

    @pytest.mark.parametrize(
        "name", ["bert.pooler.dense.weight", "bert.encoder.layer.0.output.LayerNorm.bias"]
    )
    def test_is_refused_by_name_before_anything_is_written(
        self, small: SmallRun, tmp_path: Path, name: str
    ) -> None:
        model = small.model()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model.get_parameter(name).requires_grad_(True)
        with pytest.raises(PlanError) as error:
            small.fit(model, out=tmp_path / "run")
        assert name in str(error.value)
        assert "put it in the plan, or freeze it" in str(error.value)
        assert not (tmp_path / "run").exists()
        assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())

    def test_the_first_are_named_and_the_others_counted(self, small: SmallRun) -> None:
        model = small.model()
        model.bert.encoder.layer[0].requires_grad_(True)  # 16 parameters
        with pytest.raises(PlanError, match=r"query\.weight, .* and 13 more would train"):
            small.fit(model)

    def test_a_parameter_of_the_user_s_own_is_refused(self, small: SmallRun) -> None:
        model = small.model()
        model.register_parameter("temperature", torch.nn.Parameter(torch.ones(1)))
        with pytest.raises(PlanError, match="temperature would train"):
            small.fit(model)


class TestFrozenByTheUser:
    """Oracle: the same run, uninterrupted; and the values before it."""

    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_stays_as_it_was_and_has_no_moments(
        self, small: SmallRun, tmp_path: Path, impl: str
    ) -> None:
        model = partly_frozen(small)
        set_impl(model, impl)
        before = trained(model)
        small.fit(model, out=tmp_path, epochs=2)
        after = trained(model)
        assert {name for name in after if torch.equal(before[name], after[name])} == set(FROZEN)
        state = everything(tmp_path)["state.safetensors"]
        moments = {name.split(".", 2)[2] for name in state if name.startswith("optimizer.exp_avg.")}
        assert moments == {name_in_files(name) for name in set(after) - set(FROZEN)}

    def test_the_record_names_it(self, small: SmallRun, tmp_path: Path) -> None:
        for name, model in (("all", small.model()), ("some", partly_frozen(small))):
            small.fit(model, out=tmp_path / name, epochs=1)
        every, some = (
            json.loads((tmp_path / name / "run.json").read_text()) for name in ("all", "some")
        )
        assert "frozen_by_user" not in every
        assert set(some["frozen_by_user"]) == set(FROZEN)
        numbers = sum(small.model().get_parameter(name).numel() for name in FROZEN)
        assert every["trainable"] - some["trainable"] == numbers

    def test_the_adapter_file_is_complete(self, small: SmallRun, tmp_path: Path) -> None:
        model = partly_frozen(small)
        with torch.no_grad():  # as an earlier training would have left it
            for name in FROZEN:
                model.get_parameter(name).add_(0.125)
        small.fit(model, out=tmp_path, epochs=2)
        path = tmp_path / "adapter.safetensors"
        written = {name_in_files(name): value for name, value in trained(model).items()}
        assert not differences(load_file(path), written)
        fresh = load_pretrained(small.folder, num_labels=2)
        load_adapter(fresh, path)
        assert not differences(trained(fresh), trained(model))

    @pytest.mark.parametrize(
        "method", ["spafit", pytest.param("spafit-direct", marks=pytest.mark.full), "full"]
    )
    def test_a_resumed_run_is_the_same_bit_for_bit(
        self, small: SmallRun, tmp_path: Path, method: str
    ) -> None:
        names = ("bert.encoder.layer.2.output.LayerNorm.bias", "classifier.weight")

        def fresh() -> BertForSequenceClassification:
            return partly_frozen(small, names if method != "spafit" else FROZEN, method)

        settings = {"epochs": 2, "save_every": 3}
        whole = fresh()
        small.fit(whole, out=tmp_path / "whole", **settings)
        _, model = interrupted(small, tmp_path / "parts", [2, 7], fresh, **settings)
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))
        assert not differences(trained(whole), trained(model))

    @pytest.mark.parametrize("now", [(), FROZEN[:3], (*FROZEN, "classifier.weight")], ids=len)
    def test_a_run_is_not_taken_up_with_other_parameters_frozen(
        self, small: SmallRun, tmp_path: Path, now: tuple[str, ...]
    ) -> None:
        small.fit(partly_frozen(small), out=tmp_path, epochs=1)
        with pytest.raises(CheckpointError, match=r"holds another run: frozen_by_user\."):
            small.fit(partly_frozen(small, now), out=tmp_path, epochs=2)

    def test_a_matrix_that_the_plan_trains_is_never_stored_in_half(
        self, small: SmallRun, tmp_path: Path
    ) -> None:
        """It is saved with the rest, so that its last bits matter."""
        name = "bert.encoder.layer.2.intermediate.dense.weight"
        model = partly_frozen(small, (name,), "full")
        before = model.get_parameter(name).detach().clone()
        narrow = {"precision": "bf16", "frozen_weights": "half"}
        small.fit(model, out=tmp_path, epochs=1, **narrow)
        assert torch.equal(load_file(tmp_path / "adapter.safetensors")[name], before)
        assert torch.equal(model.get_parameter(name), before)
