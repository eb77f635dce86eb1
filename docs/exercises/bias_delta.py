"""Exercise 1: add a trained vector to a pre-trained bias, without writing to it."""

import torch
from torch import nn


class BiasDelta(nn.Module):
    """b + δ, where δ trains and b stays as it is.

    Parameters
    ----------
    bias : torch.Tensor, (out,)
        The pre-trained bias. δ has its length and type.
    """

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        raise NotImplementedError("make δ: a parameter that changes nothing before it is trained")

    def forward(self, b: torch.Tensor) -> torch.Tensor:
        """Return b + δ, (out,)."""
        raise NotImplementedError("return the sum; b must not be changed")
