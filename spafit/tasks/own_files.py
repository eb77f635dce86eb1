"""Read files with a task of your own: CSV and TSV tables, JSONL, parquet.

CSV and TSV are read as spreadsheets write them: a field may be quoted, a quote in it is doubled, a
quoted field may hold delimiters and line breaks. The delimiter is the one of ``, ; TAB |`` by which
the first line has the columns that are needed. A text file is in UTF-8, or in the encoding that its
byte-order mark or its user names; which one it is in is never guessed.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spafit.errors import ConfigError, DataError, counted
from spafit.tasks.reading import (
    Fields,
    MalformedRowError,
    Rows,
    Source,
    as_text,
    json_object,
    name_of,
    parquet_records,
    raw_lines,
    require_file,
    shown,
    text_of,
)
from spafit.tasks.task import Label, Task, is_name

_DELIMITERS = (",", ";", "\t", "|")
_MARKS = (  # those of UTF-32 first: the little-endian one begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LONGEST_FIELD = 2**24  # csv's own limit, 131,072 characters, is shorter than some documents


@dataclass(frozen=True)
class TableForm:
    """How a text file is written: CSV, TSV, or (only its encoding matters) JSONL.

    Attributes
    ----------
    delimiter : str or None
        The character between fields; None: found from the first line.
    quoted : bool
        Whether ``"`` quotes a field; False where it is a character like any other.
    encoding : str
        The encoding of a file without a byte-order mark, by any name that Python knows.

    Raises
    ------
    ConfigError
        If there is no such encoding of texts.
    """

    delimiter: str | None = None
    quoted: bool = True
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoding", known_encoding(self.encoding))

    @property
    def quoting(self) -> Literal[0, 3]:
        """The csv module's name for it."""
        return csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE


def known_encoding(name: str) -> str:
    """Return Python's own name of an encoding of texts: "iso8859-1" for "latin-1".

    Raises
    ------
    ConfigError
        If there is no such encoding, or it does not encode texts, as "hex" does not.
    """
    known = ""
    with suppress(LookupError, TypeError, ValueError):
        "".encode(name)  # unlike codecs.lookup, it refuses "hex"
        codecs.getincrementaldecoder(name)
        known = codecs.lookup(name).name
    if known in ("", "idna", "punycode"):  # the last two are for the names of hosts
        raise ConfigError(
            f"unknown encoding {name!r:.80}; name that of the text, such as utf-8, cp1252 or "
            "shift_jis"
        )
    return known.removesuffix("-sig")  # the mark of UTF-8 is always taken


def read_rows(
    task: Task,
    source: Source,
    *,
    form: TableForm | None = None,
    max_bad_rows: int = 0,
    labelled: bool = False,
    any_label: bool = False,
    read_labels: bool = True,
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
    read_labels : bool
        False: every label is None, whatever its column has.
    """
    form = form or TableForm()
    ending = source.suffix.lower() if isinstance(source, Path) else None
    if isinstance(source, Path):
        require_file(source)
    parse = partial(from_record, task, labelled, any_label, read_labels=read_labels)
    if ending == ".parquet" and isinstance(source, Path):
        return Rows(name_of(source), parquet_records(source), parse, max_bad_rows)
    if ending not in (".csv", ".tsv", ".txt", ".jsonl", None):
        raise DataError(
            f"cannot tell the form of {name_of(source)}: expected .csv, .tsv, .jsonl or .parquet"
        )
    encoding, numbered = _text_lines(source, form.encoding)
    first = next(numbered, None)
    if first is None:
        raise DataError(f"{name_of(source)} is empty; is it the right file, and complete?")
    if "\0" in first[1]:
        raise DataError(
            f"{name_of(source)}, line 1 has a NUL; if the file is in UTF-16 without a byte-order "
            "mark, name the order of its bytes (--encoding utf-16-le or utf-16-be)"
        )
    numbered = itertools.chain([first], numbered)
    rows: Iterator[tuple[int, Any]]
    if ending == ".jsonl" or (ending is None and first[1].startswith("{")):
        # An empty line is no row, as in a table.
        rows = ((number, line.rstrip("\r\n")) for number, line in numbered if line.strip())
        from_row = partial(_from_line_of_json, parse)
    else:
        delimiter = _delimiter(task, name_of(source), first[1], form, is_tsv=ending == ".tsv")
        rows = _table(task, name_of(source), numbered, delimiter, form, labelled)
        from_row = partial(_from_table_row, parse, delimiter)
    return Rows(name_of(source), rows, from_row, max_bad_rows, encoding=encoding)


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


def from_record(
    task: Task,
    labelled: bool,
    any_label: bool,
    record: Mapping[str, object],
    *,
    read_labels: bool = True,
) -> Fields:
    """Return the fields of a row by the names of its columns (see :func:`read_rows`)."""
    texts = [text_of(record, name) for name in task.fields]
    label: Label | None = _label_name(record.get(task.label_field)) if read_labels else None
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


def _from_line_of_json(parse: Any, line: str) -> Fields:
    result: Fields = parse(json_object(line))
    return result


def _from_table_row(parse: Any, delimiter: str, row: tuple[list[str], list[str]]) -> Fields:
    header, fields = row
    if len(fields) != len(header):
        raise MalformedRowError(
            f"expected {counted(len(header), 'field')} ({', '.join(header):.200}), found "
            f"{len(fields)}, with {delimiter!r} between them (--delimiter): "
            f"{fields[0][:80] if fields else ''!r:.140}"
        )
    result: Fields = parse(dict(zip(header, fields, strict=True)))
    return result


def _text_lines(source: Source, encoding: str) -> tuple[str, Iterator[tuple[int, str]]]:
    """Return the encoding of a file, and its lines with their numbers, from 1, and their ends.

    A byte-order mark says what the encoding is, whichever was named.
    """
    pieces = (piece for _, piece in raw_lines(source))
    first = next(pieces, b"")
    for mark, marked in _MARKS:
        if first.startswith(mark):
            first, encoding = first.removeprefix(mark), marked
            break
    return encoding, _decoded(source, itertools.chain([first], pieces, [b""]), encoding)


def _decoded(source: Source, pieces: Iterable[bytes], encoding: str) -> Iterator[tuple[int, str]]:
    r"""Yield the lines of a text that comes in pieces, the last of them empty.

    A piece ends at a byte 0A, which is the end of a line in UTF-8, but a half of it in UTF-16.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    number, line = 1, ""
    for piece in pieces:
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeError as error:
            raise _undecodable(source, encoding, number, line, error) from None
        *whole, rest = text.split("\n")
        for each in whole:
            yield number, f"{line}{each}\n"
            number, line = number + 1, ""
        line += rest
    if line:
        yield number, line


def _undecodable(
    source: Source, encoding: str, number: int, line: str, error: UnicodeError
) -> DataError:
    """Return an error that names the line and the bytes that an encoding does not have."""
    where, name = "", "UTF-8" if encoding == "utf-8" else encoding
    if isinstance(error, UnicodeDecodeError):
        start = error.start
        line += error.object[:start].decode(encoding, "replace")
        number += line.count("\n")
        place = len(line.rpartition("\n")[2].encode(encoding, "replace"))
        where = f" at byte {place} of the line ({error.object[start : start + 4]!r})"
    elif encoding in ("utf-16", "utf-32"):
        name += f" with a byte-order mark; without one it is {encoding}-le or {encoding}-be"
    return DataError(
        f"{name_of(source)}, line {number}: not {name}{where}; name its encoding, such as "
        "--encoding cp1252, convert the file to UTF-8, or unpack it if it is compressed"
    )


def _table(
    task: Task,
    name: str,
    numbered: Iterator[tuple[int, str]],
    delimiter: str,
    form: TableForm,
    labelled: bool,
) -> Iterator[tuple[int, tuple[list[str], list[str]]]]:
    """Yield line number, header and fields of each row of a CSV or TSV table."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    texts = (line for _, line in numbered)
    reader = csv.reader(texts, delimiter=delimiter, quoting=form.quoting, strict=True)
    try:
        header = next(reader)
        if header.count(task.label_field) > 1:
            raise DataError(
                f"{name} has two columns {task.label_field!r:.80}; rename the one that is not it"
            )
        if labelled and task.label_field not in header:
            raise DataError(
                f"{name} has no column {task.label_field!r:.80} for the label; its columns are "
                f"{', '.join(header):.300}: rename it, or name it (--label of spafit train, "
                "probe or search)"
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


def _delimiter(task: Task, name: str, header: str, form: TableForm, *, is_tsv: bool) -> str:
    """Return the delimiter by which a header has the columns that are needed.

    A header of one column has it by any; that of a TSV file is then read as such.
    """
    candidates: tuple[str, ...] = ("\t", *_DELIMITERS) if is_tsv else _DELIMITERS
    if form.delimiter is not None:
        candidates = (form.delimiter,)
    found = []
    for each in candidates:
        try:
            columns = next(csv.reader([header], delimiter=each, quoting=form.quoting), [])
        except csv.Error as error:  # a line end inside it, such as the \r of old Macintoshes
            raise DataError(f"{name}, line 1: not a table of fields ({error})") from None
        if all(columns.count(field) == 1 for field in task.fields):
            return each
        found.append(columns)
    columns = max(found, key=len)
    missing = next(field for field in task.fields if columns.count(field) != 1)
    what = "has two columns" if missing in columns else "has no column"
    raise DataError(
        f"{name} {what} {missing!r:.80}; its columns are {', '.join(columns):.300}: rename that of "
        "the text, name it (--text of spafit train, probe or search; --text2 for a pair's second), "
        "or name what is between the columns (--delimiter)"
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
        try:
            number = float(value)
        except OverflowError:
            raise DataError("the label is a number that is too large") from None
        text = str(int(value)) if number.is_integer() else repr(number)
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
