"""Several matrices that lie side by side in memory are one tall matrix, without a copy.

Query, key and value (and their A, and their B) have the same input, so that one product can serve
all three if their matrices are one. They are laid side by side where they get their memory: where a
model is built, loaded, moved, copied or adapted (:meth:`spafit.bert.SelfAttention.lay_side_by_side`
is called there). A forward pass only looks where they are: side by side, they are read as one
matrix; anywhere else, because a user arranged them otherwise, they are copied into one for the
product and stay where they are.

Each of them has a storage of its own even side by side, because what saves, shares or counts
tensors by their storage (``torch.save``, safetensors, accelerate) would take the parts of one
storage for one tensor under several names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

# Only of these it is known that their memory is what they look like: not of a DTensor, a fake or a
# quantised tensor, which are classes of their own.
_PLAIN = (torch.Tensor, nn.Parameter)


def cut(whole: torch.Tensor, rows: Sequence[int]) -> list[torch.Tensor]:
    """Cut (Σ rows, ...) into tensors (rows_i, ...) with a storage each, over the same memory.

    Each of them keeps the memory alive.
    """
    return [from_dlpack(piece) for piece in torch.split(whole.detach(), list(rows))]


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return where each tensor's values begin in memory; 0 where it has none of its own."""
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

    For reading while the tensors are there, where no gradient is recorded.
    """
    if len(tensors) == 1:
        return tensors[0]
    if not are_together(tensors):
        return torch.cat([tensor.detach() for tensor in tensors])
    # Every byte of it is one of the tensors', which keep it alive.
    first = tensors[0]
    rows = sum(len(tensor) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    memory = torch._C._construct_storage_from_data_pointer(first.data_ptr(), first.device, nbytes)
    whole = torch.empty(0, dtype=first.dtype, device=first.device).set_(memory)
    return whole.view(rows, *first.shape[1:])


def lay_together(parameters: Sequence[nn.Parameter]) -> None:
    """Move the parameters' values so that they lie side by side, where nothing else depends on it.

    The parameters stay what they are, under their names; only the memory behind them changes. What
    lies in shared memory, is part of a larger storage (a view of a flat vector) or is no plain
    tensor (a DTensor) was put there by the user, and is left with the others.
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
    """Return whether a parameter has its memory for itself, on a device whose memory can be cut."""
    if type(tensor) not in _PLAIN or tensor.device.type not in ("cpu", "cuda"):
        return False
    # PyTorch calls every tensor on a GPU shared.
    shared = tensor.device.type == "cpu" and tensor.is_shared()  # type: ignore[no-untyped-call]
    return (
        not shared and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    )
