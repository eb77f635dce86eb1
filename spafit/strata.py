"""Apply a plan to a model, switch what it added off, merge it, and fingerprint the base."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from spafit.adaptable import Adaptable, Linear, SublayerEnd, why_not_merged
from spafit.adaptation import Adaptation
from spafit.bert import BertForSequenceClassification, Layer, lay_side_by_side
from spafit.config import BertConfig
from spafit.errors import PlanError, WeightsError, listed
from spafit.methods import plan as make_plan
from spafit.plans import Plan, Stratum, Trained
from spafit.summary import Summary, summarise_plan
from spafit.techniques import Technique, attach_all


def adapt(
    model: BertForSequenceClassification, plan: Plan | str | Path, *, seed: int = 0
) -> Summary:
    """Freeze a model, and attach and unfreeze exactly what a plan declares; the head always trains.

    Parameters
    ----------
    model : BertForSequenceClassification
        A model that has not been adapted. Its pre-trained keys do not change.
    plan : Plan, str or Path
        A plan, or a method or plan file as for :func:`spafit.plan`.
    seed : int
        Seeds the initial values of LoRA's A, drawn in the order of the forward pass; they are the
        same on every device. Torch's global generator is not used.

    Returns
    -------
    Summary
        The counts, taken from the model itself.

    Raises
    ------
    PlanError
        If the model was adapted before or the plan does not fit it; the model is then unchanged.
    """
    if model.adaptation is not None:
        raise PlanError(
            f"the model is adapted already, by {model.adaptation.plan.name}; load it afresh"
        )
    plan = make_plan(plan, model.config.num_hidden_layers)
    pretrained = _count_pretrained(model)
    on_meta = model.classifier.weight.is_meta
    base_fingerprint = fingerprint(model) if plan.writes_pretrained and not on_meta else None
    generator = torch.Generator().manual_seed(_stream("lora_A", seed))

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    declared: dict[str, Trained] = {}
    bottom, top = plan.strata[0], plan.strata[-1]
    for prefix, part, mode, how in (
        ("bert.embeddings", model.bert.embeddings, plan.embeddings, _trained(bottom, plan, -1)),
        ("bert.pooler", model.bert.pooler, plan.pooler, Trained(thaw=top.thaw, freeze=top.freeze)),
    ):
        if part is not None and mode == "full":
            declared |= {f"{prefix}.{name}": how for name, _ in part.named_parameters()}
    kept: list[str] = []  # directly trained tensors that are small enough to keep a copy of
    for stratum in plan.strata:
        for number in range(stratum.first, stratum.last + 1):
            if stratum.dropout is not None:
                layer = model.bert.encoder.layer[number]
                assert isinstance(layer, Layer)
                layer.set_dropout(stratum.dropout)
            for path, techniques in stratum.train.items():
                name = f"bert.encoder.{path.replace('layer', f'layer.{number}', 1)}"
                module = model.get_submodule(name)
                assert isinstance(module, Adaptable)
                parent, _, child = name.rpartition(".")
                adapted = attach_all(techniques, module, generator)
                setattr(model.get_submodule(parent), child, adapted)
                for technique in techniques:
                    for added in technique.trains:
                        how = _trained(stratum, plan, number, technique, added)
                        declared[f"{name}.{added}"] = how
                    kept += [f"{name}.{parameter}" for parameter in technique.copies]
    lay_side_by_side(model)
    head = [f"classifier.{name}" for name, _ in model.classifier.named_parameters()]
    declared |= dict.fromkeys(head, Trained())
    for name in declared:
        model.get_parameter(name).requires_grad_(True)

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(declared), "what trains is not what the plan declares"
    model.adaptation = Adaptation(
        plan=plan,
        trained=declared,
        untrained={name: model.get_parameter(name).detach().clone() for name in (*kept, *head)},
        base_fingerprint=base_fingerprint,
    )
    return summarise_plan(model, plan, pretrained)


def _trained(
    stratum: Stratum,
    plan: Plan,
    layer: int,
    technique: Technique | None = None,
    parameter: str = "",
) -> Trained:
    """Return how a parameter of a layer is trained; layer -1 is the embeddings."""
    rate = plan.rate_decay ** (plan.num_layers - 1 - layer)
    decay = None
    if layer >= 0:
        rate, decay = stratum.rate * rate, stratum.weight_decay
    if technique is not None:
        rate *= technique.rate_of(parameter)
        decay = decay if technique.weight_decay is None else technique.weight_decay
    return Trained(rate, decay, stratum.thaw, stratum.freeze)


def summarise(model: BertForSequenceClassification) -> Summary:
    """Count what trains in an adapted model.

    Raises
    ------
    PlanError
        If the model was not adapted.
    """
    adaptation = _adaptation(model)
    return summarise_plan(model, adaptation.plan, _count_pretrained(model))


def layers_of_group(model: BertForSequenceClassification, group: int) -> range:
    """Return the layers of a group in an adapted model's plan; groups are numbered from 1."""
    stratum = _adaptation(model).plan.strata[group - 1]
    return range(stratum.first, stratum.last + 1)


@contextmanager
def frozen_stored_in(model: BertForSequenceClassification, dtype: torch.dtype) -> Iterator[None]:
    """Store the frozen matrices of an adapted model's encoder in half precision, inside the block.

    Biases, LayerNorms, embeddings and all that the plan trains keep their type. At the end the
    pre-trained matrices are restored, bit for bit, on the device that the model is then on.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model.
    dtype : torch.dtype
        ``torch.bfloat16`` or ``torch.float16``.

    Raises
    ------
    PlanError
        If the model was not adapted.
    """
    adaptation = _adaptation(model)
    if adaptation.base_fingerprint is None:  # what is saved inside belongs to the unrounded base
        adaptation.base_fingerprint = fingerprint(model)
    frozen = [
        module
        for name, module in model.bert.named_modules()
        if name.startswith("encoder.")
        and isinstance(module, Linear)
        and f"bert.{name}.weight" not in adaptation.trainable
    ]
    pretrained = [module.weight.data for module in frozen]
    for module in frozen:
        module.weight.data = module.weight.data.to(dtype)
    lay_side_by_side(model)
    try:
        yield
    finally:
        for module, weight in zip(frozen, pretrained, strict=True):
            module.weight.data = weight.to(module.weight.device)
        lay_side_by_side(model)


def _stream(purpose: str, seed: int) -> int:
    """Derive a generator's seed, so that two purposes never draw the same numbers."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:8], "little") >> 1


def _adaptation(model: BertForSequenceClassification) -> Adaptation:
    if model.adaptation is None:
        raise PlanError("the model was not adapted; call spafit.adapt or spafit.load_adapter first")
    return model.adaptation


# Held while a block is entered or left, not inside it. Reentrant, because the garbage collector may
# run then in the same thread, and end the block of a generator that nobody finished.
_DISABLING = threading.RLock()


@contextmanager
def adapters_disabled(model: BertForSequenceClassification) -> Iterator[None]:
    """Restore the model before training, bit for bit, inside a ``with`` block.

    What techniques added is switched off; the head and the biases that train directly have their
    untrained values inside the block. Blocks may nest, overlap and end in any order, also in
    several threads: the first to begin switches off, the last to end switches on. All threads share
    the model, so each of them sees it as it was before training while any block lasts.

    If ``.to()``, ``.double()`` and the like are called inside the block, they apply to the trained
    values too. A module whose ``adapters_on`` was False before stays switched off.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model.

    Raises
    ------
    PlanError
        If the model was not adapted, or its plan trains whole pre-trained modules ("full"), of
        which no untrained copy is kept.
    """
    adaptation = _adaptation(model)
    pretrained = set(pretrained_names(model))
    lost = [
        name
        for name in adaptation.trainable
        if name not in adaptation.untrained and name in pretrained
    ]
    if lost:
        raise PlanError(
            f"{adaptation.plan.name} writes to pre-trained tensors ({lost[0]} and "
            f"{len(lost) - 1} more), so the model before training is gone; load it afresh"
        )
    with _DISABLING:
        if adaptation.disabled == 0:
            _switch_off(model, adaptation)
        adaptation.disabled += 1
    try:
        yield
    finally:
        with _DISABLING:
            adaptation.disabled -= 1
            if adaptation.disabled == 0:
                _switch_on(model, adaptation)


def _switch_off(model: BertForSequenceClassification, adaptation: Adaptation) -> None:
    parameters = {name: model.get_parameter(name) for name in adaptation.untrained}
    shown = {  # made before anything is changed, because memory may run out
        name: untrained.to(parameters[name].device, parameters[name].dtype, copy=True)
        for name, untrained in adaptation.untrained.items()
    }
    adaptation.switched_off = [
        module for module in model.modules() if isinstance(module, Adaptable) and module.adapters_on
    ]
    adaptation.set_aside = {name: parameter.data for name, parameter in parameters.items()}
    for module in adaptation.switched_off:
        module.adapters_on = False
    for name, parameter in parameters.items():
        parameter.data = shown[name]


def _switch_on(model: BertForSequenceClassification, adaptation: Adaptation) -> None:
    for module in adaptation.switched_off:
        module.adapters_on = True
    for name, trained in adaptation.set_aside.items():
        # By name: a move to another device or type may have put another parameter there.
        parameter = model.get_parameter(name)
        parameter.data = trained.to(parameter.device, parameter.dtype)
    adaptation.switched_off, adaptation.set_aside = [], {}


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
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gone = [name for name in pretrained if name not in parameters]
    if gone:
        raise PlanError(f"the model lacks {listed(gone, ', ')}, which its merged form needs")
    state = {name: parameters[name].detach().clone() for name in pretrained}
    for owner, module in adapted.items():
        for key, value in module.merged().items():
            if f"{owner}.{key}" not in state:
                raise PlanError(f"{type(module).__name__}.merged gives {key}, no pre-trained key")
            state[f"{owner}.{key}"] = value
    return state


def pretrained_names(model: BertForSequenceClassification) -> tuple[str, ...]:
    """Return the parameters of a model as built, in its order; all others were added to it."""
    return _names_as_built(model.config)


@functools.lru_cache(maxsize=16)
def _names_as_built(config: BertConfig) -> tuple[str, ...]:
    with torch.device("meta"):
        return tuple(name for name, _ in BertForSequenceClassification(config).named_parameters())


def _added(model: BertForSequenceClassification) -> set[str]:
    """Return the parameters that were added to a model, by its plan or by hand.

    A technique trains all it adds, and a module names what it added (:attr:`Adaptable.merges`).
    """
    names = set() if model.adaptation is None else set(model.adaptation.trainable)
    for owner, module in model.named_modules():
        if isinstance(module, Adaptable):
            names.update(f"{owner}.{name}" for name in module.merges)
    return names - set(pretrained_names(model))


def _count_pretrained(model: BertForSequenceClassification) -> int:
    added = _added(model)
    return sum(each.numel() for name, each in model.named_parameters() if name not in added)


def fingerprint(model: BertForSequenceClassification) -> str:
    """Return the SHA-256 of the pre-trained tensors of embeddings, encoder and pooler.

    The head and what techniques add are left out. Every tensor contributes its name, its shape and
    its values as little-endian float32, in the order of the names, so that a float16 file gives the
    same fingerprint whether it was loaded as float16 or as float32.

    Parameters
    ----------
    model : BertForSequenceClassification
        Adapted or not.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    WeightsError
        If the model is on the meta device, where it has no values.
    """
    digest = hashlib.sha256()
    added = _added(model)
    for name, parameter in sorted(model.bert.named_parameters()):
        if f"bert.{name}" in added:
            continue
        if parameter.is_meta:
            raise WeightsError("a model on the meta device has no values to take a fingerprint of")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()
