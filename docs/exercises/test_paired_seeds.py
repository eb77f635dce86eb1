"""Tests of exercise 8: ``python -m pytest docs/exercises/test_paired_seeds.py``."""

import math

from paired_seeds import best_of_is_above, t_of_pairs

from spafit.experiments.report.statistics import paired_t_test, t_tails

X, Y = [0.72, 0.70, 0.75, 0.71], [0.70, 0.69, 0.71, 0.71]


def test_t_gives_the_p_of_the_report() -> None:
    """The sign is that of x - y."""
    t = t_of_pairs(X, Y)
    test = paired_t_test(X, Y)
    assert test is not None and test.p is not None
    assert t > 0 and math.isclose(t, -t_of_pairs(Y, X))
    assert math.isclose(t_tails(t, len(X) - 1), test.p, rel_tol=1e-9)


def test_the_best_of_many() -> None:
    """One run in ten is that good; of ten runs the best is so two times in three."""
    assert math.isclose(best_of_is_above(1, 0.1), 0.1)
    assert math.isclose(best_of_is_above(10, 0.1), 0.6513215599)
