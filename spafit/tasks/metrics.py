"""GLUE's metrics in numpy, computed from label names.

All take predictions and references of equal length n, and return a float. If a denominator is zero
the metric is 0.0 by convention: no better than chance.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spafit.errors import DataError
from spafit.tasks.table import Label, Task, get_task

Floats = NDArray[np.float64]


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions that equal their references."""
    predicted, true = _pair(predictions, references)
    return float(np.mean(predicted == true))


def f1(predictions: Sequence[str], references: Sequence[str], positive: str) -> float:
    """Return F1 of the class ``positive``: 2 TP / (2 TP + FP + FN).

    0.0 if the class occurs in neither predictions nor references, as in scikit-learn.
    """
    predicted, true = _pair(predictions, references)
    true_positives = int(np.sum((predicted == positive) & (true == positive)))
    either = int(np.sum(predicted == positive)) + int(np.sum(true == positive))
    return 2 * true_positives / either if either else 0.0


def matthews(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the Matthews correlation coefficient for any number of classes (Gorodkin, 2004).

    With c the number of right predictions, p_k and t_k how often class k is predicted and true:
    (c n - Σ p_k t_k) / sqrt((n² - Σ p_k²) (n² - Σ t_k²)). 0.0 if all predictions or all references
    are of one class, as in scikit-learn.
    """
    predicted, true = _pair(predictions, references)
    n = len(true)
    classes = np.unique(np.concatenate([predicted, true]))
    p = [int(np.sum(predicted == k)) for k in classes]
    t = [int(np.sum(true == k)) for k in classes]
    right = int(np.sum(predicted == true))
    # Python's integers, because the product of the two variances exceeds 2**63 from n = 55,000 on.
    covariance = right * n - sum(p_k * t_k for p_k, t_k in zip(p, t, strict=True))
    variances = (n * n - sum(p_k * p_k for p_k in p)) * (n * n - sum(t_k * t_k for t_k in t))
    return float(covariance / np.sqrt(float(variances))) if variances else 0.0


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Return the Pearson correlation: the cosine of the two centred vectors.

    0.0 if all predictions or all references are equal; scipy gives NaN and a warning there.
    """
    x, y = _pair_of_floats(predictions, references)
    return _correlation(x, y)


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Return the Spearman correlation: Pearson's of the ranks, where ties take their mean rank.

    0.0 if all predictions or all references are equal; scipy gives NaN and a warning there.
    """
    x, y = _pair_of_floats(predictions, references)
    return _correlation(_ranks(x), _ranks(y))


def compute(
    task: str | Task, predictions: Sequence[Label | None], references: Sequence[Label | None]
) -> dict[str, float]:
    """Score predictions by all metrics of a task, in the task's order.

    Parameters
    ----------
    task : str or Task
        The task, or its name.
    predictions, references : sequence of str or float
        Label names, or scores for regression; F1 is that of the task's second label.

    Returns
    -------
    dict of str to float
        The value of each metric, by its name; the best epoch is chosen by the first.

    Raises
    ------
    DataError
        If the lengths differ or are 0, or a value is not a label of the task.
    """
    task = get_task(task)
    _check(task, "prediction", predictions)
    _check(task, "reference", references)
    functions: dict[str, Callable[[Any, Any], float]] = {
        "accuracy": accuracy,
        "f1": lambda p, r: f1(p, r, positive=task.labels[1]),
        "matthews": matthews,
        "pearson": pearson,
        "spearman": spearman,
    }
    return {name: functions[name](predictions, references) for name in task.metrics}


def majority(task: str | Task, references: Sequence[Label | None]) -> dict[str, float]:
    """Score the constant prediction: the commonest label, or the mean score.

    If several labels are equally common, the first in the task's order is used. A constant has no
    correlation, so Pearson, Spearman and Matthews are 0.0 here.

    Raises
    ------
    DataError
        If there are no references, or one is not a label of the task.
    """
    task = get_task(task)
    _check(task, "reference", references)
    guess: Label
    if task.is_regression:
        guess = float(np.mean(np.asarray(references, dtype=np.float64)))
    else:
        counts = Counter(references)
        guess = max(task.labels, key=lambda name: counts[name])  # the first of equal ones
    return compute(task, [guess] * len(references), references)


def _check(task: Task, what: str, values: Sequence[Label | None]) -> None:
    """Raise an error if there are no values, or one is not a label of the task."""
    if len(values) == 0:
        raise DataError(f"there are no {what}s for {task.display}, and a metric needs at least one")
    for index, value in enumerate(values):
        if task.is_regression:
            right = not isinstance(value, str | bool | None) and math.isfinite(value)
        else:
            right = value in task.labels
        if not right:
            expected = " or ".join(task.labels) or "a finite number"
            raise DataError(f"{what} {index} for {task.display} is {value!r}, expected {expected}")


def _pair(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[Any, Any]:
    if len(predictions) != len(references) or len(references) == 0:
        raise DataError(
            "a metric needs as many predictions as references, and at least one, found "
            f"{len(predictions)} predictions and {len(references)} references"
        )
    return np.asarray(predictions), np.asarray(references)


def _pair_of_floats(
    predictions: Sequence[float], references: Sequence[float]
) -> tuple[Floats, Floats]:
    x, y = _pair(predictions, references)
    return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)


def _correlation(x: Floats, y: Floats) -> float:
    """Return the Pearson correlation of two vectors (n,)."""
    # Test for equality before centring: the mean of equal numbers may be rounded, and then the
    # correlation would be one of rounding errors.
    if np.all(x == x[0]) or np.all(y == y[0]):
        return 0.0
    cosine = float(np.dot(_unit(x - x.mean()), _unit(y - y.mean())))
    return min(max(cosine, -1.0), 1.0)


def _unit(x: Floats) -> Floats:
    """Scale a vector to length 1, first by its largest entry so that no square overflows."""
    x = x / np.max(np.abs(x))
    return np.asarray(x / np.linalg.norm(x), dtype=np.float64)


def _ranks(x: Floats) -> Floats:
    """Return ranks from 1; equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # rank of the last of each group of equal values
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)
