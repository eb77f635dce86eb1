"""What a report says: its tables and comparisons, as numbers; ``text`` and ``page`` show them.

The first metric of a task is its score. A smaller one may be the better (an error): wherever scores
are averaged over tasks or compared, such a score counts with a minus sign.
"""

from __future__ import annotations

import dataclasses
import statistics as plain
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spafit.errors import ConfigError, listed, one_line
from spafit.experiments.report import statistics
from spafit.experiments.report.found import (
    ALIKE,
    Found,
    Group,
    NoAnswersError,
    Run,
    Seeds,
    best_of_each_task,
    display_of,
    find_runs,
    group,
    independent,
    read_answers,
    tasks_of,
)
from spafit.experiments.report.published import ANCHORS, Anchor, paper_score
from spafit.experiments.report.statistics import Paired, Spread
from spafit.tasks.metrics import METRICS

OURS = "SPAFIT-"
"""How the names of the methods begin whose best is compared with all others."""


@dataclass(frozen=True)
class Task:
    """A column of the table: a task with its metric, and the majority's score.

    ``majority`` is that of the commonest class, or of the mean score.
    """

    name: str
    display: str
    metric: str
    majority: float

    @property
    def sign(self) -> int:
        """-1 for an error, else 1."""
        return METRICS[self.metric].sign


@dataclass(frozen=True)
class Cell:
    """The score of a method on a task over seeds, and what the paper prints for it.

    ``metrics`` are all those that each of its runs has, the score among them.
    """

    spread: Spread
    metrics: dict[str, Spread]
    best: float
    paper: float | None
    seeds: tuple[str, ...]
    trainable: tuple[int, int]


@dataclass(frozen=True)
class Row:
    """A method: what it trains, its score on each task, and the mean over all tasks of the table.

    ``mean`` is None where a task is missing, or there is only one. ``deviation`` is that of the
    seeds' means over all tasks, and None unless the same seeds were run on each. Time, speed and
    memory are medians over the runs on the tasks that every method has been run on: a run whose
    machine slept moves no median. They are None where no such run has them.
    """

    label: str
    trainable: tuple[int, int]
    cells: dict[str, Cell]
    mean: float | None
    deviation: float | None
    seconds: float | None
    examples_per_s: float | None
    peak_memory_mib: float | None


@dataclass(frozen=True)
class Comparison:
    """One method against another, on a task or in the mean over tasks.

    ``common`` is how many seeds both were run with; ``seeds``, how many of them are independent,
    and tested.
    """

    other: str
    on: str
    sign: int
    common: int
    seeds: int
    test: Paired | None


@dataclass(frozen=True)
class Agreement:
    """How far the answers of two seeds agree: a share, or for scores a correlation.

    ``by_chance`` is the share that chance alone would give; a correlation has none.
    """

    label: str
    task: str
    runs: int
    value: float | None
    by_chance: float | None


@dataclass(frozen=True)
class Shares:
    """The spread of a method on a task, divided among seeds that were set apart.

    ``shares`` are those of :func:`~spafit.experiments.report.statistics.main_effects`.
    """

    label: str
    task: str
    deviation: float
    levels: dict[str, int]
    shares: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Choice:
    """A learning rate that was tried: its score on each task, and whether it is reported.

    ``mean`` is None where a task is missing that another rate of the method was tried on.
    """

    label: str
    rate: float
    scores: dict[str, float]
    mean: float | None
    is_taken: bool


@dataclass(frozen=True)
class Curve:
    """The score on dev by epoch, as the spread over seeds, of a method on a task."""

    label: str
    points: tuple[tuple[int, Spread], ...]


@dataclass(frozen=True)
class Report:
    """All that a report says.

    Attributes
    ----------
    title : str
        The name of the folder.
    runs : int
        How many runs are reported.
    tasks, rows
        The table.
    ours : str or None
        The method that is compared with all others: the best SPAFIT, or the one that was named.
    is_named : bool
        Whether it was named.
    comparisons, agreements, shares, choices, curves, anchors
        The other tables.
    best : dict of str to Run
        The best run of each of GLUE's tasks.
    left_out : tuple of (str, str)
        Runs that are not reported, and why.
    notes : tuple of str
        What a reader should know.
    """

    title: str
    runs: int
    tasks: tuple[Task, ...]
    rows: tuple[Row, ...]
    ours: str | None
    is_named: bool
    comparisons: tuple[Comparison, ...]
    agreements: tuple[Agreement, ...]
    shares: tuple[Shares, ...]
    choices: tuple[Choice, ...]
    curves: dict[str, tuple[Curve, ...]]
    anchors: tuple[Anchor, ...]
    best: dict[str, Run]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def make_report(folder: Path, against: str | None = None) -> Report:
    """Read the runs below a folder, and compute what there is to say.

    Parameters
    ----------
    folder : Path
        The folder.
    against : str, optional
        The method, as the table has it, that all others are tested against; by default the best
        SPAFIT is tested against all that are none.

    Raises
    ------
    CheckpointError
        If the folder is not there, or holds no run.
    ConfigError
        If the table has no such method.
    """
    found = find_runs(folder)
    notes: list[str] = []
    tasks = _tasks(found.runs, notes)
    groups = _with_metrics(group(found.runs), tasks, notes)
    if against is None:
        ours = _best_of_ours(groups, tasks)
        others = [row for row in groups if not row.method.startswith(OURS)]
    else:
        ours = _named(against, groups)
        others = [row for row in groups if row is not ours]
    comparisons = _comparisons(ours, others, tasks)
    if comparisons and all(each.test is None for each in comparisons):
        comparisons = []
        notes.append("no paired test: it needs two seeds that two methods have in common")
    notes += _dependent(comparisons)
    if comparisons and ours is not None and against is None:
        notes += _no_candidates(ours, groups, tasks)
    if ours is not None:
        notes += _unlike(ours, others, tasks)
    return Report(
        title=folder.resolve().name,
        runs=len(found.runs),
        tasks=tuple(tasks),
        rows=tuple(_row(row, groups, tasks) for row in groups),
        ours=None if ours is None else ours.label,
        is_named=against is not None,
        comparisons=tuple(comparisons),
        agreements=tuple(_agreements(groups, tasks, notes)),
        shares=tuple(_shares(groups, tasks)),
        choices=tuple(_choices(found)),
        curves={task.name: tuple(_curves(groups, task)) for task in tasks},
        anchors=_anchors(found.runs, tasks),
        best=best_of_each_task(found.runs),
        left_out=found.left_out,
        notes=tuple(notes),
    )


def _with_metrics(groups: list[Group], tasks: list[Task], notes: list[str]) -> list[Group]:
    """Leave out the runs that lack the metric of their task, and the methods with no other."""
    for row in groups:
        for task in tasks:
            runs = row.runs.pop(task.name, [])
            kept = [run for run in runs if task.metric in run.metrics]
            if lacking := len(runs) - len(kept):
                notes.append(f"{row.label}, {task.display}: runs without {task.metric}: {lacking}")
            if kept:
                row.runs[task.name] = kept
    return [row for row in groups if row.runs]


def _no_candidates(ours: Group, groups: list[Group], tasks: list[Task]) -> list[str]:
    """Return a note on the SPAFITs that could not be the best, if there are any."""
    names = ", ".join(task.display for task in tasks if task.name in ours.runs)
    others = [row for row in _ours(groups) if row.runs.keys() != ours.runs.keys()]
    single = [row for row in _ours(groups) if row not in others and not _has_pairs(row)]
    whys = {
        "not run on all of these": others,
        "with a single seed, which makes no pair": single if _has_pairs(ours) else [],
    }
    return [
        f"{ours.label} is the best of the SPAFITs that were run on {names}; {why}, and so no "
        f"candidates: {listed([row.label for row in rows], ', ')}"
        for why, rows in whys.items()
        if rows
    ]


def _unlike(ours: Group, others: list[Group], tasks: list[Task]) -> list[str]:
    """Return a note for each method that differs from ours in more than the method."""
    found = []
    for other in others:
        differing: dict[str, list[str]] = {}
        for task in tasks:
            both = [row.runs.get(task.name) for row in (ours, other)]
            for name in ALIKE if all(both) else ():
                values = [{run.known_by.get(name, "") for run in runs or ()} for runs in both]
                if values[0] != values[1]:
                    differing.setdefault(name, []).append(task.display)
        if differing:
            what = [f"{name} ({', '.join(where)})" for name, where in differing.items()]
            means = (
                "on other bases or other rows of dev there is no test"
                if differing.keys() & {"weights", "model", "dev"}
                else "a test does not tell what comes from that"
            )
            found.append(
                f"{other.label} differs from {ours.label} in more than the method: "
                f"{listed(what, ', ')}; {means}"
            )
    return found


def _tasks(runs: Sequence[Run], notes: list[str]) -> list[Task]:
    columns = []
    for name in tasks_of(runs):
        same = [run for run in runs if run.task == name]
        metric = Counter(run.metric for run in same).most_common(1)[0][0]
        majorities = Counter(run.majority[metric] for run in same if metric in run.majority)
        majority = majorities.most_common(1)[0][0]
        if len({run.dev for run in same}) > 1:
            notes.append(
                f"{display_of(name)}: its runs were scored on different dev files; the majority "
                "baseline is that of most runs"
            )
        columns.append(Task(name, display_of(name), metric, majority))
    return columns


def _scores(runs: Sequence[Run], task: Task) -> list[float]:
    return [run.metrics[task.metric] for run in runs]


def _row(row: Group, groups: list[Group], tasks: list[Task]) -> Row:
    cells = {}
    for task in tasks:
        runs = row.runs.get(task.name)
        if not runs:
            continue
        spread = statistics.spread(_scores(runs, task))
        is_comparable = all(run.is_large_cased for run in runs)
        cells[task.name] = Cell(
            spread,
            {
                name: statistics.spread([run.metrics[name] for run in runs])
                for name in runs[0].metrics
                if all(name in run.metrics for run in runs)
            },
            spread.maximum if task.sign > 0 else spread.minimum,
            paper_score(row.method, task.name, task.metric, runs[0].trainable)
            if is_comparable
            else None,
            tuple(str(run.seeds) for run in runs),
            _ends([run.trainable for run in runs]),
        )
    of_all = 1 < len(tasks) == len(cells) and all(task.sign > 0 for task in tasks)
    common = [task.name for task in tasks if all(other.runs.get(task.name) for other in groups)]

    def cost(of: Callable[[Run], float | None]) -> float | None:
        found = [of(run) for name in common for run in row.runs[name]]
        known = [each for each in found if each is not None]
        return plain.median(known) if known else None

    return Row(
        row.label,
        _ends([run.trainable for run in row.every()]),
        cells,
        plain.fmean(cell.spread.mean for cell in cells.values()) if of_all else None,
        _deviation_of_means(row, tasks) if of_all else None,
        cost(lambda run: run.seconds),
        cost(lambda run: run.examples_per_s),
        cost(lambda run: run.peak_memory_mib),
    )


def _ends(counts: Sequence[int]) -> tuple[int, int]:
    return min(counts), max(counts)


def _deviation_of_means(row: Group, tasks: list[Task]) -> float | None:
    """Return the deviation over seeds of the mean over tasks, if each has the same seeds."""
    by_seeds = [
        {run.seeds: run.metrics[task.metric] for run in row.runs[task.name]} for task in tasks
    ]
    if any(scores.keys() != by_seeds[0].keys() for scores in by_seeds):
        return None
    means = [plain.fmean(scores[seeds] for scores in by_seeds) for seeds in by_seeds[0]]
    return statistics.spread(means).deviation


def _ours(groups: list[Group]) -> list[Group]:
    return [row for row in groups if row.method.startswith(OURS)]


def _has_pairs(row: Group) -> bool:
    """Return whether a test can pair its seeds with those of another method."""
    return all(len(runs) > 1 for runs in row.runs.values())


def _named(label: str, groups: list[Group]) -> Group:
    for row in groups:
        if row.label.casefold() == label.casefold():
            return row
    raise ConfigError(
        f"no method of this report is called {one_line(label, 80)!r}; they are "
        f"{listed([row.label for row in groups], ', ')}"
    )


def _best_of_ours(groups: list[Group], tasks: list[Task]) -> Group | None:
    """Return the SPAFIT with the best mean, among those that were run on the most tasks.

    These are the tasks of the first that was run on so many. One with a single seed, which no test
    can pair, is the best only where none of them has more.
    """
    ours = _ours(groups)
    if not ours:
        return None
    most = max(ours, key=lambda row: len(row.runs)).runs.keys()
    shared = [task for task in tasks if task.name in most]

    def mean(row: Group) -> float:
        return plain.fmean(
            task.sign * plain.fmean(_scores(row.runs[task.name], task)) for task in shared
        )

    candidates = [row for row in ours if row.runs.keys() == most]
    return max([row for row in candidates if _has_pairs(row)] or candidates, key=mean)


def _comparisons(ours: Group | None, others: list[Group], tasks: list[Task]) -> list[Comparison]:
    """Test a method against each of some others, on the seeds that both have."""
    found = []
    for other in others if ours is not None else ():
        assert ours is not None
        shared = [
            task
            for task in tasks
            if task.name in ours.runs
            and task.name in other.runs
            and _tested_on(ours.runs[task.name]) == _tested_on(other.runs[task.name])
        ]
        by_seeds = {
            task.name: [
                {run.seeds: run.metrics[task.metric] for run in row.runs[task.name]}
                for row in (ours, other)
            ]
            for task in shared
        }
        for task in shared:
            one, two = by_seeds[task.name]
            found.append(_comparison(other.label, task.display, task.sign, one, two))
        if len(shared) > 1:
            of_all: list[dict[Seeds, float]] = []
            for number in (0, 1):
                scores = [by_seeds[task.name][number] for task in shared]
                seeds = [each for each in scores[0] if all(each in others for others in scores)]
                of_all.append(
                    {
                        each: plain.fmean(
                            task.sign * by_seeds[task.name][number][each] for task in shared
                        )
                        for each in seeds
                    }
                )
            found.append(_comparison(other.label, f"mean of {len(shared)} tasks", 1, *of_all))
    return found


def _dependent(comparisons: list[Comparison]) -> list[str]:
    """Return a note on the tests that leave runs out, if there are any."""
    found = [
        f"{each.other}, {each.on}: {each.seeds} of {each.common}"
        for each in comparisons
        if each.seeds < each.common
    ]
    return [
        "where seeds were set apart, runs that share one are not independent; a test, and its "
        f"difference, take only runs that share none: {listed(found)}"
    ] * bool(found)


def _tested_on(runs: Sequence[Run]) -> set[tuple[str, str]]:
    """Return what the runs of two methods must share for a test by pairs: base, and rows of dev."""
    return {(run.settings.get("weights") or run.settings["model"], run.dev) for run in runs}


def _comparison(
    other: str, on: str, sign: int, one: dict[Seeds, float], two: dict[Seeds, float]
) -> Comparison:
    common = [seeds for seeds in one if seeds in two]
    tested = independent(common)
    test = statistics.paired_t_test([one[each] for each in tested], [two[each] for each in tested])
    return Comparison(other, on, sign, len(common), len(tested), test)


def _agreements(groups: list[Group], tasks: list[Task], notes: list[str]) -> list[Agreement]:
    found, faults = [], []
    for row in groups:
        for task in tasks:
            runs = row.runs.get(task.name, [])
            if len(runs) < 2:
                continue
            where = f"{row.label}, {task.display}"
            try:
                tables = [read_answers(run) for run in runs]
            except NoAnswersError as error:
                faults.append(str(error))
                continue
            examples = {tuple((index, label) for index, label, _ in table) for table in tables}
            if len(examples) > 1:
                notes.append(f"{where}: no agreement, because its runs have different dev examples")
                continue
            answers = [[answer for _, _, answer in table] for table in tables]
            try:
                if METRICS[task.metric].of == "scores":
                    scores = [[float(each) for each in row] for row in answers]
                    value, by_chance = statistics.correlation(scores), None
                else:
                    value = statistics.agreement(answers)
                    by_chance = statistics.agreement_by_chance(answers)
            except ValueError:
                notes.append(f"{where}: no agreement, because an answer is not a number")
                continue
            found.append(Agreement(row.label, task.display, len(runs), value, by_chance))
    if faults:
        notes.append(f"no agreement of a method's seeds, because {listed(faults)}")
    return found


def _shares(groups: list[Group], tasks: list[Task]) -> list[Shares]:
    """Divide the spread of methods whose seeds were set apart."""
    found = []
    for row in groups:
        for task in tasks:
            runs = row.runs.get(task.name, [])
            factors = _factors([run.seeds for run in runs])
            if len(factors) < 2:
                continue
            scores = _scores(runs, task)
            shares = statistics.main_effects(scores, factors)
            deviation = statistics.spread(scores).deviation
            if shares and deviation is not None:
                levels = {name: len(set(each)) for name, each in factors.items()}
                found.append(Shares(row.label, task.display, deviation, levels, shares))
    return found


def _factors(seeds: list[Seeds]) -> dict[str, list[int]]:
    """Return the seeds that vary, by name; those that vary together are one."""
    names = {"initial values": "init", "order": "order", "dropout": "dropout"}
    merged: dict[tuple[int, ...], tuple[str, list[int]]] = {}
    for shown, name in names.items():
        values = [getattr(each, name) for each in seeds]
        known = list(dict.fromkeys(values))
        if len(known) < 2:
            continue
        places = tuple(known.index(value) for value in values)
        together = f"{merged[places][0]} and {shown}" if places in merged else shown
        merged[places] = (together, values)
    return dict(merged.values())


def _choices(found: Found) -> list[Choice]:
    """Return the rates that were tried, each with its scores in the runs that only chose it."""

    def without_rate(runs: Sequence[Run]) -> list[Run]:
        return [
            dataclasses.replace(
                run,
                settings={k: v for k, v in run.settings.items() if k != "learning_rate"},
            )
            for run in runs
        ]

    rates = {run.name: run.settings.get("learning_rate", "") for run in found.choices}
    tried = []
    for row in group(without_rate(found.choices)):
        by_rate: dict[str, list[Run]] = {}
        every_task = tasks_of(row.every())
        for run in row.every():
            by_rate.setdefault(rates[run.name], []).append(run)
        for rate, runs in sorted(by_rate.items(), key=lambda each: _float(each[0])):
            scores = {
                display_of(task): plain.fmean(run.score for run in runs if run.task == task)
                for task in tasks_of(runs)
            }
            mean = plain.fmean(scores.values()) if len(scores) == len(every_task) else None
            its = {**row.settings, "learning_rate": rate}
            is_taken = any(
                run.method == row.method and its.items() <= run.settings.items()
                for run in found.runs
            )
            tried.append(Choice(row.label, _float(rate), scores, mean, is_taken))
    return tried


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _curves(groups: list[Group], task: Task) -> list[Curve]:
    found = []
    for row in groups:
        by_epoch: dict[int, list[float]] = {}
        for run in row.runs.get(task.name, []):
            if run.metric == task.metric:
                for epoch, score in run.history:
                    by_epoch.setdefault(epoch, []).append(score)
        # Where one seed has stopped early, the mean would be that of the others.
        most = max(map(len, by_epoch.values()), default=0)
        points = tuple(
            (epoch, statistics.spread(by_epoch[epoch]))
            for epoch in sorted(by_epoch)
            if len(by_epoch[epoch]) == most
        )
        if points:
            found.append(Curve(row.label, points))
    return found


def _anchors(runs: Sequence[Run], tasks: list[Task]) -> tuple[Anchor, ...]:
    """Return what others have published on these tasks, where a run has the same base."""
    names = {run.task for run in runs if run.is_large_cased} & {task.name for task in tasks}
    kept = []
    for anchor in ANCHORS:
        scores: dict[str, Any] = {k: v for k, v in anchor.scores.items() if k in names}
        if scores:
            kept.append(dataclasses.replace(anchor, scores=scores))
    return tuple(kept)
