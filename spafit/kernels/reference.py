"""The plain form of every operation: its definition, written as its equation.

The functions follow the order of the forward pass through a layer. Every fused and Triton form
elsewhere in this folder is tested against the function of the same name here, which
``impl="reference"`` runs.

B sequences, T tokens of the longest, N tokens in all, D hidden, A heads, Dh = D / A, r rank. ``x``
is (..., in), for padded and packed tokens alike. Equation numbers are those of the SPAFIT paper,
section 3.2; its H_1 .. H_7 are H1 .. H7 in code. Dropout rates are 0 outside training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from spafit.kernels.parts import Part


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    bias_delta: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute y = x Wᵀ + (b + δ), the W(·) + b of Eq. (1)-(3), (6), (8) and (9)."""
    b = bias if bias_delta is None else bias + bias_delta  # (out,)
    return F.linear(x, weight, b)  # (..., out)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias_delta: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute y = x Wᵀ + (b + δ) + s·(drop(x) Aᵀ) Bᵀ, s = alpha / r (Hu et al., 2022, Eq. 3).

    The paper's section 2.2 writes the adapted weight as Φ_0 + ΔΦ, where ΔΦ = s·BA.
    """
    U = F.linear(F.dropout(x, dropout), lora_A)  # drop(x) Aᵀ, (..., r)
    return linear(x, weight, bias, bias_delta) + scaling * F.linear(U, lora_B)  # (..., out)


def stacked_linear(x: torch.Tensor, parts: Sequence[Part], gelu: bool = False) -> torch.Tensor:
    """Compute several maps of one input, their outputs side by side: Q, K and V, Eq. (1)-(3).

    With ``gelu`` and one map this is Eq. (8), H_5 = GELU(W_5(H_4) + b_5), in the exact (erf) form.
    """
    outputs = []
    for part in parts:
        W, b, delta, A, B, scaling, rate = part
        if A is None or B is None:
            outputs.append(linear(x, W, b, delta))
        else:
            outputs.append(lora_linear(x, W, b, A, B, scaling, delta, rate))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)  # (..., Σ out)
    return F.gelu(y) if gelu else y


def attention(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    keep: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute attention over a padded batch, Eq. (4): H_1 = softmax(QKᵀ / √Dh) V in each head.

    Q, K and V are (B, A, T, Dh); ``keep`` (B, 1, 1, T) is True at real tokens. Eq. (5) as printed
    is H_2 = Dropout(H_1); the checkpoint was trained with dropout on the probabilities instead,
    which is computed here.
    """
    return attention_probabilities(Q, K, keep, dropout) @ V  # (B, A, T, Dh)


def attention_probabilities(
    Q: torch.Tensor, K: torch.Tensor, keep: torch.Tensor | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """Compute Dropout(softmax(QKᵀ / √Dh)), (B, A, T, T): what Eq. (4) multiplies V by."""
    Dh = Q.shape[-1]
    scores = Q @ K.transpose(-2, -1) / math.sqrt(Dh)  # (B, A, T, T)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return F.dropout(torch.softmax(scores, dim=-1), dropout)


def packed_attention(
    QKV: torch.Tensor, lengths: Sequence[int], num_heads: int, dropout: float = 0.0
) -> torch.Tensor:
    """Compute attention within each packed sequence, Eq. (4): H_1 (N, D) from QKV (N, 3·D).

    Rows after the last sequence belong to no sequence; H_1 is 0 there.
    """
    outputs = []
    for rows in torch.split(QKV[: sum(lengths)], list(lengths)):  # (T, 3·D)
        Q, K, V = rows.reshape(len(rows), 3, num_heads, -1).permute(1, 2, 0, 3)  # (A, T, Dh) each
        H1 = attention(Q, K, V, dropout=dropout)  # (A, T, Dh)
        outputs.append(H1.transpose(0, 1).flatten(1))  # (T, D)
    filler = QKV.new_zeros(len(QKV) - sum(lengths), QKV.shape[1] // 3)
    return torch.cat([*outputs, filler])  # (N, D)


def dropout_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    bias_delta: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute LayerNorm(Dropout(x) + residual) = γ ⊙ (z - mean) / √(variance + eps) + (β + δ).

    This is the checkpoint's form of the LayerNorm and Dropout of Eq. (6)-(7) and (9)-(10). As
    printed, LayerNorm comes first, then Dropout, and there is no residual.
    """
    b = bias if bias_delta is None else bias + bias_delta  # (D,)
    z = F.dropout(x, dropout) + residual  # (..., D)
    return F.layer_norm(z, weight.shape, weight, b, eps)  # (..., D)
