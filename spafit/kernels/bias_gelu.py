"""Bias and GELU as one operation, the end of Eq. (8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spafit.kernels.forms import choose_form, require_triton, suits_triton


def bias_gelu_reference(
    h: torch.Tensor, bias: torch.Tensor, bias_delta: torch.Tensor | None = None
) -> torch.Tensor:
    """Write the equation out; its arguments are described at :func:`bias_gelu`."""
    b = bias if bias_delta is None else bias + bias_delta
    return F.gelu(h + b).to(h.dtype)


def bias_gelu(
    h: torch.Tensor,
    bias: torch.Tensor,
    bias_delta: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Apply y = GELU(h + b + δ) = u Φ(u) for u = h + b + δ, with the exact (erf) Φ.

    Parameters
    ----------
    h : torch.Tensor, (..., F)
        A product without its bias.
    bias : torch.Tensor, (F,)
        b.
    bias_delta : torch.Tensor, (F,), optional
        δ, what is added to the frozen b.
    impl : {"auto", "reference", "triton"}
        The form to use. ``"triton"`` is one kernel each way, which keeps h alone for backward and
        rounds only y; ``"auto"`` is ``"triton"`` on a CUDA device that has it.

    Returns
    -------
    torch.Tensor, (..., F)
        In the type of h.

    Raises
    ------
    ConfigError
        If ``impl`` is not one of the three or cannot be had, or a second derivative is asked of
        the Triton form.
    """
    tensors = (h, bias, bias_delta)
    auto = "triton" if suits_triton(*tensors) else "reference"
    form = choose_form("bias_gelu", impl, ("reference", "triton"), auto)
    if form == "reference":
        return bias_gelu_reference(h, bias, bias_delta)
    require_triton("bias_gelu", *tensors)
    from spafit.kernels.gpu.triton_gelu import bias_gelu_triton

    return bias_gelu_triton(h, bias, bias_delta)
