"""Metrics in numpy: of classes, of scores, of probabilities.

All take predictions and references of equal length n, and return a float. If a denominator is zero
the metric is 0.0 by convention: no better than chance. With labels they depend on nothing but the
confusion matrix K (C, C): K[t, p] counts the examples of class t that were predicted as p.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spafit.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def confusion(predicted: Ints, true: Ints, classes: int) -> Ints:
    """Return the confusion matrix K (C, C) of class numbers (n,): true classes in rows."""
    counts = np.bincount(true * classes + predicted, minlength=classes * classes)
    return np.asarray(counts.reshape(classes, classes), dtype=np.int64)


def accuracy_of(k: Ints) -> float:
    """Return the share of right predictions: trace(K) / n."""
    return float(np.trace(k) / k.sum())


def matthews_of(k: Ints) -> float:
    """Return the Matthews correlation coefficient for any number of classes (Gorodkin, 2004).

    With c the number of right predictions, p_k and t_k how often class k is predicted and true:
    (c n - Σ p_k t_k) / sqrt((n² - Σ p_k²) (n² - Σ t_k²)). 0.0 if all predictions or all references
    are of one class, as in scikit-learn.
    """
    # Python's integers, because the product of the two variances exceeds 2**63 from n = 55,000 on.
    p, t = k.sum(axis=0).tolist(), k.sum(axis=1).tolist()
    n = sum(t)
    covariance = int(np.trace(k)) * n - sum(p_k * t_k for p_k, t_k in zip(p, t, strict=True))
    variances = (n * n - sum(p_k * p_k for p_k in p)) * (n * n - sum(t_k * t_k for t_k in t))
    return float(covariance / np.sqrt(float(variances))) if variances else 0.0


def of_each_class(k: Ints) -> dict[str, Floats]:
    """Return precision, recall and F1 of every class, (C,) each.

    With TP = K[k, k]: precision TP / Σ K[:, k], recall TP / Σ K[k, :], and F1, their harmonic mean,
    2 TP / (Σ K[:, k] + Σ K[k, :]).
    """
    right, predicted, true = np.diag(k), k.sum(axis=0), k.sum(axis=1)
    return {
        "precision": _ratio(right, predicted),
        "recall": _ratio(right, true),
        "f1": _ratio(2 * right, predicted + true),
    }


def _ratio(above: Ints, below: Ints) -> Floats:
    return np.asarray(above / np.maximum(below, 1), dtype=np.float64)


def _of_second_class(name: str) -> Callable[[Ints], float]:
    return lambda k: float(of_each_class(k)[name][1])


def _macro(name: str) -> Callable[[Ints], float]:
    """Return the plain mean over the classes that occur, as predictions or references."""

    def macro(k: Ints) -> float:
        occurs = (k.sum(axis=0) + k.sum(axis=1)) > 0
        return float(of_each_class(k)[name][occurs].mean())

    return macro


def _weighted(name: str) -> Callable[[Ints], float]:
    """Return the mean over the classes, weighted by how often each is true."""
    return lambda k: float(np.average(of_each_class(k)[name], weights=k.sum(axis=1)))


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions that equal their references."""
    return accuracy_of(_confusion_of_names(predictions, references))


def f1(predictions: Sequence[str], references: Sequence[str], positive: str) -> float:
    """Return F1 of the class ``positive``: 2 TP / (2 TP + FP + FN).

    0.0 if the class occurs in neither predictions nor references, as in scikit-learn.
    """
    predicted, true = _pair(predictions, references)
    k = confusion((predicted == positive).astype(int), (true == positive).astype(int), 2)
    return float(of_each_class(k)["f1"][1])


def matthews(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the Matthews correlation coefficient (see :func:`matthews_of`)."""
    return matthews_of(_confusion_of_names(predictions, references))


def _confusion_of_names(predictions: Sequence[str], references: Sequence[str]) -> Ints:
    predicted, true = _pair(predictions, references)
    classes, numbers = np.unique(np.concatenate([predicted, true]), return_inverse=True)
    return confusion(numbers[: len(true)], numbers[len(true) :], len(classes))


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


def mean_squared_error(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Return the mean of (prediction - reference)²."""
    x, y = _pair_of_floats(predictions, references)
    return float(np.mean((x - y) ** 2))


def mean_absolute_error(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Return the mean distance between prediction and reference."""
    x, y = _pair_of_floats(predictions, references)
    return float(np.mean(np.abs(x - y)))


def log_loss(probabilities: Floats, true: Ints) -> float:
    """Return the mean of -log(the probability of the true class): the cross entropy in nats.

    Parameters
    ----------
    probabilities : numpy.ndarray, (n, C)
        Rows that sum to 1. A probability of 0 counts as the smallest step of its type, as in
        scikit-learn.
    true : numpy.ndarray of int, (n,)
        The true classes.
    """
    of_true = probabilities[np.arange(len(true)), true]
    return float(-np.mean(np.log(np.maximum(of_true, np.finfo(probabilities.dtype).eps))))


@dataclass(frozen=True)
class Metric:
    """How a metric is computed and read.

    Attributes
    ----------
    of : {"classes", "scores", "probabilities"}
        What ``function`` takes: the confusion matrix; predicted and true scores; probabilities and
        true classes.
    function : callable
        Returns the metric.
    smaller_is_better : bool
        As for an error or a loss.
    is_binary : bool
        Of two labels, of which the second counts as positive.
    """

    of: str
    function: Callable[..., float]
    smaller_is_better: bool = False
    is_binary: bool = False

    @property
    def sign(self) -> int:
        """1, or -1 where the smaller value is the better one."""
        return -1 if self.smaller_is_better else 1

    @property
    def constant(self) -> str:
        """What the best constant answer is called."""
        return "always the mean" if self.of == "scores" else "the commonest class"

    def fits(self, classes: int) -> bool:
        """Return whether it can score a task of so many labels; 0 are scores."""
        if self.of == "scores" or classes == 0:
            return self.of == "scores" and classes == 0
        return classes == 2 or not self.is_binary


METRICS: dict[str, Metric] = {
    "accuracy": Metric("classes", accuracy_of),
    "matthews": Metric("classes", matthews_of),
    **{
        name: Metric("classes", _of_second_class(name), is_binary=True)
        for name in ("precision", "recall", "f1")
    },
    **{f"macro_{name}": Metric("classes", _macro(name)) for name in ("precision", "recall", "f1")},
    **{
        f"weighted_{name}": Metric("classes", _weighted(name))
        for name in ("precision", "recall", "f1")
    },
    "log_loss": Metric("probabilities", log_loss, smaller_is_better=True),
    "pearson": Metric("scores", pearson),
    "spearman": Metric("scores", spearman),
    "mean_squared_error": Metric("scores", mean_squared_error, smaller_is_better=True),
    "mean_absolute_error": Metric("scores", mean_absolute_error, smaller_is_better=True),
}
"""The metrics by name. F1, precision and recall are those of the second of two labels; with the
prefix ``macro_`` the mean over the classes, with ``weighted_`` weighted by their frequency."""


def is_better(name: str, score: float, than: float) -> bool:
    """Return whether one value of a metric is better than another."""
    return score < than if METRICS[name].smaller_is_better else score > than


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
