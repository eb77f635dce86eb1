"""Choose the fastest of several forms of an operation by measuring them.

On a GPU no rule tells beforehand whether a library's product or a kernel of ours is faster for a
shape. So the first time that a shape is met each form is run a few times, and the fastest one is
taken from then on. A form that cannot run, or whose numbers are not the plain form's, is not taken,
and a warning says why. On a CPU nothing is measured.

This module remembers the choices of its own process. :func:`remember_in` plugs in what later
processes are to find, as ``spafit`` does with :mod:`spafit.machine.kernel_choices`. Two forms round
differently, so a run repeats bit for bit only with the choices that it began with.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from spafit.errors import ConfigError
from spafit.kernels.gpu.cuda_graphs import record, recording_stream

#: Gives the results (output, gradients) of a form for a rate of dropout.
Run = Callable[[str, float], Sequence[torch.Tensor]]
#: Gives the milliseconds of each of several calls.
Timer = Callable[[Callable[[], object], torch.device], list[float]]

# What rounding may do: as a share of the largest magnitude.
_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

_WARM_UP, _ROUNDS = 3, 9


class Memory(Protocol):
    """What keeps measurements for later processes."""

    def find(self, device: str, operation: str, shape: str) -> Any:
        """Return the entry that was kept, as :func:`measure` made it; None where there is none."""

    def keep(self, device: str, operation: str, shape: str, entry: dict[str, Any]) -> None:
        """Keep an entry, if that is possible."""


_memory: Memory | None = None
_made: dict[tuple[str, str, str], str] = {}
_told: set[tuple[str, str]] = set()


def remember_in(memory: Memory | None) -> None:
    """Look measurements up in ``memory``, and keep new ones there; None forgets them at exit."""
    global _memory
    _memory = memory


def fastest(
    operation: str,
    shape: str,
    device: torch.device,
    forms: Sequence[str],
    run: Run,
    dropout: float = 0.0,
    timer: Timer | None = None,
) -> str:
    """Name the fastest form of an operation for a shape on a device.

    Parameters
    ----------
    operation : str
        Such as ``"packed_attention"``.
    shape : str
        All that decides between the forms: sizes, type, what is differentiated.
    device : torch.device
        Where it runs.
    forms : sequence of str
        Those that is available; the last one is the plain one that the others must agree with.
    run : callable of str and float, to sequence of torch.Tensor
        Runs a form with a rate of dropout, backward too where it is wanted. What it draws, and what
        it is given, is its own.
    dropout : float
        The rate to time with.
    timer : callable, optional
        Another clock.

    Returns
    -------
    str
        While a CUDA graph is captured nothing can be measured: what is not known then is the plain
        form.
    """
    where = device_name(device)
    known = _made.get((where, operation, shape))
    if known is not None and known in forms:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return forms[-1]
    entry: Any = None if _memory is None else _memory.find(where, operation, shape)
    if not (isinstance(entry, dict) and entry.get("choice") in forms):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            entry = measure(forms, run, dropout, device, timer or milliseconds)
        reasons = entry.get("refused", {}).values()
        # Another time there may be room.
        out_of_memory = any(reason.startswith("OutOfMemoryError") for reason in reasons)
        if _memory is not None and not out_of_memory:
            _memory.keep(where, operation, shape, entry)
    _tell(operation, entry)
    chosen: str = entry["choice"]
    _made[where, operation, shape] = chosen
    return chosen


def made() -> dict[str, dict[str, str]]:
    """Return the choices of this process: of each operation, the form for each shape."""
    found: dict[str, dict[str, str]] = {}
    for (_, operation, shape), form in sorted(_made.items()):
        found.setdefault(operation, {})[shape] = form
    return found


def taken() -> list[list[str]]:
    """Return the same for :func:`adopt`: device, operation, shape and form of each."""
    return [[*key, form] for key, form in sorted(_made.items())]


def adopt(entries: Sequence[Sequence[str]]) -> None:
    """Take the choices of another process, so that a run that it began rounds as it did there.

    Raises
    ------
    ValueError
        If they are not what :func:`taken` gives.
    """
    for entry in entries:
        where, operation, shape, form = entry
        if not all(isinstance(each, str) for each in entry):
            raise ValueError(f"no choice of a form: {entry!r:.200}")
        _made[where, operation, shape] = form


def forget() -> None:
    """Have this process look the measurements up again, or measure."""
    _made.clear()
    _told.clear()


def measure(
    forms: Sequence[str], run: Run, dropout: float, device: torch.device, timer: Timer
) -> dict[str, Any]:
    """Time each form that works and agrees with the last; give the choice and what led to it."""
    expected = [each.detach().float() for each in run(forms[-1], 0.0)]
    times_ms: dict[str, float] = {}
    refused: dict[str, str] = {}
    for form in forms:
        try:
            # Detached: a graph of autograd's that is still there would break the recording.
            found = [each.detach() for each in run(form, 0.0)]
            difference = _difference(found, expected)
            if not difference <= _TOLERANCE.get(found[0].dtype, 1e-9):
                refused[form] = f"differs from {forms[-1]} by {difference:.2g} of the largest"
                continue
            times_ms[form] = statistics.median(timer(functools.partial(run, form, dropout), device))
        except _refusals() as error:
            refused[form] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    choice = min(times_ms, key=times_ms.__getitem__, default=forms[-1])
    entry: dict[str, Any] = {"choice": choice, "median_ms": times_ms}
    return {**entry, "refused": refused} if refused else entry


def _refusals() -> tuple[type[Exception], ...]:
    """Return what a form raises that cannot run here: PyTorch's errors, ours, and Triton's."""
    triton = sys.modules.get("triton.runtime.errors")
    return (
        (RuntimeError, ConfigError)
        if triton is None
        else (
            RuntimeError,
            ConfigError,
            triton.TritonError,
        )
    )


def _tell(operation: str, entry: dict[str, Any]) -> None:
    """Warn of each form that was refused, once a process."""
    refused = entry.get("refused")
    for form, reason in refused.items() if isinstance(refused, dict) else ():
        if (operation, form) not in _told:
            _told.add((operation, form))
            warnings.warn(
                f"{operation}: the form {form!r:.40} is not used ({reason!s:.200})", stacklevel=2
            )


def _difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference, as a share of the largest magnitude; NaN where one is NaN."""
    if len(found) != len(expected):
        return float("inf")
    shares = [
        ((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-30)).reshape(1)
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    ]
    return float(torch.cat(shares).max()) if shares else 0.0


def milliseconds(call: Callable[[], object], device: torch.device) -> list[float]:
    """Time some calls one by one, after some that are not counted.

    On a GPU what is timed is a captured graph of the call, as a captured training step replays it:
    launched one by one, small kernels would be measured by the time that launching takes. A form
    that cannot be captured raises.
    """
    if device.type != "cuda":
        for _ in range(_WARM_UP):
            call()
        times = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
        return times
    stream = recording_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    _, graph = record(call, device)
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]


@functools.cache
def device_name(device: torch.device) -> str:
    """Name what the choices depend on beside the shape: the card and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        triton = f", triton {importlib.metadata.version('triton')}"
    return f"{name}, torch {torch.__version__}{triton}"
