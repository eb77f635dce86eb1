"""The statistics of reports.

Oracle: scipy, and numbers worked out by hand.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from spafit.experiments.report import statistics as ours


def test_spread() -> None:
    found = ours.spread([1.0, 2.0, 6.0])
    assert (found.n, found.mean, found.minimum, found.maximum) == (3, 3.0, 1.0, 6.0)
    assert found.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert ours.spread([0.7]) == ours.Spread(1, 0.7, None, 0.7, 0.7)
    assert ours.spread([0.1] * 3).deviation == 0.0  # although the mean of 0.1 is not 0.1


@pytest.mark.parametrize(
    ("a", "b"), [(0.5, 0.5), (1, 0.5), (2.5, 0.5), (7, 3), (500, 0.5), (5e4, 0.5)]
)
def test_incomplete_beta(a: float, b: float) -> None:
    for x in (0.0, 1e-9, 0.1, 0.5, 0.93, 0.9999, 1.0):
        expected = special.betainc(a, b, x)
        assert ours.incomplete_beta(a, b, x) == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 30, 999])
def test_student_s_t(df: int) -> None:
    for t in (-3.0, 0.0, 1e-3, 0.7, 2.0, 4.5, 30.0):
        assert ours.t_tails(t, df) == pytest.approx(2 * stats.t.sf(abs(t), df), rel=1e-9)
    for level in (0.2, 0.05, 0.001):
        expected = stats.t.ppf(1 - level / 2, df)
        assert ours.t_quantile(df, level) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 40, 300])
@pytest.mark.parametrize("effect", [0.0, 0.2, -0.9, 2.0])
def test_power(n: int, effect: float) -> None:
    limit = stats.t.ppf(0.975, n - 1)
    noncentral = stats.nct(n - 1, effect * math.sqrt(n)) if effect else stats.t(n - 1)
    expected = noncentral.sf(limit) + noncentral.cdf(-limit)
    assert ours.power(effect, n) == pytest.approx(expected, abs=1e-6)


def test_seeds_needed() -> None:
    """The first number of pairs whose power, by scipy's noncentral t, is 0.8."""
    for effect, level in itertools.product((3.0, -1.0, 0.5, 0.1), (0.05, 0.0125)):
        n = ours.seeds_needed(effect, level)
        assert n is not None

        def power(pairs: int, delta: float = abs(effect), level: float = level) -> float:
            limit = stats.t.ppf(1 - level / 2, pairs - 1)
            return float(stats.nct.sf(limit, pairs - 1, delta * math.sqrt(pairs)))

        assert power(n) >= 0.8 - 1e-6
        assert n == 2 or power(n - 1) < 0.8
    assert ours.seeds_needed(0.5) == 34  # Cohen's table for a paired test
    assert ours.seeds_needed(0.0) is ours.seeds_needed(1e-4) is None


def test_paired_t_test() -> None:
    x, y = [0.71, 0.74, 0.69, 0.75], [0.70, 0.70, 0.70, 0.72]
    found = ours.paired_t_test(x, y)
    assert found is not None
    expected = stats.ttest_rel(x, y)
    interval = expected.confidence_interval(0.95)
    assert found.n == 4 and found.difference == pytest.approx(0.0175)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.needed == ours.seeds_needed(0.0175 / np.std(np.subtract(x, y), ddof=1))
    other = ours.paired_t_test(y, x)
    assert other is not None and other.difference == -found.difference and other.p == found.p


def test_pairs_without_a_spread_have_no_test() -> None:
    same = [0.5634] * 3
    assert ours.paired_t_test(same, same) == ours.Paired(3, 0.0, 0.0, 0.0, None, None)
    found = ours.paired_t_test([0.1 + 0.2, 0.4], [0.2, 0.3])  # 0.1, but for rounding
    assert found is not None and found.p is None
    assert ours.paired_t_test([0.5], [0.4]) is None


def test_agreement() -> None:
    answers = [["a", "b", "b", "a"], ["a", "b", "a", "a"], ["b", "b", "a", "a"]]
    assert ours.agreement(answers) == pytest.approx((3 / 4 + 2 / 4 + 3 / 4) / 3)


def test_agreement_by_chance() -> None:
    """By hand: shares of a, b and c, and their products, pair by pair."""
    answers = [["a", "b", "b", "a"], ["a", "b", "a", "a"], ["c", "c", "a", "c"]]
    pairs = (2 / 4 * 3 / 4 + 2 / 4 * 1 / 4, 2 / 4 * 1 / 4, 3 / 4 * 1 / 4)
    assert ours.agreement_by_chance(answers) == pytest.approx(sum(pairs) / 3)
    assert ours.agreement_by_chance([["a"] * 5] * 2) == 1.0  # always the commonest class


def test_agreement_by_chance_is_that_of_shuffled_answers() -> None:
    """Oracle: the mean agreement of answers in an order that is drawn."""
    draw, one, other = np.random.default_rng(3), ["a"] * 30 + ["b"] * 10, ["a"] * 25 + ["c"] * 15
    found = [ours.agreement([one, draw.permutation(other).tolist()]) for _ in range(2000)]
    assert ours.agreement_by_chance([one, other]) == pytest.approx(np.mean(found), abs=0.005)


def test_correlation() -> None:
    answers = [[1.0, 2.0, 3.0, 5.0], [1.5, 2.0, 2.0, 4.0], [5.0, 1.0, 0.0, 2.0]]
    expected = [stats.pearsonr(answers[i], answers[j])[0] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert ours.correlation(answers) == pytest.approx(np.mean(expected))
    assert ours.correlation([[1.0, 1.0], [1.0, 2.0]]) is None


def shares(values: list[float], factors: dict[str, list[int]]) -> dict[str, float]:
    return {name: share for name, (share, _) in ours.main_effects(values, factors).items()}


class TestMainEffects:
    def test_of_a_balanced_design(self) -> None:
        """By hand: means of a 0.2 and 0.6, of b 0.3 and 0.5; the whole sum is 0.21."""
        factors = {"a": [0, 0, 1, 1], "b": [0, 1, 0, 1]}
        found = shares([0.1, 0.3, 0.5, 0.7], factors)
        assert found == pytest.approx({"a": 0.16 / 0.2, "b": 0.04 / 0.2, "rest": 0.0}, abs=1e-12)
        found = shares([0.1, 0.3, 0.5, 0.5], factors)  # with an interaction
        assert found == pytest.approx({"a": 9 / 11, "b": 1 / 11, "rest": 1 / 11})

    def test_one_factor_at_a_time(self) -> None:
        """Oracle: each factor's own spread, since the additive model fits everything."""
        values, factors = [0.5, 0.6, 0.5, 0.3], {"a": [0, 1, 0, 0], "b": [0, 0, 0, 1]}
        found = shares(values, factors)
        whole = np.var(values) * 4
        assert found["rest"] == pytest.approx(0.0, abs=1e-12)
        assert found["a"] == pytest.approx(0.01 * 2 / 3 / whole)  # against the two others at b = 0
        assert found["b"] == pytest.approx(0.04 * 2 / 3 / whole)

    def test_chance_is_in_every_share(self) -> None:
        """Oracle: the mean over scores that are drawn, and (k - 1) / (n - 1)."""
        factors = {"a": [0, 1, 2] * 4, "b": [0] * 6 + [1] * 6}
        draw = np.random.default_rng(1)
        found = [ours.main_effects(draw.normal(size=12).tolist(), factors) for _ in range(2000)]
        for name, expected in (("a", 2 / 11), ("b", 1 / 11), ("rest", 8 / 11)):
            assert {each[name][1] for each in found} == {expected}
            assert np.mean([each[name][0] for each in found]) == pytest.approx(expected, abs=0.01)

    def test_nothing_to_divide(self) -> None:
        assert ours.main_effects([0.1] * 4, {"a": [0, 1, 2, 2]}) == {}
        # Each factor by itself, each cell once: the additive model fits whatever the scores are.
        apart = {"a": [0, 1, 0], "b": [0, 0, 1]}
        assert ours.main_effects([0.5, 0.6, 0.3], apart) == {}
