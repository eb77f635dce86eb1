"""What was done to a model: what trains, what stands where, and how it is taken out and put back.

An adapter never changes the modules of the pre-trained model. At each place that it adapts, another
module stands instead, which shares the pre-trained tensors: taking an adapter out, or putting
another one in, exchanges modules and copies no tensor. :mod:`spafit.strata` does so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from spafit.adaptable import Adaptable
from spafit.errors import PlanError
from spafit.plans import Plan, Trained

_M = TypeVar("_M", bound=nn.Module)


def twin(module: _M, copied: Iterable[str] = ()) -> _M:
    """Return a module of the same class that shares parameters, children, hooks and settings.

    What is attached to one of them is not attached to the other. Of the parameters whose names are
    in ``copied`` it has copies.

    Raises
    ------
    PlanError
        If its ``forward`` was replaced by a function that need not compute the twin.
    """
    other = object.__new__(type(module))
    vars(other).update(vars(module))
    vars(other).pop("_compiled_call_impl", None)  # by Module.compile; it is of that module
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            vars(other)[name] = MethodType(value.__func__, other)
        elif name == "forward":
            raise PlanError(
                f"the forward of a {type(module).__name__} was replaced by a function that is no "
                "method of it (types.MethodType), so that it would compute without the adapter; "
                "replace it after adapting the model"
            )
    other._parameters = dict(module._parameters)
    other._modules = dict(module._modules)
    for name in copied:
        child, _, rest = name.partition(".")
        if rest:
            other._modules[child] = twin(other.get_submodule(child), [rest])
        else:
            value = module.get_parameter(name).detach()
            other._parameters[name] = nn.Parameter(value.clone(), requires_grad=False)
    return other


class Place:
    """A place in a model: the module that an adapter puts there, and the pre-trained one.

    Parameters
    ----------
    model : nn.Module
        The model.
    path : str
        The place in it, such as ``bert.encoder.layer.7.output.dense``; ``base`` is what stands
        there now.
    adapted : nn.Module
        What the adapter puts there.
    """

    def __init__(self, model: nn.Module, path: str, adapted: nn.Module) -> None:
        parent, _, self.child = path.rpartition(".")
        self.path, self.adapted = path, adapted
        # None for the model itself: it has its places, and a cycle would keep its tensors in memory
        # after the last one who uses it, until Python looks for cycles.
        self._parent = model.get_submodule(parent) if parent else None
        self.base = self.parent(model).get_submodule(self.child)
        self._compare()
        self.parent(model)._modules[self.child] = adapted

    def parent(self, model: nn.Module) -> nn.Module:
        """Return the module of a model whose child stands in this place."""
        return model if self._parent is None else self._parent

    def _compare(self) -> None:
        """Note the modules that only one of the two has, and the tensors that both have."""
        with_adapter, without = list(self.adapted.modules()), list(self.base.modules())
        self.added = [each for each in with_adapter if each not in set(without)]
        self.removed = [each for each in without if each not in set(with_adapter)]
        # The tensors that both have: where one is moved, or replaced by another, it is so for both.
        self.shared: list[tuple[nn.Module, nn.Module, str]] = []
        removed, others = set(self.removed), dict(self.adapted.named_modules())
        for name, module in self.base.named_modules():
            if module in removed and (other := others.get(name)) is not None:
                self.shared += [
                    (module, other, key)
                    for key, tensor in module._parameters.items()
                    if tensor is not None and other._parameters.get(key) is tensor
                ]
        self.form_of = _form_of(self.adapted), _form_of(self.base)

    def put(self, model: nn.Module) -> None:
        """Put the adapter's module in the place of the pre-trained one."""
        present = self.parent(model)._modules[self.child]
        assert present is not None
        if present is not self.base:  # a user has replaced what stood there
            self.base = present
            self._compare()
        for base, adapted, key in self.shared:
            _share(key, base, adapted)
        self.parent(model)._modules[self.child] = self.adapted
        self._adjust(self.base, self.adapted, self.added)

    def take(self, model: nn.Module) -> None:
        """Put the pre-trained module back."""
        present = self.parent(model)._modules[self.child]
        assert present is not None
        if present is not self.adapted:  # a user has replaced what stood there
            self.adapted = present
            self._compare()
        for base, adapted, key in self.shared:
            _share(key, adapted, base)
        self.parent(model)._modules[self.child] = self.base
        self._adjust(self.adapted, self.base, self.removed)

    def _adjust(self, old: nn.Module, new: nn.Module, modules: list[nn.Module]) -> None:
        """Give ``modules`` of ``new`` the mode of ``old``, and its form of the kernels."""
        if new.training is not old.training:
            for each in modules:
                each.training = old.training
        if impl := self.form_of[old is self.base].get("impl"):
            for each in modules:
                settings = vars(each)
                if settings.get("impl", impl) != impl:
                    settings["impl"] = impl


def _share(key: str, owner: nn.Module, other: nn.Module) -> None:
    """Have a module share a tensor of another one, unless one has it no more (parametrized)."""
    if key in owner._parameters and key in other._parameters:
        other._parameters[key] = owner._parameters[key]


def _form_of(module: nn.Module) -> dict[str, Any]:
    """Return the settings of the first module in another that has a form of the kernels."""
    return next((vars(each) for each in module.modules() if "impl" in vars(each)), {})


@dataclass
class Adaptation:
    """The record of what :func:`spafit.adapt` did to a model, at ``model.adaptation``.

    Attributes
    ----------
    plan : Plan
        The plan that was applied.
    name : str
        The adapter's name in ``model.adaptations``.
    trained : dict of str to Trained
        All parameters that the plan declares to train by name, the head's last, and how each is
        trained. One that a user froze, or a phase of the training, has ``requires_grad`` False.
    untrained : dict of str to (nn.Module, str)
        Where the values of the head and of the pre-trained parameters that train directly are
        before training: the module and the name in it.
    lost : tuple of str
        The pre-trained parameters that train directly without a copy.
    places : list of Place
        What stands where, in the order in which it was attached.
    dropout : list of (nn.Module, tuple of float)
        The layers whose dropout the plan sets, and the rates that are not in use at the moment: the
        plan's, or while the adapter is in use the model's own.
    depth : int
        The number of layers below the first one that is adapted; 0 if the embeddings are.
    base_fingerprint : str or None
        The fingerprint of the base before training, if the plan trains pre-trained tensors
        directly; else None, because it can be computed from the model at any time.
    task : str or None
        The name of the task, once trained or loaded.
    labels : tuple of str or None
        The label names in the order of the logits, once trained or loaded; empty for a score.
    definition : dict or None
        The definition of the task, once trained or loaded, if it is not one of GLUE's.
    merged_from : Adaptation or None
        The adaptation of which this is the merged form, if it is one (:func:`spafit.merge`).
    disabled : int
        The number of ``adapters_disabled`` blocks that the model is in.
    set_aside : dict of str to torch.Tensor
        Inside such blocks, the trained values of the tensors in ``untrained``.
    switched_off : list of Adaptable
        Inside such blocks, the modules whose additions the first of them switched off.
    """

    plan: Plan
    name: str
    trained: dict[str, Trained] = field(default_factory=dict, repr=False)
    untrained: dict[str, tuple[nn.Module, str]] = field(default_factory=dict, repr=False)
    lost: tuple[str, ...] = field(default=(), repr=False)
    places: list[Place] = field(default_factory=list, repr=False)
    dropout: list[tuple[nn.Module, tuple[float, ...]]] = field(default_factory=list, repr=False)
    depth: int = 0
    base_fingerprint: str | None = None
    task: str | None = None
    labels: tuple[str, ...] | None = None
    definition: dict[str, Any] | None = None
    merged_from: Adaptation | None = field(default=None, repr=False)
    disabled: int = 0
    set_aside: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    switched_off: list[Adaptable] = field(default_factory=list, repr=False)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of all parameters that the plan declares to train, the head's last."""
        return tuple(self.trained)

    @property
    def head(self) -> nn.Module:
        """The adapter's classifier, whether it is in use or not."""
        return self.places[-1].adapted

    @property
    def num_labels(self) -> int:
        """C: the number of logits of the adapter's classifier."""
        return len(list(self.head.parameters())[-1])

    def require_enabled(self) -> None:
        """Refuse to save, load, train or merge a model while its adapters are disabled.

        Raises
        ------
        PlanError
            If the adapters are disabled.
        """
        if self.disabled:
            raise PlanError("the adapters are disabled here; leave the with block first")

    def require_unmerged(self) -> None:
        """Raise a PlanError if this is a merged form, of which nothing can be trained or saved."""
        if self.merged_from is not None:
            raise PlanError("the adapter is merged here; call spafit.unmerge(model) first")

    def require_base(self) -> None:
        """Raise a PlanError if the plan writes to pre-trained tensors of which there is no copy."""
        if self.lost:
            raise PlanError(
                f"{self.plan.name} writes to pre-trained tensors ({self.lost[0]} and "
                f"{len(self.lost) - 1} more), so the model before training is gone; load it "
                'afresh, and give the adapter a name (name="..."), with which it trains copies'
            )

    def put_in(
        self, model: nn.Module, path: str, adapted: nn.Module, copied: Iterable[str], *, first: bool
    ) -> None:
        """Put a module into a model, and note where the tensors lie of which it has copies.

        With ``first`` it gets the pre-trained parameters themselves, as an optimizer that was made
        before may have them, and the pre-trained module gets the copies.
        """
        place = Place(model, path, adapted)
        self.places.append(place)
        for name in copied:
            owner, _, key = name.rpartition(".")
            base, other = place.base.get_submodule(owner), adapted.get_submodule(owner)
            if first:
                pair = base._parameters, other._parameters
                pair[0][key], pair[1][key] = pair[1][key], pair[0][key]
            self.untrained[f"{path}.{name}"] = base, key

    def put(self, model: nn.Module) -> None:
        """Put the adapter into its model, which is the pre-trained one."""
        for place in self.places:
            place.put(model)
        self._set_dropout()

    def take(self, model: nn.Module) -> None:
        """Take the adapter out of its model, which is then the pre-trained one."""
        for place in reversed(self.places):
            place.take(model)
        self._set_dropout()

    def _set_dropout(self) -> None:
        """Exchange the rates of dropout that are in use for those that are not."""
        for number, (layer, rates) in enumerate(self.dropout):
            self.dropout[number] = layer, layer.dropout  # type: ignore[assignment]
            layer.dropout = rates  # type: ignore[assignment]

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules that stand, or would stand, in the places with and without it."""
        for place in self.places:
            yield from place.adapted.modules()
            yield from place.base.modules()
