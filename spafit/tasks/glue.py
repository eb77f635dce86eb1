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

import errno
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spafit.config import no_duplicates
from spafit.errors import ConfigError, DataError
from spafit.files.durable import measure
from spafit.tasks.table import SCORE_RANGE, TASKS, Label, Split, Task, get_task

__all__ = [
    "TASKS", "Split", "Task", "Label", "get_task",
    "Example", "Dataset", "load", "read_file", "sha256_of_file",
]  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One row of a data set."""

    index: int
    """Number of the row in its file, from 0; malformed rows are counted too."""
    text_a: str
    text_b: str | None
    label: Label | None
    """Name of the label, or score; None if the file has none."""


@dataclass(frozen=True)
class Dataset:
    """The rows of one file, in its order."""

    task: Task
    split: str
    """"train", "dev", "test", or "input" for a file read without a split."""
    examples: tuple[Example, ...]
    source: str
    """Path of the file."""
    bad_rows: int
    """Number of malformed rows left out, never more than the caller allowed."""
    sha256: str
    """SHA-256 of the file's bytes, in hexadecimal, for the record of a run."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def texts_a(self) -> list[str]:
        """First text of each example."""
        return [example.text_a for example in self.examples]

    @property
    def texts_b(self) -> list[str] | None:
        """Second text of each example; None for a task with one text."""
        if not self.task.pair:
            return None
        return [example.text_b or "" for example in self.examples]

    @property
    def labels(self) -> list[Label | None]:
        """Label of each example: a name, a score, or None."""
        return [example.label for example in self.examples]


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
        kind = _kind_of(path)
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


def _kind_of(path: Path) -> str:
    """Return what is at a path: "a file", "nothing", or something that cannot be read."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: an impossible name
        return "a link to nothing" if "\0" not in str(path) and path.is_symlink() else "nothing"
    except OSError as error:
        return f"inaccessible: {error.strerror}"
    if stat.S_ISREG(mode):
        return "a file"
    # Opening a pipe would block, and reading a device may never end.
    return "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"


def _candidates(task: Task, split: Split, folder: Path) -> Iterator[Path]:
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


def _refuse_folder_of_another_task(task: Task, path: Path) -> None:
    """Refuse RTE's folder for WNLI: their test files have the same header and no labels."""
    name = path.parent.resolve().name.lower().replace("-", "")
    if name != task.hub_folder and name in {other.hub_folder for other in TASKS.values()}:
        raise DataError(
            f"{path} is in the folder of another task than {task.display}; name GLUE's root or "
            f"the folder {task.folder}"
        )


Fields = tuple[str, str | None, Label | None]
"""First text, second text, label."""


class _MalformedRowError(DataError):
    """A malformed row; the caller may allow some of these."""


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
    if split is not None:
        task.split(split)
    if type(max_bad_rows) is not int or max_bad_rows < 0:
        raise ConfigError(
            f"max_bad_rows must be a whole number of at least 0: {max_bad_rows!r:.80}"
        )
    if (kind := _kind_of(path)) not in ("a file", "nothing"):
        raise DataError(f"cannot read {path}: it is {kind}; name a file with the rows")
    try:
        sha256 = sha256_of_file(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError:  # a NUL
        raise DataError(f"cannot read {str(path)!r:.200}: no file has such a name") from None
    rows: Iterable[tuple[int, Any]]
    parse: Callable[[Any], Fields]
    needs_label = split in ("train", "dev")
    ending = path.suffix.lower()
    if ending == ".tsv":
        form, rows = _tsv_form(task, split, path)
        parse = partial(_from_line, task, form)
    elif ending == ".jsonl":
        rows, parse = _lines(path), partial(_from_json, task, needs_label)
    elif ending == ".parquet":
        rows, parse = _parquet_records(path), partial(_from_record, task, needs_label)
    else:
        raise DataError(f"cannot tell the form of {path}: expected .tsv, .jsonl or .parquet")

    examples = []
    bad_rows = 0
    for index, (line, row) in enumerate(rows):
        try:
            text_a, text_b, label = parse(row)
        except _MalformedRowError as error:
            bad_rows += 1
            if bad_rows > max_bad_rows:
                # A submission needs a prediction for each row of the test file.
                more = "" if split == "test" else ", or allow more (--max-bad-rows)"
                raise DataError(
                    f"{path}, line {line}: {error}. Bad row number {bad_rows}, {max_bad_rows} "
                    f"allowed: correct the file{more}"
                ) from None
        except DataError as error:
            raise DataError(f"{path}, line {line}: {error}") from None
        else:
            examples.append(Example(index, text_a, text_b, label))
    if not examples:
        left_out = f", {bad_rows} malformed ones left out" if bad_rows else ""
        raise DataError(
            f"{path} holds no rows of {task.display}{left_out}; is it the right file, and complete?"
        )
    return Dataset(task, split or "input", tuple(examples), str(path), bad_rows, sha256)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    return measure(path).sha256


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, from 1, without the line ends."""
    crlf = False
    for number, raw in _raw_lines(path):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw:  # the mark and nothing else
                return
            # Only if the first line ends so: otherwise a \r belongs to the text.
            crlf = raw.endswith(b"\r\n")
        raw = raw.removesuffix(b"\n")
        if crlf:
            raw = raw.removesuffix(b"\r")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not UTF-8 at byte {error.start} of the line "
                f"({raw[error.start : error.start + 4]!r}); convert the file to UTF-8, or unpack "
                "it if it is compressed"
            ) from None


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:  # binary lines end at \n alone, and an error knows its line
            yield from enumerate(file, start=1)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    """Return an error that says why a file cannot be read and what to check."""
    places = {errno.EIO: "the disk", errno.EACCES: "who may read it"}
    place = places.get(error.errno or 0, "the name")
    return DataError(f"cannot read {path}: {error.strerror}; check {place}")


def _tsv_form(task: Task, split: str | None, path: Path) -> tuple[Split, Iterator[tuple[int, str]]]:
    """Return the columns of a TSV file, found or checked by its header, and the rows after it."""
    lines = _lines(path)
    _, first = next(lines, (1, ""))
    wanted = [task.split(split)] if split else [s for s in (task.dev, task.test) if s]
    if not split and task.train and task.train.columns != wanted[0].columns:
        wanted.append(task.train)  # MNLI: one annotator's label in train, five in dev
    for form in wanted:
        if form.has_header and first == "\t".join(form.columns):
            return form, lines
    for form in wanted:
        if not form.has_header:
            return form, _lines(path)
    expected = " or ".join(repr("\t".join(form.columns)) for form in wanted)
    raise DataError(
        f"{path}, line 1: the header of {task.display} is expected to be {expected}, found "
        f"{first[:100]!r:.140}; is this the right task and split?"
    )


def _from_line(task: Task, form: Split, line: str) -> Fields:
    fields = line.split("\t")
    if len(fields) != len(form.columns):
        raise _MalformedRowError(
            f"expected {len(form.columns)} fields ({', '.join(form.columns)}), found "
            f"{len(fields)}: {line[:80]!r:.140}"
        )
    text_b = None if form.text_b is None else fields[form.text_b]
    label = None if form.label is None else _label_from_text(task, fields[form.label])
    return fields[form.text_a], text_b, label


def _label_from_text(task: Task, text: str) -> Label:
    if task.is_regression:
        if not _SCORE.fullmatch(text):  # float() would take " 1", "1_0" and the digits of Arabic
            low, high = SCORE_RANGE
            raise DataError(
                f"the score {_shown(text)} is not a number; {task.display} has {low:g} to {high:g}"
            )
        return _checked_score(task, float(text))
    if text not in task.spelling:
        raise DataError(
            f"unknown label {_shown(text)}; {task.display} has "
            f"{', '.join(map(repr, task.spelling))}"
        )
    return task.labels[task.spelling.index(text)]


_SCORE = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _checked_score(task: Task, score: float) -> float:
    low, high = SCORE_RANGE
    if not low <= score <= high:  # NaN is not either
        raise DataError(
            f"the score {_shown(score)} of {task.display} is outside [{low:g}, {high:g}]"
        )
    return float(score)  # it may be an int, and beyond any float


def _shown(value: object) -> str:
    """Return a short description of any value from a file."""
    if isinstance(value, str):
        return f"{value[:100]!r:.140}"
    if value is None or isinstance(value, int | float):
        return f"{value!r:.140}"
    return f"of type {type(value).__name__}"  # its repr may be long, or too deeply nested


def _from_json(task: Task, needs_label: bool, line: str) -> Fields:
    try:
        record = json.loads(line, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())  # a duplicate key may contain anything
        raise _MalformedRowError(f"not JSON ({reason:.140}): {line[:80]!r:.140}") from None
    if not isinstance(record, dict):
        raise _MalformedRowError(f"expected a JSON object, found {line[:80]!r:.140}")
    return _from_record(task, needs_label, record)


def _from_record(task: Task, needs_label: bool, record: Mapping[str, object]) -> Fields:
    """Return the fields of a JSON object or a parquet row with the hub's names and numbers."""
    texts = []
    for name in task.fields:
        text = record.get(name)
        if not isinstance(text, str):
            raise _MalformedRowError(
                f"{task.display} needs the texts {', '.join(task.fields)}; {name} is {_shown(text)}"
            )
        try:
            text.encode("utf-8")  # JSON can spell half a surrogate pair, which no text holds
        except UnicodeEncodeError as error:
            raise _MalformedRowError(
                f"{name} holds half of a surrogate pair, {text[error.start]!r}, at character "
                f"{error.start}"
            ) from None
        texts.append(text)
    label = _label_from_value(task, record.get("label"))
    if label is None and needs_label:
        raise DataError("there is no label, but a train or dev file must have one in each row")
    return texts[0], texts[1] if task.pair else None, label


def _label_from_value(task: Task, value: object) -> Label | None:
    """Return the label for its name, its number, or a score; None and the hub's -1 mean none."""
    if value is None or (value == -1 and not isinstance(value, bool)):
        return None
    if task.is_regression:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"the score {_shown(value)} is not a number")
        return _checked_score(task, value)
    if isinstance(value, str) and value in task.labels:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(task.labels):
        return task.labels[value]
    names = ", ".join(f"{number} {name}" for number, name in enumerate(task.labels))
    raise DataError(f"unknown label {_shown(value)}; {task.display} has {names}")


def _parquet_records(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the rows of a parquet file with their numbers, from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"reading {path} needs pyarrow: pip install 'spafit[parquet]', or use TSV or JSONL"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} is not a readable parquet file: {reason:.200}; write or fetch it again"
        ) from None
