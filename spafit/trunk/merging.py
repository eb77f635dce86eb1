"""Fold what an adapter added into the pre-trained tensors: a plain BERT under the original names.

The pre-trained tensors are kept beside it, so that it can be undone, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from spafit.adaptable import Adaptable, SublayerEnd, why_not_merged
from spafit.adaptation import Place, twin
from spafit.bert import BertForSequenceClassification, lay_side_by_side
from spafit.errors import PlanError, listed
from spafit.strata import pretrained_names, use

_SAVE_INSTEAD = "save an adapter instead (spafit.save_adapter)"


def merged_state_dict(model: BertForSequenceClassification) -> dict[str, torch.Tensor]:
    """Return a state dict with plain BERT keys, all additions folded into the pre-trained tensors.

    Each module to which something was added gives its own merged form
    (:meth:`spafit.adaptable.Adaptable.merged`): W + (alpha/r) BA, computed in float64 and rounded
    once to W's type; b + δ in b's type.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model, which is not changed; merging twice is merging once.

    Returns
    -------
    dict of str to torch.Tensor
        Copies, under the keys of a model that was never adapted and in its order.

    Raises
    ------
    PlanError
        If the adapters are disabled, something was added that has no merged form, or a pre-trained
        parameter is no longer there; it is named.
    """
    adapted = to_be_merged(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {name: parameters[name].detach().clone() for name in pretrained_names(model)}
    for owner, module in adapted.items():
        for key, value in module.merged().items():
            if f"{owner}.{key}" not in state:
                raise PlanError(f"{type(module).__name__}.merged gives {key}, no pre-trained key")
            state[f"{owner}.{key}"] = value
    return state


def to_be_merged(model: BertForSequenceClassification) -> dict[str, Adaptable]:
    """Return the modules to which something was added, by name, all of which can be merged.

    Raises
    ------
    PlanError
        As :func:`merged_state_dict`.
    """
    if model.adaptation is not None:
        model.adaptation.require_enabled()
    pretrained = pretrained_names(model)
    places = {name: each for name, each in model.named_modules() if isinstance(each, Adaptable)}
    owners = {name.rpartition(".")[0] for name in pretrained}  # the modules that hold them
    owners |= {name for name, place in places.items() if isinstance(place, SublayerEnd)}
    adapted: dict[str, Adaptable] = {}
    for name, _ in model.named_parameters():
        if name in pretrained:
            continue
        owner = name
        while owner and owner not in owners:
            owner = owner.rpartition(".")[0]  # the enclosing module, in the end the model itself
        module = model.get_submodule(owner)
        if not isinstance(module, Adaptable) or name.removeprefix(f"{owner}.") not in module.merges:
            mend = _SAVE_INSTEAD
            if ".parametrizations." in name:
                mend = "remove it (torch.nn.utils.parametrize.remove_parametrizations)"
            why = why_not_merged(module) if isinstance(module, Adaptable) else ""
            why = why or f"{type(module).__name__}.merges does not name it"
            raise PlanError(f"{name} has no merged form: {why}; {mend}")
        adapted[owner] = module
    for name, place in places.items():  # also what computes something else without a parameter
        if why := why_not_merged(place):
            raise PlanError(f"{name} has no merged form: {why}; {_SAVE_INSTEAD}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    gone = [name for name in pretrained if name not in parameters]
    if gone:
        raise PlanError(f"the model lacks {listed(gone, ', ')}, which its merged form needs")
    return adapted


def merge(model: BertForSequenceClassification) -> None:
    """Put the merged form of the adapter in use into the model: a plain BERT with the same labels.

    The model then has the parameters of one that was never adapted, under their names; where the
    adapter changes nothing they are the pre-trained ones themselves. Merging again changes nothing.
    :func:`unmerge` restores the adapter, and :func:`spafit.use` the pre-trained model or another
    adapter. A merged adapter cannot be trained, saved or disabled.

    Raises
    ------
    PlanError
        As :func:`merged_state_dict`, if no adapter is in use, or if the adapter in use trained the
        pre-trained tensors themselves and is therefore merged already.
    """
    adaptation = model.adaptation
    if adaptation is None:
        raise PlanError("no adapter is in use, so that there is nothing to merge (spafit.use)")
    if adaptation.merged_from is not None:
        return
    adaptation.require_base()
    state = merged_state_dict(model)
    places = adaptation.places
    use(model, None)
    merged = dataclasses.replace(
        adaptation, trained={}, untrained={}, places=[], dropout=[], merged_from=adaptation
    )
    try:
        for place in places:
            if place.path.startswith("bert.encoder."):
                plain = _plain(place, state)
            else:
                plain = copy.deepcopy(place.adapted).requires_grad_(False)
            merged.places.append(Place(model, place.path, plain))
        lay_side_by_side(model)
    except BaseException:
        merged.take(model)
        use(model, adaptation.name)
        raise
    model.adaptation = model.adaptations[adaptation.name] = merged


def _plain(place: Place, state: dict[str, torch.Tensor]) -> nn.Module:
    """Return the pre-trained module of a place with its merged tensors, in its mode."""
    changed = {
        name: merged
        for name, tensor in place.base.named_parameters()
        if not torch.equal(tensor, merged := state[f"{place.path}.{name}"])
    }
    plain = twin(place.base, changed)
    for name, merged in changed.items():
        plain.get_parameter(name).data = merged
    return plain


def unmerge(model: BertForSequenceClassification) -> None:
    """Put the adapter that was merged back, as it was before, bit for bit.

    Raises
    ------
    PlanError
        If no merged adapter is in use.
    """
    merged = model.adaptation
    if merged is None or merged.merged_from is None:
        raise PlanError("no merged adapter is in use; spafit.merge makes one")
    use(model, None)
    model.adaptations[merged.name] = merged.merged_from
    use(model, merged.name)
