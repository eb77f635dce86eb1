"""``export --format peft``, and back by ``import``.

Oracle: ``PeftModel.from_pretrained`` of PEFT on transformers' model with the same base: the run's
logits to 1e-5. Back again, the plan is equal, and so are all values: bit for bit, and the deltas of
biases and gains, which PEFT knows only added to the base's, to rounding.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exchanged import L, a_run, apart, batch_of, logits_of, three

import spafit
from spafit.adaptable import Adaptable
from spafit.adapters import IA3, BiasDelta, DirectBias, Full, LayerNormGain, LoRA, SeriesAdapter
from spafit.errors import PlanError
from spafit.plans import Plan, Stratum
from spafit.techniques import TECHNIQUES
from weights_tools import importing
from weights_tools.__main__ import main
from weights_tools.formats import peft as format_
from weights_tools.formats.peft_settings import read_settings

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

NORMS = "attention.output.LayerNorm, layer.output.LayerNorm"
LORA = LoRA(3, 5.0)
PLANS: dict[str, Plan] = {
    "spafit": spafit.plan("SPAFIT-0-1-II", L, r=5, alpha=7.0),
    "direct": spafit.plan("SPAFIT-0-1-I", L, r=5, bias="direct"),
    "ranks": three(
        {"query, value": [LORA], "key": [LoRA(4, 5.0)]},
        {"query": [LORA, BiasDelta()], "layer.output.dense": [LoRA(2, 9.5), DirectBias()]},
        {"layer.output.dense": [LoRA(2, 9.5)], "intermediate.dense": [LORA]},
    ),
    "rslora": three({"query, key": [LoRA(3, 5.0, rank_stabilised=True)]}),
    "some rslora": three({"query": [LORA], "key": [LoRA(3, 5.0, rank_stabilised=True)]}),
    "norms": three({"value": [LORA], NORMS: [LayerNormGain()]}, {NORMS: [BiasDelta()]}),
    "whole": three(
        {"value": [LORA], "layer.output.dense": [Full()], "attention.output.LayerNorm": [Full()]},
        {"attention.output.dense": [Full()]},
        embeddings="full",
        pooler="full",
    ),
    "ia3": spafit.plan("ia3", L),
    "ia3 and biases": three({"key": [IA3(), BiasDelta()], NORMS: [BiasDelta()]}),
    "norms alone": three({NORMS: [LayerNormGain(), BiasDelta()]}, {NORMS: [LayerNormGain()]}),
    "settings": Plan(
        "slowly",
        L,
        [
            Stratum("low", 0, 1, {"query": [LoRA(3, 5.0, 0.25, b_rate=4.0)]}, rate=0.5),
            Stratum("top", 2, 3, {"query": [LoRA(3, 5.0, 0.25)]}, dropout=0.2, thaw=1),
        ],
        rate_decay=0.9,
    ),
}


def with_peft(folder: Path, base: Path, num_labels: int = 3) -> Any:
    """Load a folder as a user of PEFT does, and have nothing left out."""
    auto = transformers.AutoModelForSequenceClassification
    model = peft.PeftModel.from_pretrained(
        auto.from_pretrained(base, num_labels=num_labels), folder
    )
    written = load_file(folder / "adapter_model.safetensors")
    held = {
        re.sub(r"\.(modules_to_save\.)?default\b", "", n): p for n, p in model.named_parameters()
    }
    for name, tensor in written.items():
        assert torch.equal(held[name], tensor), name
    return model


@pytest.mark.parametrize("name", PLANS)
def test_peft_loads_it_and_it_comes_back(name: str, tiny: Path, tmp_path: Path) -> None:
    trained = a_run(tmp_path / "run", tiny, PLANS[name])
    model = trained.runs[0].model
    (tmp_path / "peft").mkdir()
    format_.export(trained, tmp_path / "peft")
    batch = batch_of(tiny)
    expected = logits_of(model, batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected).*keys")
        assert apart(logits_of(with_peft(tmp_path / "peft", tiny), batch), expected) < 1e-5

    back, notes = importing.put_on(importing.read(tmp_path / "peft"), str(tiny))
    assert apart(logits_of(back, batch), expected) < 1e-5
    assert model.adaptation is not None and back.adaptation is not None
    assert back.adaptation.plan == PLANS[name]
    assert not notes or name in ("whole", "norms alone")
    for key in model.adaptation.trainable:
        ours, theirs = model.get_parameter(key), back.get_parameter(key)
        if key.endswith((".bias_delta.delta", ".gain_delta.delta")):
            assert apart(theirs, ours) < 3e-7, key
        else:
            assert torch.equal(theirs, ours), key


def test_the_plan_is_read_from_the_tensors_too(tiny: Path, tmp_path: Path) -> None:
    """Without our metadata, as when PEFT has saved the folder again."""
    for name in ("spafit", "ranks", "ia3", "norms"):
        trained = a_run(tmp_path / name / "run", tiny, PLANS[name])
        folder = tmp_path / name / "peft"
        folder.mkdir()
        format_.export(trained, folder)
        weights = folder / "adapter_model.safetensors"
        save_file(load_file(weights), weights, {"format": "pt"})
        back, _ = importing.put_on(importing.read(folder), str(tiny))
        assert back.adaptation is not None
        found, plan = back.adaptation.plan, PLANS[name]
        biases = {DirectBias(): BiasDelta()}
        for layer in range(L):
            its = [
                {
                    place: [biases.get(each, each) for each in techniques]
                    for stratum in each.strata
                    if stratum.first <= layer <= stratum.last
                    for place, techniques in stratum.train.items()
                }
                for each in (plan, found)
            ]
            assert its[0] == its[1], (name, layer)
        batch = batch_of(tiny)
        assert apart(logits_of(back, batch), logits_of(trained.runs[0].model, batch)) < 1e-5


def test_other_plans_in_the_metadata_are_not_believed(tiny: Path, tmp_path: Path) -> None:
    trained = a_run(tmp_path / "run", tiny, PLANS["spafit"])
    (tmp_path / "peft").mkdir()
    format_.export(trained, tmp_path / "peft")
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    for plan in (PLANS["ia3"].to_json(), '{"strata": 3}'):
        save_file(load_file(weights), weights, {"spafit_plan": plan, "spafit_about": "[["})
        back, notes = importing.put_on(importing.read(tmp_path / "peft"), str(tiny))
        assert any(note.startswith("ignored: the plan in its metadata") for note in notes)
        assert back.adaptation is not None
        assert [each.layers for each in back.adaptation.plan.strata] == ["0", "1", "2-3"]


def test_what_is_written(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the names that PEFT's documentation of its checkpoints gives."""
    plan = spafit.plan("SPAFIT-0-1-II", L, r=5, alpha=7.0)
    a_run(tmp_path / "run", tiny, plan)
    out = tmp_path / "peft"
    assert main(["export", str(tmp_path / "run"), str(out), "--format", "peft"]) == 0
    said = capsys.readouterr().out
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["task_type"]) == ("LORA", "SEQ_CLS")
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (5, 7, "all")
    assert settings["modules_to_save"] == ["classifier"]
    modules = r"attention\.self\.query|attention\.self\.key|attention\.self\.value"
    assert settings["target_modules"] == (
        rf"bert\.encoder\.layer\.(2|3)\.({modules}|attention\.output\.dense)"
    )
    tensors = load_file(out / "adapter_model.safetensors")
    layer = "base_model.model.bert.encoder.layer"
    assert tensors[f"{layer}.2.attention.self.query.lora_A.weight"].shape == (5, 24)
    assert tensors[f"{layer}.2.attention.output.dense.lora_B.weight"].shape == (24, 5)
    assert tensors[f"{layer}.1.intermediate.dense.bias"].shape == (37,)
    assert not any(".layer.0." in name for name in tensors)
    assert len(tensors) == 8 + 2 * (2 * 4 + 3) + 2
    card = (out / "README.md").read_text()
    for part in ("disable_adapter()", "names of the labels", "contradiction, neutral, entailment"):
        assert part in card and part in said
    assert "{0: 'contradiction', 1: 'neutral', 2: 'entailment'}" in card
    assert "PEFT writes 14 biases" in said


def test_what_only_training_needs_is_said(tiny: Path, tmp_path: Path) -> None:
    for name, parts in {
        "settings": ("rates, weight decays and times", "dropout by strata"),
        "some rslora": ("rank-stabilised",),
    }.items():
        (tmp_path / f"{name}-out").mkdir()
        trained = a_run(tmp_path / name, tiny, PLANS[name])
        notes = " ".join(format_.export(trained, tmp_path / f"{name}-out"))
        assert all(part in notes for part in parts)


def test_a_tuned_base_is_not_restored_by_peft(tiny: Path, tmp_path: Path) -> None:
    """What the note says: without biases PEFT gives the base back, with them it does not."""
    batch = batch_of(tiny)
    for name, plan in {"with": PLANS["spafit"], "without": spafit.plan("lora-i", L)}.items():
        (tmp_path / f"{name}-out").mkdir()
        format_.export(a_run(tmp_path / name, tiny, plan), tmp_path / f"{name}-out")
        torch.manual_seed(0)
        model = with_peft(tmp_path / f"{name}-out", tiny)
        plain = transformers.AutoModel.from_pretrained(tiny)
        with torch.no_grad(), model.disable_adapter(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = model.base_model.model.bert(**batch).pooler_output
            expected = plain(**batch).pooler_output
        assert (apart(found, expected) > 1e-3) == (name == "with")


@dataclass(frozen=True)
class Own(spafit.Technique):
    """A technique of a user's own."""

    name: ClassVar[str] = "own"
    short: ClassVar[str] = "own"
    trains: ClassVar[tuple[str, ...]] = ()

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        return module


def test_refusals(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plan's name, and by the technique and its place."""
    monkeypatch.setitem(TECHNIQUES, "own", Own)
    for number, (plan, parts) in enumerate(
        (
            (spafit.plan("full", L), ("Full Fine-tuning", "--format hf")),
            (spafit.plan("bitfit", L), ("Full BitFit", "--format hf")),
            (spafit.plan("linear-probe", L), ("Linear probing", "--format hf")),
            (three({"query": [LORA], "key": [IA3()]}), ("mine", "(IA)³")),
            (
                three({"query": [LORA], "layer.output": [SeriesAdapter()]}),
                ("series on bert.encoder.layer.1.output ", "--format adapters"),
            ),
            (
                three({"query": [LORA, Own()]}),
                ("own on bert.encoder.layer.1.attention.self.query",),
            ),
            (three({NORMS: [LayerNormGain()], "key": [BiasDelta()]}), ("mine", "--format hf")),
        )
    ):
        trained = a_run(tmp_path / f"{number}", tiny, plan)
        with pytest.raises(PlanError) as error:
            format_.export(trained, tmp_path)
        assert all(part in str(error.value) for part in parts), error.value
        assert not (tmp_path / "adapter_config.json").exists()


def test_patterns_match_what_they_should(tiny: Path, tmp_path: Path) -> None:
    """Oracle: PEFT's own matching, of today and as versions up to 0.12 did it."""
    trained = a_run(tmp_path / "run", tiny, PLANS["ranks"])
    format_.export(trained, tmp_path)
    settings = read_settings(tmp_path).entries
    names = [
        name for name, each in trained.runs[0].model.named_modules() if hasattr(each, "lora_A")
    ]
    found: dict[str, Sequence[Any]] = {}
    for name in names:
        keys = settings["rank_pattern"]
        older = next((key for key in keys if re.match(rf".*\.{key}$", name)), name)
        newer = peft.utils.other.get_pattern_key(keys, name)
        assert older == newer
        found[name] = (keys.get(newer, settings["r"]), settings["alpha_pattern"].get(newer, 5))
    for stratum in PLANS["ranks"].strata:
        for layer in range(stratum.first, stratum.last + 1):
            for place, techniques in stratum.train.items():
                [lora] = [each for each in techniques if isinstance(each, LoRA)]
                name = f"bert.encoder.{place.replace('layer', f'layer.{layer}', 1)}"
                assert found.pop(name) == (lora.r, lora.alpha)
    assert not found
