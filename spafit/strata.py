"""Apply a plan to a model, switch what it added off, merge it, and fingerprint the base."""

from __future__ import annotations

import copy
import functools
import hashlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import nn

from spafit.adaptable import Adaptable, Linear
from spafit.adaptation import Adaptation, twin
from spafit.bert import (
    BertForSequenceClassification,
    Layer,
    lay_side_by_side,
    new_head,
    set_impl,
)
from spafit.config import BertConfig
from spafit.errors import PlanError, WeightsError, one_line
from spafit.kernels.products import bf16_products, laid_out
from spafit.methods import plan as make_plan
from spafit.plans import Plan, Stratum, Trained, path_in_model
from spafit.summary import Summary, summarise_plan
from spafit.techniques import Technique, attach_all

DEFAULT = "default"
"""The name of an adapter that was given none."""


def adapt(
    model: BertForSequenceClassification,
    plan: Plan | str | Path,
    *,
    seed: int = 0,
    name: str | None = None,
    num_labels: int | None = None,
) -> Summary:
    """Freeze a model, and attach and unfreeze exactly what a plan declares; the head always trains.

    A model may have several adapters, each by a name; :func:`spafit.use` chooses among them. The
    new one is in use.

    Parameters
    ----------
    model : BertForSequenceClassification
        Its pre-trained keys do not change.
    plan : Plan, str or Path
        A plan, or a method or plan file as for :func:`spafit.plan`.
    seed : int
        Seeds the initial values of LoRA's A, drawn in the order of the forward pass; they are the
        same on every device. Torch's global generator is not used.
    name : str, optional
        A name that no adapter of the model has. An adapter with a name leaves all pre-trained
        tensors to the others: those that it trains directly ("full") are copied. Without one it is
        the model's first, its name is "default", and only those of ``Technique.copies`` are.
    num_labels : int, optional
        C of a new head, its values drawn by ``seed`` too; None begins with a copy of the model's.

    Returns
    -------
    Summary
        The counts, taken from the model itself.

    Raises
    ------
    PlanError
        If the model has an adapter of that name, the plan does not fit it, a module's ``forward``
        was replaced by a function that is no method of it, or the pre-trained model is gone because
        an adapter without a name trained it directly; the model is then unchanged.
    """
    if name is None and model.adaptations:
        known = " and ".join(each.plan.name for each in model.adaptations.values())
        raise PlanError(
            f"the model is adapted already, by {one_line(known)}; load it afresh, or give this "
            'adapter a name of its own (name="...")'
        )
    key = DEFAULT if name is None else name
    check_name(model, key)
    for other in model.adaptations.values():
        other.require_enabled()
    plan = make_plan(plan, model.config.num_hidden_layers)
    before = None if model.adaptation is None else model.adaptation.name
    use(model, None)
    adaptation, present = Adaptation(plan, key), list(model.parameters())
    try:
        pretrained = _count_pretrained(model)
        head = None if num_labels is None else _drawn_head(model, num_labels, seed)
        if plan.writes_pretrained and not present[0].is_meta:
            adaptation.base_fingerprint = fingerprint(model)
        _attach(adaptation, model, head, seed, first=name is None)
    except BaseException:
        adaptation.take(model)
        use(model, before)
        raise
    for parameter in present:
        parameter.requires_grad_(False)
    declared = set(adaptation.trained)
    for each in declared:
        model.get_parameter(each).requires_grad_(True)
    trainable = {each for each, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == declared, "what trains is not what the plan declares"
    adaptation.depth = model.bert.frozen_depth
    written = declared.intersection(pretrained_names(model)) - adaptation.untrained.keys()
    adaptation.lost = tuple(each for each in adaptation.trained if each in written)
    model.adaptation = model.adaptations[key] = adaptation
    return summarise_plan(model, plan, pretrained)


def _attach(
    adaptation: Adaptation,
    model: BertForSequenceClassification,
    head: nn.Module | None,
    seed: int,
    *,
    first: bool,
) -> None:
    """Put what an adaptation's plan declares, and a head, into a model; note what trains and how.

    ``first`` is the adapter without a name. Others copy all pre-trained tensors that they train
    directly, and leave them to the rest.
    """
    plan, trained = adaptation.plan, adaptation.trained
    generator = torch.Generator().manual_seed(_stream("lora_A", seed))
    bottom, top = plan.strata[0], plan.strata[-1]
    for path, part, mode, how in (
        ("bert.embeddings", model.bert.embeddings, plan.embeddings, _trained(bottom, plan, -1)),
        ("bert.pooler", model.bert.pooler, plan.pooler, Trained(thaw=top.thaw, freeze=top.freeze)),
    ):
        if part is not None and mode == "full":
            names = [name for name, _ in part.named_parameters()]
            trained |= {f"{path}.{name}": how for name in names}
            if not first:
                adaptation.put_in(model, path, twin(part, names), names, first=False)
    for stratum in plan.strata:
        for number in range(stratum.first, stratum.last + 1):
            if stratum.dropout is not None:
                layer = model.bert.encoder.layer[number]
                assert isinstance(layer, Layer)
                adaptation.dropout.append((layer, layer.dropout))
                layer.dropout = (stratum.dropout,) * 3
            for path, techniques in stratum.train.items():
                path = path_in_model(path, number)
                module = model.get_submodule(path)
                if not isinstance(module, Adaptable):
                    raise PlanError(
                        f"{path} was replaced by a {type(module).__name__}, to which nothing can "
                        "be attached; let it be a subclass of what stood there"
                    )
                copied = [
                    name
                    for technique in techniques
                    for name in (technique.copies if first else technique.trains)
                    if name in dict(module.named_parameters())
                ]
                adapted = attach_all(techniques, _with_own_hooks(twin(module, copied)), generator)
                _share_hooks(module, adapted)
                adaptation.put_in(model, path, adapted, copied, first=first)
                for technique in techniques:
                    for name in technique.trains:
                        how = _trained(stratum, plan, number, technique, name)
                        trained[f"{path}.{name}"] = how
    lay_side_by_side(model)
    own_head = _copied(model.classifier) if head is None else head
    names = [name for name, _ in own_head.named_parameters()]
    trained |= {f"classifier.{name}": Trained() for name in names}
    adaptation.put_in(model, "classifier", own_head, names, first=first and head is None)


def _with_own_hooks(module: Adaptable) -> Adaptable:
    """Give a twin hooks of its own, so that one that a technique attaches is not the base's."""
    for key, hooks in vars(module).items():
        if "_hooks" in key:
            vars(module)[key] = hooks.copy()
    return module


def _share_hooks(base: Adaptable, adapted: Adaptable) -> None:
    """Have a twin share the base's hooks: who removes one removes it from both."""
    for key, hooks in vars(adapted).items():
        if "_hooks" in key and hooks and hooks == vars(base)[key]:
            vars(adapted)[key] = vars(base)[key]


def _copied(head: nn.Module) -> nn.Module:
    """Return a copy of a head with the same hooks: who removes one removes it from both."""
    hooks = [vars(each)[key] for each in head.modules() for key in vars(each) if "_hooks" in key]
    return copy.deepcopy(head, {id(each): each for each in hooks})


def _drawn_head(model: BertForSequenceClassification, num_labels: int, seed: int) -> nn.Module:
    """Return a new head for C labels, the same on every device."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(_stream("classifier", seed))
        head = new_head(model.config, num_labels, generator)
    set_impl(head, getattr(model.classifier, "impl", "auto"))  # a user may have replaced it
    return head.to(next(model.classifier.parameters())).train(model.classifier.training)


def use(model: BertForSequenceClassification, name: str | None) -> None:
    """Choose the adapter with which a model computes, trains and is saved, its head included.

    No tensor is copied: modules are exchanged. An optimizer that was made before goes on training
    the parameters that it was made for.

    Parameters
    ----------
    model : BertForSequenceClassification
        A model with any number of adapters; they are at ``model.adaptations``.
    name : str or None
        The adapter's name; None is the pre-trained model.

    Raises
    ------
    PlanError
        If there is no adapter of that name, the adapters are disabled at the moment, or the one in
        use trains pre-trained tensors of which there is no copy.
    """
    with _DISABLING:
        chosen = None if name is None else named_adapter(model, name)
        used = model.adaptation
        if chosen is used:
            return
        if used is not None:
            used.require_enabled()
            used.require_base()
        if chosen is not None:
            chosen.require_enabled()
        if used is not None:
            used.take(model)
        if chosen is not None:
            chosen.put(model)
        model.adaptation = chosen


@contextmanager
def using(model: BertForSequenceClassification, name: str | None) -> Iterator[None]:
    """Have an adapter in use inside the block (:func:`use`), and afterwards the one before it."""
    before = None if model.adaptation is None else model.adaptation.name
    use(model, name)
    try:
        yield
    finally:
        use(model, before)


def remove_adapter(model: BertForSequenceClassification, name: str) -> None:
    """Remove an adapter from a model; if it is in use, the model is then the pre-trained one.

    Raises
    ------
    PlanError
        As :func:`use`.
    """
    with _DISABLING:
        if named_adapter(model, name) is model.adaptation:
            use(model, None)
        del model.adaptations[name]
        model.mix = None


def named_adapter(model: BertForSequenceClassification, name: str) -> Adaptation:
    """Return the adapter of a name; raise a PlanError with the known names if there is none."""
    if name not in model.adaptations:
        known = ", ".join(map(repr, model.adaptations))
        raise PlanError(
            f"the model has no adapter {name!r:.200}; "
            + (f"it has {one_line(known, 600)}" if known else "load one by spafit.load_adapter")
        )
    return model.adaptations[name]


def check_name(model: BertForSequenceClassification, name: str) -> None:
    """Raise a PlanError if a new adapter of a model cannot have this name."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise PlanError(f"an adapter's name must be text, found {name!r:.200}")
    if name in model.adaptations:
        raise PlanError(
            f"the model has an adapter {name!r:.200} already; give this one another name, or "
            "remove that one (spafit.remove_adapter)"
        )


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
    """Store the frozen matrices of an adapted model in half precision, inside the block.

    They are those of the encoder and the pooler. Biases, LayerNorms, embeddings and all that the
    plan trains keep their type. At the end the pre-trained matrices are restored, bit for bit, on
    the device that the model is then on.

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
    adaptation.base_fingerprint = base_fingerprint(model)  # of what is saved inside: not rounded
    frozen = _frozen_maps(model)
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


def frozen_in_half(
    model: BertForSequenceClassification, dtype: torch.dtype, device: torch.device
) -> AbstractContextManager[None]:
    """Have products read the frozen matrices of a model in half precision, inside the block.

    On a CPU with products in bf16 the matrices stay as they are, and a copy of each is made as
    oneDNN wants it (:func:`spafit.kernels.products.laid_out`); elsewhere they are stored in the
    type (:func:`frozen_stored_in`).

    Parameters
    ----------
    model, dtype
        As for :func:`frozen_stored_in`.
    device : torch.device
        The one on which the model is inside the block.
    """
    weights = [module.weight for module in _frozen_maps(model)]
    is_there = all(each.device == device for each in weights)
    if device.type == "cpu" and is_there and dtype == torch.bfloat16 and bf16_products():
        return laid_out(weights)
    return frozen_stored_in(model, dtype)


def _frozen_maps(model: BertForSequenceClassification) -> list[Linear]:
    """Return the maps of encoder and pooler whose matrix the plan does not train."""
    trainable = _adaptation(model).trainable
    return [
        module
        for name, module in model.bert.named_modules()
        if isinstance(module, Linear) and f"bert.{name}.weight" not in trainable
    ]


def _stream(purpose: str, seed: int) -> int:
    """Derive a generator's seed, so that two purposes never draw the same numbers."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:8], "little") >> 1


def _adaptation(model: BertForSequenceClassification) -> Adaptation:
    if model.adaptation is None:
        require_none_to_choose(model)
        raise PlanError("the model was not adapted; call spafit.adapt or spafit.load_adapter first")
    return model.adaptation


def require_none_to_choose(model: BertForSequenceClassification) -> None:
    """Raise a PlanError if a model in which no adapter is in use has one that could be."""
    if model.adaptations:
        known = one_line(", ".join(map(repr, model.adaptations)), 600)
        raise PlanError(f"no adapter is in use; choose one of {known} (spafit.use)")


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
    with _DISABLING:
        if model.adaptation is None and model.adaptations:  # pre-trained, and it stays so
            disabled = list(model.adaptations.values())
        else:
            adaptation = _adaptation(model)
            adaptation.require_base()
            adaptation.require_unmerged()
            if adaptation.disabled == 0:
                _switch_off(model, adaptation)
            disabled = [adaptation]
        for each in disabled:
            each.disabled += 1
    try:
        yield
    finally:
        with _DISABLING:
            for each in disabled:
                each.disabled -= 1
                if each.disabled == 0:
                    _switch_on(model, each)


def _switch_off(model: BertForSequenceClassification, adaptation: Adaptation) -> None:
    parameters = {name: model.get_parameter(name) for name in adaptation.untrained}
    shown = {  # made before anything is changed, because memory may run out
        name: module.get_parameter(key).detach().clone()
        for name, (module, key) in adaptation.untrained.items()
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


def base_fingerprint(model: BertForSequenceClassification) -> str:
    """Return the fingerprint of a model's base, also where the adapter in use has changed it."""
    used = model.adaptation
    if used is not None and used.base_fingerprint is not None:
        return used.base_fingerprint
    if used is None or used.merged_from is None:
        return fingerprint(model)
    with using(model, None):
        return fingerprint(model)
