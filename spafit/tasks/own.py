"""Data of your own: files, rows of dicts, data frames, lists of texts and labels.

A table has a column for each text of the task (one, or two for a pair) and one for its label; its
other columns, such as an id, are carried through to the predictions. Labels are texts or numbers:
1, 1.0 and "1" are the label "1". They are numbered in the order of their values if all are
numbers, else of their names.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spafit.errors import DataError, counted
from spafit.tasks.own_files import NUMBER, TableForm, from_record, read_rows, score_of
from spafit.tasks.reading import Rows, sha256_of_data
from spafit.tasks.task import Dataset, Example, Label, Task, UnlabelledTask

METRICS_OF_LABELS = ("macro_f1", "accuracy", "matthews")
METRICS_OF_SCORES = ("pearson", "spearman", "mean_absolute_error")
"""The metrics of a task that names none."""

_MOST_NAMED = 3
_MOST_NUMBERS = 10  # of classes that are numbers, such as stars


def dataset(
    data: Any,
    labels: Iterable[object] | None = None,
    *,
    task: Task | None = None,
    text: str | None = None,
    text2: str | None = None,
    label: str = "label",
    regression: bool = False,
    name: str | None = None,
    form: TableForm | None = None,
    encoding: str | None = None,
    labelled: bool = False,
    max_bad_rows: int = 0,
) -> Dataset:
    """Make a data set of your own data.

    Parameters
    ----------
    data : str or Path, sequence of str, sequence of (str, str), iterable of dict, or data frame
        A file (``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``); texts, or pairs of texts; rows by the
        names of their columns, such as a split of the datasets library; or a pandas frame.
    labels : iterable, optional
        The label of each text, if ``data`` has texts.
    task : Task, optional
        The task, such as that of the training data, ``train.task``. By default one is made of the
        columns and of the labels that occur; without any labels, the texts can be predicted by any
        trained model.
    text, text2, label : str, optional
        Names of the columns: of the text, which is "text" by default; of the second text of a pair;
        and of the label. Not used if ``task`` is given.
    regression : bool
        Whether labels are scores.
    name : str, optional
        Name of the task; by default that of the file.
    form : TableForm, optional
        How a CSV or TSV file is written, if not as its extension and its first line show.
    encoding : str, optional
        The encoding of a text file, such as "cp1252"; by default that of ``form``, UTF-8. A file
        that begins with a byte-order mark, in UTF-16 too, needs none.
    labelled : bool
        Whether a row without a label is malformed.
    max_bad_rows : int
        How many malformed rows, and rows without a label, may be left out of a file.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        If a text or label is missing or of another type, or the file cannot be read; the message
        names the row.
    ConfigError
        If there is no such encoding.
    """
    form = form or TableForm()
    if encoding is not None:
        form = dataclasses.replace(form, encoding=encoding)
    if isinstance(data, (str, Path)):
        if labels is not None:
            raise DataError(f"{data} is a file, which has its labels in a column; give no others")
        path = Path(data).expanduser()
        sha256 = sha256_of_data(path)
        shape = task or _shape(text, text2, label, name or path.stem)
        rows = read_rows(
            shape,
            path,
            form=form,
            max_bad_rows=max_bad_rows,
            labelled=labelled,
            any_label=task is None,
        )
        source = str(path)
        if form.encoding != "utf-8":  # the same bytes are other texts in another encoding
            sha256 = ""
    else:
        shape, records = _from_memory(data, labels, task, text, text2, label, name or "own")
        parse = partial(from_record, shape, labelled, task is None)
        rows = Rows("the data", records, parse, max_bad_rows, unit="row")
        source, sha256 = "memory", ""
    examples = tuple(rows)
    if not examples:
        left_out = f", {rows.bad_rows:,} left out as malformed" if rows.bad_rows else ""
        raise DataError(f"{source} holds no rows{left_out}; is it the right file, and complete?")
    if task is None:
        shape, examples = _with_task(shape, examples, regression, source)
    return Dataset(shape, "input", examples, source, rows.bad_rows, sha256, rows.encoding)


def task_name(name: str) -> str:
    """Return the name that a task gets by the one that is given, or by that of its file."""
    return "".join(c if c.isprintable() else "_" for c in name).strip() or "own"


def split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split a data set into train and dev, at random and stratified.

    Of each label (of scores: of each tenth) the same share goes to dev. Rows with the same texts
    stay together, so that no text of dev is in train.

    Parameters
    ----------
    data : Dataset
        With labels.
    share : float
        The share of dev, between 0 and 1.
    seed : int
        Of the random choice.

    Returns
    -------
    train, dev : Dataset
        In the order of the rows.

    Raises
    ------
    DataError
        If a side would be empty.
    """
    if not 0 < share < 1:
        raise DataError(f"the share of dev must be between 0 and 1: {share!r}")
    groups: dict[object, list[int]] = {}
    for row, example in enumerate(data):
        groups.setdefault(_same_text(example), []).append(row)
    strata: dict[object, list[list[int]]] = {}
    tenths = _tenths(data) if data.task.is_regression else None
    for rows in groups.values():
        stratum: object = data[rows[0]].label if tenths is None else int(tenths[rows[0]])
        strata.setdefault(stratum, []).append(rows)
    generator = np.random.default_rng([seed])
    chosen: set[int] = set()
    for stratum in sorted(strata, key=str):
        members = strata[stratum]
        wanted = share * sum(map(len, members))
        taken = 0
        for place in generator.permutation(len(members))[:-1]:  # one group is left for train
            if taken + len(members[place]) / 2 > wanted and taken:
                break
            chosen.update(members[place])
            taken += len(members[place])
    parts = []
    for name, is_in in (("train", lambda row: row not in chosen), ("dev", chosen.__contains__)):
        examples = tuple(example for row, example in enumerate(data) if is_in(row))
        if not examples:
            raise DataError(
                f"{data.source} has too few different texts to split; give the data to evaluate "
                "on (--dev)"
            )
        bad_rows = data.bad_rows if name == "train" else 0  # of one file: counted once
        parts.append(
            dataclasses.replace(data, split=name, examples=examples, bad_rows=bad_rows, sha256="")
        )
    return parts[0], parts[1]


def describe(train: Dataset, dev: Dataset) -> str:
    """Return what a user should know of the data before training: labels, counts, doubtful rows."""
    task = train.task
    read_as = [
        "" if each.encoding == "utf-8" else f", read as {each.encoding}" for each in (train, dev)
    ]
    lines = [
        f"train: {len(train):,} rows of {train.source}{read_as[0]}",
        f"dev:   {len(dev):,} of {dev.source}{read_as[1]}",
    ]
    if task.is_regression:
        scores = np.array([example.label for example in train], dtype=np.float64)
        lines.append(
            f"scores of {task.display}: {scores.min():g} to {scores.max():g}, mean "
            f"{scores.mean():g}, standard deviation {scores.std():g}"
        )
    else:
        lines.append(f"labels of {task.display} by number, with their rows in train and dev:")
        counts = [Counter(dataset.labels) for dataset in (train, dev)]
        width = max(map(len, task.labels))
        lines += [
            f"  {number:>3}  {name:<{width}}  {counts[0][name]:>7,}  {counts[1][name]:>7,}"
            for number, name in enumerate(task.labels)
        ]
        if len(task.labels) > _MOST_NUMBERS and all(map(NUMBER.fullmatch, task.labels)):
            lines.append(
                f"note: the {len(task.labels)} labels are numbers, taken as names of classes; if "
                "they are scores, say so (--regression)"
            )
    for dataset in (train, dev):
        lines += _doubts(dataset)
    shared = {_same_text(example) for example in train} & {_same_text(example) for example in dev}
    rows = sum(_same_text(example) in shared for example in dev)
    if rows:
        shown = counted(rows, "row")
        lines.append(f"note: {shown} of dev with a text of train, so dev's score is too high")
    return "\n".join(lines)


def _doubts(data: Dataset) -> list[str]:
    """Return notes about rows of a data set that may be mistakes."""
    notes = []
    if data.bad_rows:
        bad = counted(data.bad_rows, "row")
        notes.append(f"{bad}, malformed or without a label, left out")
    empty = [example.index for example in data if not _same_text(example)[0]]
    if empty:
        notes.append(f"{counted(len(empty), 'empty text')} ({_rows(empty)})")
    of_text: dict[object, set[Label | None]] = {}
    again, torn = [], []
    for example in data:
        key = _same_text(example)
        known = of_text.setdefault(key, set())
        if known:
            again.append(example.index)
            if example.label not in known:
                torn.append(example.index)
        known.add(example.label)
    if again:
        rows = counted(len(again), "row")
        notes.append(f"{rows} with the text of an earlier one ({_rows(again)})")
    if torn:
        notes.append(f"{len(torn)} of them with another label ({_rows(torn)})")
    missing = set(data.task.labels) - set(data.labels)
    if missing:
        names = ", ".join(sorted(missing)[:_MOST_NAMED])
        notes.append(f"no row has the label {names}{' ...' * (len(missing) > _MOST_NAMED)}")
    return [f"note: {data.split}: {note}" for note in notes]


def _rows(numbers: Sequence[int]) -> str:
    """Name some rows, counted from 0 without the header, as predictions count them."""
    named = [str(number) for number in numbers[:_MOST_NAMED]]
    named += ["..."] * (len(numbers) > _MOST_NAMED)
    return f"row{'s' * (len(numbers) > 1)} {', '.join(named)}, counted from 0"


def _same_text(example: Example) -> tuple[str, str]:
    """Return an example's texts in the form in which equal ones are recognised."""
    a, b = example.text_a, example.text_b or ""
    return " ".join(a.split()).casefold(), " ".join(b.split()).casefold()


def _tenths(data: Dataset) -> Any:
    """Return for each example in which tenth of the scores it is, (n,)."""
    scores = np.array(data.labels, dtype=np.float64)
    return np.searchsorted(np.quantile(scores, np.linspace(0.1, 0.9, 9)), scores)


# Making a task of the labels that occur.


def _shape(text: str | None, text2: str | None, label: str, name: str) -> UnlabelledTask:
    """Return a task whose labels are not known yet."""
    fields = (text or "text",) if text2 is None else (text or "text", text2)
    if label in fields:
        raise DataError(f"the column {label!r:.80} cannot be both the text and the label")
    return UnlabelledTask(task_name(name), fields, (), METRICS_OF_SCORES, label_field=label)


def _with_task(
    shape: Task,
    examples: tuple[Example, ...],
    regression: bool,
    source: str,
) -> tuple[Task, tuple[Example, ...]]:
    """Complete a task by the labels that occur, and check them."""
    labelled = [each for each in examples if each.label is not None]
    if regression:
        found = [score_of(each.label, f"{source}, {_rows([each.index])}") for each in labelled]
        scores = np.array(found, dtype=np.float64)
        spread = float(scores.std()) if len(scores) else 0.0
        scale = (float(scores.mean()), spread) if spread else (0.0, 1.0)
        task = Task(**{**vars(shape), "scale": scale})
        every = iter(scores.tolist())
        examples = tuple(
            dataclasses.replace(each, label=None if each.label is None else next(every))
            for each in examples
        )
        return task, examples
    counts = Counter(each.label for each in labelled)
    names = sorted(map(str, counts), key=_in_order(counts))
    if len(names) == 1 or (len(names) > 20 and len(names) > len(labelled) / 2):
        numbers = all(NUMBER.fullmatch(name) for name in names)
        offer = "; for scores use regression (--regression)" if numbers and len(names) > 1 else ""
        raise DataError(
            f"{source} has {counted(len(names), 'different label')} in "
            f"{counted(len(labelled), 'row')} in the column "
            f"{shape.label_field!r:.80}; a task needs two or more, each in several rows: name "
            f"another column (--label){offer}"
        )
    if not names:
        return shape, examples
    task = Task(**{**vars(shape), "labels": tuple(names), "metrics": METRICS_OF_LABELS})
    return task, examples


def _in_order(names: Iterable[object]) -> Any:
    """Return the key by which labels are sorted: as numbers if all are, else as texts."""
    if all(NUMBER.fullmatch(str(name)) for name in names):
        return float
    return str


# Data in memory.


def _from_memory(
    data: Any,
    labels: Iterable[object] | None,
    task: Task | None,
    text: str | None,
    text2: str | None,
    label: str,
    name: str,
) -> tuple[Task, Iterator[tuple[int, Mapping[str, object]]]]:
    """Return the task's shape, and the rows of data in memory by the names of their columns."""
    label = label if task is None else task.label_field
    features = getattr(data, "features", None)
    names = getattr(features.get(label), "names", None) if isinstance(features, dict) else None
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a pandas frame
        data = data.to_dict("records")
    rows = list(data)
    if rows and isinstance(rows[0], Mapping):
        if labels is not None:
            raise DataError("rows of dicts have their labels in a column; give no others")
        shape = task or _shape(text, text2, label, name)
        if names is not None:  # the numbers of a ClassLabel of the datasets library
            rows = [{**row, label: _named(names, row.get(label))} for row in rows]
        return shape, enumerate(rows)
    every = [None] * len(rows) if labels is None else list(labels)
    if len(every) != len(rows):
        raise DataError(
            f"there are {counted(len(rows), 'text')} and {counted(len(every), 'label')}"
        )
    is_pair = bool(rows) and isinstance(rows[0], (tuple, list))
    shape = task or _shape(text or "text", text2 or ("text2" if is_pair else None), label, name)
    if is_pair != shape.pair:
        raise DataError(f"{shape.display} needs {'pairs of texts' if shape.pair else 'texts'}")
    made: list[Mapping[str, object]] = []
    for one, each in zip(rows, every, strict=True):
        texts = tuple(one) if is_pair else (one,)
        if len(texts) != len(shape.fields):
            raise DataError(f"row {len(made)} has {len(texts)} texts, expected two")
        row = dict(zip(shape.fields, texts, strict=True))
        made.append(row if labels is None else {**row, shape.label_field: each})
    return shape, enumerate(made)


def _named(names: Sequence[str], value: Any) -> object:
    """Return the name of a class number; -1 is the datasets library's missing label."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
