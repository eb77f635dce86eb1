"""The techniques: what may train inside a layer, beside or instead of the pre-trained tensors.

A technique never renames a pre-trained key. It adds keys beside it:

====================  ==============  ===========================================  ===============
technique             on              computes                                     trains
====================  ==============  ===========================================  ===============
:class:`BiasDelta`    Linear          y = x Wᵀ + (b + δ)                           bias_delta
:class:`BiasDelta`    LayerNorm       y = γ ⊙ x̂ + (β + δ)                          bias_delta
:class:`DirectBias`   both            as the pre-trained module                    bias
:class:`LoRA`         Linear          y = x Wᵀ + b + (alpha/r) (drop(x) Aᵀ) Bᵀ     lora_A, lora_B
:class:`Full`         both            as the pre-trained module                    weight, bias
====================  ==============  ===========================================  ===============

With :class:`BiasDelta` and :class:`LoRA` nothing pre-trained is ever written to, which the paper
proposes against forgetting (section 7): switch the additions off and the pre-trained model is there
again, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from spafit.config import is_number
from spafit.errors import PlanError
from spafit.kernels import Part, dropout, dropout_add_norm, stacked_linear

#: The keys that techniques add beside the pre-trained ones.
ADDED = ("lora_A", "lora_B", "bias_delta")

# Far above any use; what is larger is a mistake that would only end in exhausted memory.
_LARGEST_RANK = 65_536
_LARGEST_ALPHA = 1e6  # a larger one only makes the first loss infinite


class Linear(nn.Module):
    """y = x Wᵀ + b, or x Wᵀ + (b + δ) once a :class:`BiasDelta` is attached.

    W is not drawn here: :func:`spafit.bert.initialise` draws it, or a checkpoint fills it.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last dimension before and after.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))  # W
        self.bias = nn.Parameter(torch.zeros(out_features))  # b
        self.bias_delta: nn.Parameter | None = None  # δ (out,), zero when attached
        self.adapters_on = True
        self.impl = "auto"  # the form of the kernel; see spafit.set_impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        return stacked_linear(x, [self.part()], impl=self.impl)

    def part(self) -> Part:
        """Give what the kernels need of this map: the tensors that are switched on."""
        return Part(self.weight, self.bias, self.bias_delta if self.adapters_on else None)

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Linear`` does, and what is attached."""
        out_features, in_features = self.weight.shape
        delta = "" if self.bias_delta is None else ", bias_delta"
        return f"in_features={in_features}, out_features={out_features}{delta}"


class LayerNorm(nn.Module):
    """y = γ ⊙ (x - mean) / √(variance + eps) + β, with β + δ once a :class:`BiasDelta` is attached.

    Parameters
    ----------
    size : int
        Length of the last dimension, over which mean and variance are taken.
    eps : float
        Added to the variance.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))  # γ
        self.bias = nn.Parameter(torch.zeros(size))  # β
        self.bias_delta: nn.Parameter | None = None  # δ (size,), zero when attached
        self.eps = eps
        self.adapters_on = True
        self.impl = "auto"  # the form of the kernel; see spafit.set_impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of (..., size)."""
        delta = self.bias_delta if self.adapters_on else None
        b = self.bias if delta is None else self.bias + delta
        return F.layer_norm(x, self.weight.shape, self.weight, b, self.eps)

    def extra_repr(self) -> str:
        """Show the size and what is attached."""
        delta = "" if self.bias_delta is None else ", bias_delta"
        return f"{self.weight.shape[0]}, eps={self.eps}{delta}"


class Dropout(nn.Dropout):
    """PyTorch's Dropout, drawn by :func:`spafit.kernels.dropout`."""

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.impl = "auto"  # the form of the kernel; see spafit.set_impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of x (...) in training."""
        return dropout(x, self.p if self.training else 0.0, self.impl)


class LoRALinear(Linear):
    """y = x Wᵀ + b + (alpha/r) (drop(x) Aᵀ) Bᵀ, around the parameters of an existing Linear.

    B starts at zero, so that training begins at the pre-trained function; A is Kaiming-uniform with
    a = √5, as in Hu et al.'s code, that is uniform in ±1/√in.

    Parameters
    ----------
    linear : Linear
        Its weight, bias and bias delta are taken over, not copied.
    r : int
        Rank.
    alpha : float
        The update is scaled by alpha / r.
    dropout : float
        Rate at which the input of A is dropped in training.
    generator : torch.Generator, optional
        A CPU generator from which A is drawn; None takes torch's global one.
    """

    def __init__(
        self,
        linear: Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.train(linear.training)  # a module attached to a model in eval mode must not drop out
        self.weight = linear.weight  # W
        self.bias = linear.bias  # b
        self.bias_delta = linear.bias_delta  # δ
        self.adapters_on = linear.adapters_on
        self.impl = linear.impl
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

    def part(self) -> Part:
        """Give what the kernels need of this map: the tensors that are switched on."""
        if not self.adapters_on:
            return Part(self.weight, self.bias)
        rate = self.dropout if self.training else 0.0
        return Part(
            self.weight, self.bias, self.bias_delta, self.lora_A, self.lora_B, self.scaling, rate
        )

    def merged_weight(self) -> torch.Tensor:
        """Give W + s·BA (out, in), detached, computed in float64 and rounded once to W's type."""
        with torch.no_grad():
            update = self.scaling * (self.lora_B.double() @ self.lora_A.double())
            return (self.weight.double() + update).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Show the sizes, the rank and the scale."""
        return f"{super().extra_repr()}, r={self.lora_A.shape[0]}, scaling={self.scaling:g}"


def project(x: torch.Tensor, maps: Sequence[Linear], gelu: bool = False) -> torch.Tensor:
    """Apply several maps to one input as one product, their outputs side by side.

    Maps that are not spafit's own, or that are watched by hooks, are called one by one, so that
    whoever replaces or observes one of them sees it called.

    Parameters
    ----------
    x : torch.Tensor, (..., in)
        Input.
    maps : sequence of Linear
        With or without techniques.
    gelu : bool
        Whether to apply GELU (exact, erf) to what comes out.

    Returns
    -------
    torch.Tensor, (..., Σ out)
    """
    if not all(type(each) in (Linear, LoRALinear) and _unwatched(each) for each in maps):
        y = torch.cat([each(x) for each in maps], dim=-1) if len(maps) > 1 else maps[0](x)
        return F.gelu(y) if gelu else y
    return stacked_linear(x, [each.part() for each in maps], gelu=gelu, impl=maps[0].impl)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, drop: Dropout, norm: LayerNorm
) -> torch.Tensor:
    """Give LayerNorm(Dropout(x) + residual), as one operation where nobody watches the two.

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
    if not (ours and _unwatched(norm) and _unwatched(drop)):
        y: torch.Tensor = norm(drop(x) + residual)
        return y
    return dropout_add_norm(
        x,
        residual,
        norm.weight,
        norm.bias,
        norm.eps,
        bias_delta=norm.bias_delta if norm.adapters_on else None,
        dropout=drop.p if drop.training else 0.0,
        impl=norm.impl,
    )


def _unwatched(module: nn.Module) -> bool:
    """Whether nobody notices if a module's function is computed without calling the module."""
    return not (
        "forward" in vars(module)
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@dataclass(frozen=True)
class BiasDelta:
    """Train δ in b + δ; the pre-trained bias b stays as it is."""

    name: ClassVar[str] = "bias-delta"
    short: ClassVar[str] = "bias"
    trains: ClassVar[tuple[str, ...]] = ("bias_delta",)
    writes_pretrained: ClassVar[bool] = False

    def attach(
        self, module: Linear | LayerNorm, generator: torch.Generator | None
    ) -> Linear | LayerNorm:
        """Add a zero δ to ``module`` and give it back."""
        if module.bias_delta is not None:
            raise PlanError("the module has a bias delta already; attaching another would lose it")
        module.bias_delta = nn.Parameter(torch.zeros_like(module.bias))
        return module


@dataclass(frozen=True)
class DirectBias:
    """Train the pre-trained bias itself, as in BitFit's own paper (Ben Zaken et al., 2022)."""

    name: ClassVar[str] = "bias-direct"
    short: ClassVar[str] = "bias"
    trains: ClassVar[tuple[str, ...]] = ("bias",)
    writes_pretrained: ClassVar[bool] = True

    def attach(
        self, module: Linear | LayerNorm, generator: torch.Generator | None
    ) -> Linear | LayerNorm:
        """Give ``module`` back as it is."""
        return module


@dataclass(frozen=True)
class LoRA:
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
    writes_pretrained: ClassVar[bool] = False

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

    def attach(
        self, module: Linear | LayerNorm, generator: torch.Generator | None
    ) -> Linear | LayerNorm:
        """Give a :class:`LoRALinear` around the parameters of ``module``."""
        if not isinstance(module, Linear):
            raise PlanError("LoRA needs a Linear; a LayerNorm has no matrix to update")
        if isinstance(module, LoRALinear):
            raise PlanError("the module has LoRA already; attaching another would lose it")
        return LoRALinear(module, self.r, self.alpha, self.dropout, generator)


@dataclass(frozen=True)
class Full:
    """Train the pre-trained weight and bias themselves."""

    name: ClassVar[str] = "full"
    short: ClassVar[str] = "full"
    trains: ClassVar[tuple[str, ...]] = ("weight", "bias")
    writes_pretrained: ClassVar[bool] = True

    def attach(
        self, module: Linear | LayerNorm, generator: torch.Generator | None
    ) -> Linear | LayerNorm:
        """Give ``module`` back as it is."""
        return module


Technique = BiasDelta | DirectBias | LoRA | Full

TECHNIQUES: dict[str, type[BiasDelta] | type[DirectBias] | type[LoRA] | type[Full]] = {
    technique.name: technique for technique in (BiasDelta, DirectBias, LoRA, Full)
}
