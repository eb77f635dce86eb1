"""Scaled dot-product attention over padded sequences, Eq. (4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spafit.kernels import reference
from spafit.kernels.forms import choose_form


def attention(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    keep: torch.Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Compute attention, Eq. (4): H1 = softmax(QKᵀ / √Dh) V in each head, over the kept keys.

    Parameters
    ----------
    Q, K, V : torch.Tensor, (B, A, T, Dh)
        Queries, keys and values of A heads.
    keep : torch.Tensor of bool, (B, 1, 1, T), optional
        True where a key is a real token; None keeps all. Every sequence needs at least one: without
        any, the forms do not agree (the plain one gives NaN).
    dropout : float
        Rate at which attention probabilities are dropped; 0 outside training.
    impl : {"auto", "reference", "sdpa", "fused"}
        ``"sdpa"`` is PyTorch's ``scaled_dot_product_attention``; ``"fused"`` and ``"auto"`` are the
        same.

    Returns
    -------
    torch.Tensor, (B, A, T, Dh)
        H1, head by head.

    Raises
    ------
    ConfigError
        If ``impl`` is not one of the four.
    """
    if choose_form("attention", impl, ("reference", "sdpa", "fused"), "sdpa") == "reference":
        return reference.attention(Q, K, V, keep, dropout)
    return F.scaled_dot_product_attention(Q, K, V, attn_mask=keep, dropout_p=dropout)
