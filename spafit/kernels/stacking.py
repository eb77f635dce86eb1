"""Lay several matrices side by side in memory, and read them as one tall matrix without a copy.

Query, key and value have the same input, so one product can compute all three from one matrix; the
same holds for their A and their B. They are laid side by side when memory is allocated for them:
when a model is built, loaded, moved, copied or adapted
(:meth:`spafit.bert.SelfAttention.lay_side_by_side`). A forward pass only checks their addresses. If
they are side by side, it reads them as one matrix; if a user arranged them differently, it copies
them into one and leaves them in place.

Each has a storage of its own even when they are side by side: programs that save, share or count
tensors by storage (``torch.save``, safetensors, accelerate) would take slices of one storage for
one tensor with several names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

# Only these classes are known to hold their values in plain memory; a DTensor, a fake or a
# quantised tensor is of another class.
_PLAIN = (torch.Tensor, nn.Parameter)


def cut(whole: torch.Tensor, rows: Sequence[int]) -> list[torch.Tensor]:
    """Cut (Σ rows, ...) into tensors (rows_i, ...) over the same memory, each with its own storage.

    Each of them keeps the whole memory alive.
    """
    return [from_dlpack(piece) for piece in torch.split(whole.detach(), list(rows))]


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return the address of each tensor's values; 0 if it has no plain memory."""
    return [tensor.data_ptr() if type(tensor) in _PLAIN else 0 for tensor in tensors]


def are_together(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether each tensor begins in memory where the one before it ends."""
    first = tensors[0]
    expected = 0
    for tensor in tensors:
        if (
            type(tensor) not in _PLAIN
            or tensor.dtype != first.dtype
            or tensor.device != first.device
            or tensor.shape[1:] != first.shape[1:]
            or not tensor.is_contiguous()
        ):
            return False
        address = tensor.data_ptr()
        if address == 0 or address != (expected or address):  # 0: on meta, or empty
            return False
        expected = address + tensor.numel() * tensor.element_size()
    return True


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors (out_i, in) as one (Σ out_i, in): over their memory if together, else a copy.

    It may only be read, only while the tensors exist, and no gradient is recorded.
    """
    if len(tensors) == 1:
        return tensors[0]
    if not are_together(tensors):
        return torch.cat([tensor.detach() for tensor in tensors])
    # All of this memory belongs to the tensors, which keep it alive.
    first = tensors[0]
    rows = sum(len(tensor) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    memory = torch._C._construct_storage_from_data_pointer(first.data_ptr(), first.device, nbytes)
    whole = torch.empty(0, dtype=first.dtype, device=first.device).set_(memory)
    return whole.view(rows, *first.shape[1:])


def lay_together(parameters: Sequence[nn.Parameter]) -> None:
    """Move the parameters' values so that they lie side by side in memory.

    The parameters remain the same objects; only the memory behind them changes. If one of them is
    in shared memory, part of a larger storage (a view of a flat vector) or not a plain tensor (a
    DTensor), the user arranged it so, and none is moved.
    """
    if len(parameters) < 2 or are_together(parameters):
        return
    if len({(each.dtype, each.device, each.shape[1:]) for each in parameters}) > 1:
        return
    if len(set(addresses(parameters))) < len(parameters):  # also on meta, where all are 0
        return
    if not all(_is_free(each) for each in parameters):
        return
    # Memory made in inference mode could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([parameter.detach() for parameter in parameters])
        pieces = cut(whole, [len(parameter) for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data = piece


def _is_free(tensor: nn.Parameter) -> bool:
    """Return whether a parameter may be moved: plain memory of its own, on a CPU or a GPU."""
    if type(tensor) not in _PLAIN or tensor.device.type not in ("cpu", "cuda"):
        return False
    # PyTorch calls every tensor on a GPU shared.
    shared = tensor.device.type == "cpu" and tensor.is_shared()  # type: ignore[no-untyped-call]
    return (
        not shared and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    )
