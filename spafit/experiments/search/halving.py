"""Successive halving: many plans trained a little, the best part of them more.

Jamieson and Talwalkar (2016, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization", arXiv 1502.07943), with a third kept instead of a half. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from spafit.errors import TrainingError

ETA = 3
"""η: a rung keeps one plan in η of the one before it, and trains it η times as long."""

T = TypeVar("T")


@dataclass(frozen=True)
class Rung:
    """A rung: so many plans, each trained for a share of a full run."""

    plans: int
    share: Fraction


def rungs(plans: int) -> tuple[Rung, ...]:
    """Return the rungs for n plans: ⌈n/η^k⌉ of them trained for 1/η^(K-k) of a run, k = 0 .. K.

    K is the least number with ⌈n/η^K⌉ <= η, so that the last rung compares a few full runs.
    """
    counts = [plans]
    while counts[-1] > ETA:
        counts.append(-(-counts[-1] // ETA))
    K = len(counts) - 1
    return tuple(Rung(n, Fraction(1, ETA ** (K - k))) for k, n in enumerate(counts))


def climb(
    plans: Sequence[T], rungs: Sequence[Rung], score: Callable[[T, Fraction], float | None]
) -> tuple[T, list[dict[T, float | None]]]:
    """Train plans rung by rung, and return the one that is best in the last.

    Parameters
    ----------
    plans : sequence
        Different ones, those to be preferred of equal scores first.
    rungs : sequence of Rung
        One rung that trains all of them in full is the choice of the best.
    score : callable
        Trains a plan for a share of a full run, and returns its score, the larger the better; None
        if the run diverged.

    Returns
    -------
    best, scores
        The best plan, and for each rung the scores of those that were trained.

    Raises
    ------
    TrainingError
        If all runs of a rung diverge.
    """
    left, scores = list(plans), []
    place = {plan: number for number, plan in enumerate(plans)}
    for rung in rungs:
        found = {plan: score(plan, rung.share) for plan in left[: rung.plans]}
        scores.append(found)
        sound = [(-value, place[plan], plan) for plan, value in found.items() if value is not None]
        if not sound:
            raise TrainingError(
                f"all {len(found)} runs of a rung diverged; lower the learning rate"
            )
        left = [plan for *_, plan in sorted(sound, key=lambda each: each[:2])]
    return left[0], scores
