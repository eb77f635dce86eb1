"""The fine-tuning techniques, one class each beside its equation.

A technique never renames a pre-trained key. It may add keys beside it:

========================  =========  =========================================  ==============
technique                 on         computes                                   trains
========================  =========  =========================================  ==============
:class:`BiasDelta`        Linear     y = x Wᵀ + (b + δ)                         bias_delta.*
:class:`BiasDelta`        LayerNorm  y = γ ⊙ x̂ + (β + δ)                       bias_delta.*
:class:`DirectBias`       both       as the pre-trained module                  bias
:class:`LayerNormGain`    LayerNorm  y = (γ + δγ) ⊙ x̂ + β                      gain_delta.*
:class:`LoRA`             Linear     y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ           lora_A, lora_B
:class:`IA3`              Linear     y = l ⊙ (x Wᵀ + b), or (l ⊙ x) Wᵀ + b      ia3.l
:class:`SeriesAdapter`    sub-layer  H' = H + s (U σ(D H + b_d) + b_u)          adapters.*
:class:`PfeifferAdapter`  sub-layer  H' = H + s (U σ(D LN(H + X) + b_d) + b_u)  adapters.*
:class:`ParallelAdapter`  sub-layer  H' = H + s (U σ(D X + b_d) + b_u)          adapters.*
:class:`Full`             both       as the pre-trained module                  weight, bias
========================  =========  =========================================  ==============

A sub-layer ends, in attention.output or output, with LN(H + X): H is the output of its last map
after dropout, X its input, LN its LayerNorm. With an adapter it is LN(H' + X). LoRA's s is alpha/r,
or alpha/√r if it is rank-stabilised. Where a checkpoint has no bias, b is 0 and δ the bias itself.

:class:`DirectBias` and :class:`Full` write to pre-trained tensors. All others leave them as they
are: without what was added, the model is the pre-trained one, bit for bit. This works against
catastrophic forgetting: section 2.2 of the paper says so of LoRA, and section 7 suggests a separate
vector for a bias.

Of a technique that adds something there are two classes: the one that a plan names holds the
settings and says what is attached and what trains; the module beside it computes. What every
technique has is in :mod:`spafit.techniques`. To add one, subclass
:class:`~spafit.techniques.Technique` and register it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

import torch
import torch.nn.functional as F
from torch import nn

from spafit.adaptable import Adaptable, Affine, LayerNorm, Linear, SublayerEnd, project
from spafit.config import is_number
from spafit.errors import PlanError
from spafit.kernels import Part, stacked_linear
from spafit.techniques import Technique, Term, check_rate, register

# Far above any use; a larger rank is a mistake that would only exhaust memory.
_LARGEST_RANK = 65_536
_LARGEST_ALPHA = 1e6  # a larger one only makes the first loss infinite


class BiasDelta(nn.Module):
    """b + δ: a trained vector δ is added to a pre-trained bias b, which stays as it is.

    Where a checkpoint has no bias, b is 0 and δ is the bias that it lacks.

    It is the child ``bias_delta`` of a :class:`Linear` or :class:`LayerNorm`. ``BiasDelta()``,
    without a bias, is the technique that attaches one, as plans name it (:class:`Bias`).

    Parameters
    ----------
    bias : torch.Tensor, (out,)
        The pre-trained bias; δ takes its length, type and device, and starts at zero.
    """

    is_a_sum: ClassVar[bool] = True  # a kernel may add δ itself

    @overload
    def __new__(cls, *, rate: float = ..., weight_decay: float | None = ...) -> Bias: ...  # type: ignore[misc]

    @overload
    def __new__(cls, bias: torch.Tensor, *more: Any, **named: Any) -> BiasDelta: ...

    def __new__(cls, bias: torch.Tensor | None = None, *more: Any, **named: Any) -> Any:
        """Return the module for a bias; without a bias, the technique.

        A subclass, such as that of a parametrized δ, is always a module; it may take more.
        """
        return Bias(**named) if cls is BiasDelta and bias is None else super().__new__(cls)

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(bias.new_zeros(bias.shape))  # δ (out,)

    def __getnewargs__(self) -> tuple[torch.Tensor]:
        return (self.delta,)  # so that copying and pickling call __new__ with a bias

    def forward(self, b: torch.Tensor) -> torch.Tensor:
        """Return b + δ, (out,)."""
        return b + self.delta

    def extra_repr(self) -> str:
        """Show the length of δ."""
        return f"{len(self.delta)}"


@register
@dataclass(frozen=True, repr=False)
class Bias(Technique):
    """Train δ in b + δ; the pre-trained bias b stays as it is.

    It attaches a :class:`BiasDelta`, and is written ``BiasDelta()`` in plans.
    """

    name: ClassVar[str] = "bias-delta"
    short: ClassVar[str] = "bias"
    trains: ClassVar[tuple[str, ...]] = ("bias_delta.delta",)
    is_a_sum: ClassVar[bool] = True

    def __repr__(self) -> str:
        return super().__repr__().replace("Bias", "BiasDelta", 1)

    def combines_with(self, other: Technique) -> bool:
        """Return False for a technique that trains the bias directly."""
        return "bias" not in other.trains

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Add a zero δ to ``module`` and return it."""
        assert isinstance(module, Affine)
        if module.bias_delta is not None:
            raise PlanError("the module has a bias delta already; attaching another would lose it")
        module.bias_delta = BiasDelta(module.bias).train(module.training)
        return module


@register
@dataclass(frozen=True, repr=False)
class DirectBias(Technique):
    """Train the pre-trained bias b directly, as BitFit does (Ben Zaken et al., 2022)."""

    name: ClassVar[str] = "bias-direct"
    short: ClassVar[str] = "bias"
    trains: ClassVar[tuple[str, ...]] = ("bias",)
    copies: ClassVar[tuple[str, ...]] = ("bias",)
    is_a_sum: ClassVar[bool] = True

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Return ``module`` unchanged."""
        return module


class GainDelta(BiasDelta):
    """γ + δγ: a trained vector δγ is added to a pre-trained gain γ, which stays as it is.

    It is the child ``gain_delta`` of a :class:`LayerNorm`.

    Parameters
    ----------
    bias : torch.Tensor, (D,)
        The pre-trained γ; δγ takes its length, type and device, and starts at zero.
    """

    is_a_sum = True


@register
@dataclass(frozen=True, repr=False)
class LayerNormGain(Technique):
    """Train δγ in γ + δγ; the pre-trained gain γ of a LayerNorm stays as it is."""

    name: ClassVar[str] = "layernorm-gain"
    short: ClassVar[str] = "gain"
    trains: ClassVar[tuple[str, ...]] = ("gain_delta.delta",)
    is_a_sum: ClassVar[bool] = True
    attaches_to: ClassVar[tuple[type[Adaptable], ...]] = (LayerNorm,)

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Add a zero δγ to ``module`` and return it."""
        assert isinstance(module, LayerNorm)
        if module.gain_delta is not None:
            raise PlanError("the module has a gain delta already; attaching another would lose it")
        module.gain_delta = GainDelta(module.weight).train(module.training)
        return module


class LoRALinear(Linear):
    """y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ with s = alpha/r, in place of an existing Linear.

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
        The update is scaled by s = alpha / r.
    dropout : float
        Rate at which the input of A is dropped in training.
    generator : torch.Generator, optional
        A CPU generator from which A is drawn; None uses torch's global one.
    rank_stabilised : bool
        Whether s is alpha / √r instead (Kalajdzievski, 2023).
    """

    merges = (*Linear.merges, "lora_A", "lora_B")
    is_stackable = True

    def __init__(
        self,
        linear: Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        rank_stabilised: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.take_over(linear)  # W, b, δ
        self.scaling = _scaling(r, alpha, rank_stabilised)  # s
        self.dropout = dropout
        self.lora_A = nn.Parameter(_drawn(r, self.weight, generator))  # A (r, in)
        self.lora_B = nn.Parameter(self.weight.new_zeros(len(self.weight), r))  # B (out, r)

    def affine(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out), without (IA)³."""
        if self.impl != "reference":
            return stacked_linear(x, [self.part()], impl=self.impl)  # the same, fused
        # Eq. (LoRA)  y = x Wᵀ + (b + δ) + s (drop(x) Aᵀ) Bᵀ
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

    def merged_weight(self) -> torch.Tensor:
        """Return W + s·BA (out, in), detached, computed in float64, rounded once to W's type."""
        with torch.no_grad():
            # Eq. (LoRA merged)  W + s BA
            update = self.scaling * (self.lora_B.double() @ self.lora_A.double())
            return (self.weight.double() + update).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Show the sizes, the rank and the scale."""
        return f"{super().extra_repr()}, r={self.lora_A.shape[0]}, scaling={self.scaling:g}"


@register
@dataclass(frozen=True, repr=False)
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
    rank_stabilised : bool
        Whether the update is scaled by alpha / √r instead of alpha / r (rsLoRA, Kalajdzievski,
        2023), so that its size does not fall with the rank.
    b_rate : float
        The learning rate of B is so many times that of A (LoRA+, Hayou et al., 2024).

    Raises
    ------
    PlanError
        If r is not a positive whole number, alpha not positive, or dropout outside [0, 1).
    """

    r: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    rank_stabilised: bool = field(default=False, kw_only=True)
    b_rate: float = field(default=1.0, kw_only=True)

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
        if type(self.rank_stabilised) is not bool:
            raise PlanError(
                f"LoRA's rank_stabilised must be true or false, found {self.rank_stabilised!r:.80}"
            )
        check_rate(self.name, self.b_rate, "b_rate")
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "dropout", float(self.dropout))

    @property
    def scaling(self) -> float:
        """s: alpha / r, or alpha / √r if it is rank-stabilised."""
        return _scaling(self.r, self.alpha, self.rank_stabilised)

    @property
    def caption(self) -> str:
        """``"LoRA r=64"``, or ``"rsLoRA r=64"``."""
        return f"{'rs' if self.rank_stabilised else ''}{self.short} r={self.r}"

    def rate_of(self, parameter: str) -> float:
        """Return the factor of the learning rate: B's is :attr:`b_rate` times A's."""
        return self.rate * self.b_rate if parameter == "lora_B" else self.rate

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Return a :class:`LoRALinear` that shares the parameters of ``module``."""
        if isinstance(module, LoRALinear):
            raise PlanError("the module has LoRA already; attaching another would lose it")
        if not isinstance(module, Linear):
            raise PlanError("LoRA needs a Linear; a LayerNorm has no matrix to update")
        return LoRALinear(module, self.r, self.alpha, self.dropout, generator, self.rank_stabilised)

    @classmethod
    def summed(cls, terms: Sequence[Term]) -> tuple[Technique, dict[str, torch.Tensor]]:
        """Return Σ w s BA as one BA of rank Σ r: the A below each other, the w s B side by side."""
        A, B = [], []
        for each in terms:
            assert isinstance(each.technique, LoRA)
            A.append(each.values["lora_A"].double())
            B.append(each.weight * each.technique.scaling * each.values["lora_B"].double())
        r = sum(map(len, A))
        return cls(r, float(r)), {"lora_A": torch.cat(A), "lora_B": torch.cat(B, dim=1)}


class IA3Scale(nn.Module):
    """l ⊙ (x Wᵀ + b), or (l ⊙ x) Wᵀ + b: a trained vector l scales a Linear's output or its input.

    It is the child ``ia3`` of a :class:`Linear`. l starts at 1, with which nothing changes.

    Parameters
    ----------
    linear : Linear
        l takes its type and device.
    of : {"output", "input"}
        What is scaled.
    """

    def __init__(self, linear: Linear, of: str) -> None:
        super().__init__()
        self.of = of
        size = linear.weight.shape[0 if of == "output" else 1]
        self.l = nn.Parameter(linear.weight.new_ones(size))  # l (out,) or (in,)

    def forward(
        self, x: torch.Tensor, affine: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Map x (..., in) to (..., out) by ``affine`` and l."""
        # Eq. (IA3)  y = l ⊙ (x Wᵀ + b), or (l ⊙ x) Wᵀ + b
        return self._scaled(affine(x)) if self.of == "output" else affine(self._scaled(x))

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return (self.l * x).to(x.dtype)  # l is not rounded first: under autocast x is in half

    def merged(self, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return diag(l) W and l ⊙ b, or W diag(l) and b, detached, in their types."""
        # Eq. (IA3 merged)  diag(l) W and l ⊙ b, or W diag(l) and b
        scale = self.l.detach()
        if self.of == "output":
            return {"weight": scale[:, None] * weight, "bias": scale * bias}
        return {"weight": weight * scale, "bias": bias}

    def extra_repr(self) -> str:
        """Show what is scaled."""
        return f"{len(self.l)}, of={self.of!r}"


@register
@dataclass(frozen=True, repr=False)
class IA3(Technique):
    """Train a vector l that scales a map's output, or its input: (IA)³ (Liu et al., 2022).

    Liu et al. scale the keys, the values and the hidden units of the feed-forward network. The last
    are the input of ``layer.output.dense``.

    Attributes
    ----------
    of : {"output", "input"}
        What is scaled.
    """

    of: str = "output"

    name: ClassVar[str] = "ia3"
    short: ClassVar[str] = "(IA)³"
    trains: ClassVar[tuple[str, ...]] = ("ia3.l",)
    attaches_to: ClassVar[tuple[type[Adaptable], ...]] = (Linear,)

    def __post_init__(self) -> None:
        if self.of not in ("output", "input"):
            raise PlanError(f'(IA)³ is of the "output" or the "input", found {self.of!r:.80}')

    @property
    def caption(self) -> str:
        """``"(IA)³"``, or ``"(IA)³ of input"``."""
        return self.short if self.of == "output" else f"{self.short} of input"

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Add l, all 1, to ``module`` and return it."""
        assert isinstance(module, Linear)
        if module.ia3 is not None:
            raise PlanError("the module has (IA)³ already; attaching another would lose it")
        module.ia3 = IA3Scale(module, self.of).train(module.training)
        return module


#: Returns LayerNorm(H + X) for H and X.
Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ACTIVATIONS = ("relu", "gelu", "swish")
"""σ in the adapters: max(0, x), x Φ(x) with the exact Φ, x / (1 + exp(-x))."""


class Bottleneck(nn.Module):
    """H + s (U σ(D z + b_d) + b_u), where z is what the technique reads: H, X or LayerNorm(H + X).

    It is one of the children ``adapters`` of the end of a sub-layer. U, b_d and b_u start at zero,
    so that training begins with the pre-trained function; D is Kaiming-uniform with a = √5, as A of
    LoRA is. (Houlsby et al. draw both D and U near zero instead.)

    Parameters
    ----------
    technique : BottleneckAdapter
        Its settings, and what it reads.
    end : SublayerEnd
        The sub-layer's end; its LayerNorm gives D's size, type and device.
    generator : torch.Generator, optional
        A CPU generator from which D is drawn; None uses torch's global one.
    """

    def __init__(
        self, technique: BottleneckAdapter, end: SublayerEnd, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        like = end.LayerNorm.weight
        hidden = len(like)
        size = technique.size_for(hidden)
        self.technique = technique
        self.down = Linear(hidden, size).to(like)  # D (m, D), b_d
        self.up = Linear(size, hidden).to(like)  # U (D, m), b_u
        for linear in (self.down, self.up):
            linear.impl = end.LayerNorm.impl
        with torch.no_grad():
            self.down.weight.copy_(_drawn(size, self.down.weight, generator))
            self.up.weight.zero_()

    def forward(self, H: torch.Tensor, X: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return H', (..., D), for H and X (..., D) and the function LayerNorm(H + X)."""
        z = self.technique.reads(H, X, norm)
        change: torch.Tensor = self.up(self.hidden(z))
        # Eq. (bottleneck)  H' = H + s (U σ(D z + b_d) + b_u)
        return H + self.technique.scaling * change

    def hidden(self, z: torch.Tensor) -> torch.Tensor:
        """Return σ(D z + b_d), (..., m)."""
        if self.technique.activation == "gelu":
            return project(z, [self.down], gelu=True)
        h: torch.Tensor = self.down(z)
        return F.relu(h) if self.technique.activation == "relu" else F.silu(h)

    def extra_repr(self) -> str:
        """Show the technique."""
        return repr(self.technique)


@dataclass(frozen=True, repr=False)
class BottleneckAdapter(Technique):
    """Base of the adapters with a bottleneck of m units: two maps, from D to m and back to D.

    Merged with its sub-layer such an adapter has no form, because of its activation.

    Attributes
    ----------
    bottleneck : int or str
        m, or ``"D/16"``: D by so much, rounded down, at least 1.
    activation : {"relu", "gelu", "swish"}
        σ.
    scaling : float
        s.

    Raises
    ------
    PlanError
        If a setting is out of range.
    """

    bottleneck: int | str = "D/16"
    activation: str = "relu"
    scaling: float = 1.0

    attaches_to: ClassVar[tuple[type[Adaptable], ...]] = (SublayerEnd,)

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            cls.trains = tuple(
                f"adapters.{cls.name}.{each}.{kind}"
                for each in ("down", "up")
                for kind in ("weight", "bias")
            )

    def __post_init__(self) -> None:
        m = self.bottleneck
        by = re.fullmatch(r"D/([0-9]+(?:\.[0-9]+)?)", m) if isinstance(m, str) else None
        divides = by is not None and 1e-3 <= float(by[1]) <= _LARGEST_RANK
        if not divides and not (type(m) is int and 1 <= m <= _LARGEST_RANK):
            raise PlanError(
                f"{self.name}: bottleneck must be a whole number from 1 to {_LARGEST_RANK}, or a "
                f'part of D such as "D/16", found {m!r:.80}'
            )
        if self.activation not in ACTIVATIONS:
            raise PlanError(
                f"{self.name}: activation must be one of {', '.join(ACTIVATIONS)}, found "
                f"{self.activation!r:.80}"
            )
        if not is_number(self.scaling) or not 0 < self.scaling <= _LARGEST_ALPHA:
            raise PlanError(
                f"{self.name}: scaling must be a positive number, found {self.scaling!r:.80} (the "
                f"largest is {_LARGEST_ALPHA:,.0f})"
            )
        object.__setattr__(self, "scaling", float(self.scaling))

    def size_for(self, hidden: int) -> int:
        """Return m for a model of hidden size D."""
        if isinstance(self.bottleneck, int):
            return self.bottleneck
        size = max(1, int(hidden // float(self.bottleneck.removeprefix("D/"))))
        if size > _LARGEST_RANK:
            raise PlanError(
                f"{self.name}: bottleneck {self.bottleneck} is {size:,} units for D = {hidden}; "
                f"the largest is {_LARGEST_RANK:,}"
            )
        return size

    @property
    def caption(self) -> str:
        """Such as ``"Series m=64"``."""
        return f"{self.short} m={self.bottleneck}"

    def reads(self, H: torch.Tensor, X: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return z, (..., D): what D is applied to."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it reads")

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Add a :class:`Bottleneck` to the end of a sub-layer and return it."""
        assert isinstance(module, SublayerEnd)
        module.add_adapter(self.name, Bottleneck(self, module, generator))
        return module


@register
@dataclass(frozen=True, repr=False)
class SeriesAdapter(BottleneckAdapter):
    """H + s (U σ(D H + b_d) + b_u): an adapter after the sub-layer (Houlsby et al., 2019).

    Section 2.1 of the paper: after the projection of a sub-layer and before its residual. (Houlsby
    et al. train the LayerNorms too: :class:`LayerNormGain` and :class:`BiasDelta` beside it.)
    """

    activation: str = "swish"

    name: ClassVar[str] = "series"
    short: ClassVar[str] = "Series"

    def combines_with(self, other: Technique) -> bool:
        """Return False for Pfeiffer's form: which of the two is first is nowhere said."""
        return not isinstance(other, PfeifferAdapter)

    def reads(self, H: torch.Tensor, X: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return H."""
        return H  # Eq. (SeriesAdapter)  z = H


@register
@dataclass(frozen=True, repr=False)
class PfeifferAdapter(BottleneckAdapter):
    """H + s (U σ(D LayerNorm(H + X) + b_d) + b_u): the form of Pfeiffer et al. (2020).

    The method ``pfeiffer`` has it after the feed-forward block alone. The residual and LayerNorm of
    the sub-layer are applied twice: to what the adapter reads, and to what it returns.
    """

    name: ClassVar[str] = "pfeiffer"
    short: ClassVar[str] = "Pfeiffer"

    def reads(self, H: torch.Tensor, X: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return LayerNorm(H + X)."""
        return norm(H, X)  # Eq. (PfeifferAdapter)  z = LayerNorm(H + X)


@register
@dataclass(frozen=True, repr=False)
class ParallelAdapter(BottleneckAdapter):
    """H + s (U σ(D X + b_d) + b_u): an adapter beside the sub-layer, whose input X it reads.

    Section 2.1 of the paper describes it; He et al. (2022) scale it, by 4.
    """

    scaling: float = 4.0

    name: ClassVar[str] = "parallel"
    short: ClassVar[str] = "Parallel"
    order: ClassVar[int] = 1  # after a Series Adapter, which reads the sub-layer's output alone

    def reads(self, H: torch.Tensor, X: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return X."""
        return X  # Eq. (ParallelAdapter)  z = X


@register
@dataclass(frozen=True, repr=False)
class Full(Technique):
    """Train the pre-trained weight and bias directly."""

    name: ClassVar[str] = "full"
    short: ClassVar[str] = "full"
    trains: ClassVar[tuple[str, ...]] = ("weight", "bias")
    is_a_sum: ClassVar[bool] = True

    def combines_with(self, other: Technique) -> bool:
        """Return False: a fully trained module takes no other technique."""
        return False

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        """Return ``module`` unchanged."""
        return module


def _scaling(r: int, alpha: float, rank_stabilised: bool) -> float:
    """Return s: alpha / r, or alpha / √r if it is rank-stabilised."""
    # Eq. (s)  s = alpha / r, or alpha / √r
    return alpha / math.sqrt(r) if rank_stabilised else alpha / r


def _drawn(rows: int, weight: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw a matrix (rows, in) for the input of ``weight`` (out, in), uniform in ±1/√in.

    It is drawn on the CPU in float32: a seed gives the same values on every device and dtype. On
    the meta device nothing is drawn.
    """
    drawn = weight.new_empty(rows, weight.shape[1])
    if not drawn.is_meta:
        drawn = torch.empty(rows, weight.shape[1], device="cpu")
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    return drawn.to(weight)
