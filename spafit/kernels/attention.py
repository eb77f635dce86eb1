"""Scaled dot-product attention over padded sequences, Eq. (4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from spafit.kernels.forms import choose_form


def attention_reference(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    keep: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Eq. (4) written out: softmax(QKᵀ / √Dh) V, with dropout on the probabilities.

    This is the definition of :func:`attention`; its arguments are described there.
    """
    Dh = Q.shape[-1]
    scores = Q @ K.transpose(-2, -1) / math.sqrt(Dh)  # (B, A, T, T)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    return F.dropout(probabilities, dropout) @ V  # (B, A, T, Dh)


def attention(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    keep: torch.Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Attend from every query to the kept keys of its sequence, Eq. (4).

    Parameters
    ----------
    Q, K, V : torch.Tensor, (B, A, T, Dh)
        Queries, keys and values of A heads.
    keep : torch.Tensor of bool, (B, 1, 1, T), optional
        True where a key is a real token; None keeps all. Every sequence needs at least one: where
        there is none, the forms do not agree (the plain one gives NaN).
    dropout : float
        Rate at which attention probabilities are dropped; 0 outside training.
    impl : {"auto", "reference", "sdpa", "fused"}
        ``"sdpa"`` is PyTorch's ``scaled_dot_product_attention``, which is the fused form here, and
        what ``"auto"`` takes.

    Returns
    -------
    torch.Tensor, (B, A, T, Dh)

    Raises
    ------
    ConfigError
        If ``impl`` is not one of the four.
    """
    if choose_form("attention", impl, ("reference", "sdpa", "fused"), "sdpa") == "reference":
        return attention_reference(Q, K, V, keep, dropout)
    return F.scaled_dot_product_attention(Q, K, V, attn_mask=keep, dropout_p=dropout)
