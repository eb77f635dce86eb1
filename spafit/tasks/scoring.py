"""Score predictions of a task by its metrics, beside a constant guess, with their uncertainty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spafit.errors import DataError
from spafit.tasks.metrics import METRICS, Floats, Ints, confusion
from spafit.tasks.table import get_task
from spafit.tasks.task import Label, Task


def compute(
    task: str | Task,
    predictions: Sequence[Label | None],
    references: Sequence[Label | None],
    probabilities: Floats | None = None,
) -> dict[str, float]:
    """Score predictions by all metrics of a task, in the task's order.

    Parameters
    ----------
    task : str or Task
        The task, or the name of one of GLUE's.
    predictions, references : sequence of str or float
        Label names, or scores for regression; F1 is that of the task's second label.
    probabilities : numpy.ndarray, (n, C), optional
        Of each label in the task's order, for metrics that need them, such as log loss.

    Returns
    -------
    dict of str to float
        The value of each metric, by its name; the best epoch is chosen by the first.

    Raises
    ------
    DataError
        If the lengths differ or are 0, a value is not a label of the task, or a metric needs
        probabilities and there are none.
    """
    task = task if isinstance(task, Task) else get_task(task)
    return _scored(task, predictions, references, probabilities).metrics()


def majority(task: str | Task, references: Sequence[Label | None]) -> dict[str, float]:
    """Score the constant prediction: the commonest label, or the mean score.

    If several labels are equally common, the first in the task's order is used. A constant has no
    correlation, so Pearson, Spearman and Matthews are 0.0 here. Where probabilities are scored, the
    constant ones are the shares of the labels.

    Raises
    ------
    DataError
        If there are no references, or one is not a label of the task.
    """
    task = task if isinstance(task, Task) else get_task(task)
    _check(task, "reference", references)
    guess: Label
    shares = None
    if task.is_regression:
        guess = float(np.mean(np.asarray(references, dtype=np.float64)))
    else:
        counts = Counter(references)
        guess = max(task.labels, key=lambda name: counts[name])  # the first of equal ones
        share = np.array([counts[name] / len(references) for name in task.labels])
        shares = np.tile(share, (len(references), 1))
    return compute(task, [guess] * len(references), references, shares)


def intervals(
    task: Task,
    predictions: Sequence[Label | None],
    references: Sequence[Label | None],
    probabilities: Floats | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return a 95 % confidence interval of each metric, by the percentile bootstrap.

    The n examples are drawn anew with replacement ``samples`` times; the interval holds the middle
    95 % of the metric's values. It tells how far the score depends on which examples were at hand,
    not how far it depends on the seed of the training.

    Parameters
    ----------
    task, predictions, references, probabilities
        As for :func:`compute`.
    samples, seed : int
        How often the examples are drawn, and the seed of the draws.
    """
    scored = _scored(task, predictions, references, probabilities)
    generator = np.random.default_rng(seed)
    drawn = [scored.drawn_anew(generator).metrics() for _ in range(samples)]
    bounds = {}
    for name in task.metrics:
        low, high = np.percentile([each[name] for each in drawn], (2.5, 97.5))
        bounds[name] = (float(low), float(high))
    return bounds


def confusion_matrix(
    task: Task, predictions: Sequence[Label | None], references: Sequence[Label | None]
) -> Ints:
    """Return K (C, C): how many examples of each label (rows) were predicted as each (columns)."""
    predicted, true = _class_numbers(task, predictions), _class_numbers(task, references)
    return confusion(predicted, true, len(task.labels))


def _class_numbers(task: Task, labels: Sequence[Label | None]) -> Ints:
    """Return the class number of each label, (n,)."""
    number = {name: k for k, name in enumerate(task.labels)}
    return np.array([number[str(each)] for each in labels], dtype=np.int64)


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction.

    Attributes
    ----------
    row : int
        Its place in the data set, from 0.
    predicted, true : str or float
        The prediction and the reference.
    weight : float
        The probability of the prediction, or the distance of a score from its reference.
    """

    row: int
    predicted: Label
    true: Label
    weight: float


def mistakes(
    task: Task,
    predictions: Sequence[Label],
    references: Sequence[Label | None],
    probabilities: Floats | None = None,
) -> list[Mistake]:
    """Return the wrong predictions, the most confident first; of scores, the farthest first."""
    found = []
    for row, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
        if task.is_regression:
            weight = abs(float(predicted) - float(true or 0.0))
        else:
            weight = 1.0
            if probabilities is not None:
                weight = float(probabilities[row, task.labels.index(str(predicted))])
        if true is not None and predicted != true:
            found.append(Mistake(row, predicted, true, weight))
    return sorted(found, key=lambda each: -each.weight)


@dataclass(frozen=True)
class _Scored:
    """What the metrics of a task take: a confusion matrix, scores, probabilities."""

    task: Task
    confusion: Ints | None = None
    scores: Floats | None = None
    """Predicted and true ones, (2, n)."""
    probabilities: Floats | None = None
    true: Ints | None = None

    def metrics(self) -> dict[str, float]:
        """Return the value of each metric of the task."""
        found = {}
        for name in self.task.metrics:
            metric = METRICS[name]
            if metric.of == "scores":
                assert self.scores is not None
                found[name] = metric.function(*self.scores)
            elif metric.of == "classes":
                found[name] = metric.function(self.confusion)
            else:
                found[name] = metric.function(self.probabilities, self.true)
        return found

    def drawn_anew(self, generator: np.random.Generator) -> _Scored:
        """Return as many examples, drawn with replacement."""
        if self.scores is not None:
            n = self.scores.shape[1]
            return _Scored(self.task, scores=self.scores[:, generator.integers(n, size=n)])
        assert self.confusion is not None
        if self.probabilities is None or self.true is None:
            # The examples matter only by their counts: a draw of the cells of the matrix.
            n = int(self.confusion.sum())
            counts = generator.multinomial(n, self.confusion.ravel() / n)
            return _Scored(self.task, counts.reshape(self.confusion.shape))
        rows = generator.integers(len(self.true), size=len(self.true))
        probabilities, true = self.probabilities[rows], self.true[rows]
        drawn = confusion(probabilities.argmax(axis=1), true, len(self.task.labels))
        return _Scored(self.task, drawn, None, probabilities, true)


def _scored(
    task: Task,
    predictions: Sequence[Label | None],
    references: Sequence[Label | None],
    probabilities: Floats | None,
) -> _Scored:
    """Check predictions and references, and bring them into the form that the metrics take."""
    _check(task, "prediction", predictions)
    _check(task, "reference", references)
    if len(predictions) != len(references):
        raise DataError(
            "a metric needs as many predictions as references, found "
            f"{len(predictions)} predictions and {len(references)} references"
        )
    if task.is_regression:
        return _Scored(task, scores=np.asarray([predictions, references], dtype=np.float64))
    matrix = confusion_matrix(task, predictions, references)
    if not any(METRICS[name].of == "probabilities" for name in task.metrics):
        return _Scored(task, matrix)
    if probabilities is None:
        raise DataError(f"{', '.join(task.metrics)} need probabilities, found none")
    return _Scored(task, matrix, None, probabilities, _class_numbers(task, references))


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
