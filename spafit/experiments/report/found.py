"""Find the runs below a folder, and say which of them belong together.

Runs belong together that have the same task, the same method, and the same values of whatever else
was varied; they differ in their seeds.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from spafit.errors import CheckpointError, one_line
from spafit.experiments.report.published import TABLE_2
from spafit.runs.identity import IDLE, RENAMED, digests
from spafit.runs.record import ADAPTER, ANSWERS, CHECKPOINTS, RUN, read_run, status_of
from spafit.runs.train_config import TrainConfig
from spafit.tasks.metrics import METRICS
from spafit.tasks.table import TASKS

_SEEDS = ("seed", "init_seed", "order_seed", "dropout_seed")

_BY_TASK = ("train", "dev", "definition", "labels")
"""What every task has of its own."""

ALIKE = (
    *("weights", "model", "tokenizer", "train", "dev", "definition", "labels"),
    *(
        each.name
        for each in fields(TrainConfig)
        if each.name not in IDLE.union(_SEEDS, ("learning_rate", "dropout_in_group_1"))
    ),
)
"""What is to be alike in two methods that are compared: all but what belongs to a method."""

_REPEATING = (
    *("base_config", "tokenizer", "weights", "definition", "labels", "dev", "train"),
    *("frozen_by_user", "plan"),
)
"""What may only repeat other settings, in the order in which it is left out where it does."""

_DIGITS = 6

COSTS = ("seconds", "examples_per_s", "peak_memory_mib")
"""What a record says of time and memory; it may lack them."""


@dataclass(frozen=True)
class Seeds:
    """The seeds of a run: of initial values, of the data's order, and of dropout."""

    init: int
    order: int
    dropout: int

    def __str__(self) -> str:
        if self.init == self.order == self.dropout:
            return str(self.init)
        return f"{self.init}/{self.order}/{self.dropout}"


def independent(every: Sequence[Seeds]) -> list[Seeds]:
    """Return the first seeds, and those after them that share none that varies with one returned.

    Of runs whose initial values, order and dropout are crossed, those with one seed in common vary
    together: copies of three runs would count as eighteen.
    """
    names = [each.name for each in fields(Seeds)]
    varying = [name for name in names if len({getattr(each, name) for each in every}) > 1]
    kept: list[Seeds] = []
    taken: set[tuple[str, int]] = set()
    for each in every:
        its = {(name, getattr(each, name)) for name in varying}
        if not its & taken:
            kept.append(each)
            taken |= its
    return kept


@dataclass(frozen=True)
class Run:
    """What a report needs of a finished run.

    Attributes
    ----------
    folder : Path
        Its folder.
    name : str
        The folder, from the one that is reported on.
    task, method : str
        Their names, as the record has them.
    settings : dict of str to str
        Whatever may tell it from another run of its method and task, as text: settings of the
        training and of the plan, the model, and digests of what else identifies a run.
    seeds : Seeds
        Its seeds.
    is_choice : bool
        Whether it was made only to choose a learning rate.
    is_large_cased : bool
        Whether the base has the sizes of bert-large-cased, the paper's.
    metrics, majority : dict of str to float
        The best evaluation on dev, the first metric first, and the scores of the commonest class.
    history : tuple of (int, float)
        Epoch and first metric of every evaluation. Of several in an epoch, the last.
    trainable : int
        How many numbers train.
    seconds, examples_per_s, peak_memory_mib : float or None
        Time, speed and memory; None where the record has none.
    dev : str
        SHA-256 of the examples that it was scored on.
    """

    folder: Path
    name: str
    task: str
    method: str
    settings: dict[str, str]
    seeds: Seeds
    is_choice: bool
    is_large_cased: bool
    metrics: dict[str, float]
    majority: dict[str, float]
    history: tuple[tuple[int, float], ...]
    trainable: int
    seconds: float | None
    examples_per_s: float | None
    peak_memory_mib: float | None
    dev: str

    @property
    def known_by(self) -> dict[str, str]:
        """The settings without the model's name, where the weights say what it is."""
        left_out = "model" if "weights" in self.settings else ""
        return {name: value for name, value in self.settings.items() if name != left_out}

    @property
    def metric(self) -> str:
        """The first metric, by which the best epoch was chosen."""
        return next(iter(self.metrics))

    @property
    def score(self) -> float:
        """The first metric's value."""
        return self.metrics[self.metric]


@dataclass(frozen=True)
class Found:
    """The runs below a folder.

    Attributes
    ----------
    folder : Path
        The folder.
    runs, choices : tuple of Run
        The finished runs to report, and those that only chose a learning rate.
    left_out : tuple of (str, str)
        Every other run: its folder, and why it is not reported.
    """

    folder: Path
    runs: tuple[Run, ...] = ()
    choices: tuple[Run, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()


@dataclass
class Group:
    """Runs of one method with the same settings: a row of the table.

    Attributes
    ----------
    label : str
        The method, with the settings that tell it from other rows.
    method : str
        The method's name alone.
    settings : dict of str to str
        These settings.
    runs : dict of str to list of Run
        By task, in the order of their seeds.
    """

    label: str
    method: str
    settings: dict[str, str] = field(default_factory=dict)
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def every(self) -> Iterator[Run]:
        """Yield all runs of the group."""
        for runs in self.runs.values():
            yield from runs


def find_runs(folder: Path) -> Found:
    """Read the record of every run below a folder.

    Raises
    ------
    CheckpointError
        If the folder is not there, or holds no run at all.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise CheckpointError(f"{folder} {what}; name a folder with runs below it")
    runs: list[Run] = []
    left_out: list[tuple[str, str]] = []
    known: dict[str, str] = {}
    for path in _records(folder):
        name = one_line(path.parent.relative_to(folder).as_posix())
        try:
            run = _read(path, name)
        except CheckpointError as error:
            left_out.append((name, one_line(str(error), 400)))
            continue
        what = json.dumps([run.task, run.method, run.known_by, str(run.seeds), run.is_choice])
        if what in known:
            left_out.append((name, f"the same task, method, settings and seeds as {known[what]}"))
            continue
        known[what] = name
        runs.append(run)
    if not runs and not left_out:
        raise CheckpointError(
            f"{folder} has no run below it (no {RUN}); name the --out of spafit train or grid"
        )
    return Found(
        folder,
        tuple(run for run in runs if not run.is_choice),
        tuple(run for run in runs if run.is_choice),
        tuple(left_out),
    )


def _records(folder: Path) -> Iterator[Path]:
    """Yield every run.json below a folder, in the order of their names; behind links, too, once."""
    seen: set[str] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if each != CHECKPOINTS)
        if RUN in files:
            yield Path(at) / RUN


def _read(path: Path, name: str) -> Run:
    """Read a finished run.

    Raises
    ------
    CheckpointError
        If it is not finished, or its record is damaged; the message is the reason alone.
    """
    record = read_run(path)
    status = record.get("status")
    if status == "running":
        raise CheckpointError("running, or its process was killed")
    if status != "finished":
        raise CheckpointError(status_of(record))
    if "imported" in record:
        raise CheckpointError("its adapter was imported, and it has no scores")
    try:
        if record["about"].get("cell", {}).get("purpose") == "selection":
            raise CheckpointError("it chose a plan, by rows held out of train (spafit search)")
        return _run(path.parent, name, record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"its record is damaged: {error!r:.200}") from None


def _run(folder: Path, name: str, record: dict[str, Any]) -> Run:
    result, about, settings = record["result"], record["about"], record["settings"]
    cell = about.get("cell", {})
    seed = _whole(settings["seed"])
    order, dropout = (settings.get(f"{which}_seed") for which in ("order", "dropout"))
    init = about.get("init_seed", cell.get("settings", {}).get("init_seed"))
    seeds = Seeds(*(seed if each is None else _whole(each) for each in (init, order, dropout)))
    metrics = {_text(key): _number(value) for key, value in result["metrics"].items()}
    first = next(iter(metrics))
    if unknown := metrics.keys() - METRICS.keys():
        raise ValueError(f"no metric is called {sorted(unknown)[0]!r:.80}")
    if metrics.keys() != result["majority"].keys():
        raise ValueError("the majority's scores are of other metrics")
    base = record.get("base_config", {})
    sizes = tuple(base.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    history = {_whole(each["epoch"]): _number(each["metrics"][first]) for each in result["history"]}
    return Run(
        folder=folder,
        name=name,
        task=_text(record["task"]),
        method=one_line(_text(record["method"]), 80),
        settings=_settings(record, cell.get("settings", {})),
        seeds=seeds,
        is_choice=cell.get("purpose") == "choice",
        is_large_cased=sizes == (1024, 24, 28996),
        metrics=metrics,
        majority={_text(key): _number(value) for key, value in result["majority"].items()},
        history=tuple(history.items()),
        trainable=_whole(result["trainable"]),
        **{name: _number(result[name]) if name in result else None for name in COSTS},
        dev=str(record["data"]["dev"]["sha256"]),
    )


def _settings(record: dict[str, Any], varied: dict[str, Any]) -> dict[str, str]:
    """Return what may tell a run from others of its method and task, as text."""
    given = {RENAMED.get(key, key): value for key, value in record["settings"].items()}
    found = {  # an older record lacks what is newer, which then had its default
        key: value
        for key, value in {**vars(TrainConfig()), **given, **varied}.items()
        if key not in IDLE and key not in _SEEDS
    }
    inside: dict[str, set[str]] = {}
    _scalars(record.get("plan", {}).get("strata", []), inside)
    for key, values in inside.items():  # r and alpha, also of a run that no grid has made
        found.setdefault(key, ", ".join(sorted(values)))
    found |= {name: digest[:_DIGITS] for name, digest in digests(record).items()}
    found["model"] = record["about"].get("model", "")
    for name, key in (("weights", "base_fingerprint"), ("tokenizer", "tokenizer_fingerprint")):
        if found.pop(key, None):
            found[name] = str(record[key])[:_DIGITS]
    return {str(key): _shown(value) for key, value in found.items()}


def _scalars(value: Any, found: dict[str, set[str]], key: str = "") -> None:
    """Collect the numbers and words of the techniques in a plan, by the names of their settings."""
    if isinstance(value, dict):
        for inner, each in value.items():
            if inner not in ("name", "layers"):
                _scalars(each, found, inner)
    elif isinstance(value, list):
        for each in value:
            _scalars(each, found, key)
    elif "." not in key:  # a module's path is no setting
        found.setdefault(key, set()).add(_shown(value))


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return one_line(text, 80)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r:.80} is not a name")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r:.80} is not a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.80} is not a number")
    return float(value)


def tasks_of(runs: Iterable[Run]) -> list[str]:
    """Return the tasks of runs: GLUE's in the paper's order, then others by name."""
    paper = sorted(TASKS, key=lambda name: TASKS[name].display.lower())
    found = {run.task for run in runs}
    return [name for name in paper if name in found] + sorted(found - set(paper))


def display_of(task: str) -> str:
    """Return the name of a task as it is shown; the paper has no m for MNLI's matched half."""
    known = TASKS.get(task)
    return one_line(task, 60) if known is None else known.display.removesuffix("-m")


_ORDER = tuple(each for each in TABLE_2 if not each.startswith("SPAFIT-"))
_OTHERS = ("Houlsby", "Pfeiffer", "Parallel", "(IA)³", "Linear probing")


def group(runs: Iterable[Run]) -> list[Group]:
    """Gather the runs of each method with the same settings.

    A setting counts if runs of a method differ in it on the same task. (The batch size, which the
    paper has by the task, does not.) The data count for the tasks where they differ. The order is
    that of Table 2, SPAFIT after the others.
    """
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    groups = []
    for method in sorted(by_method, key=_place):
        varied = _varied(by_method[method])
        rows: dict[tuple[str, ...], Group] = {}
        for run in by_method[method]:
            values = tuple(
                run.settings.get(name, "") if name not in _BY_TASK or run.task in tasks else ""
                for name, tasks in varied.items()
            )
            its = {name: value for name, value in zip(varied, values, strict=True) if value}
            shown = ", ".join(f"{name} {value}" for name, value in its.items())
            label = f"{method} ({shown})" if shown else method
            row = rows.setdefault(values, Group(label, method, its))
            row.runs.setdefault(run.task, []).append(run)
        groups += [rows[values] for values in sorted(rows, key=_by_number)]
    for row in groups:
        for same in row.runs.values():
            same.sort(key=lambda run: (run.seeds.init, run.seeds.order, run.seeds.dropout))
    return groups


def _place(method: str) -> tuple[int, int, list[tuple[int, str]]]:
    """Return what sorts methods: Table 2's rows as there, others between the two kinds."""
    kind = 2 if method.startswith("SPAFIT-") else 0 if method in _ORDER else 1
    known = [*_ORDER, *_OTHERS] if kind < 2 else [each for each in TABLE_2 if "SPAFIT" in each]
    natural = [
        (int(each), "") if each.isdigit() else (-1, each)
        for each in re.split("([0-9]{1,9})", method)
    ]
    return kind, known.index(method) if method in known else len(known), natural


def _varied(runs: list[Run]) -> dict[str, set[str]]:
    """Return the settings in which runs of a method differ on one task at least, and those tasks.

    What only repeats another of them is left out: the plan's digest where r differs, the digest of
    a model's weights where its name does. A model with the same weights is the same, whatever its
    folder is called.
    """
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(run.task, []).append(run)
    differing: dict[str, set[str]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        for task, same in by_task.items():
            if len({run.settings.get(name) for run in same}) > 1:
                differing.setdefault(name, set()).add(task)

    def classes(chosen: Iterable[str]) -> int:
        return len({(run.task, *(run.settings.get(name) for name in chosen)) for run in runs})

    if "weights" not in differing and all("weights" in run.settings for run in runs):
        differing.pop("model", None)
    for name in _REPEATING:
        others = [each for each in differing if each != name]
        if name in differing and classes(others) == classes(differing):
            del differing[name]
    return differing


def _by_number(values: tuple[str, ...]) -> list[tuple[float, str]]:
    found = []
    for value in values:
        try:
            found.append((float(value), ""))
        except ValueError:
            found.append((math.inf, value))
    return found


def best_of_each_task(runs: Iterable[Run]) -> dict[str, Run]:
    """Return the best run of each of GLUE's tasks that left an adapter, by its first metric.

    Of equal ones it is the first by name.
    """
    best: dict[str, Run] = {}
    for run in runs:
        if run.task not in TASKS or not (run.folder / ADAPTER).is_file():
            continue
        metric = TASKS[run.task].metrics[0]
        score, known = run.metrics.get(metric), best.get(run.task)
        if score is not None and (known is None or score > known.metrics[metric]):
            best[run.task] = run
    return best


class NoAnswersError(Exception):
    """A run's dev.tsv is missing, or is not a table of answers."""


def read_answers(run: Run) -> list[tuple[str, str, str]]:
    """Read the index, label and prediction of each example of dev.

    Raises
    ------
    NoAnswersError
        If there is no such file, or it has another form.
    """
    path = run.folder / ANSWERS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        raise NoAnswersError(f"{run.name} has no readable {ANSWERS}") from None
    rows = [tuple(line.split("\t")) for line in lines[1:-1]]
    fits = lines[0] == "index\tlabel\tprediction" and lines[-1] == "" and rows
    if not fits or any(len(row) != 3 for row in rows):
        raise NoAnswersError(f"{run.name}/{ANSWERS} is not a table of answers")
    return [(index, label, answer) for index, label, answer in rows]
