"""Exercise 2: Eq. (6) and (7) as the checkpoint computes them."""

from collections.abc import Callable

import torch


def attention_output(
    H2: torch.Tensor,
    X: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    eps: float,
    drop: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return H4, (..., D).

    The paper prints H3 = LayerNorm(W3 H2 + b3) and H4 = Dropout(H3). The checkpoint was trained
    with another order, and with a residual.

    Parameters
    ----------
    H2 : torch.Tensor, (..., D)
        What attention gave.
    X : torch.Tensor, (..., D)
        The input of the layer.
    W, b : torch.Tensor, (D, D) and (D,)
        W3 and b3 of the paper; a row of W is an output, as in nn.Linear.
    gamma, beta, eps
        Of the LayerNorm.
    drop : callable
        Dropout: drops some of the numbers of a tensor, and returns the rest.
    """
    raise NotImplementedError("three operations; torch.nn.functional.layer_norm is one of them")
