"""How everything here is measured: checked first, then baseline and candidates side by side.

A machine's speed drifts, so times taken one after the other say little about a ratio. Here
baseline and candidates take turns in one process, batch by batch, in an order that rotates; every
round gives one ratio, and what is reported is the median of these with its spread. Before any
timing each candidate's results are compared with the baseline's, dropout off.

Memory is the opposite: what one contender has allocated stays with its process, so the peak of each
is measured in a process of its own (:func:`measure_peak_memory`):

    python -m benchmarks.harness --peak benchmarks.train_step:peft_steps '{"seed": 0}'
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from spafit.run_folder import peak_memory_mib

Thing = TypeVar("Thing")

_MOST_PASSES = 12


@dataclass(frozen=True)
class Rows:
    """One batch, as all contenders are given it: they make their own tensors of it.

    Attributes
    ----------
    numbers : tuple of int
        The rows of the data.
    tokens : int
        Their real tokens, padding not counted.
    """

    numbers: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    Attributes
    ----------
    name : str
        As it stands in the tables.
    run : callable of Rows
        The work that is timed, from row numbers to its end.
    check : callable of Rows, to dict of str to Tensor
        The results by which it is compared with the baseline, dropout off; it leaves no trace.
    tolerance : float or None
        The largest difference from the baseline, as a share of the baseline's largest magnitude;
        None takes that of :func:`compare`.
    prepared : callable, to int
        How many graphs or compiled functions it has made so far; what makes none gives 0.
    """

    name: str
    run: Callable[[Rows], object]
    check: Callable[[Rows], Mapping[str, Tensor]]
    tolerance: float | None = None
    prepared: Callable[[], int] = int


@dataclass(frozen=True)
class Spread:
    """A median, and how far the values lie around it."""

    median: float
    low_quartile: float
    high_quartile: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise one or more values; quartiles are interpolated between neighbours."""
        minimum, low, median, high, maximum = np.quantile(values, [0.0, 0.25, 0.5, 0.75, 1.0])
        return cls(float(median), float(low), float(high), float(minimum), float(maximum))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.minimum:.2f} .. {self.maximum:.2f})"


@dataclass(frozen=True)
class Timing:
    """What the rounds of one contender came to.

    Attributes
    ----------
    name : str
        The contender's.
    ratio : Spread
        Baseline's time / its time, of each round: how many times as fast it is.
    times_ms : tuple of float
        Of each round.
    examples_per_s, tokens_per_s : float
        Over all rounds: examples, or real tokens, divided by the time they took together.
    """

    name: str
    ratio: Spread
    times_ms: tuple[float, ...]
    examples_per_s: float
    tokens_per_s: float

    @property
    def median_ms(self) -> float:
        """The median time of a round."""
        return float(np.median(self.times_ms))

    def columns(self) -> dict[str, str | float]:
        """Give the columns of a row of a table."""
        return {
            "contender": self.name,
            "ratio": self.ratio.median,
            "ratio_low_quartile": self.ratio.low_quartile,
            "ratio_high_quartile": self.ratio.high_quartile,
            "ratio_min": self.ratio.minimum,
            "ratio_max": self.ratio.maximum,
            "rounds": len(self.times_ms),
            "median_time_ms": self.median_ms,
            "examples_per_s": self.examples_per_s,
            "tokens_per_s": self.tokens_per_s,
        }


class WrongResultError(RuntimeError):
    """A candidate's results are not the baseline's; it was not timed."""


def compare(
    baseline: Contender,
    candidates: Sequence[Contender],
    batches: Sequence[Rows],
    *,
    warmup: int = 1,
    repeats: int = 1,
    tolerance: float = 1e-3,
    every_shape: bool = False,
    calls: int = 1,
) -> list[Timing]:
    """Check the candidates, then time them and the baseline in turns.

    Parameters
    ----------
    baseline : Contender
        What the candidates are compared with.
    candidates : sequence of Contender
        One or more.
    batches : sequence of Rows
        Every contender runs every batch; the first is the one that results are compared on.
    warmup, repeats, every_shape, calls
        See :func:`take_turns`.
    tolerance : float
        The largest difference of a result from the baseline's, as a share of the largest magnitude
        of the baseline's.

    Returns
    -------
    list of Timing
        The baseline's (its ratio is 1) and the candidates', in order.

    Raises
    ------
    WrongResultError
        If a candidate's results differ by more; nothing has been timed then.
    """
    check_results(baseline, candidates, batches[0], tolerance)
    return take_turns(
        [baseline, *candidates],
        batches,
        warmup=warmup,
        repeats=repeats,
        every_shape=every_shape,
        calls=calls,
    )


def take_turns(
    contenders: Sequence[Contender],
    batches: Sequence[Rows],
    *,
    warmup: int = 1,
    repeats: int = 1,
    every_shape: bool = False,
    calls: int = 1,
) -> list[Timing]:
    """Time contenders in turns; the ratios are to the first one's times.

    Parameters
    ----------
    contenders : sequence of Contender
        One or more.
    batches : sequence of Rows
        Every contender runs every batch.
    warmup : int
        How many times each contender runs the first batch before timing.
    repeats : int
        How many times the batches are gone through; a round is one batch by every contender.
    every_shape : bool
        Warm up by :func:`settle` instead, on all batches.
    calls : int
        How often a contender runs the batch in a round, the device being waited for before the
        first and after the last. The time is that of one of them.
    """
    for contender in contenders:
        if every_shape:
            settle(contender, batches)
        else:
            for _ in range(warmup):
                contender.run(batches[0])

    rounds = [rows for _ in range(repeats) for rows in batches]
    times_ms: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number, rows in enumerate(rounds):
        for contender in rotated(contenders, number):
            _wait_for_gpu()
            began = time.perf_counter()
            for _ in range(calls):
                contender.run(rows)
            _wait_for_gpu()
            elapsed_ms = 1000 * (time.perf_counter() - began)
            times_ms[contender.name].append(elapsed_ms / calls)
    return timings(times_ms, rounds)


def settle(contender: Contender, batches: Sequence[Rows]) -> int:
    """Run all batches, twice or more, until a pass makes nothing new; give the passes.

    What is captured as a graph runs eagerly at the first sight of a shape and is recorded at the
    second; what is compiled may be compiled again for a later shape.

    Raises
    ------
    RuntimeError
        If something new is made for ever.
    """
    for passes in range(1, _MOST_PASSES + 1):
        before = contender.prepared()
        for rows in batches:
            contender.run(rows)
        if passes > 1 and contender.prepared() == before:
            return passes
    raise RuntimeError(f"{contender.name} still prepares itself after {_MOST_PASSES} passes")


def check_results(
    baseline: Contender, candidates: Sequence[Contender], rows: Rows, tolerance: float
) -> None:
    """Raise a WrongResultError if a candidate's results are not the baseline's."""
    expected = baseline.check(rows)
    for candidate in candidates:
        allowed = tolerance if candidate.tolerance is None else candidate.tolerance
        found = candidate.check(rows)
        if found.keys() != expected.keys():
            raise WrongResultError(
                f"{candidate.name} gives {', '.join(found)}; {baseline.name} gives "
                f"{', '.join(expected)}"
            )
        for name, right in expected.items():
            if found[name].shape != right.shape:
                raise WrongResultError(
                    f"{candidate.name}: {name} has shape {tuple(found[name].shape)}, "
                    f"{baseline.name}'s has {tuple(right.shape)}"
                )
            difference = relative_difference(found[name], right)
            if not difference <= allowed:  # NaN is not either
                raise WrongResultError(
                    f"{candidate.name}: {name} differs from {baseline.name}'s by {difference:.2g} "
                    f"of its largest magnitude, {allowed:.2g} is allowed; nothing was timed"
                )


def relative_difference(found: Tensor, right: Tensor) -> float:
    """Give the largest difference as a share of the largest magnitude of what is right."""
    right = right.detach().double().cpu()
    difference = (found.detach().double().cpu() - right).abs().max()
    return float(difference / right.abs().max().clamp(min=1e-30))


def timings(times_ms: Mapping[str, Sequence[float]], rounds: Sequence[Rows]) -> list[Timing]:
    """Summarise times of the same rounds; the first contender is the baseline."""
    examples = sum(len(rows.numbers) for rows in rounds)
    tokens = sum(rows.tokens for rows in rounds)
    first = next(iter(times_ms.values()))
    found = []
    for name, its in times_ms.items():
        ratio = Spread.of([base / own for base, own in zip(first, its, strict=True)])
        seconds = sum(its) / 1000
        found.append(Timing(name, ratio, tuple(its), examples / seconds, tokens / seconds))
    return found


def rotated(things: Sequence[Thing], number: int) -> Iterator[Thing]:
    """Give the things in their order, starting with another one each round."""
    for place in range(len(things)):
        yield things[(number + place) % len(things)]


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class PeakMemory:
    """Memory of one contender in a process of its own: resident, or of the GPU.

    Attributes
    ----------
    after_setup_mib : float
        Once weights and data were there, and nothing had run.
    peak_mib : float
        The most during the work, what was there included.
    reserved_mib : float
        On a GPU the most that the allocator held, the pools of captured graphs included; else 0.
    """

    after_setup_mib: float
    peak_mib: float
    reserved_mib: float = 0.0

    @property
    def above_weights_mib(self) -> float:
        """What the work took on top of what was there."""
        return self.peak_mib - self.after_setup_mib


def measure_peak_memory(function: str, arguments: Mapping[str, Any]) -> PeakMemory:
    """Measure a contender's memory in a fresh process.

    Parameters
    ----------
    function : str
        "module:function". Called with the arguments it sets everything up, and gives back the work
        as a function without arguments.
    arguments : mapping
        What JSON can write.

    Raises
    ------
    RuntimeError
        If the process fails; the message ends with what it said.
    """
    command = [sys.executable, "-m", "benchmarks.harness", "--peak", function]
    ran = subprocess.run([*command, json.dumps(arguments)], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{function} failed in its own process:\n{ran.stderr[-2000:]}")
    return PeakMemory(**json.loads(ran.stdout.splitlines()[-1]))


def peak_memory_here(set_up: Callable[[], Callable[[], object]]) -> PeakMemory:
    """Set up and run the work in this process, and say what memory that took."""
    work = set_up()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        after_setup_mib = torch.cuda.memory_allocated() / 2**20
        work()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return PeakMemory(after_setup_mib, *(each / 2**20 for each in most))
    _return_free_memory()
    after_setup_mib = _status_mib("VmRSS") or peak_memory_mib(torch.device("cpu"))
    with contextlib.suppress(OSError):  # where it may not be, the record includes the set-up
        # Start the kernel's record of the most resident memory anew.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    work()
    # The kernel's record of the process; getrusage's would include the parent's at the fork.
    peak_mib = _status_mib("VmHWM") or peak_memory_mib(torch.device("cpu"))
    return PeakMemory(after_setup_mib, peak_mib)


def _status_mib(key: str) -> float | None:
    """Read a size of this process from Linux's record; None where there is no such record."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), None)


def _return_free_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the memory of one contender as a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peak", metavar="MODULE:FUNCTION", required=True)
    parser.add_argument("arguments", metavar="JSON", nargs="?", default="{}")
    parsed = parser.parse_args(arguments)
    module, _, name = parsed.peak.partition(":")
    set_up = getattr(importlib.import_module(module), name)
    settings = json.loads(parsed.arguments)
    print(json.dumps(vars(peak_memory_here(lambda: set_up(**settings)))))


if __name__ == "__main__":
    main()
