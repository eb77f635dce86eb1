"""Memory: large pages, keeping freed memory, counting a run's peak, recognising out-of-memory.

Large pages and kept memory concern the host and change only speed. The first access to a page costs
a page fault: 1.3 GB of weights take 325,000 small pages or 640 large ones. And a training step that
returns the memory of its activations to the system requests it again in the next step.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from pathlib import Path

import torch

# Smaller tensors gain nothing: a large page is 2 MiB.
_LEAST_BYTES = 4 * 2**20

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt


def empty_in_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised CPU tensor, in large pages if it is large and the system has them.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : torch.dtype
        Its type.

    Returns
    -------
    torch.Tensor
        Contiguous.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # without large pages, small ones are used
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # which keeps the memory


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep freed memory in this process for its next request.

    glibc returns large blocks to the system as soon as they are freed, and in a training step every
    activation is one. Measured on allocating and filling 1 GB: 88 ms if it had been returned, 42 ms
    if it was kept. Resident memory stays at its peak until the process ends.

    Returns
    -------
    bool
        Whether this was possible: on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def forget_peak_memory() -> None:
    """Begin anew to count the peak of this process's resident memory, without what was freed.

    Only Linux can; elsewhere the peak is that of the whole process.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The host's allocator, cuBLAS and pinned memory raise plain RuntimeErrors.
    said = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in said)


def shortage(error: BaseException) -> str:
    """Return the first line of an out-of-memory error's message."""
    return str(error).partition("\n")[0] or type(error).__name__
