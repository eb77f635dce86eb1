"""What a search found: its table, its tests against random choice, and the frontier."""

from __future__ import annotations

import csv
import dataclasses
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spafit.errors import one_line
from spafit.experiments.report.statistics import LEVEL, Paired, paired_t_test, spread
from spafit.experiments.report.text import number, p_text
from spafit.experiments.search.candidates import Candidate
from spafit.experiments.search.proposers import CHOICE, DRAW, HALVING, Proposal
from spafit.experiments.search.runs import Run
from spafit.machine.terminal import fitted
from spafit.tasks.metrics import METRICS


@dataclass(frozen=True)
class Row:
    """A proposal, and what its plan scores on dev.

    Attributes
    ----------
    proposal : Proposal
        What was proposed, by whom, at which cost.
    scores : dict of int to float or None
        The first metric by seed; None where the run diverged.
    """

    proposal: Proposal
    scores: Mapping[int, float | None]

    @property
    def trainable(self) -> float:
        """The numbers that train; of one random draw the mean."""
        numbers = [each.trainable for each in self.proposal.plans.values()]
        return sum(numbers) / len(numbers)


@dataclass(frozen=True)
class Comparison:
    """A proposer held against random choice that costs as much.

    Attributes
    ----------
    name, against : str
        The proposer, and the random one.
    is_same : bool
        Whether both have the same plan for every seed.
    test : Paired or None
        Of its scores less the random one's; None with one seed, or where a run diverged.
    """

    name: str
    against: str
    is_same: bool
    test: Paired | None

    @property
    def is_tested(self) -> bool:
        """Return whether there is a p value."""
        return self.test is not None and self.test.p is not None

    @property
    def is_alike(self) -> bool:
        """Return whether the plans or all scores are the same, so that there is nothing to test."""
        alike = self.test is not None and self.test.p is None and self.test.difference == 0
        return self.is_same or alike


@dataclass(frozen=True)
class Point:
    """A plan of the frontier: what it trains, and what it scores.

    Attributes
    ----------
    on : {"dev", "held out"}
        Which rows it was scored on.
    candidate : Candidate
        The plan.
    scores : tuple of float
        One for each seed.
    is_on_frontier : bool
        Whether no other plan scores at least as much on these rows with no more numbers.
    """

    on: str
    candidate: Candidate
    scores: tuple[float, ...]
    is_on_frontier: bool = False


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Hold halving against random choice of the same cost, and all that is cheap against a draw."""
    found = _compared(rows, LEVEL)
    return _compared(rows, _level(found))


def _level(comparisons: Sequence[Comparison]) -> float:
    """Return the level of each test: Bonferroni's."""
    return LEVEL / max(1, sum(each.is_tested for each in comparisons))


def _compared(rows: Sequence[Row], level: float) -> list[Comparison]:
    by_name = {row.proposal.name: row for row in rows}
    found = []
    for name, row in by_name.items():
        if name in (CHOICE, DRAW):
            continue
        other = by_name[CHOICE if name == HALVING else DRAW]
        pairs = [(row.scores[seed], other.scores[seed]) for seed in row.scores]
        sound = [(one, two) for one, two in pairs if one is not None and two is not None]
        test = None
        if len(sound) == len(pairs):
            test = paired_t_test([one for one, _ in sound], [two for _, two in sound], level)
        is_same = row.proposal.plans == other.proposal.plans
        found.append(Comparison(name, other.proposal.name, is_same, test))
    return found


def verdict(comparisons: Sequence[Comparison], sign: int) -> str:
    """Return in words whether anything beats random choice, by Bonferroni's level.

    Parameters
    ----------
    comparisons : sequence of Comparison
        All of them.
    sign : {1, -1}
        -1 if the smaller score is the better one.
    """
    tested = [each for each in comparisons if each.is_tested]
    alike = [each for each in comparisons if each.is_alike]
    untested = [each.name for each in comparisons if each not in (*tested, *alike)]
    better: list[Comparison] = []
    worse: list[Comparison] = []
    rule = ""
    for each in tested:
        assert each.test is not None and each.test.p is not None
        level = f"{LEVEL:g}" + f" / {len(tested)}" * (len(tested) > 1)
        rule = f"by a paired t-test over {each.test.n} seeds at level {level}"
        if each.test.p < _level(comparisons):
            (better if sign * each.test.difference > 0 else worse).append(each)
    said = []
    if better:
        names = "; ".join(f"{each.name} beats {each.against}" for each in better)
        said.append(f"{names[0].upper()}{names[1:]}, {rule}.")
    elif tested:
        said.append(f"Nothing beats random here: of what was tested none is better, {rule}.")
    elif alike and not untested:
        said.append("Nothing beats random here: no other scores were found than random's.")
    else:
        said.append(
            "Nothing can be said of random choice: a test takes two seeds at least, and no run "
            "that diverged."
        )
    if worse:
        names = ", ".join(f"{each.name} than {each.against}" for each in worse)
        said.append(f"Worse: {names}.")
    if untested:
        said.append(f"Without a test: {', '.join(untested)}.")
    return " ".join(said)


def frontier(points: Sequence[Point], sign: int) -> list[Point]:
    """Mark the plans that no other one dominates, and sort them by what they train."""

    def rank(point: Point) -> float:
        return sign * spread(point.scores).mean

    found = []
    for point in points:
        numbers, score = point.candidate.trainable, rank(point)
        is_dominated = any(
            other.candidate.trainable <= numbers
            and rank(other) >= score
            and (other.candidate.trainable < numbers or rank(other) > score)
            for other in points
        )
        found.append(Point(point.on, point.candidate, point.scores, not is_dominated))
    return sorted(found, key=lambda each: (each.candidate.trainable, each.candidate.name))


def summary(rows: Sequence[Row], points: Sequence[Point], sign: int) -> dict[str, Any]:
    """Return what search.json says of what was found; the sign is as in :func:`verdict`."""
    comparisons = compare(rows)
    return {
        "proposals": [
            {
                "proposer": row.proposal.name,
                "plans": {seed: plan.name for seed, plan in row.proposal.plans.items()},
                "trainable": row.trainable,
                "steps": row.proposal.steps,
                "cost": row.proposal.cost,
                "scores": dict(row.scores),
            }
            for row in rows
        ],
        "comparisons": [
            {
                "proposer": each.name,
                "against": each.against,
                "says": says(each),
                "test": None if each.test is None else dataclasses.asdict(each.test),
            }
            for each in comparisons
        ],
        "says": verdict(comparisons, sign),
        "points": [
            {
                "on": each.on,
                "plan": each.candidate.name,
                "trainable": each.candidate.trainable,
                "scores": list(each.scores),
                "is_on_frontier": each.is_on_frontier,
            }
            for each in points
        ],
    }


def screen(rows: Sequence[Row], summary: Mapping[str, Any], points: Sequence[Point]) -> str:
    """Return the table, the tests and the frontier, at most 80 columns wide."""
    metric, seeds = next(iter(summary["majority"])), summary["seeds"]
    count = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
    title = (
        f"{one_line(summary['display'])}, {one_line(summary['model'])}: {metric} on "
        f"{summary['rows']['dev']:,} rows of dev, after training on all "
        f"{summary['rows']['train']:,} of train ({count})"
    )
    lines = [*textwrap.wrap(title, 80), ""]
    form = "{:<21}{:<16}{:>11}{:>14}  {}"
    lines += [form.format("proposed by", "plan", "trainable", "choosing", "on dev"), "─" * 80]
    for row in rows:
        plan = row.proposal.plan
        lines.append(
            form.format(
                row.proposal.name,
                "one a seed" if plan is None else plan.name,
                f"{row.trainable:,.0f}",
                row.proposal.cost,
                _score(list(row.scores.values())),
            )
        )
    lines.append("─" * 80)
    lines += [f"{METRICS[metric].constant:<64}{number(summary['majority'][metric])}", ""]
    for each in summary["comparisons"]:
        lines += textwrap.wrap(
            f"{each['proposer']} - {each['against']}: {each['says']}", 80, subsequent_indent="  "
        )
    best = [each.candidate.name for each in points if each.on == "dev" and each.is_on_frontier]
    frontier_said = (
        "The frontier on dev: no other plan that was trained with every seed scores as much with "
        f"as few numbers: {', '.join(best)}."
        if best
        else "There is no frontier on dev: no plan was trained with every seed."
    )
    said = (
        f"{summary['says']} That is what one choice gave, with one seed to choose by; another "
        "(--selection-seed) may choose otherwise."
    )
    lines += ["", *textwrap.wrap(said, 80), "", *textwrap.wrap(frontier_said, 80)]
    return fitted("\n".join(map(str.rstrip, lines)), {})


def says(each: Comparison) -> str:
    """Return the outcome of a comparison in words."""
    test = each.test
    if each.is_same:
        return "the same plan"
    if each.is_alike:
        return "the same scores"
    if test is None:
        return "no test with one seed, or where a run diverged"
    difference = f"{test.difference:+.4f}"
    if test.p is None:
        return f"{difference} for every seed, which has no test"
    needed = "" if test.needed is None else f", {test.needed:,} seeds would be needed"
    return (
        f"{difference}, 95 % interval {test.low:+.4f} to {test.high:+.4f}, p {p_text(test.p)}"
        f"{needed}"
    )


def table(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """Return search.csv: a row for each run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["scored_on", "plan", "N1", "N2", "type", "trainable", "seed", "rows", "epochs", "steps"]
    writer.writerow([*head, *metrics])
    for run in runs:
        one = run.candidate
        writer.writerow(
            [
                "dev" if run.purpose == "report" else "held out",
                *(one.name, one.N1, one.N2, one.kind, one.trainable),
                *(run.seed, run.rows, run.epochs, run.steps),
                *("" if run.metrics is None else run.metrics[name] for name in metrics),
            ]
        )
    return text.getvalue()


def _score(scores: Sequence[float | None]) -> str:
    sound = [each for each in scores if each is not None]
    if len(sound) < len(scores):
        return f"{len(scores) - len(sound)} diverged"
    of = spread(sound)
    return number(of.mean) + ("" if of.deviation is None else f" ± {number(of.deviation)}")
