"""Solution 5."""

import torch


def pack(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return the real tokens of a padded batch, their positions, and the lengths."""
    keep = mask.bool()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return ids[keep], positions[keep], keep.sum(dim=1).tolist()


def unpack(rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return packed rows (N, D) as a padded batch (B, T, D), with 0 at padding."""
    padded = rows.new_zeros(len(lengths), max(lengths), rows.shape[1])
    for row, sequence in zip(padded, rows.split(lengths), strict=True):
        row[: len(sequence)] = sequence
    return padded
