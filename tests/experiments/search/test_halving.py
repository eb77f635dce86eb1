"""Successive halving with scores that are made up.

Oracle: survivors and costs by hand.
"""

from __future__ import annotations

from fractions import Fraction

import pytest

from spafit.errors import TrainingError
from spafit.experiments.search.halving import Rung, climb, rungs


@pytest.mark.parametrize(
    ("plans", "expected"),
    [
        (27, [(27, "1/9"), (9, "1/3"), (3, "1")]),
        (28, [(28, "1/27"), (10, "1/9"), (4, "1/3"), (2, "1")]),
        (6, [(6, "1/3"), (2, "1")]),
        (3, [(3, "1")]),
        (2, [(2, "1")]),
    ],
)
def test_rungs(plans: int, expected: list[tuple[int, str]]) -> None:
    assert rungs(plans) == tuple(Rung(n, Fraction(share)) for n, share in expected)


def test_every_rung_of_a_power_of_three_costs_as_much() -> None:
    assert {each.plans * each.share for each in rungs(81)} == {3}


class TestClimb:
    def test_the_best_third_survives(self) -> None:
        """Of 7 plans 3 go on; which is best may change on the way."""
        scores = {
            Fraction(1, 3): {"a": 1.0, "b": 7.0, "c": 3.0, "d": 6.0, "e": 2.0, "f": 5.0, "g": 0.0},
            Fraction(1): {"b": 1.0, "d": 2.0, "f": 4.0},
        }
        asked = []

        def score(plan: str, share: Fraction) -> float:
            asked.append((plan, share))
            return scores[share][plan]

        best, found = climb("abcdefg", rungs(7), score)
        assert best == "f"
        assert found == list(scores.values())
        assert len(asked) == 10

    def test_of_equal_scores_the_first(self) -> None:
        assert climb("dcba", rungs(4), lambda plan, share: 1.0)[0] == "d"
        # The first of all, and not the best of the shorter runs.
        short = {"a": 0.5, "b": 0.6, "c": 0.1, "d": 0.2}
        assert climb("abcd", rungs(4), lambda plan, share: 1 if share == 1 else short[plan]) == (
            "a",
            [short, {"b": 1, "a": 1}],
        )

    def test_what_diverges_is_out(self) -> None:
        values = {"a": 3.0, "b": None, "c": 1.0, "d": None}
        best, found = climb("bacd", rungs(4), lambda plan, share: values[plan] if share < 1 else 0)
        assert best == "a" and found[1] == {"a": 0, "c": 0}
        with pytest.raises(TrainingError, match="all 3 runs of a rung diverged"):
            climb("abc", rungs(3), lambda plan, share: None)
