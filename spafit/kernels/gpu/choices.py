"""Which of several forms is fastest on a device: measured once, and remembered in a file.

On a GPU no rule tells beforehand whether a library's products or a kernel of ours is faster for a
shape. So the first time that a shape is met each form is run a few times, and the fastest one is
taken from then on, in later processes too: ``kernels.json`` in spafit's cache folder
(``$SPAFIT_CACHE``) holds one entry for each device, version of PyTorch, operation and shape. It may
be deleted at any time; the forms are then measured again. A form that fails, or whose numbers are
not the plain form's, is not taken, and the file says why.

Another choice rounds otherwise, so a run repeats bit for bit only with the file as it was. On a CPU
nothing is measured.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spafit.files.replacing import cache_folder, replacing
from spafit.files.strict_json import read_json
from spafit.kernels.gpu.cuda_graphs import record, recording_stream

#: Gives the results (output, gradients) of a form for a rate of dropout.
Run = Callable[[str, float], Sequence[torch.Tensor]]
#: Gives the milliseconds of each of several calls.
Timer = Callable[[Callable[[], object], torch.device], list[float]]

# What rounding may do: as a share of the largest magnitude.
_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

_WARM_UP, _ROUNDS = 3, 9

_made: dict[tuple[str, str, str], str] = {}


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
        Those that can be had; the last one is the plain one that the others must agree with.
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
    entry: Any = read()
    for name in (where, operation, shape):
        entry = entry.get(name) if isinstance(entry, dict) else None
    if not (isinstance(entry, dict) and entry.get("choice") in forms):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            entry = measure(forms, run, dropout, device, timer or milliseconds)
        reasons = entry.get("refused", {}).values()
        # Another time there may be room.
        if not any(reason.startswith("OutOfMemoryError") for reason in reasons):
            _remember(where, operation, shape, entry)
    chosen: str = entry["choice"]
    _made[where, operation, shape] = chosen
    return chosen


def made() -> dict[str, dict[str, str]]:
    """Give the choices of this process: of each operation, the form for each shape."""
    found: dict[str, dict[str, str]] = {}
    for (_, operation, shape), form in sorted(_made.items()):
        found.setdefault(operation, {})[shape] = form
    return found


def taken() -> list[list[str]]:
    """Give the same for :func:`adopt`: device, operation, shape and form of each."""
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


def remembered(device: torch.device) -> dict[str, dict[str, Any]]:
    """Give what the file holds for a device: of each operation, the entry for each shape."""
    here = read().get(device_name(device))
    if not isinstance(here, dict):
        return {}
    return {
        operation: {
            shape: entry
            for shape, entry in shapes.items()
            if isinstance(entry, dict) and isinstance(entry.get("choice"), str)
        }
        for operation, shapes in here.items()
        if isinstance(shapes, dict)
    }


def forget() -> None:
    """Have this process look into the file again, or measure."""
    _made.clear()


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
        except Exception as error:  # whatever it is, the other forms remain
            refused[form] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    choice = min(times_ms, key=times_ms.__getitem__, default=forms[-1])
    entry: dict[str, Any] = {"choice": choice, "median_ms": times_ms}
    return {**entry, "refused": refused} if refused else entry


def _difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Give the largest difference, as a share of the largest magnitude; NaN where one is NaN."""
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


def path() -> Path:
    """Give the file that the choices are remembered in."""
    return cache_folder() / "kernels.json"


def read() -> dict[str, Any]:
    """Give what the file holds; nothing where there is none or it cannot be read."""
    try:
        found = read_json(path())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(where: str, operation: str, shape: str, entry: dict[str, Any]) -> None:
    """Add an entry to the file, whole or not at all; where nothing can be written, go without."""
    known = read()
    for name in (where, operation):  # foreign content is replaced
        inner = known if name == where else known[where]
        if not isinstance(inner.get(name), dict):
            inner[name] = {}
    known[where][operation][shape] = entry
    text = json.dumps(known, indent=1, sort_keys=True) + "\n"
    with contextlib.suppress(OSError):
        path().parent.mkdir(parents=True, exist_ok=True)
        with replacing(path()) as temporary:
            temporary.write_text(text, encoding="utf-8")
