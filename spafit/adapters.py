"""The fine-tuning techniques: bias deltas, direct biases, LoRA, and full training of a module.

A technique never renames a pre-trained key. It may add keys beside it:

====================  ==============  ===========================================  ================
technique             on              computes                                     trains
====================  ==============  ===========================================  ================
:class:`BiasDelta`    Linear          y = x Wᵀ + (b + δ)                           bias_delta.delta
:class:`BiasDelta`    LayerNorm       y = γ ⊙ x̂ + (β + δ)                          bias_delta.delta
:class:`DirectBias`   both            as the pre-trained module                    bias
:class:`LoRA`         Linear          y = x Wᵀ + b + (alpha/r) (drop(x) Aᵀ) Bᵀ     lora_A, lora_B
:class:`Full`         both            as the pre-trained module                    weight, bias
====================  ==============  ===========================================  ================

With :class:`BiasDelta` and :class:`LoRA` no pre-trained tensor is ever written to: without what was
added, the model is the pre-trained one, bit for bit. This works against catastrophic forgetting:
section 2.2 of the paper says so of LoRA, and section 7 suggests a separate vector for a bias.

The modules, which compute, come first; then the techniques as plans name them, which say what is
attached and what trains. To add a technique, subclass :class:`Technique` and call :func:`register`.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from spafit.config import is_number
from spafit.errors import PlanError, listed
from spafit.kernels import Part, dropout, dropout_add_norm, stacked_linear

# Far above any use; a larger rank is a mistake that would only exhaust memory.
_LARGEST_RANK = 65_536
_LARGEST_ALPHA = 1e6  # a larger one only makes the first loss infinite


class BiasDelta(nn.Module):
    """b + δ: a trained vector δ is added to a pre-trained bias b, which stays as it is.

    It is the child ``bias_delta`` of a :class:`Linear` or :class:`LayerNorm`. ``BiasDelta()``,
    without a bias, is the technique that attaches one, as plans name it (:class:`Bias`).

    Parameters
    ----------
    bias : torch.Tensor, (out,)
        The pre-trained bias; δ takes its length, type and device, and starts at zero.
    """

    @overload
    def __new__(cls) -> Bias: ...  # type: ignore[misc]

    @overload
    def __new__(cls, bias: torch.Tensor, *more: Any, **named: Any) -> BiasDelta: ...

    def __new__(cls, bias: torch.Tensor | None = None, *more: Any, **named: Any) -> Any:
        """Return the module for a bias; without a bias, the technique.

        A subclass, such as that of a parametrized δ, is always a module; it may take more.
        """
        return Bias() if cls is BiasDelta and bias is None else super().__new__(cls)

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(bias))  # δ (out,)

    def __getnewargs__(self) -> tuple[torch.Tensor]:
        return (self.delta,)  # so that copying and pickling call __new__ with a bias

    def forward(self, b: torch.Tensor) -> torch.Tensor:
        """Return b + δ, (out,)."""
        return b + self.delta

    def extra_repr(self) -> str:
        """Show the length of δ."""
        return f"{len(self.delta)}"


class Adaptable(nn.Module):
    """Base of the modules that techniques adapt: a weight, a bias b, perhaps its δ, and a switch.

    Attributes
    ----------
    weight, bias : nn.Parameter
        The pre-trained tensors.
    bias_delta : BiasDelta or None
        The module of δ, if one is attached.
    adapters_on : bool
        While it is False, the module computes what it did before anything was attached.
    impl : str
        The form of the kernel; see :func:`spafit.set_impl`.
    merges : tuple of str
        The added parameters that :meth:`merged` folds into the pre-trained ones. A subclass that
        adds parameters and has a merged form names them here, with those of its parent;
        :func:`spafit.merged_state_dict` refuses a parameter that is not named.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    merges: ClassVar[tuple[str, ...]] = ("bias_delta.delta",)

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.bias_delta: BiasDelta | None = None
        self.adapters_on = True
        self.impl = "auto"

    def take_over(self, module: Adaptable) -> None:
        """Share the parameters, mode and switch of the module that this one replaces.

        A subclass with which a technique replaces ``module`` calls ``nn.Module.__init__`` and this
        method instead of its parent's ``__init__``.
        """
        self.train(module.training)  # a module attached to a model in eval mode must not drop out
        self.weight = module.weight
        self.bias = module.bias
        self.bias_delta = module.bias_delta
        self.adapters_on = module.adapters_on
        self.impl = module.impl

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Accept a state dict in which δ has its older name, ``bias_delta``."""
        if self.bias_delta is not None and f"{prefix}bias_delta" in state_dict:
            state_dict[f"{prefix}bias_delta.delta"] = state_dict.pop(f"{prefix}bias_delta")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def b(self) -> torch.Tensor:
        """Return the bias in effect: b, or b + δ if a δ is attached and switched on."""
        if self.bias_delta is None or not self.adapters_on:
            return self.bias
        b: torch.Tensor = self.bias_delta(self.bias)
        return b

    def bias_terms(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return b and δ for a kernel that adds them itself, or the bias in effect and None.

        A :class:`BiasDelta` that has hooks or a replaced ``forward`` is called here.
        """
        delta = self.bias_delta
        if delta is None or not self.adapters_on:
            return self.bias, None
        if type(delta) is BiasDelta and can_be_bypassed(delta):
            return self.bias, delta.delta
        return delta(self.bias), None

    def merged(self) -> dict[str, torch.Tensor]:
        """Return weight and bias with all of :attr:`merges` folded in, as detached copies.

        b + δ is rounded once, to b's type.
        """
        b = self.bias.detach().clone()
        if self.bias_delta is not None:
            b += self.bias_delta.delta.detach()
        return {"weight": self.weight.detach().clone(), "bias": b}


class Linear(Adaptable):
    """y = x Wᵀ + b, or x Wᵀ + (b + δ) once a :class:`BiasDelta` is attached.

    W has no values yet: :func:`spafit.bert.initialise` draws them, or a checkpoint fills it.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last dimension before and after.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(torch.empty(out_features, in_features), torch.zeros(out_features))  # W, b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        if self.impl == "reference":
            return F.linear(x, self.weight, self.b())  # x Wᵀ + (b + δ)
        return stacked_linear(x, [self.part()], impl=self.impl)  # the same, fused

    def part(self) -> Part:
        """Return the tensors of this map for the kernels, without those that are switched off."""
        return Part(self.weight, *self.bias_terms())

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Linear`` does."""
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}"


class LayerNorm(Adaptable):
    """y = γ ⊙ (x - mean) / √(variance + eps) + β, with β + δ once a :class:`BiasDelta` is attached.

    Parameters
    ----------
    size : int
        Length of the last dimension, over which mean and variance are taken.
    eps : float
        Added to the variance.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(torch.ones(size), torch.zeros(size))  # γ, β
        self.eps = eps

    def take_over(self, module: Adaptable) -> None:
        """Share another LayerNorm's parameters, mode, switch and eps."""
        assert isinstance(module, LayerNorm)
        super().take_over(module)
        self.eps = module.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of (..., size).

        Inside a layer, :func:`add_norm` computes it together with dropout and the residual.
        """
        return F.layer_norm(x, self.weight.shape, self.weight, self.b(), self.eps)  # ... + (β + δ)

    def extra_repr(self) -> str:
        """Show the size."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Dropout(nn.Dropout):
    """``nn.Dropout`` computed by :func:`spafit.kernels.dropout`."""

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.impl = "auto"  # the form of the kernel; see spafit.set_impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of x (...) in training."""
        return dropout(x, self.p if self.training else 0.0, self.impl)


class LoRALinear(Linear):
    """y = x Wᵀ + b + (alpha/r) (drop(x) Aᵀ) Bᵀ, in place of an existing Linear.

    The weight is the paper's Φ_0 + (alpha/r) BA (section 2.2), with Φ_0 = W. B starts at zero, so
    that training begins with the pre-trained function; A is Kaiming-uniform with a = √5, as in Hu
    et al.'s code, that is uniform in ±1/√in.

    Parameters
    ----------
    linear : Linear
        Its weight, bias and bias delta are shared, not copied.
    r : int
        Rank.
    alpha : float
        The update is scaled by alpha / r.
    dropout : float
        Rate at which the input of A is dropped in training.
    generator : torch.Generator, optional
        A CPU generator from which A is drawn; None uses torch's global one.
    """

    merges = (*Linear.merges, "lora_A", "lora_B")

    def __init__(
        self,
        linear: Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.take_over(linear)  # W, b, δ
        self.scaling = alpha / r  # s
        self.dropout = dropout
        out_features, in_features = linear.weight.shape
        A = self.weight.new_empty(r, in_features)
        if not A.is_meta:
            # Drawn on the CPU in float32: a seed gives the same A on every device and dtype.
            A = torch.empty(r, in_features, device="cpu")
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(A.to(self.weight))  # A (r, in)
        self.lora_B = nn.Parameter(self.weight.new_zeros(out_features, r))  # B (out, r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        if self.impl != "reference":
            return stacked_linear(x, [self.part()], impl=self.impl)  # the same, fused
        y = F.linear(x, self.weight, self.b())  # x Wᵀ + (b + δ)
        if not self.adapters_on:
            return y
        dropped = F.dropout(x, self.dropout if self.training else 0.0)
        low_rank = F.linear(F.linear(dropped, self.lora_A), self.lora_B)  # (drop(x) Aᵀ) Bᵀ
        return y + self.scaling * low_rank

    def part(self) -> Part:
        """Return the tensors of this map for the kernels, without those that are switched off."""
        if not self.adapters_on:
            return Part(self.weight, self.bias)
        rate = self.dropout if self.training else 0.0
        b, delta = self.bias_terms()
        return Part(self.weight, b, delta, self.lora_A, self.lora_B, self.scaling, rate)

    def merged(self) -> dict[str, torch.Tensor]:
        """Return W + s·BA as the weight, s = alpha / r, and b + δ as the bias."""
        return {**super().merged(), "weight": self.merged_weight()}

    def merged_weight(self) -> torch.Tensor:
        """Return W + s·BA (out, in), detached, computed in float64, rounded once to W's type."""
        with torch.no_grad():
            update = self.scaling * (self.lora_B.double() @ self.lora_A.double())
            return (self.weight.double() + update).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Show the sizes, the rank and the scale."""
        return f"{super().extra_repr()}, r={self.lora_A.shape[0]}, scaling={self.scaling:g}"


def project(x: torch.Tensor, maps: Sequence[Linear], gelu: bool = False) -> torch.Tensor:
    """Apply several maps to one input as one product, with their outputs side by side.

    Maps of another class, with hooks or with a replaced ``forward`` are called one by one, so that
    these take effect.

    Parameters
    ----------
    x : torch.Tensor, (..., in)
        Input.
    maps : sequence of Linear
        With or without techniques.
    gelu : bool
        Whether to apply GELU (exact, erf) to the outputs.

    Returns
    -------
    torch.Tensor, (..., Σ out)
    """
    if not all(type(each) in (Linear, LoRALinear) and can_be_bypassed(each) for each in maps):
        y = torch.cat([each(x) for each in maps], dim=-1) if len(maps) > 1 else maps[0](x)
        return F.gelu(y) if gelu else y
    return stacked_linear(x, [each.part() for each in maps], gelu=gelu, impl=maps[0].impl)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, drop: Dropout, norm: LayerNorm
) -> torch.Tensor:
    """Return LayerNorm(Dropout(x) + residual), how the checkpoint ends Eq. (6)-(7) and (9)-(10).

    It is one operation unless ``drop`` or ``norm`` is of another class, has hooks or has a replaced
    ``forward``.

    Parameters
    ----------
    x, residual : torch.Tensor, (..., D)
        The sub-layer's output and its input.
    drop : Dropout
        Its rate is used while it is in training mode.
    norm : LayerNorm
        With or without a bias delta.

    Returns
    -------
    torch.Tensor, (..., D)
    """
    ours = type(norm) is LayerNorm and type(drop) is Dropout
    if not (ours and can_be_bypassed(norm) and can_be_bypassed(drop)):
        y: torch.Tensor = norm(drop(x) + residual)
        return y
    b, delta = norm.bias_terms()
    return dropout_add_norm(
        x,
        residual,
        norm.weight,
        b,
        norm.eps,
        bias_delta=delta,
        dropout=drop.p if drop.training else 0.0,
        impl=norm.impl,
    )


def can_be_bypassed(module: nn.Module) -> bool:
    """Return whether a module's call can be bypassed: no hooks and no replaced ``forward``."""
    return not (
        "forward" in vars(module)
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@dataclass(frozen=True)
class Technique:
    """Base of the techniques that a plan may name: what is attached to a module, and what trains.

    A subclass is a frozen dataclass whose fields are the technique's settings, under the names that
    they have in plan files. :func:`register` makes it known.

    Attributes
    ----------
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
        The classes of modules that it can be attached to.
    order : int
        Techniques on one module are attached in ascending order.
    """

    name: ClassVar[str]
    short: ClassVar[str]
    trains: ClassVar[tuple[str, ...]]
    copies: ClassVar[tuple[str, ...]] = ()
    attaches_to: ClassVar[tuple[type[Adaptable], ...]] = (Linear, LayerNorm)
    order: ClassVar[int] = 0

    @property
    def caption(self) -> str:
        """The technique and its size, as the summary prints it."""
        return self.short

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
        (:meth:`Adaptable.take_over`). While its ``adapters_on`` is False, it computes what the
        pre-trained module does, bit for bit.

        Parameters
        ----------
        module : Adaptable
            Of one of the classes in :attr:`attaches_to`; other techniques may be attached already.
        generator : torch.Generator
            A CPU generator, the only source of random initial values. A module on the meta device
            has no values, and nothing is drawn for it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it is attached")


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


@register
@dataclass(frozen=True)
class Bias(Technique):
    """Train δ in b + δ; the pre-trained bias b stays as it is.

    It attaches a :class:`BiasDelta`, and is written ``BiasDelta()`` in plans.
    """

    name: ClassVar[str] = "bias-delta"
    short: ClassVar[str] = "bias"
    trains: ClassVar[tuple[str, ...]] = ("bias_delta.delta",)

    def __repr__(self) -> str:
        return "BiasDelta()"

    def combines_with(self, other: Technique) -> bool:
        """Return False for a technique that trains the bias directly."""
        return "bias" not in other.trains

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Add a zero δ to ``module`` and return it."""
        if module.bias_delta is not None:
            raise PlanError("the module has a bias delta already; attaching another would lose it")
        module.bias_delta = BiasDelta(module.bias).train(module.training)
        return module


@register
@dataclass(frozen=True)
class DirectBias(Technique):
    """Train the pre-trained bias b directly, as BitFit does (Ben Zaken et al., 2022)."""

    name: ClassVar[str] = "bias-direct"
    short: ClassVar[str] = "bias"
    trains: ClassVar[tuple[str, ...]] = ("bias",)
    copies: ClassVar[tuple[str, ...]] = ("bias",)

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Return ``module`` unchanged."""
        return module


@register
@dataclass(frozen=True)
class LoRA(Technique):
    """Train A and B in W + (alpha/r) BA (Hu et al., 2022); W stays as it is.

    Attributes
    ----------
    r : int
        Rank; the paper's is 64.
    alpha : float
        Scale before division by r; the paper's is 128.
    dropout : float
        Rate at which the input of A is dropped in training.

    Raises
    ------
    PlanError
        If r is not a positive whole number, alpha not positive, or dropout outside [0, 1).
    """

    r: int = 64
    alpha: float = 128.0
    dropout: float = 0.0

    name: ClassVar[str] = "lora"
    short: ClassVar[str] = "LoRA"
    trains: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    attaches_to: ClassVar[tuple[type[Adaptable], ...]] = (Linear,)
    order: ClassVar[int] = 1  # after BiasDelta: a LoRALinear shares the δ of its Linear

    def __post_init__(self) -> None:
        if type(self.r) is not int or not 1 <= self.r <= _LARGEST_RANK:
            raise PlanError(
                f"LoRA's rank r must be a whole number of at least 1 and at most {_LARGEST_RANK}, "
                f"found {self.r!r}"
            )
        if not is_number(self.alpha) or not 0 < self.alpha <= _LARGEST_ALPHA:
            raise PlanError(
                f"LoRA's alpha must be a positive number, found {self.alpha!r:.80} (the largest is "
                f"{_LARGEST_ALPHA:,.0f})"
            )
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise PlanError(f"LoRA's dropout must be a rate in [0, 1), found {self.dropout!r}")
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "dropout", float(self.dropout))

    @property
    def caption(self) -> str:
        """``"LoRA r=64"``."""
        return f"{self.short} r={self.r}"

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Return a :class:`LoRALinear` that shares the parameters of ``module``."""
        if isinstance(module, LoRALinear):
            raise PlanError("the module has LoRA already; attaching another would lose it")
        if not isinstance(module, Linear):
            raise PlanError("LoRA needs a Linear; a LayerNorm has no matrix to update")
        return LoRALinear(module, self.r, self.alpha, self.dropout, generator)


@register
@dataclass(frozen=True)
class Full(Technique):
    """Train the pre-trained weight and bias directly."""

    name: ClassVar[str] = "full"
    short: ClassVar[str] = "full"
    trains: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def combines_with(self, other: Technique) -> bool:
        """Return False: a fully trained module takes no other technique."""
        return False

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Return ``module`` unchanged."""
        return module


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
        :class:`Linear` or :class:`LayerNorm`.
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
        raise PlanError(f"{' and '.join(names)} are the same technique twice")
    for technique in techniques:
        if not issubclass(kind, technique.attaches_to):
            needs = " or a ".join(each.__name__ for each in technique.attaches_to)
            raise PlanError(f"{technique.short} needs a {needs}, found a {kind.__name__}")
        if not all(technique.combines_with(each) for each in techniques if each is not technique):
            raise PlanError(f"{' and '.join(names)} cannot be attached to the same module")
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
    _try_out(issubclass(kind, Linear), ordered)
    return ordered


@functools.lru_cache(maxsize=256)
def _try_out(on_linear: bool, techniques: tuple[Technique, ...]) -> None:
    """Attach techniques to a module on the meta device, so that an impossible plan is refused."""
    with torch.device("meta"):
        module = Linear(768, 768) if on_linear else LayerNorm(768, 1e-12)
    attach_all(techniques, module, torch.Generator())
