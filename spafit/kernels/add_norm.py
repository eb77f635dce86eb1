"""Dropout, residual and LayerNorm as one operation: the checkpoint's end of Eq. (6)-(7), (9)-(10).

The paper prints LayerNorm, then Dropout, and no residual; see :mod:`spafit.kernels.reference`.
"""

from __future__ import annotations

import torch

from spafit.errors import ConfigError
from spafit.kernels import reference
from spafit.kernels.dropout import apply_mask, keep_mask, scale_of
from spafit.kernels.forms import (
    best_on,
    choose_form,
    refuse_second_derivative,
    require_triton,
    suits_triton,
)

TRITON_WIDEST = 4096
"""The longest row that fits well into the registers of a Triton program."""


def dropout_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    bias_delta: torch.Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Compute y = LayerNorm(Dropout(x) + residual) = γ ⊙ (z - mean) / √(variance + eps) + (β + δ).

    z is Dropout(x) + residual.

    Parameters
    ----------
    x, residual : torch.Tensor, (..., D)
        The sub-layer's output and its input.
    weight, bias : torch.Tensor, (D,)
        γ and β.
    eps : float
        Added to the variance.
    bias_delta : torch.Tensor, (D,), optional
        δ, added to the frozen β.
    dropout : float
        Rate at which elements of x are dropped; 0 outside training.
    impl : {"auto", "reference", "fused", "triton"}
        The form to use. ``"fused"`` keeps z, two numbers for each token and a byte for each element
        for backward, less than the dropout, sum and LayerNorm of the plain form keep; ``"auto"`` is
        ``"fused"`` on a CPU. ``"triton"`` is one kernel for forward and one for backward, which
        keep z, two numbers for each token and the seed of the mask; ``"auto"`` uses it on a CUDA
        device that has it.

    Returns
    -------
    torch.Tensor, (..., D)

    Raises
    ------
    ConfigError
        If ``impl`` is not one of the four or is not available, or a second derivative of the fused
        or the Triton form is asked for.
    """
    tensors = (x, residual, weight, bias, bias_delta)
    known = ("reference", "fused", "triton")
    auto = best_on(x.device)
    if suits_triton(*tensors) and x.shape[-1] <= TRITON_WIDEST:
        auto = "triton"
    form = choose_form("dropout_add_norm", impl, known, auto)
    if form == "reference":
        return reference.dropout_add_norm(x, residual, weight, bias, eps, bias_delta, dropout)
    autocast = torch.is_autocast_enabled(x.device.type)
    if form == "triton":
        require_triton("dropout_add_norm", *tensors)
        if x.shape[-1] > TRITON_WIDEST:
            raise ConfigError(
                f"dropout_add_norm(impl='triton') is for rows of at most {TRITON_WIDEST}, found "
                f"{x.shape[-1]}; use impl='reference'"
            )
        from spafit.kernels.gpu.triton_add_norm import dropout_add_norm_triton

        # The kernel reads each tensor in its own type: nothing is cast before it.
        dtype = torch.float32 if autocast else torch.promote_types(x.dtype, residual.dtype)
        return dropout_add_norm_triton(x, residual, weight, bias, eps, bias_delta, dropout, dtype)
    if autocast:
        # Under autocast LayerNorm is computed in float32, as in PyTorch.
        x, residual, weight, bias = (
            each if each.dtype == torch.float64 else each.float()
            for each in (x, residual, weight, bias)
        )
        if bias_delta is not None:
            bias_delta = bias_delta.to(bias.dtype)
    y: torch.Tensor = _DropoutAddNorm.apply(x, residual, weight, bias, bias_delta, eps, dropout)  # type: ignore[no-untyped-call]
    return y


class _DropoutAddNorm(torch.autograd.Function):
    """dx = m ⊙ dz / (1 - rate), dresidual = dz, dβ = dδ = Σ dy; dz and dγ are LayerNorm's."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, bias_delta, eps, dropout):  # type: ignore[no-untyped-def]
        mask = None
        if dropout:
            mask = keep_mask(x, dropout)
            m = mask.view(torch.uint8).to(x.dtype)
            z = torch.addcmul(residual, x, m, value=scale_of(dropout, x.device))
        else:
            z = x + residual
        b = bias if bias_delta is None else bias + bias_delta
        y, mean, reciprocal_deviation = torch.native_layer_norm(z, weight.shape, weight, b, eps)
        ctx.dropout = dropout
        ctx.save_for_backward(z, mean, reciprocal_deviation, mask, weight, bias)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        refuse_second_derivative("dropout_add_norm")
        z, mean, reciprocal_deviation, mask, weight, bias = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, needs_bias, needs_delta, _, _ = ctx.needs_input_grad
        wanted = [needs_x or needs_residual, needs_weight, needs_bias or needs_delta]
        dz, dweight, db = torch.ops.aten.native_layer_norm_backward(
            dy, z, weight.shape, mean, reciprocal_deviation, weight, bias, wanted
        )
        dx = None
        if needs_x:
            dx = dz if mask is None else apply_mask(dz, mask, ctx.dropout)
        ddelta = None
        if needs_delta:  # in memory of its own, because b's gradient may be modified in place
            ddelta = db.clone() if needs_bias else db
        dbias = db if needs_bias else None
        return dx, dz if needs_residual else None, dweight, dbias, ddelta, None, None
