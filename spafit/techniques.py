"""What a technique is: what it attaches to a module, what trains, and which may stand together.

The techniques themselves are in :mod:`spafit.adapters`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import nn

from spafit.adaptable import Adaptable, Affine, Dropout, LayerNorm, Linear, SublayerEnd
from spafit.config import is_number
from spafit.errors import PlanError, listed

LARGEST_RATE = 1e6  # far above any use


@dataclass(frozen=True, repr=False)
class Technique:
    """Base of the techniques that a plan may name: what is attached to a module, and what trains.

    A subclass is a frozen dataclass whose fields are the technique's settings, under the names that
    they have in plan files. :func:`register` makes it known.

    Attributes
    ----------
    rate : float
        Factor of the learning rate for what the technique trains.
    weight_decay : float or None
        AdamW's weight decay of what it trains; None is the run's, which is that of matrices alone.
    name : str
        The technique in plan files, such as ``"bias-delta"``.
    short : str
        The technique in print, such as ``"bias"``.
    trains : tuple of str
        The parameters that train, by their names in the module that :meth:`attach` returns: all
        those that it adds, and the pre-trained ones that it trains directly.
    copies : tuple of str
        Of the pre-trained parameters that it trains directly, those of which an untrained copy is
        kept, so that ``adapters_disabled`` can restore them. The values of the others are lost.
    attaches_to : tuple of type
        The classes of modules that it can be attached to: Linear, LayerNorm, SublayerEnd.
    is_a_sum : bool
        Whether what several of its kind train can be added up: δ, or a pre-trained tensor.
    order : int
        Techniques on one module are attached in ascending order.
    """

    rate: float = field(default=1.0, kw_only=True)
    weight_decay: float | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    short: ClassVar[str]
    trains: ClassVar[tuple[str, ...]]
    copies: ClassVar[tuple[str, ...]] = ()
    attaches_to: ClassVar[tuple[type[Adaptable], ...]] = (Linear, LayerNorm)
    is_a_sum: ClassVar[bool] = False
    order: ClassVar[int] = 0

    def __repr__(self) -> str:
        """Show the settings of its own, and those by keyword alone that have not their defaults."""
        shown = [
            f"{each.name}={getattr(self, each.name)!r}"
            for each in sorted(dataclasses.fields(self), key=lambda each: each.kw_only is True)
            if not each.kw_only or getattr(self, each.name) != each.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def caption(self) -> str:
        """The technique and its size, as the summary prints it."""
        return self.short

    def rate_of(self, parameter: str) -> float:
        """Return the factor of the learning rate for one of :attr:`trains`."""
        return self.rate

    @property
    def writes_pretrained(self) -> bool:
        """Whether a pre-trained tensor of the module is itself trained."""
        return not {"weight", "bias"}.isdisjoint(self.trains)

    def combines_with(self, other: Technique) -> bool:
        """Return whether ``other``, of another class, may be attached to the same module.

        Both techniques must agree.
        """
        return True

    def attach(self, module: Adaptable, generator: torch.Generator) -> Adaptable:
        """Attach the technique to a module, and return the module or what replaces it.

        A replacement is an instance of a subclass that shares all parameters of ``module``
        (:meth:`spafit.adaptable.Affine.take_over`). While its ``adapters_on`` is False, it computes
        what the pre-trained module does, bit for bit.

        Parameters
        ----------
        module : Adaptable
            Of one of the classes in :attr:`attaches_to`; other techniques may be attached already.
        generator : torch.Generator
            A CPU generator, the only source of random initial values. A module on the meta device
            has no values, and nothing is drawn for it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it is attached")

    @classmethod
    def summed(cls, terms: Sequence[Term]) -> tuple[Technique, dict[str, torch.Tensor]]:
        """Return the technique that adds the weighted sum of what several of its kind add.

        Where :attr:`is_a_sum` says so, its values are the sums of theirs (:func:`added_up`).

        Returns
        -------
        Technique
            Its settings.
        dict of str to torch.Tensor
            The values of its parameters, those of :attr:`trains`, in float64.

        Raises
        ------
        PlanError
            If the sum is none of its kind.
        """
        if cls.is_a_sum:
            return cls(), added_up(terms)
        raise PlanError(
            f"{cls.name} has no sum, because what it computes is not linear in what it trains"
        )


class Term(NamedTuple):
    """One technique at one place, to be added to others with a weight.

    Attributes
    ----------
    weight : float
        Its factor.
    technique : Technique
        Its settings.
    values : mapping of str to torch.Tensor
        The values of its parameters.
    pretrained : mapping of str to torch.Tensor
        The values before training of those that it trains directly.
    """

    weight: float
    technique: Technique
    values: Mapping[str, torch.Tensor]
    pretrained: Mapping[str, torch.Tensor]


def added_up(terms: Sequence[Term]) -> dict[str, torch.Tensor]:
    """Return Σ w δ, or θ_0 + Σ w (θ - θ_0) where a pre-trained θ_0 trains directly, in float64."""
    found = {}
    for name in terms[0].values:
        start = terms[0].pretrained.get(name)
        zero = torch.zeros(()) if start is None else start
        changes = [each.weight * (each.values[name].double() - zero.double()) for each in terms]
        found[name] = zero.double() + torch.stack(changes).sum(0)
    return found


TECHNIQUES: dict[str, type[Technique]] = {}
"""The techniques that plans may name, by their names in plan files."""

_T = TypeVar("_T", bound=type[Technique])


def register(technique: _T) -> _T:
    """Register a technique under its name, so that plans, plan files and adapter files may use it.

    It can be used as a decorator. A class that is defined again in the same place, as when a cell
    of a notebook runs twice, replaces the former one.

    Parameters
    ----------
    technique : type
        A subclass of :class:`Technique`, a frozen dataclass.

    Returns
    -------
    type
        The same class.

    Raises
    ------
    PlanError
        If it is not such a class, or another technique already has its name.
    """
    if not (isinstance(technique, type) and issubclass(technique, Technique)):
        raise PlanError(f"{technique!r:.200} is no subclass of spafit.Technique")
    parameters = vars(technique).get("__dataclass_params__")
    if parameters is None or not parameters.frozen or not parameters.eq:
        raise PlanError(f"{technique.__name__} must be a dataclass, by @dataclass(frozen=True)")
    for attribute in ("name", "short"):
        value = getattr(technique, attribute, None)
        if not isinstance(value, str) or not value or not value.isprintable():
            raise PlanError(f"{technique.__name__}.{attribute} must be text, found {value!r:.200}")
    known = TECHNIQUES.get(technique.name, technique)
    if (known.__module__, known.__qualname__) != (technique.__module__, technique.__qualname__):
        raise PlanError(
            f"there is a technique {technique.name} already, {known.__qualname__}; "
            f"give {technique.__name__} another name"
        )
    TECHNIQUES[technique.name] = technique
    return technique


def attach_all(
    techniques: Sequence[Technique], module: Adaptable, generator: torch.Generator
) -> Adaptable:
    """Attach several techniques to one module, in their order.

    Returns
    -------
    Adaptable
        The module, or what replaces it.

    Raises
    ------
    PlanError
        If a technique adds a parameter that its ``trains`` does not name, names one that does not
        exist, or loses one that was there before.
    """
    kind, before = type(module), dict(module.named_parameters())
    for technique in techniques:
        module = technique.attach(module, generator)
        if not isinstance(module, kind):
            raise PlanError(
                f"{technique.name} leaves a {type(module).__name__} in the place of a "
                f"{kind.__name__}; it must be a subclass of it"
            )
        left = dict(module.named_parameters())
        lost = [name for name, each in before.items() if left.get(name) is not each]
        unsaid = left.keys() - before.keys() - set(technique.trains)
        absent = set(technique.trains) - left.keys()
        if lost:
            raise PlanError(
                f"{technique.name} cannot be attached to this {kind.__name__}: the module that its "
                f"attach returns has lost {listed(lost, ' and ')}"
            )
        if unsaid:
            raise PlanError(
                f"{technique.name} adds {listed(sorted(unsaid))}, which its trains does not name; "
                "name it there, so that it is trained and saved"
            )
        if absent:
            raise PlanError(
                f"{technique.name} trains {listed(sorted(absent))}, but the module that its attach "
                "returns has no such parameter"
            )
        before = left
    return module


def in_order(kind: type[Adaptable], techniques: Sequence[Technique]) -> tuple[Technique, ...]:
    """Check that techniques can be combined on a module, and return them in order of attachment.

    Parameters
    ----------
    kind : type
        Linear, LayerNorm or SublayerEnd.
    techniques : sequence of Technique
        One or more.

    Raises
    ------
    PlanError
        If one cannot be attached to such a module, or two cannot be attached to the same one.
    """
    names = [technique.name for technique in techniques]
    trains = [name for technique in techniques for name in technique.trains]
    if len(set(names)) < len(names):
        again = next(name for name, count in Counter(names).items() if count > 1)
        raise PlanError(f"{again} is named twice for the same module; once will do")
    for technique in techniques:
        if not issubclass(kind, technique.attaches_to):
            needs = " or ".join(each.called for each in technique.attaches_to)
            raise PlanError(f"{technique.short} needs {needs}, found {kind.called}")
        check_rate(technique.name, technique.rate)
        check_decay(technique.name, technique.weight_decay)
        if not all(technique.combines_with(each) for each in techniques if each is not technique):
            raise PlanError(
                f"{' and '.join(names)} cannot be attached to the same module; give one of them"
            )
        try:
            hash(technique)
        except TypeError as error:
            raise PlanError(
                f"a setting of {technique.name} can be changed ({error}); let it be a tuple"
            ) from None
    twice = [name for name, count in Counter(trains).items() if count > 1]
    if twice:
        raise PlanError(f"{' and '.join(names)} train the same {listed(twice, ' and ')}")
    ordered = tuple(sorted(techniques, key=lambda each: (each.order, each.name)))
    _try_out(kind, ordered)  # type: ignore[arg-type]
    return ordered


def check_rate(place: str, rate: object, name: str = "rate") -> None:
    """Raise a PlanError if a factor of the learning rate is not a positive number."""
    if not is_number(rate) or not 0 < rate <= LARGEST_RATE:
        raise PlanError(
            f"{place}: {name}, a factor of the learning rate, must be a positive number, found "
            f"{rate!r:.80} (the largest is {LARGEST_RATE:,.0f})"
        )


def check_decay(place: str, decay: object) -> None:
    """Raise a PlanError if a weight decay is neither None nor a number from 0."""
    if decay is not None and not (is_number(decay) and 0 <= decay <= 1e6):
        raise PlanError(f"{place}: weight_decay must be a number from 0, found {decay!r:.80}")


@functools.lru_cache(maxsize=256)
def _try_out(kind: type[Adaptable], techniques: tuple[Technique, ...]) -> None:
    """Attach techniques to a module of BERT-tiny's size, so that an impossible plan is refused."""
    # Not on the meta device, where an addition has PyTorch import its compiler, for a second.
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        module: Adaptable
        if issubclass(kind, SublayerEnd):
            module = SublayerEnd()
            module.dropout, module.LayerNorm = Dropout(0.0), LayerNorm(128, 1e-12)
        elif issubclass(kind, LayerNorm):
            module = LayerNorm(128, 1e-12)
        else:
            module = Linear(128, 128)
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        _refuse_in_vain(techniques, attach_all(techniques, module, generator))


@torch.inference_mode(False)  # with gradients, whatever mode the caller is in
def _refuse_in_vain(techniques: tuple[Technique, ...], module: Adaptable) -> None:
    """Refuse what no gradient reaches: one's module may leave out what another added to it."""
    for each in module.modules():
        if isinstance(each, Affine):
            each.impl = "reference"
    added = [(technique, name) for technique in techniques for name in technique.trains]
    values = [module.get_parameter(name).requires_grad_() for _, name in added]
    x = torch.ones(1, 128)
    try:
        y = module.add_norm(x, x) if isinstance(module, SublayerEnd) else module(x)
        gradients = torch.autograd.grad(y.sum(), values, allow_unused=True)
    except (NotImplementedError, RuntimeError):
        return  # a technique of a user's own that needs other values or sizes
    for (technique, name), gradient in zip(added, gradients, strict=True):
        if gradient is None:
            raise PlanError(
                f"{technique.name} would train {name} in vain: {type(module).__name__} computes "
                "its output without it; let its forward use it, or let combines_with refuse "
                f"{' and '.join(each.name for each in techniques)} together"
            )
