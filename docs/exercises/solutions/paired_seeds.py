"""Solution 8."""

import math
import statistics
from collections.abc import Sequence


def t_of_pairs(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the t statistic of the paired test, d̄ / (s_d / √n)."""
    d = [one - other for one, other in zip(x, y, strict=True)]
    return statistics.fmean(d) / (statistics.stdev(d) / math.sqrt(len(d)))


def best_of_is_above(n: int, share: float) -> float:
    """Return 1 - (1 - share)^n: the best is not above the level if no run is."""
    return 1 - (1 - share) ** n
