"""Load what ``spafit train`` has trained: one run, or the runs of several seeds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
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
from spafit.training.inference import predict, probabilities_of
from spafit.weights.adapter_files import load_adapter, read_adapter_header
from spafit.weights.pretrained import load_pretrained

SUMMARY = "summary.json"
"""The file that makes a folder of several seeds' runs one thing."""


@dataclass(frozen=True)
class Run:
    """A trained model with its tokenizer and its record."""

    model: BertForSequenceClassification
    tokenizer: Tokenizer
    record: dict[str, Any]


class Trained:
    """One run, or several seeds' runs whose probabilities (or scores) are averaged.

    Parameters
    ----------
    folder : Path
        A run folder, or the folder of several seeds.
    model : str, optional
        Another place of the base model.
    mapped : bool, optional
        As for :func:`spafit.load_pretrained`.
    average : bool
        Whether to average over all seeds; otherwise the best of them is taken.

    Attributes
    ----------
    task : Task
        What it was trained for.
    record : dict
        The record of the run, or of the first one.
    """

    def __init__(
        self, folder: Path, model: str | None, mapped: bool | None, average: bool = False
    ) -> None:
        self.runs = [_load(each, model, mapped) for each in members(folder, average)]
        self.record = self.runs[0].record
        definition = self.record.get("definition")
        name = self.record["task"]
        self.task = glue.get_task(name) if definition is None else Task.from_json_dict(definition)
        self.task = self.task.with_metric(self.record["settings"].get("metric"))

    def predict(self, dataset: Dataset) -> tuple[list[Label], Floats | None]:
        """Predict examples; return their labels, and probabilities (n, C) in the task's order."""
        found = []
        for run in self.runs:
            settings = run.record["settings"]
            max_length, precision = settings["max_length"], settings["precision"]
            found.append(
                predict(
                    run.model, run.tokenizer, dataset, max_length=max_length, precision=precision
                )
            )
        if dataset.task.is_regression:
            scores = np.array([each.labels for each in found], dtype=np.float64)
            return scores.mean(axis=0).tolist(), None
        every = [probabilities_of(each.logits, each.names, dataset.task) for each in found]
        probabilities = np.mean(np.stack([each for each in every if each is not None]), axis=0)
        if len(found) == 1:
            return list(found[0].labels), probabilities
        return [dataset.task.labels[k] for k in probabilities.argmax(axis=1)], probabilities

    def table_form(self, delimiter: str | None, unquoted: bool, encoding: str | None) -> TableForm:
        """Return how a file is written: as asked for, else as the training data was."""
        about = self.record["about"]
        quoted = False if unquoted else about.get("quoted", True)
        encoding = encoding or about.get("encoding", "utf-8")
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


def _load(folder: Path, model: str | None, mapped: bool | None) -> Run:
    """Load a run's base model, its adapter and its tokenizer."""
    record = read_record(folder)
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
    network = load_pretrained(name, num_labels=header.num_labels, revision=revision, mapped=mapped)
    load_adapter(network, folder / ADAPTER)
    _place(network, record["settings"])
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
    return Run(network, tokenizer, record)


def _place(network: BertForSequenceClassification, settings: dict[str, Any]) -> None:
    """Move a model to the run's device; if that is not available, report it and choose another."""
    try:
        device = resolve_device(settings["device"])
        resolve_precision(settings["precision"], device)
    except ConfigError as error:
        device = resolve_device("auto")
        settings["precision"] = resolve_precision("auto", device)
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
