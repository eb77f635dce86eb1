"""Dropout with random numbers that are cheap to draw on a CPU.

y = x ⊙ m / (1 - rate), where m is 1 with probability 1 - rate and else 0, independently for each
element.

PyTorch's ``bernoulli_`` draws 32 or 64 bits for each element, about 4.5 ns on a CPU; here one draw
of 64 bits serves four elements, 0.7 ns each. The rate is thereby rounded to a multiple of 1/65,536
(0.1 becomes 0.100006), and the scale is computed from the rounded rate, so that the expectation of
y is exactly x. The numbers come from PyTorch's own generator: the same seed gives the same mask,
and activation checkpointing draws it again.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from spafit.kernels.forms import best_on, choose_form

_LEVELS = 65_536


def scale_of(rate: float, device: torch.device) -> float:
    """Return the factor of the kept elements: 1 / (1 - rate), for the rate as rounded."""
    if device.type != "cpu":
        return 1.0 / (1.0 - rate)
    return _LEVELS / (_LEVELS - _dropped_levels(rate))


def draw_bits(shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Draw 16 random bits for each element on the CPU, as int16 of ``shape``."""
    numel = math.prod(shape)
    draws = torch.empty((numel + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return draws.view(torch.int16)[:numel].view(shape)


def threshold(rate: float) -> int:
    """Return t such that a number of :func:`draw_bits` is below t with probability ``rate``."""
    return _dropped_levels(rate) - _LEVELS // 2


def keep_mask(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Draw m for a tensor: bool of its shape, on its device, False where ``x`` is dropped."""
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - rate)
    mask = torch.empty(x.shape, dtype=torch.bool)
    torch.ge(draw_bits(x.shape), threshold(rate), out=mask.view(torch.uint8))
    return mask


def apply_mask(x: torch.Tensor, mask: torch.Tensor, rate: float) -> torch.Tensor:
    """Return x ⊙ m / (1 - rate) for a mask of :func:`keep_mask`; also the backward, of dY."""
    # Through uint8: PyTorch converts bool to float six times as slowly.
    m = mask.view(torch.uint8).to(x.dtype)
    return m.mul_(x).mul_(scale_of(rate, x.device))


def _dropped_levels(rate: float) -> int:
    # At least one level is kept, so that no scale is infinite.
    return min(round(rate * _LEVELS), _LEVELS - 1)


class _Dropout(torch.autograd.Function):
    """dX = dY ⊙ m / (1 - rate); m is kept, one byte for each element."""

    @staticmethod
    def forward(ctx, x, rate):  # type: ignore[no-untyped-def]
        mask = keep_mask(x, rate)
        ctx.rate = rate
        ctx.save_for_backward(mask)
        return apply_mask(x, mask, rate)

    @staticmethod
    def backward(ctx, dY):  # type: ignore[no-untyped-def]
        (mask,) = ctx.saved_tensors
        return apply_mask(dY, mask, ctx.rate), None


def dropout(x: torch.Tensor, rate: float, impl: str = "auto") -> torch.Tensor:
    """Drop each element with probability ``rate`` and scale the others by 1 / (1 - rate).

    Parameters
    ----------
    x : torch.Tensor
        Any shape.
    rate : float
        At least 0 and below 1; at 0 nothing is drawn.
    impl : {"auto", "reference", "fused"}
        ``"reference"`` is PyTorch's ``F.dropout``; ``"auto"`` is ``"fused"`` on a CPU.

    Returns
    -------
    torch.Tensor
        Of the shape of ``x``.

    Raises
    ------
    ConfigError
        If ``impl`` is not one of the three.
    """
    form = choose_form("dropout", impl, ("reference", "fused"), best_on(x.device))
    if rate == 0.0:
        return x
    if form == "reference":
        return F.dropout(x, rate)
    dropped: torch.Tensor = _Dropout.apply(x, rate)  # type: ignore[no-untyped-call]
    return dropped
