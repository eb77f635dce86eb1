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

import math
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
import torch.nn.functional as F
from torch import nn

from spafit.adaptable import Adaptable, Linear
from spafit.config import is_number
from spafit.errors import PlanError
from spafit.kernels import Part, stacked_linear
from spafit.techniques import Technique, register

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

    is_a_sum: ClassVar[bool] = True  # a kernel may add δ itself

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
    is_stackable = True

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
