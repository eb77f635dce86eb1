"""Exercise 5: take the padding out of a batch, and put the results back."""

import torch


def pack(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return the real tokens of a padded batch, their positions, and the lengths.

    Parameters
    ----------
    ids : torch.Tensor of int64, (B, T)
        Token ids, padded on the right.
    mask : torch.Tensor, (B, T)
        1 at real tokens, 0 at padding.

    Returns
    -------
    ids : torch.Tensor of int64, (N,)
        One sequence after the other.
    position_ids : torch.Tensor of int64, (N,)
        0, 1, 2 ... from the start of each sequence.
    lengths : list of int
        Tokens of each sequence.
    """
    raise NotImplementedError("a mask of bool can be an index")


def unpack(rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return packed rows (N, D) as a padded batch (B, T, D), with 0 at padding."""
    raise NotImplementedError("make the zeros first, then fill in")
