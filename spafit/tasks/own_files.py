"""Read files with a task of your own: CSV and TSV tables, JSONL, parquet.

CSV and TSV are read as spreadsheets write them: a field may be quoted, a quote in it is doubled, a
quoted field may hold delimiters and line breaks. The delimiter is the one of ``, ; TAB |`` by which
the first line has the columns that are needed.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spafit.errors import DataError
from spafit.tasks.reading import (
    Fields,
    MalformedRowError,
    Rows,
    Source,
    as_text,
    decoded,
    json_object,
    lines,
    name_of,
    parquet_records,
    raw_lines,
    require_file,
    shown,
    text_of,
)
from spafit.tasks.task import Label, Task, is_name

_DELIMITERS = (",", ";", "\t", "|")
_LONGEST_FIELD = 2**24  # csv's own limit, 131,072 characters, is shorter than some documents


@dataclass(frozen=True)
class TableForm:
    """How a CSV or TSV file is written.

    Attributes
    ----------
    delimiter : str or None
        The character between fields; None: found from the first line.
    quoted : bool
        Whether ``"`` quotes a field; False where it is a character like any other.
    """

    delimiter: str | None = None
    quoted: bool = True

    @property
    def quoting(self) -> Literal[0, 3]:
        """The csv module's name for it."""
        return csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE


def read_rows(
    task: Task,
    source: Source,
    *,
    form: TableForm | None = None,
    max_bad_rows: int = 0,
    labelled: bool = False,
    any_label: bool = False,
) -> Rows:
    """Return the examples of a file or a stream one after the other, without keeping them.

    Parameters
    ----------
    task : Task
        Its fields are the columns of the texts and of the label, which may be missing.
    source : Path or binary stream
        A stream holds JSON objects if it begins with ``{``, else a table with a header.
    form, labelled, max_bad_rows
        As for :func:`dataset`.
    any_label : bool
        Whether to take labels as they come, instead of only those of the task.
    """
    form = form or TableForm()
    ending = source.suffix.lower() if isinstance(source, Path) else None
    if isinstance(source, Path):
        require_file(source)
    parse = partial(from_record, task, labelled, any_label)
    if ending == ".parquet" and isinstance(source, Path):
        return Rows(name_of(source), parquet_records(source), parse, max_bad_rows)
    if ending == ".jsonl":
        return Rows(name_of(source), lines(source), _parsed(parse), max_bad_rows)
    if ending in (".csv", ".tsv", ".txt", None):
        numbered = _text_lines(source)
        first = next(numbered, None)
        if first is None:
            raise DataError(f"{name_of(source)} is empty; is it the right file, and complete?")
        numbered = itertools.chain([first], numbered)
        if ending is None and first[1].startswith("{"):
            stripped = ((number, line.rstrip("\r\n")) for number, line in numbered)
            return Rows(name_of(source), stripped, _parsed(parse), max_bad_rows)
        rows = _table(task, name_of(source), numbered, form)
        return Rows(name_of(source), rows, partial(_from_table_row, parse), max_bad_rows)
    raise DataError(
        f"cannot tell the form of {name_of(source)}: expected .csv, .tsv, .jsonl or .parquet"
    )


def distinct(names: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """Return the names of columns, each repeated or taken one with a number: "id", "id (2)"."""
    names, found = list(names), dict.fromkeys(taken)
    for name in names:
        shown, number = name, 1
        while shown in found or (number > 1 and shown in names):
            number += 1
            shown = f"{name} ({number})".strip()
        found[shown] = None
    return list(found)[len(taken) :]


def _parsed(parse: Any) -> Any:
    """Return a parser of lines of JSON."""
    return lambda line: parse(json_object(line))


def from_record(
    task: Task, labelled: bool, any_label: bool, record: Mapping[str, object]
) -> Fields:
    """Return the fields of a row by the names of its columns (see :func:`read_rows`)."""
    texts = [text_of(record, name) for name in task.fields]
    label: Label | None = _label_name(record.get(task.label_field))
    if label is None and (labelled or (any_label and task.label_field in record)):
        raise MalformedRowError(
            f"there is no label in the column {task.label_field!r:.80}; the columns are "
            f"{', '.join(map(str, record)):.200}, and --label names it"
        )
    if label is not None and not any_label:
        label = _known_label(task, str(label))
    others = {
        str(name): as_text(value)
        for name, value in record.items()
        if name not in task.fields and name != task.label_field
    }
    return texts[0], texts[1] if task.pair else None, label, others


def _known_label(task: Task, label: str) -> Label:
    if task.is_regression:
        return score_of(label)
    if label not in task.labels:
        raise DataError(
            f"unknown label {shown(label)}; {task.display} has {', '.join(task.labels)}"
        )
    return label


def _from_table_row(parse: Any, row: tuple[list[str], list[str]]) -> Fields:
    header, fields = row
    if len(fields) != len(header):
        raise MalformedRowError(
            f"expected {len(header)} fields ({', '.join(header):.200}), found {len(fields)}: "
            f"{fields[0][:80] if fields else ''!r:.140}"
        )
    result: Fields = parse(dict(zip(header, fields, strict=True)))
    return result


def _text_lines(source: Source) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, from 1, and with their ends; refuse UTF-16."""
    for number, raw in raw_lines(source):
        if number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(
                    f"{name_of(source)} is in UTF-16; convert it to UTF-8, such as by "
                    'iconv -f UTF-16 -t UTF-8, or by saving it as "CSV UTF-8"'
                )
            raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw:
                return
        yield number, decoded(raw, number, source)


def _table(
    task: Task, name: str, numbered: Iterator[tuple[int, str]], form: TableForm
) -> Iterator[tuple[int, tuple[list[str], list[str]]]]:
    """Yield line number, header and fields of each row of a CSV or TSV table."""
    first = next(numbered)
    delimiter = _delimiter(task, name, first[1], form)
    before = csv.field_size_limit(_LONGEST_FIELD)
    texts = (line for _, line in itertools.chain([first], numbered))
    reader = csv.reader(texts, delimiter=delimiter, quoting=form.quoting, strict=True)
    try:
        header = next(reader)
        if header.count(task.label_field) > 1:
            raise DataError(
                f"{name} has two columns {task.label_field!r:.80}; rename the one that is not it"
            )
        header = distinct(header)
        while True:
            start = reader.line_num + 1
            fields = next(reader, None)
            if fields is None:
                return
            if fields:  # an empty line is no row
                yield start, (header, fields)
    except csv.Error as error:
        unquoted = "; if a quote is a character like any other here, say so (--unquoted)"
        raise DataError(
            f"{name}, line {reader.line_num}: not a table of fields ({error}), in the row that "
            f"begins on line {start}{unquoted if form.quoted else ''}"
        ) from None
    finally:
        csv.field_size_limit(before)


def _delimiter(task: Task, name: str, header: str, form: TableForm) -> str:
    """Return the delimiter by which a header has the columns that are needed."""
    candidates = _DELIMITERS if form.delimiter is None else (form.delimiter,)
    found = []
    for each in candidates:
        columns = next(csv.reader([header], delimiter=each, quoting=form.quoting), [])
        if all(columns.count(field) == 1 for field in task.fields):
            return each
        found.append(columns)
    columns = max(found, key=len)
    missing = next(field for field in task.fields if columns.count(field) != 1)
    what = "has two columns" if missing in columns else "has no column"
    raise DataError(
        f"{name} {what} {missing!r:.80}; its columns are {', '.join(columns):.300}: name "
        "that of the text by --text, and that of a pair's second one by --text2"
    )


NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _label_name(value: object) -> str | None:
    """Return a label as a name: 1, 1.0 and "1" are "1"; None if it is missing."""
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return None
    if isinstance(value, str):
        text = value.strip()
    elif isinstance(value, bool | np.bool_):
        text = str(bool(value))
    elif isinstance(value, int | float | np.integer | np.floating):
        text = str(int(value)) if float(value).is_integer() else repr(float(value))
    else:
        raise DataError(f"the label is {shown(value)}, expected a text or a number")
    if not text:
        return None
    if not is_name(text):
        raise DataError(f"the label {shown(text)} holds characters that cannot be printed")
    return text


def score_of(value: object, source: str = "") -> float:
    """Return a score, or raise a DataError if it is no finite number."""
    text = str(value)
    if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        where = f"{source}: " if source else ""
        raise DataError(f"{where}the score {shown(value)} is not a finite number such as 3.8")
    return float(text)
