"""Choose a learning rate by the runs that tried it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from spafit.experiments.grid.cells import Choice
from spafit.tasks.metrics import METRICS


def score_of(record: Mapping[str, Any]) -> tuple[str, float]:
    """Return the first metric of a finished run, and its best score on dev."""
    name, score = next(iter(record["result"]["metrics"].items()))
    return str(name), float(score)


def mean_scores(
    choice: Choice, records: Mapping[int, Mapping[str, Any] | None]
) -> dict[float, float | None]:
    """Return the mean score of each learning rate; None for one with which a run diverged.

    Parameters
    ----------
    choice : Choice
        The learning rates, and the cells that try each of them.
    records : mapping of int to record
        The record of each cell's finished run; None for one that diverged.
    """
    means: dict[float, float | None] = {}
    for rate, cells in choice.cells.items():
        scores = []
        for record in (records[number] for number in cells):
            if record is None:
                break
            name, score = score_of(record)
            scores.append(METRICS[name].sign * score)
        means[rate] = statistics.mean(scores) if len(scores) == len(cells) else None
    return means


def best_rate(means: Mapping[float, float | None]) -> float | None:
    """Return the learning rate with the best mean, of equal ones the smallest; None if all failed.

    The mean is over tasks and seeds, of each task's first metric; of an error it is the negative.
    """
    sound = [(-mean, rate) for rate, mean in means.items() if mean is not None]
    return min(sound)[1] if sound else None
