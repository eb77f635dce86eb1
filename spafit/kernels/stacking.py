"""Several matrices that lie one after the other in memory are one tall matrix, without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def are_together(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether each tensor begins in memory where the one before it ends."""
    first = tensors[0]
    storage, expected = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        if (
            tensor.data_ptr() != expected
            or tensor.untyped_storage().data_ptr() != storage
            or not tensor.is_contiguous()
            or tensor.dtype != first.dtype
        ):
            return False
        expected += tensor.numel() * tensor.element_size()
    return True


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Give tensors (out_i, in) as one (Σ out_i, in): a view where they lie together, else a copy.

    For use where no gradient is recorded.
    """
    if len(tensors) == 1:
        return tensors[0]
    if torch.compiler.is_compiling() or not are_together(tensors):
        return torch.cat([tensor.detach() for tensor in tensors])
    rows = sum(tensor.shape[0] for tensor in tensors)
    first = tensors[0].detach()
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def lay_together(parameters: Sequence[nn.Parameter]) -> None:
    """Move the parameters' values so that they lie one after the other, where they don't yet.

    The parameters stay what they are, under their names; only the memory behind them changes.
    Loading, moving to another device and copying a model all separate them again, which is why the
    model calls this where it is about to need it.
    """
    if len(parameters) < 2 or torch.compiler.is_compiling():
        return
    if len({(each.dtype, each.device, each.shape[1:]) for each in parameters}) > 1:
        return
    if are_together(parameters):
        return
    # Memory made in inference mode could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([parameter.detach() for parameter in parameters])
        rows = [parameter.shape[0] for parameter in parameters]
        for parameter, values in zip(parameters, torch.split(whole, rows), strict=True):
            parameter.data = values
