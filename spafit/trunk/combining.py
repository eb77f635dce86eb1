"""Begin an adapter with another, or add several up (task arithmetic, Ilharco et al., 2023)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import nn

from spafit.adaptable import Linear
from spafit.adaptation import Adaptation, Place
from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError, one_line
from spafit.plans import Plan, Stratum, path_in_model
from spafit.strata import adapt, check_name, named_adapter, using
from spafit.summary import Summary
from spafit.techniques import Technique, Term, added_up


def copy_adapter(
    model: BertForSequenceClassification,
    source: str,
    name: str,
    *,
    num_labels: int | None = None,
    seed: int = 0,
) -> Summary:
    """Add an adapter that begins with the values of another one, such as for a related task.

    Parameters
    ----------
    model : BertForSequenceClassification
        A model with the adapter ``source``. The new one is in use afterwards.
    source, name : str
        The names of the two.
    num_labels : int, optional
        C of a new head, drawn by ``seed``; None copies the head too, with its labels.
    seed : int
        Seeds the new head.

    Returns
    -------
    Summary
        As of :func:`spafit.adapt`.

    Raises
    ------
    PlanError
        If there is no adapter ``source``, or one of the new name already; or the head to copy is
        of a kind of a user's own.
    """
    other = _unmerged(model, source)
    check_name(model, name)
    if num_labels is None:
        _require_plain_head(model, other)
    with using(model, source):
        values = {
            each: model.get_parameter(each).detach().clone()
            for each in other.trainable
            if num_labels is None or not each.startswith("classifier.")
        }
    own_head = other.num_labels if num_labels is None else num_labels
    summary = adapt(model, other.plan, name=name, num_labels=own_head, seed=seed)
    with torch.no_grad():
        for each, value in values.items():
            model.get_parameter(each).copy_(value)
    if num_labels is None:
        _take_labels(model.adaptations[name], other)
    return summary


def combine(
    model: BertForSequenceClassification, weights: Mapping[str, float], *, name: str, head: str
) -> Summary:
    """Add an adapter that changes the pre-trained model by the weighted sum of what others change.

    Task arithmetic: Σ w (θ - θ_0), where θ_0 is pre-trained (Ilharco et al., 2023, arXiv
    2212.04089). Deltas and tensors that were trained directly are added; of LoRA the products: the
    sum of BA of rank r and of rank r' is one of rank r + r'. Of (IA)³ and of adapters with a
    bottleneck there is no sum.

    Parameters
    ----------
    model : BertForSequenceClassification
        A model with these adapters. The new one is in use afterwards.
    weights : mapping of str to float
        w of each adapter, by its name; a negative one takes away.
    name : str
        The name of the new adapter.
    head : str
        The adapter whose head, with its labels, the new one has: heads are not added.

    Returns
    -------
    Summary
        As of :func:`spafit.adapt`.

    Raises
    ------
    PlanError
        If there is no such adapter, or one of the new name already; a weight is not a finite
        number; or a technique has no sum, or cannot stand beside another of them.
    """
    check_name(model, name)
    adapters = {each: _unmerged(model, each) for each in weights}
    of_head = _unmerged(model, head)
    _require_plain_head(model, of_head)
    if not adapters:
        raise PlanError("there is nothing to combine; give the weight of one or more adapters")
    for each, weight in weights.items():
        if not math.isfinite(weight):
            raise PlanError(f"the weight of {each!r:.200} must be a finite number, found {weight}")
    with using(model, None):
        plan, values = _added_up(adapters, weights)
    summary = adapt(model, plan, name=name, num_labels=of_head.num_labels)
    values |= {f"classifier.{each}": value for each, value in _values(of_head.head).items()}
    with torch.no_grad():
        for path, value in values.items():
            model.get_parameter(path).copy_(value)
    _take_labels(model.adaptations[name], of_head)
    return summary


def _added_up(
    adapters: Mapping[str, Adaptation], weights: Mapping[str, float]
) -> tuple[Plan, dict[str, torch.Tensor]]:
    """Return the plan of a weighted sum, and its values by the names that they have in a model."""
    first = next(iter(adapters.values())).plan
    values: dict[str, torch.Tensor] = {}
    strata: list[Stratum] = []
    for number in range(first.num_layers):
        train: dict[str, list[Technique]] = {}
        for path, kinds in _of_layer(adapters, weights, number).items():
            for terms in kinds.values():
                technique, found = terms[0].technique.summed(terms)
                train.setdefault(path, []).append(technique)
                place = path_in_model(path, number)
                values |= {f"{place}.{each}": value for each, value in found.items()}
        alone = Stratum(f"layer {number}", number, number, train)
        if strata and strata[-1].train == alone.train:
            strata[-1] = dataclasses.replace(strata[-1], last=number)
        else:
            strata.append(alone)
    strata = [
        dataclasses.replace(each, name=f"group {group}") for group, each in enumerate(strata, 1)
    ]
    whole = {"embeddings": "frozen", "pooler": "frozen"}
    for part in ("embeddings", "pooler"):
        terms = [
            Term(weights[name], Technique(), _values(place.adapted), _values(place.base))
            for name, each in adapters.items()
            for place in each.places
            if place.path == f"bert.{part}"
        ]
        if terms:
            whole[part] = "full"
            values |= {f"bert.{part}.{each}": value for each, value in added_up(terms).items()}
    said = " + ".join(f"{weights[each]:g} {one_line(each, 60)}" for each in adapters)
    return Plan(said, first.num_layers, strata, whole["embeddings"], whole["pooler"]), values


def _of_layer(
    adapters: Mapping[str, Adaptation], weights: Mapping[str, float], number: int
) -> dict[str, dict[str, list[Term]]]:
    """Return the terms of a layer by the path in it and the name of the technique."""
    found: dict[str, dict[str, list[Term]]] = {}
    for name, adaptation in adapters.items():
        places = {place.path: place for place in adaptation.places}
        for stratum in adaptation.plan.strata:
            if not stratum.first <= number <= stratum.last:
                continue
            for path, techniques in stratum.train.items():
                place = places[path_in_model(path, number)]
                for technique in techniques:
                    term = _term(weights[name], technique, place)
                    found.setdefault(path, {}).setdefault(technique.name, []).append(term)
    return found


def _term(weight: float, technique: Technique, place: Place) -> Term:
    before = _values(place.base)
    values = {each: place.adapted.get_parameter(each).detach() for each in technique.trains}
    return Term(weight, technique, values, {k: v for k, v in before.items() if k in values})


def _values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _unmerged(model: BertForSequenceClassification, name: str) -> Adaptation:
    adaptation = named_adapter(model, name)
    adaptation.require_unmerged()
    return adaptation


def _require_plain_head(model: BertForSequenceClassification, adaptation: Adaptation) -> None:
    head = model.classifier if model.adaptation is adaptation else adaptation.head
    if not isinstance(head, Linear):
        raise PlanError(
            f"the head of {adaptation.name!r:.200} was replaced by a {type(head).__name__}, which "
            "cannot be copied; draw a new one (copy_adapter with num_labels), or take another"
        )


def _take_labels(adaptation: Adaptation, other: Adaptation) -> None:
    adaptation.task, adaptation.labels = other.task, other.labels
    adaptation.definition = other.definition
