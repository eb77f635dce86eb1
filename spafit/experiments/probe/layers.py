"""Probe every layer of a frozen model: which of them a linear probe can read a task off.

Besides each layer's score there are the two summaries of Tenney, Das and Pavlick (2019, "BERT
Rediscovers the Classical NLP Pipeline", arXiv 1905.05950), of probes on a scalar mix of layers
(:mod:`~spafit.experiments.probe.linear_probe`): :func:`center_of_gravity`, :func:`expected_layer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from spafit.errors import ConfigError, DataError
from spafit.experiments.probe.linear_probe import (
    Axes,
    Probe,
    choose_strength,
    fit_bootstrap,
    standardise,
)
from spafit.experiments.probe.states import STATES
from spafit.tasks import scoring
from spafit.tasks.metrics import METRICS, Floats
from spafit.tasks.task import Dataset, Label, Task

LEAST_ROWS = 10
"""The fewest training rows."""

_DRAWS = 100


@dataclass(frozen=True)
class Probed:
    """What the probes of one kind of state found, for each layer (0: the embeddings) and seed.

    Attributes
    ----------
    scores : dict of str to numpy.ndarray, (L + 1, seeds)
        On dev, by metric: of the probe on one layer.
    strengths : numpy.ndarray, (L + 1, seeds)
        The λ that was chosen for it.
    cumulative : numpy.ndarray, (L + 1, seeds)
        The task's first metric on dev, of the probe on the mix of layers 0 to l.
    weights : numpy.ndarray, (L + 1, seeds)
        s of the mix of all layers.
    drawn : numpy.ndarray, (L + 1, draws)
        As ``cumulative``, of the first seed, on rows of dev drawn with replacement: every layer on
        the same ones.
    """

    scores: dict[str, Floats]
    strengths: Floats
    cumulative: Floats
    weights: Floats
    drawn: Floats

    @property
    def metric(self) -> str:
        """The task's first metric."""
        return next(iter(self.scores))

    @property
    def best_layer(self) -> int:
        """The layer whose probe has the best mean of the first metric; the first of equal ones."""
        means = self.scores[self.metric].mean(axis=1)
        return int(np.argmax(METRICS[self.metric].sign * means))

    @property
    def error(self) -> float:
        """The standard error of a score for want of more rows of dev, of the layer's with most."""
        return float(deviation(self.drawn).max())

    def first_gain(self) -> int | None:
        """Return the first layer with which a mix does better than the embeddings alone.

        That is the least l at which the mean over seeds of cumulative[l] - cumulative[0] is more
        than twice its uncertainty: its standard deviation over seeds, and that over the draws of
        dev's rows, taken together as sqrt(a² + b²). None if there is no such layer.
        """
        gains = METRICS[self.metric].sign * (self.cumulative - self.cumulative[0])  # (L + 1, seeds)
        uncertainty = np.hypot(deviation(gains), deviation(self.drawn - self.drawn[0]))
        found = np.flatnonzero(gains.mean(axis=1)[1:] > 2 * uncertainty[1:])
        return int(found[0]) + 1 if len(found) else None


def center_of_gravity(weights: Floats) -> Floats:
    """Return Σ_l l s_l, l from 0 to L: the mean layer that a mix attends to.

    Of the scalar mixing weights of Tenney et al. (2019).

    Parameters
    ----------
    weights : numpy.ndarray, (L + 1, ...)
        s, of sum 1 over the layers.

    Returns
    -------
    numpy.ndarray, (...)
    """
    return np.asarray(np.tensordot(np.arange(len(weights)), weights, axes=1))


def expected_layer(cumulative: Sequence[float] | Floats) -> float | None:
    """Return Σ_l l Δ_l / Σ_l Δ_l, l from 1 to L: the mean layer at which a task is solved.

    Δ_l is the differential score: that of the probe on layers 0 to l less that of the one on 0 to
    l - 1: the cumulative scoring of Tenney et al. (2019).

    Parameters
    ----------
    cumulative : sequence of float, (L + 1,)
        The scores of the cumulative probes.

    Returns
    -------
    float or None
        None if Σ_l Δ_l is 0. A Δ_l may be negative, and the layer then lie outside of 0 to L.
    """
    differences = np.diff(np.asarray(cumulative, dtype=np.float64))
    total = float(differences.sum())
    if total == 0:
        return None
    return float(np.arange(1, len(differences) + 1) @ differences) / total


def deviation(values: Floats) -> Floats:
    """Return the standard deviation over the seeds, the last axis; 0 for a single one."""
    if values.shape[-1] == 1:
        return np.zeros(values.shape[:-1])
    return np.asarray(values.std(axis=-1, ddof=1))


def probe(
    states: Mapping[str, Mapping[str, torch.Tensor]],
    train: Dataset,
    dev: Dataset,
    seeds: Sequence[int],
    *,
    quiet: bool = True,
) -> dict[str, Probed]:
    """Fit and score the probes of every layer, state and seed.

    For each layer and seed λ is chosen on a held-out fifth of the training rows, and the probe
    fitted on a bootstrap sample of them. The cumulative probes of a seed have the λ that is chosen
    in the same way for the mix of all layers.

    Parameters
    ----------
    states : mapping of str to mapping of str to torch.Tensor
        Of "train" and "dev", for each kind of state: (L + 1, n, D).
    train, dev : Dataset
        Their rows, labelled.
    seeds : sequence of int
        Of the held-out rows and the bootstrap sample.
    quiet : bool
        Whether to show no progress, as without a terminal.

    Returns
    -------
    dict of str to Probed
        By the kind of state.

    Raises
    ------
    DataError
        If there are fewer than :data:`LEAST_ROWS` training rows, or all have the same label.
    """
    for data in (train, dev):
        if None in data.labels:
            raise DataError(f"{data.source} has no labels, which a probe needs")
    if len(train) < LEAST_ROWS or len(set(train.labels)) < 2:
        raise DataError(
            f"a probe needs {LEAST_ROWS} training rows or more, and two labels among them; "
            f"{train.source} has {len(train)} with {len(set(train.labels))}"
        )
    task = train.task
    y, scale = _targets(task, train.labels)
    found = {}
    layers = len(states["train"][STATES[0]])
    with tqdm(
        total=len(STATES) * layers * len(seeds) * 2,
        desc="probes",
        disable=quiet or None,
        leave=False,
    ) as progress:
        for name in STATES:
            X, X_dev = standardise(states["train"][name], states["dev"][name])
            fits = _Fits(task, y, scale, dev.labels, X, X_dev)
            found[name] = fits.all(seeds, progress)
    return found


@dataclass(frozen=True)
class _Fits:
    """The probes on one kind of state."""

    task: Task
    y: torch.Tensor
    scale: tuple[float, float]
    references: Sequence[Label | None]
    X: torch.Tensor
    X_dev: torch.Tensor

    def all(self, seeds: Sequence[int], progress: tqdm) -> Probed:
        L1, C = len(self.X), self.task.num_labels
        metric = self.task.metrics[0]
        scores = {name: np.zeros((L1, len(seeds))) for name in self.task.metrics}
        strengths, cumulative, weights = (np.zeros((L1, len(seeds))) for _ in range(3))
        drawn = np.zeros((L1, _DRAWS))
        for layer in range(L1):
            X, X_dev = self.X[layer : layer + 1], self.X_dev[layer : layer + 1]
            axes = Axes.of(X)
            for column, seed in enumerate(seeds):
                strength = choose_strength(X, self.y, C, seed, axes)
                fitted = fit_bootstrap(X, self.y, strength, C, seed, axes)
                strengths[layer, column] = strength
                for name, score in self.score(fitted, X_dev).items():
                    scores[name][layer, column] = score
                progress.update()
        all_axes = [Axes.of(self.X[: layer + 1]) for layer in range(L1)]
        for column, seed in enumerate(seeds):
            strength = choose_strength(self.X, self.y, C, seed, all_axes[-1])
            for layer in range(L1):
                X, X_dev = self.X[: layer + 1], self.X_dev[: layer + 1]
                fitted = fit_bootstrap(X, self.y, strength, C, seed, all_axes[layer])
                cumulative[layer, column] = self.score(fitted, X_dev)[metric]
                if column == 0:
                    drawn[layer] = self.drawn(fitted, X_dev)
                progress.update()
            weights[:, column] = fitted.s.numpy()
        return Probed(scores, strengths, cumulative, weights, drawn)

    def predict(self, fitted: Probe, X: torch.Tensor) -> tuple[list[Label], Floats | None]:
        outputs = fitted(X)
        if self.task.is_regression:
            center, spread = self.scale
            return [center + spread * float(each) for each in outputs[:, 0]], None
        probabilities = outputs.double().softmax(1).numpy()
        return [self.task.labels[k] for k in probabilities.argmax(axis=1)], probabilities

    def score(self, fitted: Probe, X: torch.Tensor) -> dict[str, float]:
        predictions, probabilities = self.predict(fitted, X)
        return scoring.compute(self.task, predictions, self.references, probabilities)

    def drawn(self, fitted: Probe, X: torch.Tensor) -> list[float]:
        """Return the first metric on rows of dev that are drawn with replacement, always alike."""
        task = dataclasses.replace(self.task, metrics=self.task.metrics[:1])
        predictions, probabilities = self.predict(fitted, X)
        generator = np.random.default_rng(0)
        found: list[float] = []
        for _ in range(_DRAWS):
            rows = generator.integers(len(predictions), size=len(predictions)).tolist()
            scored = scoring.compute(
                task,
                [predictions[row] for row in rows],
                [self.references[row] for row in rows],
                None if probabilities is None else probabilities[rows],
            )
            found += scored.values()
        return found


def chance(task: Task, train: Dataset, dev: Dataset) -> dict[str, float]:
    """Score guesses drawn at random from the labels of the training rows: the mean of 100 draws.

    Where probabilities are scored, those of a guess are the shares of the labels.
    """
    generator = np.random.default_rng(0)
    shares = None
    if not task.is_regression:
        counts = np.array([train.labels.count(name) for name in task.labels])
        shares = np.tile(counts / counts.sum(), (len(dev), 1))
    drawn = []
    for _ in range(_DRAWS):
        rows = generator.integers(len(train), size=len(dev)).tolist()
        guesses = [train.examples[row].label for row in rows]
        drawn.append(scoring.compute(task, guesses, dev.labels, shares))
    return {name: float(np.mean([each[name] for each in drawn])) for name in task.metrics}


def some_rows(data: Dataset, most: int) -> Dataset:
    """Return a data set, or if it is larger, ``most`` of its rows, drawn always alike."""
    if most < LEAST_ROWS:
        raise ConfigError(f"a probe needs {LEAST_ROWS} rows or more, asked for are {most}")
    if len(data) <= most:
        return data
    drawn = np.sort(np.random.default_rng(0).permutation(len(data))[:most])
    examples = tuple(data.examples[row] for row in drawn.tolist())
    return dataclasses.replace(data, examples=examples, sha256="")


def _targets(
    task: Task, labels: Sequence[Label | None]
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Return class numbers, or scores of mean 0 and variance 1 with their mean and deviation."""
    if not task.is_regression:
        number = {name: k for k, name in enumerate(task.labels)}
        return torch.tensor([number[str(each)] for each in labels]), (0.0, 1.0)
    scores = np.asarray(labels, dtype=np.float64)
    center, spread = float(scores.mean()), float(scores.std())
    return torch.tensor((scores - center) / spread, dtype=torch.float32), (center, spread)
