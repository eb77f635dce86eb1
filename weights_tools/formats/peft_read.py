"""Adapters that PEFT wrote: LoRA, (IA)³ and LayerNorms, with biases and modules saved whole."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spafit.adapters import IA3, Bias, DirectBias, Full, LayerNormGain, LoRA
from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError, WeightsError, listed
from spafit.plans import Plan
from spafit.strata import pretrained_names
from spafit.techniques import Technique
from weights_tools.formats.foreign import (
    Foreign,
    Found,
    Tensors,
    head_of,
    is_adaptable,
    place_of,
    plan_of,
    read_tensors,
    values_for,
)
from weights_tools.formats.peft_settings import Settings, read_settings

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

PLAN, ABOUT = "spafit_plan", "spafit_about"
"""Entries of the metadata of an export of ours, which PEFT does not read: plan and task."""

_ADDED = re.compile(r"(.+)\.(lora_A|lora_B|ia3_l)(?:\.weight)?")
_POOLER = "bert.pooler.dense"


@dataclass(frozen=True, kw_only=True)
class PeftFolder(Foreign):
    """A folder of PEFT's that was read.

    Attributes
    ----------
    settings : Settings
        Its adapter_config.json.
    added : dict of str to torch.Tensor
        LoRA's matrices and (IA)³'s vectors, by module: ``....query.lora_A``, ``....key.ia3_l``.
    trained : dict of str to torch.Tensor
        Pre-trained tensors as they are after training, under the base's names; the head too.
    plan : Plan or None
        That of an export of ours.
    """

    settings: Settings
    added: Tensors
    trained: Tensors
    plan: Plan | None

    def onto(self, model: BertForSequenceClassification) -> Found:
        """Return the plan and its values on a base, which is not changed."""
        notes = list(self.notes)
        trained = dict(self.trained)
        modules = list(dict.fromkeys(n.rpartition(".")[0] for n in pretrained_names(model)))
        self._check_modules(modules)
        self._check_saved(model)
        techniques, added = self._added(model, modules, trained, notes)
        parts = {"embeddings": "frozen", "pooler": "frozen"}
        before = dict(model.named_parameters())
        untrained = []
        for name in sorted(trained):
            module, _, kind = name.rpartition(".")
            part = next((each for each in parts if name.startswith(f"bert.{each}.")), None)
            may_be_left_out = part is not None or self.settings.kind == "LN_TUNING"
            if may_be_left_out and name in before and torch.equal(before[name], trained[name]):
                untrained.append(name)
                del trained[name]
            elif part is not None:
                parts[part] = "full"
            elif is_adaptable(module):
                techniques.setdefault(module, []).append(_technique(module, kind, trained))
            elif module != "classifier":
                raise self._error(f"{name} has no place in a BERT for sentences")
        if untrained:
            notes.append(f"left out, because it is the base's: {listed(untrained, ', ', 3)}")
        for part, mode in parts.items():
            if mode == "full":
                notes.append(f"the {part} differ from the base's, so the adapter holds them whole")
        tables: list[dict[str, list[Technique]]] = [{} for _ in model.bert.encoder.layer]
        for module, its in techniques.items():
            layer, place = place_of(module) or (0, "")
            tables[layer][place] = list(dict.fromkeys(its))
        try:
            plan = plan_of(self.settings.path.parent.resolve().name, tables, **parts)
        except PlanError as error:
            raise PlanError(f"{self.path} has no plan in spafit: {error}") from None
        if self.plan is not None:
            if _computes(self.plan) == _computes(plan):
                plan = self.plan
            else:
                notes.append("ignored: the plan in its metadata, which is not what the file holds")
        return Found(plan, values_for(model, plan, added, trained, self.path), notes)

    def _added(
        self,
        model: BertForSequenceClassification,
        modules: list[str],
        trained: Tensors,
        notes: list[str],
    ) -> tuple[dict[str, list[Technique]], Tensors]:
        """Return LoRA or (IA)³ of each module, and the values by their names in a model.

        LoRA on the pooler, which no plan has, is merged into what was trained.
        """
        targets = self._targets(modules)
        techniques: dict[str, list[Technique]] = {}
        added: Tensors = {}
        if self.settings.kind == "LORA":
            for module, lora in self._loras(targets).items():
                if module == _POOLER:
                    trained[f"{module}.weight"] = self._merged(module, lora, model)
                    notes.append(f"LoRA on {module}, which no plan has, was merged into its weight")
                    continue
                techniques[module] = [lora]
                for name in ("lora_A", "lora_B"):
                    added[f"{module}.{name}"] = self.added[f"{module}.{name}"]
        elif self.settings.kind == "IA3":
            for module, ia3 in self._scaled(targets, modules).items():
                techniques[module] = [ia3]
                added[f"{module}.ia3.l"] = self.added[f"{module}.ia3_l"].reshape(-1)
        return techniques, added

    def _error(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path}: {what}")

    def _check_modules(self, modules: list[str]) -> None:
        """Refuse a base that lacks a module of the file's."""
        held = {name.rpartition(".")[0] for name in (*self.added, *self.trained)}
        others = sorted(held - set(modules))
        if others:
            raise self._error(
                f"it holds {listed(others, ', ', 3)}, which this base does not have; give the base "
                "that it was trained on (--model)"
            )

    def _check_saved(self, model: BertForSequenceClassification) -> None:
        """Refuse a file that lacks a part of what ``modules_to_save`` names."""
        lacking = [
            name
            for name in pretrained_names(model)
            if self.settings.is_saved_whole(name) and name not in self.trained
        ]
        if lacking:
            raise self._error(
                f"it lacks {listed(lacking, ', ', 3)}, which modules_to_save names; fetch it again"
            )

    def _targets(self, modules: list[str]) -> list[str]:
        """Return the modules that the settings name, which must be those that the file holds."""
        targets = self.settings.targets(modules)
        adds = self.settings.kind != "LN_TUNING"  # a tuned LayerNorm is a tensor like any other
        held = {name.rpartition(".")[0] for name in (self.added if adds else self.trained)}
        lacking = [each for each in targets if each not in held]
        others = sorted(held - set(targets)) if adds else []
        if lacking:
            raise self._error(
                f"it lacks {listed(lacking, ', ', 3)}, which target_modules names; fetch it again"
            )
        if others:
            raise self._error(
                f"it holds {listed(others, ', ', 3)}, which target_modules does not name, so that "
                "PEFT would leave it out; set right which of the two is meant"
            )
        wrong = [each for each in targets if adds and each != _POOLER and not _is_map(each)]
        if wrong:
            raise self._error(
                f"{self.settings.kind} on {listed(wrong, ', ', 3)} has no form in spafit, only on "
                "the maps of a layer"
            )
        return targets

    def _loras(self, targets: list[str]) -> dict[str, LoRA]:
        settings = self.settings
        ranks = settings.by_pattern("rank_pattern", targets, settings.number("r", 8))
        alphas = settings.by_pattern("alpha_pattern", targets, settings.number("lora_alpha", 8))
        dropout = settings.number("lora_dropout", 0.0)
        loras = {}
        for module in targets:
            r = ranks[module]
            for name, axis in (("lora_A", 0), ("lora_B", 1)):
                matrix = self.added.get(f"{module}.{name}")
                if matrix is None or matrix.dim() != 2 or matrix.shape[axis] != r:
                    found = "none" if matrix is None else list(matrix.shape)
                    raise self._error(f"{module}.{name} must be of rank {r}, found {found}")
            try:
                loras[module] = LoRA(
                    int(r),
                    alphas[module],
                    dropout,
                    rank_stabilised=settings.flag("use_rslora"),
                )
            except PlanError as error:
                raise PlanError(f"{settings.path}: {module}: {error}") from None
        return loras

    def _scaled(self, targets: list[str], modules: list[str]) -> dict[str, IA3]:
        of_input = self.settings.feedforward(modules)
        scaled = {}
        for module in targets:
            vector = self.added.get(f"{module}.ia3_l", torch.empty(0))
            thin = 0 if module in of_input else 1
            if module == _POOLER or vector.dim() != 2 or vector.shape[thin] != 1:
                raise self._error(
                    f"{module}.ia3_l of shape {list(vector.shape)} is not what the settings say"
                )
            scaled[module] = IA3(of="input" if module in of_input else "output")
        return scaled

    def _merged(
        self, module: str, lora: LoRA, model: BertForSequenceClassification
    ) -> torch.Tensor:
        """Return W + s·BA of a module, computed in float64."""
        name = f"{module}.weight"
        try:
            base = self.trained.get(name, model.get_parameter(name)).detach().double()
            A, B = (self.added[f"{module}.{each}"].double() for each in ("lora_A", "lora_B"))
            return (base + _scaling(lora) * (B @ A)).float()
        except (AttributeError, RuntimeError):
            raise self._error(f"LoRA on {module} does not fit this base (--model)") from None


def read(folder: Path) -> PeftFolder:
    """Read a folder that PEFT's ``save_pretrained`` wrote.

    Raises
    ------
    WeightsError
        If a file cannot be trusted, or asks for what spafit does not compute.
    """
    settings = read_settings(folder)
    path = folder / WEIGHTS
    tensors, metadata = read_tensors(folder, WEIGHTS, PICKLED)
    added: Tensors = {}
    trained: Tensors = {}
    copies, unknown, notes = [], [], [*settings.notes]
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        found = _ADDED.fullmatch(name)
        if name == key or re.search(r"\.lora_(embedding|magnitude)", name):
            unknown.append(key)
        elif ".original_module." in name:
            notes.append(f"ignored: {key}, of the base before training")
        elif ".modules_to_save." in name:
            copies.append(key)
        elif found is not None:
            added[f"{found[1]}.{found[2]}"] = tensor
        else:
            name = name.replace(".base_layer.", ".").replace(".ln_tuning_layers.", ".")
            if name in trained:
                raise WeightsError(f"{path} holds {name} twice, as {key} too")
            trained[name] = tensor
    for key in copies:
        before, _, after = key.removeprefix(PREFIX).partition(".modules_to_save.")
        # The adapter's name may stand between.
        ends = (after, after.partition(".")[2])
        of = next((f"{before}.{end}" for end in ends if f"{before}.{end}" in trained), "")
        if of and torch.equal(trained[of], tensors[key]):
            notes.append(f"ignored: {key}, a copy of {of}")
        else:
            unknown.append(key)
    if unknown:
        raise WeightsError(f"{path} holds {listed(unknown, ', ', 3)}, which spafit does not know")
    if not added and settings.kind != "LN_TUNING":
        raise WeightsError(f"{path} holds nothing of {settings.kind}; fetch it again")
    num_labels = head_of(trained, path)
    _note_biases(settings, trained, notes)
    about = _about(metadata)
    labels = about.pop("labels", None)
    named = isinstance(labels, list) and len(labels) == (num_labels if num_labels > 1 else 0)
    base = settings.entries.get("base_model_name_or_path")
    return PeftFolder(
        settings=settings,
        path=path,
        added=added,
        trained=trained,
        num_labels=num_labels,
        labels=tuple(map(str, labels)) if named else None,
        task=about,
        base=base if isinstance(base, str) else "",
        plan=_plan_in(metadata, notes),
        notes=notes,
    )


def _note_biases(settings: Settings, trained: Tensors, notes: list[str]) -> None:
    bias = settings.entries.get("bias", "none")
    if bias in ("all", "lora_only") and not any(
        name.startswith("bert.") and name.endswith(".bias") for name in trained
    ):
        notes.append(
            f'bias="{bias}" trained biases, and the file holds none: PEFT left those of '
            "lora_only out before its fix (peft#3306); they are lost, and the scores are not those "
            "of the training"
        )


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    try:
        about = json.loads(metadata.get(ABOUT, "{}"))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _plan_in(metadata: dict[str, str], notes: list[str]) -> Plan | None:
    if PLAN not in metadata:
        return None
    try:
        return Plan.from_json(metadata[PLAN], source="the plan in its metadata")
    except PlanError as error:
        notes.append(f"ignored: {error}")
        return None


def _is_map(module: str) -> bool:
    return is_adaptable(module) and not module.endswith("LayerNorm")


def _technique(module: str, kind: str, trained: Tensors) -> Technique:
    """Return the technique that trains a pre-trained tensor of a layer's module."""
    if module.endswith("LayerNorm"):
        return Bias() if kind == "bias" else LayerNormGain()
    return Full() if f"{module}.weight" in trained else Bias()


def _scaling(lora: LoRA) -> float:
    return lora.alpha / (math.sqrt(lora.r) if lora.rank_stabilised else lora.r)


def _computes(plan: Plan) -> tuple[object, ...]:
    """Return what a plan computes, without its names and what is of training alone."""
    layers = [
        {
            place: frozenset(form for each in its for form in _forms(place, each))
            for place, its in stratum.train.items()
        }
        for stratum in plan.strata
        for _ in range(len(stratum))
    ]
    return layers, plan.embeddings, plan.pooler


def _forms(place: str, technique: Technique) -> list[tuple[object, ...]]:
    """Return what a technique adds; a whole LayerNorm is its gain and its bias."""
    if isinstance(technique, LoRA):
        return [("lora", technique.r, f"{_scaling(technique):.12g}")]
    if isinstance(technique, IA3):
        return [("ia3", technique.of)]
    if isinstance(technique, Full) and place.endswith("LayerNorm"):
        return [(Bias.name,), (LayerNormGain.name,)]
    return [(Bias.name,) if isinstance(technique, DirectBias) else (technique.name,)]
