"""Exercise 6: the gradient of the key bias."""

import torch


def score_gradient(P: torch.Tensor, dP: torch.Tensor) -> torch.Tensor:
    """Return dS for P = softmax(S) along the last dimension, (T, T).

    Parameters
    ----------
    P, dP : torch.Tensor, (T, T)
        The probabilities, and the gradient of the loss with respect to them.
    """
    raise NotImplementedError("softmax backwards; the row sums of dS tell whether it is right")


def key_bias_gradient(dS: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """Return db for S = Q (K + 1 bᵀ)ᵀ / √Dh, (Dh,).

    Parameters
    ----------
    dS : torch.Tensor, (T, T)
        The gradient of the scores.
    Q : torch.Tensor, (T, Dh)
        The queries.
    """
    raise NotImplementedError("b is in every key: sum over the keys; then look at what you have")
