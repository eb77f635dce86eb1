"""A run as a folder that PEFT loads onto its base: LoRA, (IA)³ or LayerNorms, biases and head.

PEFT knows no deltas. A bias or a gain is written as it is after training, under the base's own name
(b + δ, γ + δγ), and PEFT writes it over the base's when it loads.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spafit.adaptable import Affine
from spafit.adapters import IA3, Bias, DirectBias, Full, LayerNormGain, LoRA
from spafit.bert import BertForSequenceClassification
from spafit.cli.trained import Trained
from spafit.errors import PlanError, WeightsError
from spafit.files.replacing import replacing
from spafit.plans import Plan, path_in_model
from spafit.plans import Trained as HowTrained
from spafit.techniques import Technique
from spafit.weights.hub import local_folder
from spafit.weights.safefile import save_tensors
from weights_tools.formats.beside import labels_in_order, score_note
from weights_tools.formats.peft_read import ABOUT, PLAN, PREFIX, WEIGHTS
from weights_tools.formats.peft_settings import CONFIG

CARD = "README.md"


@dataclass
class _Content:
    """What is written, by the names of the base's modules."""

    loras: dict[str, LoRA] = field(default_factory=dict)
    scaled: dict[str, str] = field(default_factory=dict)  # (IA)³: what is scaled
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)  # modules that PEFT saves whole
    overwritten: int = 0  # biases and gains
    norms: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """PEFT's type."""
        return "LORA" if self.loras else "IA3" if self.scaled else "LN_TUNING"


def export(trained: Trained, folder: str | Path) -> list[str]:
    """Write a run as adapter_config.json, adapter_model.safetensors and a README.md.

    What it takes, returns and refuses is said in :mod:`weights_tools.formats`.
    """
    folder = Path(folder)
    run = trained.runs[0]
    adaptation = run.model.adaptation
    assert adaptation is not None
    content = _content(run.model, adaptation.plan)
    about = run.record["about"]
    base = str(about.get("model") or "")
    revision = about.get("revision")
    if not revision:  # a folder, or a name that is spafit's own
        base = str(local_folder(base).resolve())
    labels = labels_in_order(trained)
    notes = _notes(content, adaptation.plan, adaptation.trained.values(), trained, labels)
    settings = {
        "peft_type": content.kind,
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "modules_to_save": ["classifier", *content.saved],
        **_settings(content),
    }
    metadata = {
        "format": "pt",
        PLAN: adaptation.plan.to_json(),
        ABOUT: json.dumps(
            {
                "task": trained.task.name,
                "definition": adaptation.definition,
                "labels": labels,
                "max_length": run.record["settings"]["max_length"],
            }
        ),
    }
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in content.tensors.items()}
    for name, text in (
        (CARD, _card(base, revision, labels, run.model.num_labels, notes)),
        (CONFIG, json.dumps(settings, indent=2, ensure_ascii=False)),
    ):
        with replacing(folder / name, WeightsError) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")
    save_tensors(folder / WEIGHTS, tensors, metadata)  # last: without it the folder is none
    return notes


def _content(model: BertForSequenceClassification, plan: Plan) -> _Content:
    content = _Content()
    for stratum in plan.strata:
        for layer in range(stratum.first, stratum.last + 1):
            for place, techniques in stratum.train.items():
                name = path_in_model(place, layer)
                for technique in techniques:
                    where = f"{plan.name}: {technique.name} on {name}"
                    _add(content, model, name, technique, where)
    if content.loras and content.scaled:
        raise PlanError(
            f"{plan.name}: it has LoRA and (IA)³, and a folder of PEFT holds one of them; give "
            "--format hf"
        )
    norms_alone = set(content.norms) == {n.rpartition(".")[0] for n in content.tensors}
    if content.kind == "LN_TUNING" and not (content.norms and norms_alone):
        raise PlanError(
            f"{plan.name}: PEFT has no type for it, because it has neither LoRA nor (IA)³, nor "
            "LayerNorms alone; give --format hf"
        )
    if content.kind == "LN_TUNING":  # it holds whole LayerNorms
        content.tensors.clear()
        for name in content.norms:
            module = model.get_submodule(name)
            assert isinstance(module, Affine)
            for end, tensor in module.merged().items():
                content.tensors[f"{name}.ln_tuning_layers.{end}"] = tensor
    for name in (*content.loras, *content.scaled):  # PEFT wraps these
        for end in ("weight", "bias"):
            if f"{name}.{end}" in content.tensors:
                tensor = content.tensors.pop(f"{name}.{end}")
                content.tensors[f"{name}.base_layer.{end}"] = tensor
    for part, mode in (("embeddings", plan.embeddings), ("pooler", plan.pooler)):
        if mode == "full":
            content.saved.append(f"bert.{part}")
            for end, value in model.bert.get_submodule(part).named_parameters():
                content.tensors[f"bert.{part}.{end}"] = value.detach()
    for end, value in model.classifier.named_parameters():
        content.tensors[f"classifier.{end}"] = value.detach()
    return content


def _add(
    content: _Content,
    model: BertForSequenceClassification,
    name: str,
    technique: Technique,
    where: str,
) -> None:
    """Add what one technique trains on one module."""
    module = model.get_submodule(name)
    if type(technique) is LoRA:
        content.loras[name] = technique
        for end in ("lora_A", "lora_B"):
            content.tensors[f"{name}.{end}.weight"] = model.get_parameter(f"{name}.{end}").detach()
    elif type(technique) is IA3:
        vector = model.get_parameter(f"{name}.ia3.l").detach()
        content.scaled[name] = technique.of
        content.tensors[f"{name}.ia3_l"] = (
            vector[:, None] if technique.of == "output" else vector[None]
        )
    elif isinstance(technique, Bias | DirectBias | LayerNormGain) and isinstance(module, Affine):
        is_bias = not isinstance(technique, LayerNormGain)
        end = "bias" if is_bias else "weight"
        value = module.merged_bias() if is_bias else module.merged_weight()
        content.tensors[f"{name}.{end}"] = value
        content.overwritten += 1
        if name.endswith("LayerNorm") and name not in content.norms:
            content.norms.append(name)
    elif type(technique) is Full:
        content.saved.append(name.removeprefix("bert.encoder."))
        for end in ("weight", "bias"):
            content.tensors[f"{name}.{end}"] = model.get_parameter(f"{name}.{end}").detach()
    else:
        raise PlanError(
            f"{where} has no form in PEFT; give --format adapters for bottleneck adapters, or hf "
            "for what can be merged"
        )


def _settings(content: _Content) -> dict[str, Any]:
    """Return the settings that a type has of its own."""
    if content.kind == "LN_TUNING":
        return {"target_modules": _expression(content.norms)}
    if content.kind == "IA3":
        of_input = [name for name, of in content.scaled.items() if of == "input"]
        return {
            "target_modules": _expression(content.scaled),
            "feedforward_modules": _expression(of_input) if of_input else [],
            "fan_in_fan_out": False,
        }
    stabilised = all(lora.rank_stabilised for lora in content.loras.values())
    sizes = {name: (lora.r, _alpha(lora, stabilised)) for name, lora in content.loras.items()}
    usual = Counter(sizes.values()).most_common(1)[0][0]
    others: dict[tuple[int, float], list[str]] = {}
    for name, size in sizes.items():
        if size != usual:
            others.setdefault(size, []).append(name)
    # From "encoder." on: older versions of PEFT want something before what a key matches. And each
    # key stands in both patterns, because they look both up by the first that matches.
    keys = {size: _expression(names, "encoder.") for size, names in others.items()}
    return {
        "target_modules": _expression(content.loras),
        "r": usual[0],
        "lora_alpha": usual[1],
        "rank_pattern": {key: size[0] for size, key in keys.items()},
        "alpha_pattern": {key: size[1] for size, key in keys.items()},
        "use_rslora": stabilised,
        "lora_dropout": next(iter(content.loras.values())).dropout,
        "bias": "all" if any(name.endswith(".bias") for name in _of_base(content)) else "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _of_base(content: _Content) -> list[str]:
    """Return the tensors of the base that are written outside of modules saved whole."""
    saved = tuple(f"bert.encoder.{each}." for each in content.saved)
    return [
        name
        for name in content.tensors
        if name.startswith("bert.encoder.") and not name.startswith(saved)
    ]


def _alpha(lora: LoRA, stabilised: bool) -> float:
    """Return alpha as a folder has it in which all maps are rank-stabilised, or none."""
    alpha = lora.alpha
    if lora.rank_stabilised and not stabilised:
        alpha *= math.sqrt(lora.r)
    return int(alpha) if alpha == int(alpha) else alpha


def _expression(names: Iterable[str], beginning: str = "bert.encoder.") -> str:
    """Return a regular expression that matches these modules of layers and no others."""
    layers_of: dict[str, list[str]] = {}
    for name in names:
        layer, _, place = name.removeprefix("bert.encoder.layer.").partition(".")
        layers_of.setdefault(place, []).append(layer)
    places_of: dict[tuple[str, ...], list[str]] = {}
    for place, layers in layers_of.items():
        places_of.setdefault(tuple(layers), []).append(place)
    return "|".join(
        rf"{re.escape(beginning)}layer\.({'|'.join(layers)})\.({'|'.join(map(re.escape, places))})"
        for layers, places in places_of.items()
    )


def _notes(
    content: _Content,
    plan: Plan,
    how: Iterable[HowTrained],
    trained: Trained,
    labels: tuple[str, ...],
) -> list[str]:
    """Return what PEFT cannot restore."""
    notes = []
    if content.overwritten and content.kind != "LN_TUNING":
        notes.append(
            f"PEFT writes {content.overwritten} biases and gains over the base's when it loads "
            "them: its disable_adapter() and unload() do not bring the base's back, and a second "
            "such adapter on the same model overwrites the first; load the base afresh instead"
        )
    if labels:
        notes.append(
            "PEFT does not keep the names of the labels: give them to the base as id2label and "
            f"label2id; the logits are in the order {', '.join(labels)}"
        )
    notes += score_note(trained)
    its = list(content.loras.values())
    if len({lora.rank_stabilised for lora in its}) > 1:
        notes.append(
            "PEFT has rank-stabilised LoRA on all maps or on none: each alpha here gives the same "
            "scale without it"
        )
    in_training = ["dropout"] * (len({lora.dropout for lora in its}) > 1)
    if any(each != HowTrained() for each in how) or plan.rate_decay != 1:
        in_training.append("rates, weight decays and times")
    if any(stratum.dropout is not None for stratum in plan.strata):
        in_training.append("dropout by strata")
    if in_training:
        notes.append(
            f"PEFT does not hold the plan's {' and '.join(in_training)}: they matter only where "
            "the adapter is trained on"
        )
    return notes


def _card(
    base: str, revision: object, labels: tuple[str, ...], num_labels: int, notes: list[str]
) -> str:
    """Return a README.md: how the folder is loaded, and what is lost."""
    options = f'num_labels={num_labels}, problem_type="regression"'
    if labels:
        ids = {name: number for number, name in enumerate(labels)}
        options = f"id2label={dict(enumerate(labels))}, label2id={ids}"
    if revision:
        options = f"revision={revision!r}, {options}"
    remarks = "\n".join(f"- {note}" for note in notes)
    return (
        "---\nlibrary_name: peft\n---\n\nExported by spafit.\n\n```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification\n\n"
        f"base = AutoModelForSequenceClassification.from_pretrained(\n    {base!r}, {options}\n)\n"
        f'model = PeftModel.from_pretrained(base, "FOLDER")\n```\n\n{remarks}'
    )
