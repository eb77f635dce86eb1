"""The same random hidden states twice, packed for spafit and padded for transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spafit.layout import Packed


@dataclass(frozen=True)
class Pair:
    """One batch of sequences sorted by length, with the gradient of their output.

    Attributes
    ----------
    packed, padded : Tensor
        The input, (N, width) and (B, T, width); both need a gradient.
    packed_upstream, padded_upstream : Tensor
        The gradient of the output, zero in rows that are no tokens.
    layout : Packed
        Where each sequence begins.
    keep : Tensor of bool, (B, T)
        True at real tokens.
    """

    packed: Tensor
    padded: Tensor
    packed_upstream: Tensor
    padded_upstream: Tensor
    layout: Packed
    keep: Tensor

    @classmethod
    def draw(
        cls, lengths: Sequence[int], width: int, output_width: int, device: torch.device
    ) -> Pair:
        """Draw a batch of sequences of these lengths."""
        layout = Packed(sorted(lengths), device)
        sizes = torch.tensor(layout.lengths, device=device)
        keep = torch.arange(max(lengths), device=device) < sizes[:, None]
        packed = torch.randn(layout.rows, width, device=device)
        upstream = torch.randn(layout.rows, output_width, device=device)
        upstream[layout.tokens :] = 0.0
        return cls(
            packed.clone().requires_grad_(),
            _padded(packed, keep).requires_grad_(),
            upstream,
            _padded(upstream, keep),
            layout,
            keep,
        )


def _padded(rows: Tensor, keep: Tensor) -> Tensor:
    """Return (N, width) as (B, T, width), zero at padding."""
    padded = rows.new_zeros(*keep.shape, rows.shape[1])
    padded[keep] = rows[: int(keep.sum())]
    return padded
