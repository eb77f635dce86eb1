"""A frozen linear map with a low-rank update: y = x Wᵀ + b + δ + s·(drop(x) Aᵀ) Bᵀ."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spafit.errors import ConfigError


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias_delta: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Write the equation out; its arguments are described at :func:`lora_linear`."""
    b = bias if bias_delta is None else bias + bias_delta
    low_rank = F.linear(F.linear(F.dropout(x, dropout), lora_A), lora_B)  # (..., out)
    return F.linear(x, weight, b) + scaling * low_rank


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias_delta: torch.Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Apply y = x Wᵀ + b + δ + s·(drop(x) Aᵀ) Bᵀ (Hu et al., 2021, Eq. 3, with biases).

    Parameters
    ----------
    x : torch.Tensor, (..., in)
        Input.
    weight : torch.Tensor, (out, in)
        W, the pre-trained weight.
    bias : torch.Tensor, (out,)
        b, the pre-trained bias.
    lora_A : torch.Tensor, (r, in)
        A, the map down to rank r.
    lora_B : torch.Tensor, (out, r)
        B, the map up again.
    scaling : float
        s = alpha / r.
    bias_delta : torch.Tensor, (out,), optional
        δ, what is added to the frozen bias.
    dropout : float
        Rate at which the input of A alone is dropped; 0 outside training.
    impl : {"auto", "reference"}
        The form to use.

    Returns
    -------
    torch.Tensor, (..., out)

    Raises
    ------
    ConfigError
        If ``impl`` is not one of the two.
    """
    if impl in ("auto", "reference"):
        return lora_linear_reference(
            x, weight, bias, lora_A, lora_B, scaling, bias_delta=bias_delta, dropout=dropout
        )
    raise ConfigError(f'lora_linear has no impl={impl!r}; choose "auto" or "reference"')
