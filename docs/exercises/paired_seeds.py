"""Exercise 8: tell whether one method is better than another."""

from collections.abc import Sequence


def t_of_pairs(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the t statistic of the paired test, d̄ / (s_d / √n).

    Parameters
    ----------
    x, y : sequence of float
        Scores of two methods, with the same seeds.
    """
    raise NotImplementedError("the differences, their mean, and their deviation over n - 1")


def best_of_is_above(n: int, share: float) -> float:
    """Return the probability that the best of n independent runs is above a level.

    It is how much a table of maxima flatters a method that was tried n times.

    Parameters
    ----------
    n : int
        How many runs.
    share : float
        The probability that a single run is above the level.
    """
    raise NotImplementedError("when is the best run not above it?")
