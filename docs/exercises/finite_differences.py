"""Exercise 7: check a gradient that you have derived."""

from collections.abc import Callable

import torch


def numerical_gradient(
    f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """Return the gradient of a function by differences of its values, of the shape of x.

    Entry by entry, by central differences (f(x + ε e_i) - f(x - ε e_i)) / 2 ε, whose error falls
    with ε². x must be the same afterwards.

    Parameters
    ----------
    f : callable
        Takes a tensor like x and returns a single number.
    x : torch.Tensor of float64
        Where.
    eps : float
        ε.
    """
    raise NotImplementedError("two values of f for each entry of x")
