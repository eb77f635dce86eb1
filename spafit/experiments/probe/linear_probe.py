"""A linear probe on frozen states: of one layer, or of a mix of several.

With X (n, D) the states of the training rows, each feature standardised to mean 0 and variance 1:

    one layer:       logits = X_l Vᵀ + b
    a scalar mix:    logits = (γ Σ_l s_l X_l) Vᵀ + b,    s = softmax(a)

The mix is that of Tenney, Das and Pavlick (2019, arXiv 1905.05950). A linear probe sees the product
of γ and V alone, so this product is what is learnt and penalised here, as W. What is minimised is

    mean cross entropy + λ/2 ‖W‖²          (for scores: half the mean squared error + λ/2 ‖W‖²)

over W, b and a; b and a are not penalised. (The penalty favours a mix of few layers, because the
mean of unlike features is smaller than each, and needs a larger W.) With one layer it is
multinomial logistic regression (scikit-learn's C is 1/(nλ)), or ridge regression.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4)
"""The values of λ to choose from; of equal ones the strongest is taken."""

HELD_OUT = 0.2
"""Share of the training rows on which λ is chosen."""

_MOST_ITERATIONS = 200


class Axes(NamedTuple):
    """The principal axes of some states, in whose scales the loss is about as steep everywhere.

    They change how fast a fit ends, not where.
    """

    Q: torch.Tensor
    """The axes in columns, (D, D)."""
    variances: torch.Tensor
    """Along each of them, (D,)."""

    @classmethod
    def of(cls, X: torch.Tensor) -> Axes:
        """Return those of standardised states (k, n, D), of the mean of the layers' covariances."""
        flat = X.flatten(0, 1)
        variances, Q = torch.linalg.eigh(flat.T @ flat / len(flat))
        return cls(Q, variances.clamp_min(0))

    def scales(self, strength: float) -> torch.Tensor:
        """Return P (D, D): W = V P makes the loss about as steep in every entry of V."""
        return (self.Q / (self.variances / 4 + strength).sqrt()).T


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes
    ----------
    W : torch.Tensor, (C, D)
        γV; C is 1 for scores.
    b : torch.Tensor, (C,)
        The intercept.
    s : torch.Tensor, (k,)
        The weights of the k layers, of sum 1.
    strength : float
        λ.
    """

    W: torch.Tensor
    b: torch.Tensor
    s: torch.Tensor
    strength: float

    def __call__(self, X: torch.Tensor) -> torch.Tensor:
        """Return the logits, or the scores, (n, C) of standardised states (k, n, D)."""
        return F.linear(_mixed(self.s, X), self.W, self.b)


def standardise(train: torch.Tensor, dev: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states (..., n, D) with every feature of mean 0 and variance 1 on the training rows.

    A feature that is constant there, but for rounding, becomes 0 everywhere.
    """
    variance, mean = torch.var_mean(train, dim=-2, correction=0, keepdim=True)
    size = train.abs().amax(dim=-2, keepdim=True)
    is_constant = variance.sqrt() <= 1e-5 * size
    scale = torch.where(is_constant, 0.0, variance.clamp_min(1e-38).rsqrt())
    return (train - mean) * scale, (dev - mean) * scale


def fit(
    X: torch.Tensor,
    y: torch.Tensor,
    strength: float,
    classes: int,
    *,
    axes: Axes | None = None,
    weights: torch.Tensor | None = None,
    tolerance: float = 1e-3,
) -> Probe:
    """Fit a probe by full-batch L-BFGS, in the type of the states.

    Parameters
    ----------
    X : torch.Tensor, (k, n, D)
        The standardised states of k layers.
    y : torch.Tensor, (n,)
        Class numbers (int64), or standardised scores.
    strength : float
        λ.
    classes : int
        C; 1 for scores.
    axes : Axes, optional
        Those of the states, if they are known.
    weights : torch.Tensor, (n,), optional
        How often each row counts; None: once.
    tolerance : float
        The largest entry of the gradient, along the axes, at which it ends.
    """
    k, n, D = X.shape
    share = X.new_full((n,), 1 / n) if weights is None else (weights / weights.sum()).to(X.dtype)
    P = (Axes.of(X) if axes is None else axes).scales(strength)
    V, b, a = X.new_zeros(classes, D), X.new_zeros(classes), X.new_zeros(k)
    learnt = [V, b, a] if k > 1 else [V, b]
    for each in learnt:
        each.requires_grad_()
    optimizer = torch.optim.LBFGS(
        learnt,
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=tolerance * 1e-3,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        W = V @ P
        found = (share * _losses(F.linear(_mixed(a.softmax(0), X), W, b), y)).sum()
        found = found + strength / 2 * W.square().sum()
        torch.autograd.backward(found)
        return found

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Probe((V @ P).detach(), b.detach(), a.detach().softmax(0), strength)


def choose_strength(X: torch.Tensor, y: torch.Tensor, classes: int, seed: int, axes: Axes) -> float:
    """Return the λ of :data:`STRENGTHS` with the least loss on held-out training rows.

    Parameters
    ----------
    X, y, classes, axes
        As for :func:`fit`.
    seed : int
        Draws which fifth of the rows is held out.
    """
    order = torch.from_numpy(np.random.default_rng((seed, 0)).permutation(len(y)))
    size = max(1, round(HELD_OUT * len(y)))
    held_out, held_in = order[:size], order[size:]
    inside, outside = X[:, held_in], X[:, held_out]
    least = [
        float(_losses(probe(outside), y[held_out]).mean())
        for strength in STRENGTHS
        for probe in [fit(inside, y[held_in], strength, classes, axes=axes)]
    ]
    return STRENGTHS[least.index(min(least))]


def fit_bootstrap(
    X: torch.Tensor, y: torch.Tensor, strength: float, classes: int, seed: int, axes: Axes
) -> Probe:
    """Fit a probe on a bootstrap sample: as many rows, drawn with replacement by a seed.

    So the spread over seeds is what other training rows would change. (The sample has 63 % of the
    rows, so its scores are a little below those of all of them.) Arguments as for :func:`fit`.
    """
    generator = np.random.default_rng((seed, 1))
    rows, counts = np.unique(generator.integers(len(y), size=len(y)), return_counts=True)
    taken, weights = torch.from_numpy(rows), torch.from_numpy(counts)
    return fit(X[:, taken], y[taken], strength, classes, axes=axes, weights=weights)


def _mixed(s: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Return Σ_l s_l X_l, (n, D)."""
    return X[0] if len(X) == 1 else (s @ X.flatten(1)).view(X.shape[1:])


def _losses(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the loss of each row, (n,)."""
    if y.is_floating_point():
        return (outputs[:, 0] - y).square() / 2
    return F.cross_entropy(outputs, y, reduction="none")
