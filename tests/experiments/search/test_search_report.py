"""What a search says: its tests against random choice, the frontier, the table, the figure.

Oracle: outcomes worked out by hand; matplotlib's own axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spafit.experiments.search.candidates import Candidate
from spafit.experiments.search.figure import draw
from spafit.experiments.search.proposers import CHOICE, DRAW, HALVING, Proposal
from spafit.experiments.search.report import (
    Point,
    Row,
    compare,
    frontier,
    says,
    screen,
    summary,
    verdict,
)

SMALL, MIDDLE, LARGE = (Candidate(n, 4, "II", 1000 * (4 - n)) for n in (3, 2, 0))


def row(name: str, plan: Candidate, scores: Sequence[float | None]) -> Row:
    seeds = range(len(scores))
    return Row(
        Proposal(name, dict.fromkeys(seeds, plan), 9, "9 steps"),
        dict(zip(seeds, scores, strict=True)),
    )


def rows(halving: Sequence[float | None], selector: Sequence[float | None]) -> list[Row]:
    """Return those of four proposers; the random ones score 0.5 and a little more or less."""
    random = [0.50, 0.51, 0.49, 0.50, 0.52, 0.48][: len(halving)]
    return [
        row(HALVING, LARGE, halving),
        row(CHOICE, SMALL, random),
        row("Fisher score", MIDDLE, selector),
        row(DRAW, SMALL, random),
    ]


ABOVE = [0.81, 0.80, 0.80, 0.79, 0.82, 0.81]
ALIKE = [0.52, 0.50, 0.48, 0.51, 0.50, 0.50]


class TestAgainstRandom:
    def test_nothing_beats_it(self) -> None:
        found = compare(rows(ALIKE, ALIKE))
        assert [(each.name, each.against) for each in found] == [
            (HALVING, CHOICE),
            ("Fisher score", DRAW),
        ]
        assert verdict(found, 1) == (
            "Nothing beats random here: of what was tested none is better, by a paired t-test over "
            "6 seeds at level 0.05 / 2."
        )

    def test_what_beats_it_is_named(self) -> None:
        assert verdict(compare(rows(ABOVE, ALIKE)), 1).startswith(
            f"Successive halving beats {CHOICE}, by a paired t-test over 6 seeds"
        )
        assert verdict(compare(rows(ALIKE, ABOVE)), 1).startswith("Fisher score beats one random")

    def test_what_is_worse_is_named(self) -> None:
        """Also where the smaller score is the better one."""
        said = verdict(compare(rows([each - 0.6 for each in ABOVE], ALIKE)), 1)
        assert said.startswith("Nothing beats random") and said.endswith(
            f"Worse: {HALVING} than {CHOICE}."
        )
        said = verdict(compare(rows(ABOVE, ALIKE)), -1)
        assert said.startswith("Nothing beats random") and f"Worse: {HALVING}" in said

    def test_the_level_is_shared_among_the_tests(self) -> None:
        """A p between 0.025 and 0.05 is not enough with two of them."""
        near = [0.52, 0.52, 0.50, 0.51, 0.52, 0.51]
        found = compare(rows(near, ALIKE))
        assert found[0].test is not None and 0.025 < (found[0].test.p or 0) < 0.05
        assert verdict(found, 1).startswith("Nothing beats random")
        assert found[0].test.needed is not None and found[0].test.needed > len(near)
        [alone] = compare([*rows(near, ALIKE)[:2], row(DRAW, SMALL, ALIKE)])
        assert verdict([alone], 1).startswith("Successive halving beats")
        assert alone.test is not None and alone.test.p == found[0].test.p
        assert (alone.test.needed or 0) < found[0].test.needed
        assert f"{found[0].test.needed} seeds would be needed" in says(found[0])

    def test_what_cannot_be_tested(self) -> None:
        for found in (compare(rows([0.9], [0.9])), compare(rows([0.9, None], [0.9, None]))):
            assert not any(each.is_tested for each in found)
            assert verdict(found, 1).startswith(
                "Nothing can be said of random choice: a test takes two seeds at least, and no run "
                "that diverged. Without a test: "
            )
        one_alike = compare([row(HALVING, SMALL, [0.5]), *rows([0.9], [0.9])[1:]])
        assert [each.is_alike for each in one_alike] == [True, False]
        assert verdict(one_alike, 1).startswith("Nothing can be said of random choice")
        found = compare(
            [
                *rows(ALIKE, ALIKE)[:2],
                row("gradient norm", LARGE, [0.5] * 6),  # by the same in every seed
                row(DRAW, SMALL, [0.25] * 6),
            ]
        )
        assert verdict(found, 1).endswith("0.05. Without a test: gradient norm.")
        assert says(found[1]) == "+0.2500 for every seed, which has no test"
        same = [row(HALVING, SMALL, ALIKE), row(CHOICE, SMALL, ALIKE), row(DRAW, SMALL, ALIKE)]
        for plan, expected in ((SMALL, "the same plan"), (LARGE, "the same scores")):
            found = compare([row(HALVING, plan, ALIKE), *same[1:]])
            assert [says(each) for each in found] == [expected]
            assert verdict(found, 1) == (
                "Nothing beats random here: no other scores were found than random's."
            )
        assert [each.is_same for each in compare(same)] == [True]


class TestFrontier:
    POINTS = (
        Point("dev", LARGE, (0.7, 0.9)),
        Point("dev", SMALL, (0.6,)),
        Point("dev", MIDDLE, (0.55, 0.55)),
    )

    def test_what_nothing_dominates(self) -> None:
        marked = {e.candidate: e.is_on_frontier for e in frontier(self.POINTS, 1)}
        assert marked == {SMALL: True, MIDDLE: False, LARGE: True}
        assert list(marked) == [SMALL, MIDDLE, LARGE]

    def test_of_errors_the_smaller(self) -> None:
        marked = {e.candidate: e.is_on_frontier for e in frontier(self.POINTS, -1)}
        assert marked == {SMALL: True, MIDDLE: True, LARGE: False}

    def test_equal_ones_stay_both(self) -> None:
        twin = Candidate(1, 2, "I", SMALL.trainable)
        points = [Point("dev", SMALL, (0.6,)), Point("dev", twin, (0.6,))]
        assert all(each.is_on_frontier for each in frontier(points, 1))


def summed(some: list[Row], points: Sequence[Point]) -> dict[str, Any]:
    return {
        "display": "Made\x1b" * 30,
        "model": "m" * 200,
        "seeds": list(some[0].scores),
        "rows": {"train": 90, "selection": 72, "held_out": 18, "dev": 33},
        "majority": {"accuracy": 0.5},
        **summary(some, points, 1),
    }


@pytest.mark.parametrize("selector", [ALIKE, [None, *ALIKE[1:]]])
def test_the_table(selector: list[float | None]) -> None:
    some = rows(ABOVE, selector)
    points = frontier(TestFrontier.POINTS, 1)
    text = screen(some, summed(some, points), points)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and text.replace("\n", "").isprintable()
    line = next(each for each in lines if each.startswith(HALVING))
    assert line.split() == "successive halving SPAFIT-0-4-II 4,000 9 steps 0.805 ± 0.010".split()
    fisher = next(each for each in lines if each.startswith("Fisher score"))
    assert fisher.endswith("1 diverged" if None in selector else "0.502 ± 0.013")
    flat = " ".join(text.split())
    assert (
        "no other plan that was trained with every seed scores as much with as few numbers: "
        "SPAFIT-3-4-II, SPAFIT-0-4-II."
    ) in flat
    assert "Successive halving beats random choice" in flat


def test_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))
    )
    points = [*frontier(TestFrontier.POINTS, 1), Point("held out", SMALL, (0.5,), True)]
    draw(points, summed(rows(ABOVE, ALIKE), points), tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    axes = kept[0].axes[0]
    labels = axes.get_legend_handles_labels()[1]
    assert [each.split()[0] for each in labels] == [
        "frontier",
        "choosing:",
        "reported:",
    ]
    assert "18 rows held out" in labels[1] and "33 rows of dev" in labels[2]
    dev = next(each for each in axes.containers if each.get_label().startswith("reported"))
    assert dev.lines[0].get_xydata().tolist() == [
        [1000, pytest.approx(0.6)],
        [2000, pytest.approx(0.55)],
        [4000, pytest.approx(0.8)],
    ]
    assert axes.get_ylabel() == "accuracy (the commonest class of dev: 0.500)"
    low, high = dev.lines[2][0].get_segments()[2]
    assert high[1] - low[1] == pytest.approx(2 * 0.1 * 2**0.5)
    assert {each.get_text() for each in axes.texts} == {"SPAFIT-3-4-II", "SPAFIT-0-4-II"}
