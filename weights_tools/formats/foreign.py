"""What the readers of other programs' adapters share: tensors become a plan with values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification
from spafit.config import read_json
from spafit.errors import WeightsError, listed, one_line
from spafit.plans import MODULES, Plan, Stratum
from spafit.strata import adapt, pretrained_names
from spafit.techniques import Technique
from spafit.weights.safefile import FLOAT_DTYPES, SafeFile

Tensors = dict[str, torch.Tensor]
Table = Mapping[str, Sequence[Technique]]
"""What trains in one layer: its places in :data:`spafit.plans.PLACES`, with their techniques."""

_IN_LAYER = re.compile(r"bert\.encoder\.layer\.([0-9]{1,4})\.(.+)")


@dataclass(frozen=True)
class Found:
    """A foreign adapter in the terms of spafit.

    Attributes
    ----------
    plan : Plan
        What it adds, and where.
    values : dict of str to torch.Tensor
        A value for each parameter that the plan trains, under its name in the model.
    notes : list of str
        What became of everything that is not a value.
    """

    plan: Plan
    values: Tensors
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """An adapter's folder that was read and checked, not yet put on a base.

    Attributes
    ----------
    path : Path
        Its file of weights.
    num_labels : int
        C, the rows of its head.
    labels : tuple of str or None
        The names of the labels in the order of the rows, if the folder has them.
    task : dict
        What the folder says of the task, as an export of ours writes it: perhaps ``task``,
        ``definition`` and ``max_length``.
    base : str
        What the folder calls its base; empty if it does not say.
    notes : list of str
        What was ignored, and what is to be known.
    """

    path: Path
    num_labels: int
    labels: tuple[str, ...] | None
    base: str
    task: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def onto(self, model: BertForSequenceClassification) -> Found:
        """Return its plan and values on a base, which is not changed.

        Raises
        ------
        WeightsError, PlanError
            If it does not fit the base, or something in it has no form in spafit.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it is read")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises
    ------
    WeightsError
        If it is missing or no such thing.
    """
    try:
        entries = read_json(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {one_line(str(error), 600)}") from None
    if not isinstance(entries, dict):
        raise WeightsError(f"{path} must hold a JSON object, found {type(entries).__name__}")
    return entries


def read_tensors(folder: Path, name: str, pickled: str) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors of a safetensors file as float32, and its metadata.

    Raises
    ------
    WeightsError
        If it is missing (a pickle in its place is named, with the way to convert it), cannot be
        trusted, or holds something else than numbers.
    """
    path = folder / name
    if not path.exists() and (folder / pickled).exists():
        raise WeightsError(
            f"{folder / pickled} is a pickle, which is a program and is not read here; if you "
            f"trust who made it: python -m weights_tools convert {folder / pickled} --out {path} "
            "--i-trust-this-file"
        )
    with SafeFile(path) as file:
        others = [each.name for each in file.tensors.values() if each.dtype not in FLOAT_DTYPES]
        if others:
            names = listed(others, ", ")
            raise WeightsError(f"{path} holds {names} in a type that is not floating-point")
        return {each: file.read(each, torch.float32) for each in file.tensors}, file.metadata


def head_of(tensors: Tensors, source: object) -> int:
    """Return C of the head among the tensors.

    Raises
    ------
    WeightsError
        If there is no head for sentences.
    """
    weight = tensors.get("classifier.weight")
    if weight is None or weight.dim() != 2 or "classifier.bias" not in tensors or not len(weight):
        raise WeightsError(
            f"{source} has no head, classifier.weight (C, D) and classifier.bias (C), so that its "
            "logits would be random; save it with its head"
        )
    return len(weight)


def place_of(module: str) -> tuple[int, str] | None:
    """Return the layer and the place in it of a module's name, if it is in a layer."""
    found = _IN_LAYER.fullmatch(module)
    return None if found is None else (int(found[1]), f"layer.{found[2]}")


def is_adaptable(module: str) -> bool:
    """Return whether a module's name is one of the eight of a layer that hold parameters."""
    place = place_of(module)
    return place is not None and place[1] in MODULES


def plan_of(
    name: str, tables: Sequence[Table], embeddings: str = "frozen", pooler: str = "frozen"
) -> Plan:
    """Return a plan of which each stratum is a run of layers with one and the same table."""
    firsts = [0]
    firsts += [i for i in range(1, len(tables)) if dict(tables[i]) != dict(tables[i - 1])]
    ends = [*firsts[1:], len(tables)]
    strata = [
        Stratum(f"group {number}", first, end - 1, tables[first])
        for number, (first, end) in enumerate(zip(firsts, ends, strict=True), 1)
    ]
    return Plan(name, len(tables), strata, embeddings, pooler)


def values_for(
    model: BertForSequenceClassification,
    plan: Plan,
    added: Tensors,
    trained: Tensors,
    source: object,
) -> Tensors:
    """Return a value for each parameter that a plan trains.

    Parameters
    ----------
    model : BertForSequenceClassification
        The base.
    plan : Plan
        The plan.
    added : dict of str to torch.Tensor
        Values of what techniques add, by the names in the model.
    trained : dict of str to torch.Tensor
        Pre-trained tensors as they are after training, of which the plan's deltas are the
        differences from the base. One that is missing is the base's.
    source : object
        The file, for the message.

    Raises
    ------
    WeightsError
        If shapes differ from the model's, or a value has no place in the plan.
    """
    with torch.device("meta"):
        shadow = BertForSequenceClassification(model.config, model.num_labels)
    before = {name: model.get_parameter(name) for name in pretrained_names(model)}
    _compare(trained, {name: tuple(each.shape) for name, each in before.items()}, source)
    adapt(shadow, plan)
    assert shadow.adaptation is not None
    used: set[str] = set()
    values = {}
    for name in shadow.adaptation.trainable:
        owner = name
        for delta, of in ((".bias_delta.delta", ".bias"), (".gain_delta.delta", ".weight")):
            owner = owner.removesuffix(delta) + of if name.endswith(delta) else owner
        used.add(owner)
        base = before[owner].detach().float() if owner in before else None
        value = added[name] if base is None else trained.get(owner, base)
        values[name] = value if owner == name or base is None else value - base
    _compare(values, {name: tuple(shadow.get_parameter(name).shape) for name in values}, source)
    left = sorted((trained.keys() | added.keys()) - used)
    if left:
        raise WeightsError(
            f"{source} holds {listed(left, ', ', 3)}, for which the plan has no place"
        )
    return values


def _compare(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], source: object) -> None:
    """Refuse names that the model does not have, and other shapes than its."""
    faults = [
        f"{name} {list(tensor.shape)} (the model's is {list(shapes[name])})"
        if name in shapes
        else f"{name}, which the model does not have"
        for name, tensor in tensors.items()
        if name not in shapes or tuple(tensor.shape) != shapes[name]
    ]
    if faults:
        raise WeightsError(
            f"{source} does not fit this base: it holds {listed(faults, '; ', 3)}; give the base "
            "that it was trained on (--model)"
        )
