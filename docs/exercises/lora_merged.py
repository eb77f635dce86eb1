"""Exercise 4: fold a trained LoRA into the matrix that it stands beside."""

import torch


def merged(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the one matrix that computes what W and the LoRA beside it compute, (out, in).

    The map is y = x Wᵀ + (alpha / r) (x Aᵀ) Bᵀ. W itself must stay as it is.

    Parameters
    ----------
    W : torch.Tensor, (out, in)
        The pre-trained matrix.
    A, B : torch.Tensor, (r, in) and (out, r)
        The trained ones.
    alpha : float
        Of the scale alpha / r.
    """
    raise NotImplementedError("one line; the shapes leave little choice")
