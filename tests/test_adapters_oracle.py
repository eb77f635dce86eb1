"""Bottleneck adapters as the library ``adapters`` 1.3.0 computes them, in float64.

Oracle: files of weights, adapters, a batch, and what that library made of them: every hidden state,
logits, loss, gradients, and the losses and weights of 20 steps of AdamW. They are read from the
folder ADAPTERS_ORACLES; sizes, layers and settings are taken from each file.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support import REPOSITORY

import spafit
from spafit.adapters import ParallelAdapter, PfeifferAdapter, SeriesAdapter
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.plans import ATTENTION_OUTPUT, OUTPUT, Plan, Stratum

FOLDER = Path(
    os.environ.get(
        "ADAPTERS_ORACLES", REPOSITORY.parent / "shared" / "data" / "oracles" / "adapters"
    )
)
FILES = sorted(FOLDER.glob("*.safetensors"))
Tensors = dict[str, torch.Tensor]

pytestmark = pytest.mark.skipif(not FILES, reason=f"no oracle files in {FOLDER}")


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    with safe_open(path, "pt") as file:
        about = file.metadata()
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


def make_plan(about: dict[str, Any], num_layers: int) -> Plan:
    """Give the plan that says what the library's settings say; layers left out are frozen."""
    settings, left_out = json.loads(about["settings"]), set(json.loads(about["left_out"]))
    for name in ("use_gating", "ln_before", "ln_after", "phm_layer", "adapter_residual_before_ln"):
        assert not settings[name], f"{name}: another form of adapter"
    assert settings["original_ln_after"]
    assert settings["residual_before_ln"]
    kind = SeriesAdapter
    if settings["is_parallel"]:
        kind = ParallelAdapter
    elif settings["original_ln_before"]:
        kind = PfeifferAdapter
    adapter = kind(
        bottleneck=f"D/{settings['reduction_factor']}",
        activation=settings["non_linearity"],
        scaling=settings["scaling"],
    )
    places = {ATTENTION_OUTPUT: settings["mh_adapter"], OUTPUT: settings["output_adapter"]}
    train = {place: (adapter,) for place, is_there in places.items() if is_there}
    strata = [
        Stratum(f"layer {layer}", layer, layer, {} if layer in left_out else train)
        for layer in range(num_layers)
    ]
    return Plan(about["form"], num_layers, strata)


def our_name(name: str, kind: str) -> str:
    """Give our name of a parameter of the library's adapter, or of the head."""
    name = re.sub(r"\.adapters\.a\.adapter_down\.0\.", f".adapters.{kind}.down.", name)
    return re.sub(r"\.adapters\.a\.adapter_up\.", f".adapters.{kind}.up.", name)


def loaded(path: Path, impl: str) -> tuple[BertForSequenceClassification, Tensors, str]:
    """Give the model of a file with its adapters, what the file holds, and the adapters' name."""
    tensors, about = read(path)
    entries = json.loads(about["config"])
    config = BertConfig.from_dict(entries)
    labels = len(tensors["base.classifier.bias"])
    model = BertForSequenceClassification(config, num_labels=labels).double()
    base = {name.removeprefix("base."): each for name, each in tensors.items() if "base." in name}
    model.load_state_dict({name: base[name] for name in model.state_dict()})
    plan = make_plan(about, entries["num_hidden_layers"])
    spafit.adapt(model, plan)
    trains = [stratum.train for stratum in plan.strata if stratum.train]
    kind = next(iter(trains[0].values()))[0].name
    values = {
        our_name(name.removeprefix("adapter."), kind): each
        for name, each in tensors.items()
        if name.startswith("adapter.")
    }
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    assert model.adaptation is not None
    assert values.keys() | {"classifier.weight", "classifier.bias"} == set(
        model.adaptation.trainable
    )
    spafit.set_impl(model, impl)
    return model, tensors, kind


def batch(tensors: Tensors) -> tuple[torch.Tensor, ...]:
    return tuple(tensors[name] for name in ("input_ids", "attention_mask", "token_type_ids"))


def loss_of(model: BertForSequenceClassification, tensors: Tensors) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(*batch(tensors)), tensors["labels"])


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.detach() - theirs).abs().max())


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestAsTheLibrary:
    def test_states_logits_and_gradients(self, path: Path, impl: str) -> None:
        model, tensors, kind = loaded(path, impl)
        out = model(*batch(tensors), output_hidden_states=True)
        real = tensors["attention_mask"].bool()
        for number, state in enumerate(out.hidden_states):
            expected = tensors[f"hidden_states.{number}"]
            assert apart(state[real], expected[real]) < 1e-12, f"hidden state {number}"
        assert apart(out.logits, tensors["logits"]) < 1e-12
        loss = loss_of(model, tensors)
        assert apart(loss, tensors["loss"][0]) < 1e-12
        loss.backward()
        expected = {
            our_name(name.removeprefix("grad."), kind): each
            for name, each in tensors.items()
            if name.startswith("grad.")
        }
        assert model.adaptation is not None
        assert expected.keys() == set(model.adaptation.trainable)
        for name, gradient in expected.items():
            found = model.get_parameter(name).grad
            assert found is not None
            assert apart(found, gradient) < 1e-12, name

    def test_twenty_steps(self, path: Path, impl: str) -> None:
        model, tensors, kind = loaded(path, impl)
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        losses = []
        for _ in tensors["trained.losses"]:
            optimizer.zero_grad()
            loss = loss_of(model, tensors)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        expected = tensors.pop("trained.losses")
        assert apart(torch.tensor(losses, dtype=torch.float64), expected) < 1e-9
        assert losses[-1] < losses[0]
        for name, value in tensors.items():
            if name.startswith("trained."):
                ours = model.get_parameter(our_name(name.removeprefix("trained."), kind))
                assert apart(ours, value) < 1e-9, name
