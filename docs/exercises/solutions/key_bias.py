"""Solution 6."""

import math

import torch


def score_gradient(P: torch.Tensor, dP: torch.Tensor) -> torch.Tensor:
    """Return dS = P ⊙ (dP - Σ P ⊙ dP), (T, T): each row sums to 0, because that of P is 1."""
    return P * (dP - (P * dP).sum(dim=-1, keepdim=True))


def key_bias_gradient(dS: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """Return db = Σ_t (Σ_u dS[t, u]) q_t / √Dh, (Dh,), which is 0: the inner sums are."""
    return dS.sum(dim=-1) @ Q / math.sqrt(Q.shape[-1])
