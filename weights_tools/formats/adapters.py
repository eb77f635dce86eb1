"""Bottleneck adapters of the library ``adapters`` (AdapterHub): written for it, and read from it.

Its settings describe one form for the whole model: series, Pfeiffer's or parallel; behind
attention, the feed-forward block or both; in all layers but those that are left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spafit.adapters import ACTIVATIONS, ParallelAdapter, PfeifferAdapter, SeriesAdapter
from spafit.bert import BertForSequenceClassification
from spafit.cli.trained import Trained
from spafit.config import is_number
from spafit.errors import PlanError, WeightsError, listed, one_line
from spafit.files.replacing import replacing
from spafit.plans import ATTENTION_OUTPUT, OUTPUT, Plan, path_in_model
from spafit.weights.heads import label_names_of
from spafit.weights.safefile import save_tensors
from weights_tools.formats.beside import labels_in_order, score_note
from weights_tools.formats.foreign import (
    Foreign,
    Found,
    Tensors,
    head_of,
    plan_of,
    read_object,
    read_tensors,
    values_for,
)

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD = "head_config.json", "model_head.safetensors"
PICKLED_HEAD = "pytorch_model_head.bin"
VERSION = "adapters.1.3.0"

NAME = "spafit"
"""The adapter's name in files that are written; the library lets it be replaced (load_as)."""

Bottleneck = SeriesAdapter | PfeifferAdapter | ParallelAdapter

PLACES = {"mh_adapter": ATTENTION_OUTPUT, "output_adapter": OUTPUT}

# With which the form is one of ours. residual_before_ln has a part in Pfeiffer's form alone, as
# adapter_residual_before_ln has behind a LayerNorm that is not there.
_COMPUTED: dict[str, Any] = {
    "ln_before": False,
    "ln_after": False,
    "original_ln_after": True,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "phm_layer": False,
}
_FORM = frozenset(
    "mh_adapter output_adapter reduction_factor non_linearity original_ln_before is_parallel "
    "scaling leave_out".split()
)
_IN_TRAINING = frozenset("dropout stochastic_depth init_weights init_weights_seed".split())
# Settings of what is not there.
_NO_MATTER = re.compile(
    r"phm_\w+|factorized_phm_\w+|shared_\w*phm\w*|learn_phm|hypercomplex_nonlinearity"
    r"|inv_adapter_reduction_factor|architecture"
)
_KEY = re.compile(
    r"(bert\.encoder\.layer\.[0-9]{1,4}\.(?:attention\.)?output)\.adapters\.([^.]+)\."
    r"adapter_(down\.0|up)\.(weight|bias)"
)


def export(trained: Trained, folder: str | Path) -> list[str]:
    """Write a run's bottleneck adapters and head, as ``save_adapter`` of the library does.

    What it takes, returns and refuses is said in :mod:`weights_tools.formats`.
    """
    folder = Path(folder)
    model = trained.runs[0].model
    adaptation = model.adaptation
    assert adaptation is not None
    settings, kind = _settings(adaptation.plan, model.config.hidden_size)
    tensors = {}
    for name in adaptation.trainable:
        if not name.startswith("classifier."):
            owner, _, end = name.rpartition(f".adapters.{kind}.")
            part, _, which = end.partition(".")
            part = "adapter_down.0" if part == "down" else "adapter_up"
            tensors[f"{owner}.adapters.{NAME}.{part}.{which}"] = model.get_parameter(name).detach()
    labels = labels_in_order(trained)
    names = labels or ("LABEL_0",)
    about = {
        "hidden_size": model.config.hidden_size,
        "model_class": "BertForSequenceClassification",
        "model_name": "",
        "model_type": "bert",
        "version": VERSION,
    }
    head = {
        **about,
        "config": None,
        "name": None,
        "num_labels": model.num_labels,
        "label2id": {name: number for number, name in enumerate(names)},
    }
    for name, entries in (
        (HEAD_CONFIG, head),
        (CONFIG, {**about, "name": NAME, "config": settings}),
    ):
        with replacing(folder / name, WeightsError) as temporary:
            text = json.dumps(entries, indent=2, ensure_ascii=False, sort_keys=True)
            temporary.write_text(f"{text}\n", encoding="utf-8")
    head_tensors = {f"classifier.{n}": p.detach() for n, p in model.classifier.named_parameters()}
    save_tensors(folder / HEAD, head_tensors, {"format": "pt"})
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    notes = [
        "model.load_adapter(FOLDER, use_safetensors=True) reads it on a "
        f"BertForSequenceClassification with num_labels={model.num_labels}, after adapters.init"
    ]
    return notes + score_note(trained)


def _settings(plan: Plan, hidden: int) -> tuple[dict[str, Any], str]:
    """Return the library's settings for a plan, and the name of our form."""
    kinds: dict[tuple[str, str, float], Bottleneck] = {}
    places: set[frozenset[str]] = set()
    sizes: dict[int, int] = {}
    left_out: list[int] = []
    for stratum in plan.strata:
        its: set[int] = set()
        for place, techniques in stratum.train.items():
            for technique in techniques:
                if type(technique) not in (SeriesAdapter, PfeifferAdapter, ParallelAdapter):
                    raise _no_form(plan, f"{technique.name} on {place} is no bottleneck adapter")
                assert isinstance(technique, Bottleneck)
                kinds[(technique.name, technique.activation, technique.scaling)] = technique
                its.add(technique.size_for(hidden))
        layers = range(stratum.first, stratum.last + 1)
        if not stratum.train:
            left_out += layers
            continue
        places.add(frozenset(stratum.train))
        if len(its) > 1:
            raise _no_form(plan, f"{stratum.name} has bottlenecks of {sorted(its)} units")
        sizes |= dict.fromkeys(layers, its.pop())
    if "full" in (plan.embeddings, plan.pooler):
        raise _no_form(plan, "it trains pre-trained tensors too")
    if len(kinds) != 1 or len(places) != 1:
        found = [
            f"{name} with {activation} and scaling {scaling:g}"
            for name, activation, scaling in kinds
        ]
        raise _no_form(
            plan,
            f"it has {listed(found, ' and ')} in other places from stratum to stratum"
            if len(kinds) == 1
            else f"it has {listed(found, ' and ')}"
            if kinds
            else "it has no adapters",
        )
    [adapter], [at] = kinds.values(), places
    usual = Counter(sizes.values()).most_common(1)[0][0]
    factors: Any = {
        str(layer): _factor(hidden, size) for layer, size in sizes.items() if size != usual
    }
    factors = {**factors, "default": _factor(hidden, usual)} if factors else _factor(hidden, usual)
    return {
        **_COMPUTED,
        **{key: place in at for key, place in PLACES.items()},
        "reduction_factor": factors,
        "non_linearity": adapter.activation,
        "original_ln_before": isinstance(adapter, PfeifferAdapter),
        "is_parallel": isinstance(adapter, ParallelAdapter),
        "scaling": adapter.scaling,
        "leave_out": left_out,
        "dropout": 0.0,
        "init_weights": "bert",
    }, adapter.name


def _no_form(plan: Plan, why: str) -> PlanError:
    return PlanError(
        f"{plan.name} has no form in the library adapters, which has one kind of bottleneck in one "
        f"size in the same places of every layer: {why}; give --format hf or peft for what is none"
    )


def _factor(hidden: int, size: int) -> float:
    """Return a reduction factor f for which D // f is the size."""
    for factor in (hidden // size, hidden / size, hidden / (size + 0.5)):
        if factor and int(hidden // factor) == size:
            return factor
    raise AssertionError(f"no factor for {size} of {hidden}")


@dataclass(frozen=True, kw_only=True)
class AdapterFolder(Foreign):
    """A folder of the library's that was read: its settings, and the tensors of both files."""

    settings: dict[str, Any]
    tensors: Tensors

    def onto(self, model: BertForSequenceClassification) -> Found:
        """Return the plan and its values on a base, which is not changed."""
        count, hidden = len(model.bert.encoder.layer), model.config.hidden_size
        kind: type[Bottleneck] = SeriesAdapter
        if self.settings["is_parallel"]:
            kind = ParallelAdapter
        elif self.settings["original_ln_before"]:
            kind = PfeifferAdapter
        sizes = {
            match[1]: len(tensor)
            for name, tensor in self.tensors.items()
            if (match := _KEY.fullmatch(name)) and match[3] == "down.0"
        }
        tables: list[dict[str, list[Bottleneck]]] = [{} for _ in range(count)]
        for layer, table in enumerate(tables):
            for key, place in PLACES.items():
                end = path_in_model(place, layer)
                expected = bool(self.settings[key]) and layer not in self.settings["leave_out"]
                if expected != (end in sizes):
                    raise WeightsError(
                        f"{self.path} {'lacks' if expected else 'holds'} an adapter in {end}, "
                        f"otherwise than {CONFIG} says; fetch both again, or give the base that it "
                        "was trained on (--model)"
                    )
                if expected:
                    self._check_size(layer, sizes[end], hidden)
                    table[place] = [
                        kind(sizes[end], self.settings["non_linearity"], self.settings["scaling"])
                    ]
        values: Tensors = {}
        trained: Tensors = {}
        for name, tensor in self.tensors.items():
            match = _KEY.fullmatch(name)
            if match is None:
                trained[name] = tensor
            else:
                part = match[3].removesuffix(".0")
                values[f"{match[1]}.adapters.{kind.name}.{part}.{match[4]}"] = tensor
        plan = plan_of(self.path.parent.resolve().name, tables)
        return Found(plan, values_for(model, plan, values, trained, self.path), list(self.notes))

    def _check_size(self, layer: int, size: int, hidden: int) -> None:
        factors = self.settings["reduction_factor"]
        factor = factors
        if isinstance(factors, dict):
            factor = factors.get(str(layer), factors.get("default"))
        if not is_number(factor) or factor <= 0 or max(1, int(hidden // factor)) != size:
            raise WeightsError(
                f"{self.path}: the adapter of layer {layer} has {size} units, and "
                f"reduction_factor {factor!r:.40} of D = {hidden} asks for another number; fetch "
                f"it and {CONFIG} again"
            )


def read(folder: Path) -> AdapterFolder:
    """Read a folder that ``save_adapter`` of the library wrote, with ``use_safetensors=True``.

    Raises
    ------
    WeightsError
        If a file cannot be trusted, or asks for what spafit does not compute.
    """
    entries = read_object(folder / CONFIG)
    if entries.get("model_type") != "bert":
        raise WeightsError(
            f"{folder / CONFIG}: model_type is {entries.get('model_type')!r:.80}, expected bert"
        )
    notes: list[str] = []
    settings = _checked(folder / CONFIG, entries["config"], notes)
    tensors, _ = read_tensors(folder, WEIGHTS, PICKLED)
    matches = [_KEY.fullmatch(name) for name in tensors]
    unknown = [name for name, match in zip(tensors, matches, strict=True) if match is None]
    names = {match[2] for match in matches if match is not None}
    if unknown or len(names) != 1:
        what = listed(unknown, ", ", 3) if unknown else f"{len(names)} adapters, expected one"
        raise WeightsError(f"{folder / WEIGHTS} holds {what}, which spafit does not know")
    head, _ = read_tensors(folder, HEAD, PICKLED_HEAD)
    others = sorted(head.keys() - {"classifier.weight", "classifier.bias"})
    if others:
        raise WeightsError(
            f"{folder / HEAD} holds {listed(others, ', ', 3)}: a head of another kind than "
            "BertForSequenceClassification's"
        )
    num_labels = head_of(head, folder / HEAD)
    base = entries.get("model_name")
    return AdapterFolder(
        path=folder / WEIGHTS,
        settings=settings,
        tensors={**tensors, **head},
        num_labels=num_labels,
        labels=_labels(folder, num_labels),
        base=base if isinstance(base, str) else "",
        notes=notes,
    )


def _checked(path: Path, config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Refuse settings that are not of a form of ours; note what is ignored."""
    if config.get("architecture") is not None:
        raise WeightsError(
            f"{path}: the architecture {config['architecture']!r:.80} is no bottleneck adapter"
        )
    for key, value in sorted(config.items()):
        if key in _COMPUTED:
            if value is not _COMPUTED[key]:
                raise WeightsError(
                    f"{path}: {key} is {value!r:.80}, another form than spafit's, which has "
                    f"{_COMPUTED[key]!r}"
                )
        elif key in _FORM or key in _IN_TRAINING or _NO_MATTER.fullmatch(key):
            continue
        elif value in (None, False, 0, "") or value in ([], {}):
            notes.append(f"ignored: {one_line(key)}, unknown, is {value!r:.20}")
        else:
            raise WeightsError(
                f"{path}: {one_line(key)} is {value!r:.80}, which spafit does not know"
            )
    settings = {
        "original_ln_before": False,
        "is_parallel": False,
        "scaling": 1.0,
        "leave_out": [],
        **config,
    }
    for key in ("mh_adapter", "output_adapter", "original_ln_before", "is_parallel"):
        if not isinstance(settings.get(key), bool):
            raise WeightsError(f"{path}: {key} must be true or false")
    sigma = settings.get("non_linearity")
    if sigma not in ACTIVATIONS:
        raise WeightsError(
            f"{path}: non_linearity is {sigma!r:.80}; spafit has {', '.join(ACTIVATIONS)}"
        )
    if not is_number(settings["scaling"]):
        raise WeightsError(
            f"{path}: scaling is {settings['scaling']!r:.80}; spafit has a fixed number"
        )
    layers = settings["leave_out"]
    if not isinstance(layers, list) or not all(type(each) is int for each in layers):
        raise WeightsError(f"{path}: leave_out must be numbers of layers, found {layers!r:.80}")
    return settings


def _labels(folder: Path, num_labels: int) -> tuple[str, ...] | None:
    """Return the names that head_config.json gives the head's rows, if it names all of them."""
    path = folder / HEAD_CONFIG
    if not path.exists():
        return None
    names, _ = label_names_of({"label2id": read_object(path).get("label2id")}, num_labels)
    return names
