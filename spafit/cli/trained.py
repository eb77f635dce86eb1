"""Load what ``spafit train`` has trained: one run, those of several seeds, or of several tasks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spafit.bert import BertForSequenceClassification
from spafit.config import read_json
from spafit.errors import CheckpointError, ConfigError, one_line
from spafit.machine.precision import resolve_device, resolve_precision
from spafit.runs.identity import require_trained_with
from spafit.runs.record import ADAPTER, read_record, status_of
from spafit.tasks import glue
from spafit.tasks.metrics import Floats
from spafit.tasks.own_files import TableForm
from spafit.tasks.task import Dataset, Label, Task
from spafit.text.tokenization import Tokenizer, load_tokenizer
from spafit.training.inference import (
    WORTH_MERGING,
    Predictions,
    Predictor,
    predict_all,
    probabilities_of,
)
from spafit.weights.adapter_files import load_adapter, read_adapter_header
from spafit.weights.pretrained import load_pretrained

Predicted = tuple[list[Label], Floats | None]
"""Labels or scores, and probabilities (n, C) in the order of the task's labels."""

SUMMARY = "summary.json"
"""The file that makes a folder of several seeds' runs one thing."""


@dataclass(frozen=True)
class Run:
    """A trained model with its tokenizer and its record."""

    model: BertForSequenceClassification
    tokenizer: Tokenizer
    record: dict[str, Any]
    base: str = ""
    """Fingerprint of the base that it was trained on."""


def trained_in(
    folders: Sequence[Path],
    model: str | None,
    mapped: bool | None,
    average: bool,
    precision: str | None,
) -> Trained:
    """Return the runs of folders: of several seeds in one the best, or the average of all.

    Parameters
    ----------
    folders : sequence of Path
        Run folders, or folders of several seeds.
    average : bool
        Whether to average over all seeds of a folder.
    model, mapped, precision
        As for :class:`Trained`.
    """
    if len(folders) == 1 and not average:
        return Trained(folders[0], model, mapped, precision)
    return TrainedTogether(folders, model, mapped, average, precision)


class Trained:
    """One run: its record is read at once, and its weights when they are first needed.

    So everything that can be refused without weights is refused before they are read.

    Parameters
    ----------
    folder : Path
        A run folder, or the folder of several seeds, of which the best is taken.
    model : str, optional
        Another place of the base model.
    mapped : bool, optional
        As for :func:`spafit.load_pretrained`.
    precision : str, optional
        Of matrix products, in place of that of the training.

    Attributes
    ----------
    task : Task
        What it was trained for.
    record : dict
        The record of the run, or of the first one.
    tasks : mapping of str to Task
        What is predicted, by the name that it has in a table; one task alone has none, "".
    """

    tasks: Mapping[str, Task]

    def __init__(
        self,
        folder: Path,
        model: str | None,
        mapped: bool | None,
        precision: str | None = None,
    ) -> None:
        [self._folder] = members(folder)
        self._how = model, mapped, precision
        self.record = read_record(self._folder)
        self.task = _task_of(self.record)
        self.tasks = {"": self.task}
        self._predictors: dict[bool, Predictor] = {}  # by whether it merges

    @cached_property
    def runs(self) -> list[Run]:
        """What is loaded."""
        return [_load(self._folder, self.record, *self._how)]

    def load(self) -> None:
        """Read the weights, if they were not, so that they are not refused later."""
        _ = self.runs

    def _predictor(self, rows: int) -> Predictor:
        """Return what predicts so many rows, or more; it is made once."""
        merges = rows >= WORTH_MERGING
        if merges not in self._predictors:
            [run] = self.runs
            self._predictors[merges] = Predictor(
                run.model,
                run.tokenizer,
                max_length=run.record["settings"]["max_length"],
                precision=run.record["settings"]["precision"],
                merges=merges,
            )
        return self._predictors[merges]

    def predict(self, dataset: Dataset) -> Predicted:
        """Predict examples."""
        return _mean([self._predictor(len(dataset)).predict(dataset)], dataset.task)

    def stream(
        self, parts: Iterable[Dataset], done: Callable[[float], None] = lambda rows: None
    ) -> Iterator[tuple[Dataset, list[Predicted]]]:
        """Yield the parts of a file, each with its predictions for each of ``tasks``.

        ``done`` is called after every batch with how many rows it had.
        """
        parts = iter(parts)
        first = list(itertools.islice(parts, 1))
        predictor = self._predictor(sum(map(len, first)))
        for part, found in predictor.stream(itertools.chain(first, parts), done):
            yield part, [_mean([found], part.task)]

    def table_form(self, delimiter: str | None, unquoted: bool, encoding: str | None) -> TableForm:
        """Return how a file is written: as asked for, else as the training data was."""
        about = self.record["about"]
        delimiter = delimiter or about.get("delimiter")
        quoted = False if unquoted else about.get("quoted", True)
        encoding = encoding or about.get("encoding", "utf-8")
        if not isinstance(delimiter, str) or len(delimiter) != 1:
            delimiter = None
        return TableForm(delimiter, quoted if isinstance(quoted, bool) else True, encoding)

    def bad_rows_allowed(self, asked: int | None) -> int:
        """Return how many malformed rows may be left out: as asked for, else as in training."""
        if asked is not None:
            if asked < 0:
                raise ConfigError(f"--max-bad-rows must be a whole number of at least 0: {asked}")
            return asked
        allowed = self.record["about"].get("max_bad_rows")
        if allowed is None:  # an older record, or a run of the Python interface
            try:
                data = self.record["data"]
                allowed = max(data[split]["bad_rows"] for split in ("train", "dev"))
            except (KeyError, TypeError):
                allowed = 0
        if type(allowed) is not int or allowed < 0:
            raise ConfigError(
                f"the run's record is damaged: max_bad_rows is {allowed!r:.80}, expected a whole "
                "number of at least 0; give --max-bad-rows"
            )
        return allowed

    def recorded(self, key: str, option: str) -> str:
        """Return an entry of the record, or say which option replaces it."""
        value = self.record["about"].get(key)
        if not isinstance(value, str):
            raise ConfigError(f"the run's record has no {key}; give {option}")
        return value


class TrainedTogether(Trained):
    """Several runs, loaded as adapters onto one base, so that what they share is computed once.

    Each predicts as it was trained, with its own maximum length and precision; frozen layers are
    shared by those that have both in common.

    Parameters
    ----------
    folders : sequence of Path
        Folders as for :class:`Trained`.
    average : bool
        Whether to average the probabilities (or scores) of all seeds of a folder; otherwise the
        best of them is taken.
    model, mapped, precision
        As for :class:`Trained`.

    Attributes
    ----------
    task, record
        Those of the first run.
    adapters : dict of str to list of str
        The adapters of each of ``tasks``.

    Raises
    ------
    ConfigError
        If a run is named twice, they do not have the same base and tokenizer, or some are for
        pairs of texts and some not.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        model: str | None,
        mapped: bool | None,
        average: bool = False,
        precision: str | None = None,
    ) -> None:
        of_each = [members(folder, average) for folder in folders]
        self._folders = list(itertools.chain(*of_each))
        self._how = model, mapped, precision
        places = [folder.resolve() for folder in self._folders]
        self._records = []
        for number, folder in enumerate(self._folders):
            if places[number] in places[:number]:
                raise ConfigError(f"{folder} is named twice")
            self._records.append(read_record(folder))
        every = [_task_of(record) for record in self._records]
        for folder, task in zip(self._folders, every, strict=True):
            if task.pair != every[0].pair:
                what = "the same number of texts, one or a pair"
                raise _unlike(str(self._folders[0]), str(folder), what)
        tasks = dict(zip(map(str, self._folders), every, strict=True))
        self.record, self.task = self._records[0], every[0]
        self.adapters = {
            name: [str(each) for each in some]
            for name, some in zip(_names(folders), of_each, strict=True)
        }
        self.tasks = {name: tasks[some[0]] for name, some in self.adapters.items()}

    @cached_property
    def runs(self) -> list[Run]:
        """What is loaded, all on one base."""
        runs: list[Run] = []
        for folder, record in zip(self._folders, self._records, strict=True):
            runs.append(_load(folder, record, *self._how, runs))
            if runs[-1].tokenizer.fingerprint != runs[0].tokenizer.fingerprint:
                raise _unlike(str(self._folders[0]), str(folder), "the same tokenizer")
        return runs

    @cached_property
    def alike(self) -> dict[tuple[int, str], list[str]]:
        """The adapters with the same maximum length and precision."""
        found: dict[tuple[int, str], list[str]] = {}
        for folder, run in zip(self._folders, self.runs, strict=True):
            settings, device = run.record["settings"], run.model.classifier.weight.device
            its = resolve_precision(settings["precision"], device)
            found.setdefault((settings["max_length"], its), []).append(str(folder))
        return found

    def predict(self, dataset: Dataset) -> Predicted:
        """Predict examples by the first of ``tasks``."""
        return self._predict_each(dataset)[0]

    def stream(
        self, parts: Iterable[Dataset], done: Callable[[float], None] = lambda rows: None
    ) -> Iterator[tuple[Dataset, list[Predicted]]]:
        """Yield the parts of a file, each with its predictions for each of ``tasks``.

        ``done`` is called after every batch with how many rows it had, or the share of them where
        runs that have not the same length and precision take turns.
        """
        for part in parts:
            yield part, self._predict_each(part, done)

    def _predict_each(
        self, dataset: Dataset, done: Callable[[float], None] = lambda rows: None
    ) -> list[Predicted]:
        seconds = dataset.texts_b
        texts: Sequence[Any] = dataset.texts_a
        if seconds is not None:
            texts = list(zip(texts, seconds, strict=True))
        found: dict[str, Predictions] = {}
        for (max_length, precision), names in self.alike.items():
            found |= predict_all(
                self.runs[0].model,
                self.runs[0].tokenizer,
                texts,
                names,
                max_length=max_length,
                precision=precision,
                done=lambda count: done(count / len(self.alike)),
            )
        return [
            _mean([found[each] for each in some], self.tasks[name])
            for name, some in self.adapters.items()
        ]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the names of folders, with as many of those above them as tell all apart.

    One alone needs none.
    """
    if len(folders) == 1:
        return [""]
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(parts):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def _unlike(one: str, other: str, what: str) -> ConfigError:
    return ConfigError(f"{one} and {other} do not have {what}; predict with one after the other")


def _mean(found: Sequence[Predictions], task: Task) -> Predicted:
    """Return what one adapter predicts, or several by the mean of probabilities or scores."""
    if task.is_regression:
        scores = np.array([each.labels for each in found], dtype=np.float64)
        return scores.mean(axis=0).tolist(), None
    every = [probabilities_of(each.logits, each.names, task) for each in found]
    probabilities = np.mean(np.stack([each for each in every if each is not None]), axis=0)
    if len(found) == 1:
        return list(found[0].labels), probabilities
    return [task.labels[k] for k in probabilities.argmax(axis=1)], probabilities


def _task_of(record: dict[str, Any]) -> Task:
    """Return the task of a run, with the metric that it was trained for as the first."""
    definition, name = record.get("definition"), record["task"]
    task = glue.get_task(name) if definition is None else Task.from_json_dict(definition)
    return task.with_metric(record["settings"].get("metric"))


def members(folder: Path, average: bool = False) -> list[Path]:
    """Return the run folders to load: the run, or of several seeds all of them or the best."""
    path = folder / SUMMARY
    if not path.is_file():
        if average:
            raise ConfigError(f"{folder} is one run; --average is for a folder of several seeds")
        return [folder]
    try:
        summary = read_json(path)
        members = [folder / name for name in summary["runs"]]
        best = folder / summary["best"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r:.200}") from None
    if not average:
        print(f"{folder}: the best of {len(members)} seeds, {best.name}", file=sys.stderr)
    return members if average else [best]


def _load(
    folder: Path,
    record: dict[str, Any],
    model: str | None,
    mapped: bool | None,
    precision: str | None,
    together: Sequence[Run] | None = None,
) -> Run:
    """Load the base model of a run, by its record, its adapter and its tokenizer.

    If it is to be used together with other runs, the adapter has the name of its folder, and the
    base is theirs if some are loaded.
    """
    if record.get("status", "finished") != "finished":
        status = status_of(record)
        text = f"{folder}: its run is {status}; this is its best adapter so far"
        print(one_line(text, 1000), file=sys.stderr)
    about = record["about"]
    name = model or about.get("model")
    if not isinstance(name, str):
        raise ConfigError("the run's record has no model; give --model")
    revision = None if model else about.get("revision")
    header = read_adapter_header(folder / ADAPTER)
    if together:
        network = together[0].model
        if header.base_fingerprint != together[0].base:
            raise _unlike(next(iter(network.adaptations)), str(folder), "the same base")
        record["settings"]["device"] = str(network.classifier.weight.device)
    else:
        network = load_pretrained(
            name, num_labels=header.num_labels, revision=revision, mapped=mapped
        )
    load_adapter(network, folder / ADAPTER, name=None if together is None else str(folder))
    _place(network, record["settings"], precision)
    tokenizer = load_tokenizer(
        name,
        revision=revision,
        lowercase=_flag(record, "lowercase", None),
        split_special_tokens=_flag(record, "split_special_tokens", False),
    )
    loaded = {
        "task": record["task"] if header.task is None else header.task,
        "labels": None if header.labels is None else list(header.labels),
        "base_fingerprint": header.base_fingerprint,
        "base_config": network.config.to_json_dict(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    require_trained_with(folder, record, loaded)
    return Run(network, tokenizer, record, header.base_fingerprint)


def _place(
    network: BertForSequenceClassification, settings: dict[str, Any], precision: str | None
) -> None:
    """Move a model to the run's device, and set the precision: that asked for, or the run's.

    If what the run had is not available, report it and choose another.
    """
    try:
        device = resolve_device(settings["device"])
        settings["precision"] = resolve_precision(precision or settings["precision"], device)
    except ConfigError as error:
        device = resolve_device("auto")
        settings["precision"] = resolve_precision(precision or "auto", device)
        text = f"using {settings['precision']} on {device}: {error}"
        print(one_line(text, 600), file=sys.stderr)
    network.to(device)


def _flag(record: dict[str, Any], key: str, default: bool | None) -> bool | None:
    """Return what a run's record says of its tokenizer, or the default of older records."""
    value = record["about"].get(key, default)
    if value is not default and not isinstance(value, bool):
        raise ConfigError(
            f"the run's record is damaged: {key} is {value!r:.80}, expected true or false; correct "
            "run.json, or train again"
        )
    return value
