"""Solution 4."""

import torch


def merged(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return W + (alpha / r) B A, (out, in): x (B A)ᵀ = (x Aᵀ) Bᵀ."""
    r = len(A)
    return W + alpha / r * (B @ A)
