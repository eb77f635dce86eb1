"""Attention over packed sequences by PyTorch's flash and efficient operators for NVIDIA GPUs.

``flash`` is FlashAttention 2 (Dao 2023), for bfloat16 and float16; ``efficient`` is xFormers'
memory-efficient attention, for float32, too, and for older cards. Both are told where each sequence
begins, compute no padding, and have derivatives of PyTorch's own; both draw dropout from its
generator, flash with 8 bits an element, so that a rate of 0.1 drops 0.1016. They are what
``scaled_dot_product_attention`` calls for nested tensors. Their backward adds up in an order that
may change; only ``torch.use_deterministic_algorithms`` makes it repeat bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

_HALF_TYPES = (torch.bfloat16, torch.float16)
_MULTIPLE = 8
"""Both operators read 16 bytes at once: a head's size is filled up with zeros to a multiple."""
_MOST_OF_FLASH = 256
"""The largest head that flash has."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""From Q, K, V (tokens, A, Dh) and the scale of the scores to H1 (tokens, A, Dh)."""


def flash(
    QKV: torch.Tensor,
    boundaries: torch.Tensor,
    tokens: int,
    longest: int,
    num_heads: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute attention within each sequence, Eq. (4): H1 = softmax(QKᵀ / √Dh) V in each head.

    Parameters
    ----------
    QKV : torch.Tensor, (N, 3·D)
        Queries, keys and values side by side, A heads of size Dh = D / A in each; bfloat16 or
        float16, on a GPU (:func:`why_no_flash`).
    boundaries : torch.Tensor of int32, (B + 1,)
        On the same device: sequence i has the rows boundaries[i] .. boundaries[i + 1] - 1.
    tokens : int
        boundaries[B], known on the host.
    longest : int
        No sequence is longer.
    num_heads : int
        A.
    dropout : float
        Rate at which attention probabilities are dropped; 0 outside training.

    Returns
    -------
    torch.Tensor, (N, D)
        H1 with its heads joined; 0 in rows that belong to no sequence. A captured graph serves
        other lengths with the same ``tokens``.
    """

    def attend(
        Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, scale: float
    ) -> torch.Tensor:  # (tokens, A, Dh) each
        H1, *_ = torch.ops.aten._flash_attention_forward(
            Q,
            K,
            V,
            boundaries,
            boundaries,
            longest,
            longest,
            dropout,
            False,  # causal
            False,  # whether to give the mask
            scale=scale,
        )
        given: torch.Tensor = H1
        return given

    return _attend(QKV, tokens, num_heads, attend)


def efficient(
    QKV: torch.Tensor,
    boundaries: torch.Tensor,
    tokens: int,
    longest: int,
    num_heads: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return the same as :func:`flash`, which see; also in float32 (:func:`why_no_efficient`)."""
    # What backward needs is computed only where there will be one.
    keep = torch.is_grad_enabled() and QKV.requires_grad
    # Backward refuses more than there are tokens.
    longest = min(longest, tokens)

    def attend(
        Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, scale: float
    ) -> torch.Tensor:  # (tokens, A, Dh) each
        H1, *_ = torch.ops.aten._efficient_attention_forward(
            Q[None],
            K[None],
            V[None],
            None,  # bias
            boundaries,
            boundaries,
            longest,
            longest,
            dropout,
            0,  # no mask
            keep,
            scale=scale,
        )
        given: torch.Tensor = H1[0]
        return given

    return _attend(QKV, tokens, num_heads, attend)


def _attend(QKV: torch.Tensor, tokens: int, num_heads: int, attend: Attend) -> torch.Tensor:
    """Call one of the operators on the rows that belong to a sequence, and join the heads."""
    N, D = QKV.shape[0], QKV.shape[1] // 3
    head_size = D // num_heads
    if tokens == 0:
        H1 = QKV[:0, :D]
    else:
        padding = -head_size % _MULTIPLE
        if QKV.stride(1) != 1 or (not padding and not _is_aligned(QKV)):
            QKV = QKV.clone(memory_format=torch.contiguous_format)
        fields = QKV[:tokens].view(tokens, 3, num_heads, head_size)
        Q, K, V = F.pad(fields, (0, padding)).unbind(1) if padding else fields.unbind(1)
        H1 = attend(Q, K, V, 1.0 / math.sqrt(head_size))  # (tokens, A, Dh + padding)
        H1 = H1[..., :head_size].flatten(1)
    return F.pad(H1, (0, 0, 0, N - tokens)) if tokens < N else H1


def _is_aligned(QKV: torch.Tensor) -> bool:
    return QKV.stride(0) % _MULTIPLE == 0 and QKV.storage_offset() % _MULTIPLE == 0


def why_no_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Return why :func:`flash` is not available for a head size and type; empty where it is."""
    reason = _why_not("_flash_attention_forward", device)
    if reason:
        return reason
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch is built without FlashAttention"
    if dtype not in _HALF_TYPES:
        return f"it computes in bfloat16 or float16, found {dtype}"
    if head_size > _MOST_OF_FLASH:
        return f"it has heads of at most {_MOST_OF_FLASH}, found {head_size}"
    return _why_too_old(device, 8, 0)


def why_no_efficient(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Return why :func:`efficient` is not available for a head size and type; empty where it is."""
    del head_size  # any will do
    reason = _why_not("_efficient_attention_forward", device)
    if reason:
        return reason
    if dtype not in (torch.float32, *_HALF_TYPES):
        return f"it computes in float32, bfloat16 or float16, found {dtype}"
    return _why_too_old(device, 8 if dtype == torch.bfloat16 else 7, 0)


def _why_not(operator: str, device: torch.device) -> str:
    if device.type != "cuda":
        return f"it needs a CUDA device, found {device}"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "CUDA"):
        return f"this PyTorch is built without {operator}"
    return ""


def _why_too_old(device: torch.device, *least: int) -> str:
    found = torch.cuda.get_device_capability(device)
    if found >= least:
        return ""
    return f"it needs compute capability {least[0]}.{least[1]}, {device} has {found[0]}.{found[1]}"
