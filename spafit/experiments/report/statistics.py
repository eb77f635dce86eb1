"""Statistics of scores over seeds, by their equations, in plain Python and numpy.

Nothing here knows a run or a task. tests/experiments/report/test_statistics.py holds each function
against scipy, or numbers worked out by hand.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spafit.tasks.metrics import Floats

LEVEL, POWER = 0.05, 0.8
"""The level of the tests, and the power for which the number of seeds is given."""

MOST_SEEDS = 100_000
"""Beyond it the number of seeds that would be needed is not looked for."""


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and extremes of n numbers.

    Attributes
    ----------
    n : int
        How many.
    mean : float
        x̄ = Σ x / n.
    deviation : float or None
        s = sqrt(Σ (x - x̄)² / (n - 1)); None for a single number.
    minimum, maximum : float
        The smallest and the largest.
    """

    n: int
    mean: float
    deviation: float | None
    minimum: float
    maximum: float


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation and extremes of at least one number."""
    n, mean = len(values), math.fsum(values) / len(values)
    deviation = None
    if n > 1:
        same = all(value == values[0] for value in values)  # their mean may be rounded
        squares = 0.0 if same else math.fsum((value - mean) ** 2 for value in values)
        deviation = math.sqrt(squares / (n - 1))
    return Spread(n, mean, deviation, min(values), max(values))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b).

    I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) · 1 / (1 + d1 / (1 + d2 / (1 + ...))), with
    d_{2m} = m (b - m) x / ((a + 2m - 1) (a + 2m)) and
    d_{2m+1} = -(a + m) (a + b + m) x / ((a + 2m) (a + 2m + 1)), by Lentz's method; it converges
    fast for x < (a + 1) / (a + b + 2), and elsewhere I_x(a, b) = 1 - I_{1-x}(b, a).
    """
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d, c = 1.0 + term * d, 1.0 + term / c
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            change = d * c
            value *= change
        if abs(change - 1.0) < 1e-15:
            break
    return front * value


def t_tails(t: float, df: float) -> float:
    """Return P(|T| >= |t|) for Student's T with ``df`` degrees of freedom.

    It is I_x(df / 2, 1 / 2) with x = df / (df + t²).
    """
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


@functools.cache
def t_quantile(df: float, level: float = LEVEL) -> float:
    """Return the t that |T| exceeds with probability ``level``, by bisection."""
    low, high = 0.0, 1.0
    while t_tails(high, df) > level:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_tails(middle, df) > level else (low, middle)
    return high


def power(effect: float, n: int, level: float = LEVEL) -> float:
    """Return the power of the two-sided paired t-test.

    Parameters
    ----------
    effect : float
        The mean difference divided by the standard deviation of the differences.
    n : int
        The number of pairs, at least 2.
    level : float
        The level of the test.
    """
    return t_power(effect * math.sqrt(n), n - 1, level)


def t_power(delta: float, df: int, level: float = LEVEL) -> float:
    """Return the power of a two-sided t-test, by the noncentral t distribution.

    T = (Z + δ) / S with Z normal and S = sqrt(χ²_ν / ν). The power is
    P(|T| > t*) = ∫ (Φ(δ - t* s) + Φ(-δ - t* s)) f(s) ds over the density of S,
    f(s) = 2 (ν/2)^(ν/2) / Γ(ν/2) · s^(ν-1) exp(-ν s² / 2), by Gauss and Legendre's rule.

    Parameters
    ----------
    delta : float
        δ: the true difference in its standard errors.
    df : int
        ν: the degrees of freedom.
    level : float
        The level of the test.
    """
    delta, limit = abs(delta), t_quantile(df, level)
    width = 12 / math.sqrt(2 * df)  # S has a standard deviation of nearly 1 / sqrt(2 ν)
    low, high = max(0.0, 1 - width), 1 + width
    nodes, weights = _gauss_legendre()
    s = low + (high - low) * (nodes + 1) / 2
    log_constant = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    density = np.exp(log_constant + (df - 1) * np.log(s) - df * s * s / 2)
    beyond = np.array([_normal(delta - limit * x) + _normal(-delta - limit * x) for x in s])
    return min(1.0, float(np.sum(weights * density * beyond)) * (high - low) / 2)


@functools.cache
def _gauss_legendre() -> tuple[Floats, Floats]:
    return np.polynomial.legendre.leggauss(200)


def _normal(z: float) -> float:
    """Return Φ(z), the share of the normal distribution below z."""
    return math.erfc(-z / math.sqrt(2)) / 2


def seeds_needed(effect: float, level: float = LEVEL) -> int | None:
    """Return the smallest number of pairs with which the paired test has the power wanted.

    Parameters
    ----------
    effect : float
        The mean difference divided by the standard deviation of the differences.
    level : float
        The level of the test.

    Returns
    -------
    int or None
        None if it is more than :data:`MOST_SEEDS`.
    """
    if effect == 0 or power(effect, MOST_SEEDS, level) < POWER:
        return None
    low, high = 1, 2  # power grows with n
    while power(effect, high, level) < POWER:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, middle, level) >= POWER else (middle, high)
    return high


@dataclass(frozen=True)
class Paired:
    """A paired t-test: of the mean difference of n pairs from 0.

    Attributes
    ----------
    n : int
        The number of pairs.
    difference : float
        Their mean difference d̄.
    low, high : float
        Its 95 % confidence interval, d̄ ± t* s_d / sqrt(n).
    p : float or None
        P(|T| >= |t|) for t = d̄ / (s_d / sqrt(n)) with n - 1 degrees of freedom; None where all
        differences are the same, so that there is no spread to hold them against.
    needed : int or None
        The number of pairs with which this difference would be seen with power 0.8 at the test's
        level, if it and its spread are as they were found; None if there is no such number.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float | None
    needed: int | None


def paired_t_test(x: Sequence[float], y: Sequence[float], level: float = LEVEL) -> Paired | None:
    """Test whether x - y differs from 0 on average.

    Parameters
    ----------
    x, y : sequence of float
        Scores of two methods, pair by pair, such as for the same seeds.
    level : float
        The level at which a difference counts as seen: less, where it is one of several tests.

    Returns
    -------
    Paired or None
        None with fewer than two pairs.
    """
    differences = [one - other for one, other in zip(x, y, strict=True)]
    if len(differences) < 2:
        return None
    of = spread(differences)
    assert of.deviation is not None
    largest = max(map(abs, (*x, *y)))
    if of.deviation <= 1e-12 * largest:  # rounding alone
        return Paired(of.n, of.mean, of.mean, of.mean, None, None)
    error = of.deviation / math.sqrt(of.n)
    half = t_quantile(of.n - 1) * error
    p = t_tails(of.mean / error, of.n - 1)
    needed = seeds_needed(of.mean / of.deviation, level)
    return Paired(of.n, of.mean, of.mean - half, of.mean + half, p, needed)


def agreement(answers: Sequence[Sequence[str]]) -> float:
    """Return on which share of the examples two runs give the same answer, over all pairs."""
    pairs = list(itertools.combinations(answers, 2))
    same = [sum(map(str.__eq__, one, other)) / len(one) for one, other in pairs]
    return math.fsum(same) / len(pairs)


def agreement_by_chance(answers: Sequence[Sequence[str]]) -> float:
    """Return the agreement to expect of runs that give each label as often, but by chance alone.

    For runs i and j it is Σ p_i(c) p_j(c) over the labels c, where p_i(c) is the share of the
    examples that i answers with c; and then the mean over all pairs.
    """
    shares = [{label: n / len(each) for label, n in Counter(each).items()} for each in answers]
    pairs = list(itertools.combinations(shares, 2))
    same = [
        math.fsum(p * other.get(label, 0.0) for label, p in one.items()) for one, other in pairs
    ]
    return math.fsum(same) / len(pairs)


def correlation(answers: Sequence[Sequence[float]]) -> float | None:
    """Return Pearson's correlation of the scores of two runs, as the mean over all pairs.

    None if the scores of a run are all the same: there is no correlation with them.
    """
    matrix = np.asarray(answers, dtype=np.float64)
    if any(np.all(row == row[0]) for row in matrix):
        return None
    pairs = itertools.combinations(range(len(matrix)), 2)
    found = [float(np.corrcoef(matrix[i], matrix[j])[0, 1]) for i, j in pairs]
    return math.fsum(found) / len(found)


def main_effects(
    values: Sequence[float], factors: Mapping[str, Sequence[object]]
) -> dict[str, tuple[float, float]]:
    """Divide a spread among the factors that were set apart, and what they leave unexplained.

    The share of a factor is (R(others) - R(all)) / Σ (x - x̄)², where R is what the additive model
    x = μ + α_i + β_j + ... leaves of the sum of squares by least squares, without the factor and
    with all of them. In a balanced design this is the classical Σ n_i (x̄_i - x̄)² / Σ (x - x̄)². The
    rest is what all factors together leave: their interactions, and chance.

    Chance is in every share: of scores that nothing but chance tells apart, a factor of k levels
    takes (k - 1) / (n - 1) on average, its degrees of freedom among all.

    Parameters
    ----------
    values : sequence of float
        The scores.
    factors : mapping of str to sequence
        The level of each factor for each score.

    Returns
    -------
    dict of str to (float, float)
        The share of each factor, and of the "rest", with what chance alone would give it. Empty if
        there is no spread, or no degree of freedom is left to the rest.
    """
    x = np.asarray(values, dtype=np.float64)
    whole = float(np.sum((x - x.mean()) ** 2))
    if np.all(x == x[0]):
        return {}
    columns = {}
    for name, levels in factors.items():
        known = list(dict.fromkeys(levels))
        columns[name] = np.array([[level == each for each in known] for level in levels], float)

    def left(names: Sequence[str]) -> tuple[float, int]:
        """Return R, and the degrees of freedom that it has."""
        design = np.hstack([np.ones((len(x), 1)), *(columns[name] for name in names)])
        solution, _, rank, _ = np.linalg.lstsq(design, x, rcond=None)
        return float(np.sum((x - design @ solution) ** 2)), len(x) - int(rank)

    rest, free = left(list(factors))
    if free == 0:
        return {}
    shares = {}
    for name in factors:
        without, more = left([each for each in factors if each != name])
        shares[name] = (max(0.0, without - rest) / whole, (more - free) / (len(x) - 1))
    return {**shares, "rest": (rest / whole, free / (len(x) - 1))}
