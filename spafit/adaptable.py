"""The modules of a layer that techniques adapt, and the operations that they compute together.

A technique (:mod:`spafit.adapters`) adds a child to a module, or puts a subclass in its place that
shares its parameters; what it added can be switched off (``adapters_on``). The pre-trained tensors
keep their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from spafit.errors import PlanError
from spafit.kernels import Part, dropout, dropout_add_norm, stacked_linear


class Adaptable(nn.Module):
    """Base of the places in a layer that techniques adapt.

    Attributes
    ----------
    adapters_on : bool
        While it is False, the module computes what it did before anything was attached.
    merges : tuple of str
        The added parameters that :meth:`merged` folds into the pre-trained ones. A subclass that
        adds parameters and has a merged form names them here, with those of its parent;
        :func:`spafit.merged_state_dict` refuses a parameter that is not named, and a class that
        computes something else than its parent but has no :meth:`merged` of its own.
    called : str
        Such a place in error messages.
    """

    merges: ClassVar[tuple[str, ...]] = ()
    called: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__()
        self.adapters_on = True

    def merged(self) -> dict[str, torch.Tensor]:
        """Return the pre-trained tensors with all of :attr:`merges` folded in, as detached copies.

        The names are those in the module.
        """
        return {}


class Affine(Adaptable):
    """Base of Linear and LayerNorm: a weight, a bias b and perhaps its δ.

    Attributes
    ----------
    weight, bias : nn.Parameter
        The pre-trained tensors.
    bias_delta : spafit.BiasDelta or None
        The module of δ, if one is attached.
    impl : str
        The form of the kernel; see :func:`spafit.set_impl`.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    merges: ClassVar[tuple[str, ...]] = ("bias_delta.delta",)

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.bias_delta: nn.Module | None = None
        self.impl = "auto"

    def take_over(self, module: Affine) -> None:
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

        A BiasDelta that has hooks or a replaced ``forward`` is called here.
        """
        delta = self.bias_delta
        if delta is None or not self.adapters_on:
            return self.bias, None
        if _says(delta, "is_a_sum") and can_be_bypassed(delta):
            assert isinstance(delta.delta, torch.Tensor)
            return self.bias, delta.delta
        return delta(self.bias), None

    def merged(self) -> dict[str, torch.Tensor]:
        """Return weight and bias with all of :attr:`merges` folded in, as detached copies."""
        return {"weight": self.merged_weight(), "bias": self.merged_bias()}

    def merged_weight(self) -> torch.Tensor:
        """Return the weight in effect, detached, rounded once to its type."""
        return self.weight.detach().clone()

    def merged_bias(self) -> torch.Tensor:
        """Return b, or b + δ, detached, rounded once to b's type."""
        b = self.bias.detach().clone()
        if self.bias_delta is not None:
            assert isinstance(self.bias_delta.delta, torch.Tensor)
            b += self.bias_delta.delta.detach()  # Eq. (BiasDelta merged)  b + δ
        return b


class Linear(Affine):
    """y = x Wᵀ + b, or x Wᵀ + (b + δ) once a BiasDelta is attached.

    W has no values yet: :func:`spafit.bert.initialise` draws them, or a checkpoint fills it.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last dimension before and after.

    Attributes
    ----------
    ia3 : spafit.adapters.IA3Scale or None
        The module of (IA)³'s vector, if one is attached.
    """

    called = "a Linear"
    merges: ClassVar[tuple[str, ...]] = (*Affine.merges, "ia3.l")
    is_stackable: ClassVar[bool] = True  # project may compute it as part of a stack

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(torch.empty(out_features, in_features), torch.zeros(out_features))  # W, b
        self.ia3: nn.Module | None = None

    def take_over(self, module: Affine) -> None:
        """Share another Linear's parameters, mode, switch and vector of (IA)³."""
        assert isinstance(module, Linear)
        super().take_over(module)
        self.ia3 = module.ia3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        if self.ia3 is None or not self.is_scaled:
            return self.affine(x)
        y: torch.Tensor = self.ia3(x, self.affine)
        return y

    @property
    def is_scaled(self) -> bool:
        """Whether (IA)³ has a part in what is computed now."""
        return self.ia3 is not None and self.adapters_on

    def affine(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out), without (IA)³."""
        if self.impl == "reference":
            return F.linear(x, self.weight, self.b())  # Eq. (BiasDelta)  y = x Wᵀ + (b + δ)
        return stacked_linear(x, [self.part()], impl=self.impl)  # the same, fused

    def part(self) -> Part:
        """Return the tensors of this map for the kernels, without those that are switched off."""
        return Part(self.weight, *self.bias_terms())

    def merged(self) -> dict[str, torch.Tensor]:
        """Return weight and bias with all that was added folded in; (IA)³'s vector last."""
        state = super().merged()
        if self.ia3 is not None:
            state = self.ia3.merged(**state)  # type: ignore[operator]
        return state

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Linear`` does."""
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}"


class LayerNorm(Affine):
    """y = γ ⊙ (x - mean) / √(variance + eps) + β, or with γ + δγ and β + δ once they are attached.

    Parameters
    ----------
    size : int
        Length of the last dimension, over which mean and variance are taken.
    eps : float
        Added to the variance.

    Attributes
    ----------
    gain_delta : spafit.adapters.GainDelta or None
        The module of δγ, if one is attached.
    """

    called = "a LayerNorm"
    merges: ClassVar[tuple[str, ...]] = (*Affine.merges, "gain_delta.delta")

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(torch.ones(size), torch.zeros(size))  # γ, β
        self.eps = eps
        self.gain_delta: nn.Module | None = None

    def take_over(self, module: Affine) -> None:
        """Share another LayerNorm's parameters, mode, switch, eps and δγ."""
        assert isinstance(module, LayerNorm)
        super().take_over(module)
        self.eps = module.eps
        self.gain_delta = module.gain_delta

    def gamma(self) -> torch.Tensor:
        """Return the gain in effect: γ, or γ + δγ if a δγ is attached and switched on."""
        if self.gain_delta is None or not self.adapters_on:
            return self.weight
        gamma: torch.Tensor = self.gain_delta(self.weight)
        return gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of (..., size).

        Inside a layer, :func:`add_norm` computes it together with dropout and the residual.
        """
        # Eq. (LayerNormGain)  y = (γ + δγ) ⊙ x̂ + (β + δ)
        return F.layer_norm(x, self.weight.shape, self.gamma(), self.b(), self.eps)

    def merged_weight(self) -> torch.Tensor:
        """Return γ, or γ + δγ, detached, rounded once to γ's type."""
        gamma = super().merged_weight()
        if self.gain_delta is not None:
            assert isinstance(self.gain_delta.delta, torch.Tensor)
            gamma += self.gain_delta.delta.detach()  # Eq. (LayerNormGain merged)  γ + δγ
        return gamma

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


class SublayerEnd(Adaptable):
    """The end of a sub-layer: LayerNorm(Dropout(H) + X), and the place of its adapters.

    H is the output of the sub-layer's last map, X the sub-layer's input. An adapter stands between
    the dropout and the residual: it is called with Dropout(H), X and :meth:`norm`, and what it
    returns takes the place of Dropout(H). A subclass has the children ``dropout`` and
    ``LayerNorm``.

    Attributes
    ----------
    adapters : nn.ModuleDict or None
        The adapters by name, in the order in which they are called (:meth:`add_adapter`).
    """

    called = "the end of a sub-layer (attention.output or layer.output)"
    merges: ClassVar[tuple[str, ...]] = ()
    dropout: Dropout
    LayerNorm: LayerNorm

    def __init__(self) -> None:
        super().__init__()
        self.adapters: nn.ModuleDict | None = None

    def add_adapter(self, name: str, adapter: nn.Module) -> None:
        """Have an adapter of a new name called after those that are there."""
        adapters = nn.ModuleDict() if self.adapters is None else self.adapters
        if name in adapters:
            raise PlanError(f"the sub-layer has {name} already; attaching another would lose it")
        if "." in name or hasattr(nn.ModuleDict, name):
            raise PlanError(f"an adapter cannot be called {name!r:.80}; give it another name")
        adapters[name] = adapter
        self.adapters = adapters.train(self.training)

    def add_norm(self, H: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Return LayerNorm(Dropout(H) + X), (..., D); adapters, if any, change Dropout(H)."""
        if self.adapters is None or not self.adapters_on:
            return add_norm(H, X, self.dropout, self.LayerNorm)
        H = self.dropout(H)
        for adapter in self.adapters.values():
            H = adapter(H, X, self.norm)
        return self.norm(H, X)

    def norm(self, H: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Return LayerNorm(H + X)."""
        return add_norm(H, X, None, self.LayerNorm)


def project(x: torch.Tensor, maps: Sequence[Linear], gelu: bool = False) -> torch.Tensor:
    """Apply several maps to one input as one product, with their outputs side by side.

    Maps of another class, with (IA)³ that is on, with hooks or with a replaced ``forward`` are
    called one by one, so that these take effect.

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
    if not all(can_be_stacked(each) and not each.is_scaled for each in maps):
        y = torch.cat([each(x) for each in maps], dim=-1) if len(maps) > 1 else maps[0](x)
        return F.gelu(y) if gelu else y
    return stacked_linear(x, [each.part() for each in maps], gelu=gelu, impl=maps[0].impl)


def can_be_stacked(linear: nn.Module) -> bool:
    """Return whether a map is of a class that has nothing but a Part and (IA)³, and has no hook."""
    return _says(linear, "is_stackable") and can_be_bypassed(linear)


# The methods that say what a module computes, and those that say how that is merged.
_OF_WEIGHT = ("__call__", "forward", "affine", "part", "gamma"), ("merged", "merged_weight")
_OF_BIAS = ("b", "bias_terms"), ("merged", "merged_bias")
_OF_END = ("__call__", "forward", "add_norm", "norm"), ("merges",)
_OF_IA3 = ("__call__", "forward"), ("merged",)


def why_not_merged(module: Adaptable) -> str:
    """Return why the pre-trained tensors of a module cannot hold all that it computes, or "".

    What is not known to be merged is refused: a class that computes something of its own must have
    a merged form of its own, a hook may change anything, and an adapter in the end of a sub-layer
    stands beside its maps.
    """
    is_end = isinstance(module, SublayerEnd)
    names = ("dropout",) if is_end else ("bias_delta", "gain_delta", "ia3")
    children = {name: each for name in names if (each := getattr(module, name, None)) is not None}
    for each in (module, *children.values()):
        if each._forward_hooks or each._forward_pre_hooks:
            return f"{type(each).__name__} has a hook, which may change what it computes; remove it"
    if isinstance(module, SublayerEnd):
        if module.adapters is not None:
            return (
                f"the adapter {' and '.join(module.adapters)} stands beside its maps, not in them"
            )
        if not isinstance(module.dropout, (nn.Dropout, nn.Identity)):
            return f"its dropout is a {type(module.dropout).__name__}"
        return _computes_more(module, _OF_END)
    for name, child in children.items():
        if name == "ia3" and (why := _computes_more(child, _OF_IA3)):
            return why
        if name != "ia3" and (not _says(child, "is_a_sum") or "forward" in vars(child)):
            return f"{type(child).__name__} need not be a sum"
    return _computes_more(module, _OF_WEIGHT, _OF_BIAS)


def _computes_more(module: nn.Module, *parts: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
    """Return what a module computes otherwise than its class that says how it is merged, or ""."""
    for computing, merging in parts:
        replaced = [name for name in computing if name in vars(module)]
        if replaced:
            return f"its {replaced[0]} was replaced"
        for kind in type(module).mro():
            if any(name in vars(kind) for name in merging):
                break
            if any(name in vars(kind) for name in computing):
                return f"{kind.__name__} computes something of its own, and has no {merging[0]}"
    return ""


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, drop: Dropout | None, norm: LayerNorm
) -> torch.Tensor:
    """Return LayerNorm(Dropout(x) + residual), how the checkpoint ends Eq. (6)-(7) and (9)-(10).

    It is one operation unless ``drop`` or ``norm`` is of another class, has hooks or has a replaced
    ``forward``.

    Parameters
    ----------
    x, residual : torch.Tensor, (..., D)
        The sub-layer's output and its input.
    drop : Dropout or None
        Its rate is used while it is in training mode; None drops nothing.
    norm : LayerNorm
        With or without a bias delta.

    Returns
    -------
    torch.Tensor, (..., D)
    """
    ours = type(norm) is LayerNorm and (drop is None or type(drop) is Dropout)
    if not (ours and can_be_bypassed(norm) and (drop is None or can_be_bypassed(drop))):
        y: torch.Tensor = norm((x if drop is None else drop(x)) + residual)
        return y
    b, delta = norm.bias_terms()
    return dropout_add_norm(
        x,
        residual,
        norm.gamma(),
        b,
        norm.eps,
        bias_delta=delta,
        dropout=drop.p if drop is not None and drop.training else 0.0,
        impl=norm.impl,
    )


def _says(module: nn.Module, attribute: str) -> bool:
    """Return whether a module's own class says so; what its parent says need not be true of it."""
    return bool(vars(type(module)).get(attribute))


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
