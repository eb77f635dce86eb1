"""Measure contenders: check their results, then time baseline and candidates side by side.

A machine's speed drifts, so times measured one after the other give unreliable ratios. Here
baseline and candidates take turns in one process, batch by batch, in an order that rotates; every
round gives one ratio, and the median of these is reported with its spread. Before any timing each
candidate's results are compared with the baseline's, dropout off; in half precision, where the
baseline itself is inexact, both are compared with its float32 results (:func:`check_by_truth`).

On a GPU the harness synchronizes before and after each turn, and warms up every shape until there
is nothing new to capture or compile (:func:`settle`).

Memory is measured in separate processes (:mod:`benchmarks.harness.peak_memory`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Thing = TypeVar("Thing")

_MOST_PASSES = 12


@dataclass(frozen=True)
class Rows:
    """One batch as row numbers, from which each contender makes its own tensors.

    Attributes
    ----------
    numbers : tuple of int
        The rows of the data.
    tokens : int
        Their real tokens, without padding.
    """

    numbers: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    Attributes
    ----------
    name : str
        Its name in the tables.
    run : callable of Rows
        The timed work, from row numbers to the end.
    check : callable of Rows, to dict of str to Tensor
        Returns the results to compare with the baseline's, dropout off; it has no side effects.
    tolerance : float or None
        The largest difference from the baseline, as a share of the baseline's largest magnitude;
        None takes that of :func:`compare`.
    prepared : callable, to int
        Returns how many graphs or compiled functions it has made so far; 0 if it makes none.
    has_own_clock : bool
        Whether ``run`` returns the milliseconds that the work took, which are taken instead of
        those of the call: for work in another process.
    """

    name: str
    run: Callable[[Rows], object]
    check: Callable[[Rows], Mapping[str, Tensor]]
    tolerance: float | None = None
    prepared: Callable[[], int] = int
    has_own_clock: bool = False


@dataclass(frozen=True)
class Spread:
    """A median, and the spread of the values around it."""

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
    """The times of one contender over all rounds.

    Attributes
    ----------
    name : str
        The contender's name.
    ratio : Spread
        The baseline's time / its time in each round: how many times as fast it is.
    times_ms : tuple of float
        The time of each round.
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
        """Return the columns of a row of a table.

        Of at most 50 rounds it has the time of each, for ratios to a contender other than the
        baseline.
        """
        each = " ".join(f"{time:.1f}" for time in self.times_ms) if len(self.times_ms) <= 50 else ""
        return {
            "contender": self.name,
            "ratio": self.ratio.median,
            "ratio_low_quartile": self.ratio.low_quartile,
            "ratio_high_quartile": self.ratio.high_quartile,
            "ratio_min": self.ratio.minimum,
            "ratio_max": self.ratio.maximum,
            "rounds": len(self.times_ms),
            "median_time_ms": self.median_ms,
            "round_times_ms": each,
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
    truth: Callable[[Rows], Mapping[str, Tensor]] | None = None,
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
    truth : callable of Rows, to dict of str to Tensor
        The baseline's results in float32, where it is timed in less; the candidates are then
        compared with these by :func:`check_by_truth`, and ``tolerance`` has no part in it.

    Returns
    -------
    list of Timing
        The baseline's (its ratio is 1) and the candidates', in order.

    Raises
    ------
    WrongResultError
        If a candidate's results differ by more; nothing has been timed then.
    """
    if truth is None:
        check_results(baseline, candidates, batches[0], tolerance)
    else:
        check_by_truth(truth, baseline, candidates, batches[0])
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
            times_ms[contender.name].append(_time_ms(contender, rows, calls) / calls)
    return timings(times_ms, rounds)


def _time_ms(contender: Contender, rows: Rows, calls: int) -> float:
    """Return the time that a contender takes for a number of calls."""
    _wait_for_gpu()
    began = time.perf_counter()
    found = [contender.run(rows) for _ in range(calls)]
    _wait_for_gpu()
    elapsed_ms = 1000 * (time.perf_counter() - began)
    if contender.has_own_clock:
        return sum(each for each in found if isinstance(each, float))
    return elapsed_ms


def settle(contender: Contender, batches: Sequence[Rows]) -> int:
    """Run all batches at least twice until a pass makes nothing new; return the number of passes.

    A captured contender runs a shape eagerly the first time and records it the second; a compiled
    one may be compiled again for a later shape.

    Raises
    ------
    RuntimeError
        If this does not end.
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


def check_by_truth(
    truth: Callable[[Rows], Mapping[str, Tensor]],
    baseline: Contender,
    candidates: Sequence[Contender],
    rows: Rows,
    factor: float = 2.0,
    least: float = 0.01,
) -> None:
    """Raise a WrongResultError if a candidate's error is larger than rounding explains.

    In half precision the baseline itself has errors, large ones in batches where the gradients of
    many examples nearly cancel. So a candidate's error, ‖found - right‖ / ‖right‖, may be
    ``factor`` times the baseline's, or ``least``.
    """
    right, plain = truth(rows), baseline.check(rows)
    for candidate in candidates:
        found = candidate.check(rows)
        if not found.keys() == plain.keys() == right.keys():
            raise WrongResultError(f"{candidate.name} gives {', '.join(found)}")
        for name, its in right.items():
            allowed = max(least, factor * distance(plain[name], its))
            difference = distance(found[name], its)
            if not difference <= allowed:  # NaN is not either
                raise WrongResultError(
                    f"{candidate.name}: {name} are off by {difference:.2g} of their norm, "
                    f"{allowed:.2g} is allowed by {baseline.name}'s; nothing was timed"
                )


def distance(found: Tensor, right: Tensor) -> float:
    """Return ‖found - right‖ / ‖right‖."""
    right = right.detach().double().cpu()
    off = (found.detach().double().cpu() - right).norm()
    return float(off / right.norm().clamp(min=1e-30))


def relative_difference(found: Tensor, right: Tensor) -> float:
    """Return the largest difference as a share of the right values' largest magnitude."""
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
    """Yield the things in order, starting with a different one each round."""
    for place in range(len(things)):
        yield things[(number + place) % len(things)]


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
