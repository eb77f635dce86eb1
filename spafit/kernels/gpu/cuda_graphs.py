"""Record GPU work as a CUDA graph; where recording fails, restore the state before it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that graphs of a device are recorded on, always the same.

    The libraries of matrix products keep memory for every stream that they have worked on.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def record(
    function: Callable[[], Result], device: torch.device, pool: Any = None
) -> tuple[Result, torch.cuda.CUDAGraph]:
    """Record what a function launches, without running it.

    Parameters
    ----------
    function : callable
        It must have run before, so that nothing prepares itself in it for the first time.
    device : torch.device
        A GPU.
    pool : optional
        Of ``torch.cuda.graph_pool_handle()``: the memory that other graphs take theirs from.

    Returns
    -------
    tuple of the function's result and torch.cuda.CUDAGraph
        The result's tensors hold what each ``graph.replay()`` computes.

    Raises
    ------
    Exception
        Whatever the function or the recording raises. The stream, and the state of PyTorch's
        generator, are then what they were; graphs that were recorded before draw from another
        generator's state and must not be replayed any more.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    here, state = torch.cuda.current_stream(index), torch.cuda.get_rng_state(index)
    graph = torch.cuda.CUDAGraph()
    try:
        # Thread-local: another thread may pin memory meanwhile, as the one does that prepares the
        # next batches.
        with (
            torch.cuda.device(index),
            torch.cuda.graph(
                graph,
                pool=pool,
                stream=recording_stream(torch.device("cuda", index)),
                capture_error_mode="thread_local",
            ),
        ):
            result = function()
    except BaseException:
        torch.cuda.set_stream(here)
        # The old state may believe for good that it is being captured.
        fresh = torch.Generator(torch.device("cuda", index))
        fresh.set_state(state)
        torch.cuda.default_generators[index].graphsafe_set_state(fresh)
        raise
    return result, graph
