r"""Read GLUE's data files. The tasks themselves are listed in ``table.py``.

The original files are TAB-separated text with traps:

- there is no quoting: texts contain unbalanced double quotes, for which a CSV reader would skip
  whole rows;
- only ``\n`` ends a line: U+0085, U+2028 and other separators occur inside texts;
- a byte-order mark may come first, and the last newline may be missing; if the first line ends in
  ``\r\n``, a ``\r`` at the end of any line is removed;
- whitespace and control characters are kept, in labels too: " 1" is not a label.

A label is stored by its name ("acceptable"), never by its number, because the numbers differ
between files, models and submissions. A score is a decimal number in ASCII: "3.8", "5", "1e0".
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from spafit.errors import DataError
from spafit.tasks.own_files import NUMBER, distinct
from spafit.tasks.reading import (
    Fields,
    MalformedRowError,
    Rows,
    Source,
    as_text,
    json_object,
    kind_of,
    lines,
    name_of,
    parquet_records,
    sha256_of_data,
    sha256_of_file,
    shown,
    text_of,
)
from spafit.tasks.table import SCORE_RANGE, TASKS, GlueTask, Split, get_task
from spafit.tasks.task import Dataset, Example, Label, Task

__all__ = [
    "TASKS", "Split", "GlueTask", "Task", "Label", "get_task",
    "Example", "Dataset", "load", "read_file", "read_rows", "sha256_of_file",
]  # fmt: skip


def load(task: str | Task, split: str, folder: str | Path, *, max_bad_rows: int = 0) -> Dataset:
    """Read one split of a task from a folder.

    Parameters
    ----------
    task : str or Task
        Name of the task, such as "rte".
    split : str
        "train", "dev" or "test".
    folder : str or Path
        GLUE's root folder (which has ``RTE/``), or the task's own. The original TSV file is read
        if there is one; else JSONL, else parquet, with the field names of the hub.
    max_bad_rows : int
        How many malformed rows may be left out. They are counted in ``Dataset.bad_rows``.

    Raises
    ------
    DataError
        If no file is found, or the file does not have the task's format.
    """
    task, folder = get_task(task), Path(folder)
    candidates = list(_candidates(task, task.split(split), folder))
    others = []
    for path in candidates:
        kind = kind_of(path)
        if kind == "a file":
            _refuse_folder_of_another_task(task, path)
            return read_file(task, path, split, max_bad_rows=max_bad_rows)
        if kind != "nothing":
            others.append(f" ({path.relative_to(folder)} is {kind})")
    looked_for = ", ".join(str(path.relative_to(folder)) for path in candidates)
    raise DataError(
        f"no file for the {split} split of {task.display} in {folder}; looked for {looked_for}"
        f"{''.join(others[:1])}. "
        "Name GLUE's root or the task's own folder, or fetch the files: spafit download glue"
    )


def has_file(task: str | Task, split: str, folder: str | Path) -> bool:
    """Return whether :func:`load` would find a file of a split; nothing is read."""
    task = get_task(task)
    paths = _candidates(task, task.split(split), Path(folder))
    return any(kind_of(path) == "a file" for path in paths)


def _candidates(task: GlueTask, split: Split, folder: Path) -> Iterator[Path]:
    """Yield the paths where a split's file may be, in order of preference."""
    stem = Path(split.file).stem
    names = (
        split.file,
        f"{stem}.jsonl",
        f"{split.hub_name}.jsonl",
        f"{stem}.parquet",
        f"{split.hub_name}.parquet",
        f"{split.hub_name}-00000-of-00001.parquet",
    )
    for name in dict.fromkeys(names):
        for place in (folder / task.folder, folder / task.hub_folder, folder):
            yield place / name


def _refuse_folder_of_another_task(task: GlueTask, path: Path) -> None:
    """Refuse RTE's folder for WNLI: their test files have the same header and no labels."""
    name = path.parent.resolve().name.lower().replace("-", "")
    if name != task.hub_folder and name in {other.hub_folder for other in TASKS.values()}:
        raise DataError(
            f"{path} is in the folder of another task than {task.display}; name GLUE's root or "
            f"the folder {task.folder}"
        )


def read_file(
    task: str | Task, path: str | Path, split: str | None = None, *, max_bad_rows: int = 0
) -> Dataset:
    """Read one file by its extension: TSV in GLUE's original format, JSONL or parquet.

    Parameters
    ----------
    task : str or Task
        Name of the task whose format the file has.
    path : str or Path
        The file; its extension is ``.tsv``, ``.jsonl`` or ``.parquet``.
    split : str, optional
        The split whose columns a TSV file has. None: the columns are found from the header (CoLA's
        labelled files have none), and labels are optional.
    max_bad_rows : int
        How many malformed rows may be left out: rows with a wrong number of fields, lines that are
        not JSON objects, records without a text. An unknown label is always an error, and so is a
        line that is not UTF-8.

    Raises
    ------
    DataError
        If the file does not have this format; the message names file and line.
    ConfigError
        If ``max_bad_rows`` is not a whole number of at least 0.
    """
    task, path = get_task(task), Path(path)
    sha256 = sha256_of_data(path)
    rows = read_rows(task, path, split, max_bad_rows=max_bad_rows)
    examples = tuple(rows)
    if not examples:
        left_out = f", {rows.bad_rows} malformed ones left out" if rows.bad_rows else ""
        raise DataError(
            f"{path} holds no rows of {task.display}{left_out}; is it the right file, and complete?"
        )
    return Dataset(task, split or "input", examples, str(path), rows.bad_rows, sha256)


def read_rows(
    task: str | Task,
    source: Source,
    split: str | None = None,
    *,
    ending: str | None = None,
    max_bad_rows: int = 0,
    read_labels: bool = True,
) -> Rows:
    """Return the examples of a file or a stream one after the other, without keeping them.

    Parameters and errors are those of :func:`read_file`; ``ending`` is the extension of a stream.
    Without ``read_labels``, as for predictions, every label is None, and a file may have other
    columns than GLUE's: the texts are found by their names, and all others are carried through.
    """
    task = get_task(task)
    if split is not None:
        task.split(split)
    needs_label = split in ("train", "dev")
    ending = (source.suffix.lower() if isinstance(source, Path) else ending) or ""
    name = name_of(source)
    from_record = partial(_from_record, task, needs_label, read_labels)
    rows: Iterable[tuple[int, Any]]
    parse: Callable[[Any], Fields]
    if ending == ".tsv":
        form, rows = _tsv_form(task, split, source, by_name=not read_labels)
        if not isinstance(form, Split):
            parse = partial(_from_named_columns, task, form)
        elif read_labels:
            parse = partial(_from_line, task, form)
        else:
            parse = partial(_from_line, task, dataclasses.replace(form, label=None))
    elif ending == ".jsonl":
        rows, parse = lines(source), lambda line: from_record(json_object(line))
    elif ending == ".parquet" and isinstance(source, Path):
        rows, parse = parquet_records(source), from_record
    else:
        raise DataError(f"cannot tell the form of {name}: expected .tsv, .jsonl or .parquet")
    return Rows(name, rows, parse, max_bad_rows, may_lack_rows=split != "test")


def has_form(task: str | Task, split: str, path: Path) -> bool:
    """Return whether a file is in the form of GLUE's own TSV file of a split, by its first line.

    Where that has no header, the first line has as many fields, and no column is named in it.
    """
    task = get_task(task)
    form = task.split(split)
    if path.suffix.lower() != ".tsv":
        return False
    try:
        fields = next(lines(path), (1, ""))[1].split("\t")
    except DataError:  # it is in another encoding, or what reads it says why it cannot
        return False
    if form.has_header:
        return fields == list(form.columns)
    return len(fields) == len(form.columns) and not set(task.fields) & set(fields)


def _tsv_form(
    task: GlueTask, split: str | None, source: Source, by_name: bool
) -> tuple[Split | list[str], Iterator[tuple[int, str]]]:
    """Return the columns of a TSV file, found or checked by its header, and the rows after it.

    With ``by_name`` they are a list of names where the header is none of GLUE's.
    """
    rows = lines(source)
    head = next(rows, None)
    first = "" if head is None else head[1]
    wanted = [task.split(split)] if split else [s for s in (task.dev, task.test) if s]
    if not split and task.train and task.train.columns != wanted[0].columns:
        wanted.append(task.train)  # MNLI: one annotator's label in train, five in dev
    for form in wanted:
        if form.has_header and first == "\t".join(form.columns):
            return form, rows
    header = first.split("\t")
    if by_name and _text_columns(task, header):
        return header, rows
    for form in wanted:
        if not form.has_header:
            return form, itertools.chain([] if head is None else [head], rows)
    expected = " or ".join(repr("\t".join(form.columns)) for form in wanted)
    raise DataError(
        f"{name_of(source)}, line 1: the header of {task.display} is expected to be {expected}, "
        f"found {first[:100]!r:.140}; is this the right task and split?"
    )


_IDENTIFIERS = ("index", "idx", "id", "guid")
"""Names of the field that identifies a row, in GLUE's files and the hub's."""


def _from_line(task: GlueTask, form: Split, line: str) -> Fields:
    fields = line.split("\t")
    if len(fields) != len(form.columns):
        raise MalformedRowError(
            f"expected {len(form.columns)} fields ({', '.join(form.columns)}), found "
            f"{len(fields)}: {line[:80]!r:.140}"
        )
    text_b = None if form.text_b is None else fields[form.text_b]
    label = None if form.label is None else _label_from_text(task, fields[form.label])
    first = form.columns[0]
    carried = {first: fields[0]} if first in _IDENTIFIERS else {}
    return fields[form.text_a], text_b, label, carried


def _text_columns(task: GlueTask, header: list[str]) -> tuple[str, ...]:
    """Return the names of the texts' columns in a header, by GLUE's files or the hub; or ()."""
    forms = [form for form in (task.dev, task.test, task.train) if form]
    in_files = [
        tuple(form.columns[each] for each in (form.text_a, form.text_b) if each is not None)
        for form in forms
    ]
    return next(
        (
            names
            for names in (task.fields, *in_files)
            if all(header.count(each) == 1 for each in names)
        ),
        (),
    )


def _from_named_columns(task: GlueTask, header: list[str], line: str) -> Fields:
    fields = line.split("\t")
    if len(fields) != len(header):
        raise MalformedRowError(
            f"expected {len(header)} fields ({', '.join(header):.200}), found {len(fields)}: "
            f"{line[:80]!r:.140}"
        )
    record = dict(zip(distinct(header), fields, strict=True))
    text_a, *text_b = (record.pop(name) for name in _text_columns(task, header))
    for form in (task.dev, task.train):
        if form and form.label is not None:
            record.pop(form.columns[form.label], None)
    return text_a, text_b[0] if text_b else None, None, record


def _label_from_text(task: GlueTask, text: str) -> Label:
    if task.is_regression:
        if not NUMBER.fullmatch(text):  # float() would take " 1", "1_0" and the digits of Arabic
            low, high = SCORE_RANGE
            raise DataError(
                f"the score {shown(text)} is not a number; {task.display} has {low:g} to {high:g}"
            )
        return _checked_score(task, float(text))
    if text not in task.spelling:
        raise DataError(
            f"unknown label {shown(text)}; {task.display} has {', '.join(map(repr, task.spelling))}"
        )
    return task.labels[task.spelling.index(text)]


def _checked_score(task: GlueTask, score: float) -> float:
    low, high = SCORE_RANGE
    if not low <= score <= high:  # NaN is not either
        raise DataError(
            f"the score {shown(score)} of {task.display} is outside [{low:g}, {high:g}]"
        )
    return float(score)  # it may be an int, and beyond any float


def _from_record(
    task: GlueTask, needs_label: bool, read_labels: bool, record: Mapping[str, object]
) -> Fields:
    """Return the fields of a JSON object or a parquet row with the hub's names and numbers.

    The field that identifies it is carried through; without ``read_labels`` all others are.
    """
    texts = [text_of(record, name) for name in task.fields]
    label = _label_from_value(task, record.get("label") if read_labels else None)
    if label is None and needs_label:
        raise DataError("there is no label, but a train or dev file must have one in each row")
    if read_labels:
        names = [name for name in _IDENTIFIERS if name in record][:1]
    else:
        names = [name for name in record if name not in (*task.fields, "label")]
    return (
        texts[0],
        texts[1] if task.pair else None,
        label,
        {str(name): as_text(record[name]) for name in names},
    )


def _label_from_value(task: GlueTask, value: object) -> Label | None:
    """Return the label for its name, its number, or a score; None and the hub's -1 mean none."""
    if value is None or (value == -1 and not isinstance(value, bool)):
        return None
    if task.is_regression:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"the score {shown(value)} is not a number")
        return _checked_score(task, value)
    if isinstance(value, str) and value in task.labels:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(task.labels):
        return task.labels[value]
    names = ", ".join(f"{number} {name}" for number, name in enumerate(task.labels))
    raise DataError(f"unknown label {shown(value)}; {task.display} has {names}")
