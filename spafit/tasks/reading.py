r"""Read rows from data files and streams: lines of text, JSON objects, parquet records.

Only ``\n`` ends a line: U+0085, U+2028 and other separators occur inside texts. A byte-order mark
may come first, and the last newline may be missing; if the first line ends in ``\r\n``, a ``\r`` at
the end of any line is removed.
"""

from __future__ import annotations

import errno
import json
import math
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from spafit.config import no_duplicates
from spafit.errors import ConfigError, DataError
from spafit.files.durable import measure
from spafit.tasks.task import Example, Label

Source = Path | BinaryIO
"""A file, or a stream such as standard input."""

Fields = tuple[str, str | None, Label | None, Mapping[str, str]]
"""First text, second text, label, and what identifies the row."""


class MalformedRowError(DataError):
    """A malformed row; the caller may allow some of these."""


class Rows:
    """The examples of a file, read one after the other; malformed rows are counted and left out.

    Parameters
    ----------
    source : str
        Name of the file, for messages.
    rows : iterable of (int, object)
        Line number and content of each row.
    parse : callable
        Makes the fields of an example from a row, or raises a DataError.
    max_bad_rows : int
        How many malformed rows may be left out.
    may_lack_rows : bool
        Whether rows may be left out at all; a submission needs a prediction for each.
    encoding : str
        That of the file, if it is a text.
    unit : str
        What is numbered.

    Attributes
    ----------
    bad_rows : int
        How many were left out so far.

    Raises
    ------
    DataError
        While iterating: if a row is wrong; the message names file and line.
    ConfigError
        If ``max_bad_rows`` is not a whole number of at least 0.
    """

    def __init__(
        self,
        source: str,
        rows: Iterable[tuple[int, Any]],
        parse: Callable[[Any], Fields],
        max_bad_rows: int = 0,
        *,
        may_lack_rows: bool = True,
        encoding: str = "utf-8",
        unit: str = "line",
    ) -> None:
        if type(max_bad_rows) is not int or max_bad_rows < 0:
            raise ConfigError(
                f"max_bad_rows must be a whole number of at least 0: {max_bad_rows!r:.80}"
            )
        self.source, self.max_bad_rows, self.bad_rows = source, max_bad_rows, 0
        self.encoding, self._rows, self._parse, self._unit = encoding, rows, parse, unit
        self._mend = "correct the file"
        if may_lack_rows:
            self._mend += ", or allow more (--max-bad-rows)"

    def __iter__(self) -> Iterator[Example]:
        for index, (line, row) in enumerate(self._rows):
            where = f"{self.source}, {self._unit} {line}"
            try:
                text_a, text_b, label, carried = self._parse(row)
            except MalformedRowError as error:
                self.bad_rows += 1
                if self.bad_rows > self.max_bad_rows:
                    raise DataError(
                        f"{where}: {error}. Bad row number {self.bad_rows}, "
                        f"{self.max_bad_rows} allowed: {self._mend}"
                    ) from None
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            else:
                yield Example(index, text_a, text_b, label, carried)


def name_of(source: Source) -> str:
    """Return a source's name for messages."""
    return str(source) if isinstance(source, Path) else "standard input"


def require_file(path: Path) -> None:
    """Raise a DataError if something other than a file, or nothing, is at a path."""
    if (kind := kind_of(path)) not in ("a file", "nothing"):
        raise DataError(f"cannot read {path}: it is {kind}; name a file with the rows")


def kind_of(path: Path) -> str:
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


def sha256_of_data(path: Path) -> str:
    """Return the SHA-256 of a data file.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    require_file(path)
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError:  # a NUL
        raise DataError(f"cannot read {str(path)!r:.200}: no file has such a name") from None


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    return measure(path).sha256


def lines(source: Source) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, from 1, without the line ends."""
    crlf = False
    for number, raw in raw_lines(source):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw:  # the mark and nothing else
                return
            # Only if the first line ends so: otherwise a \r belongs to the text.
            crlf = raw.endswith(b"\r\n")
        raw = raw.removesuffix(b"\n")
        if crlf:
            raw = raw.removesuffix(b"\r")
        yield number, decoded(raw, number, source)


def decoded(raw: bytes, number: int, source: Source) -> str:
    """Decode one line of UTF-8.

    Raises
    ------
    DataError
        If it is not UTF-8; the message names the line and the bytes.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name_of(source)}, line {number}: not UTF-8 at byte {error.start} of the line "
            f"({raw[error.start : error.start + 4]!r}); convert the file to UTF-8, or unpack "
            "it if it is compressed"
        ) from None


def raw_lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file in binary, with their numbers from 1."""
    if not isinstance(source, Path):
        yield from enumerate(source, start=1)
        return
    try:
        with source.open("rb") as file:  # binary lines end at \n alone, and an error knows its line
            yield from enumerate(file, start=1)
    except OSError as error:
        raise unreadable(source, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """Return an error that says why a file cannot be read and what to check."""
    places = {errno.EIO: "the disk", errno.EACCES: "who may read it"}
    place = places.get(error.errno or 0, "the name")
    return DataError(f"cannot read {path}: {error.strerror}; check {place}")


def json_object(line: str) -> Mapping[str, object]:
    """Parse a line of a JSONL file.

    Raises
    ------
    MalformedRowError
        If it is not a JSON object.
    """
    try:
        record = json.loads(line, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())  # a duplicate key may contain anything
        raise MalformedRowError(f"not JSON ({reason:.140}): {line[:80]!r:.140}") from None
    if not isinstance(record, dict):
        raise MalformedRowError(f"expected a JSON object, found {line[:80]!r:.140}")
    return record


def parquet_records(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the rows of a parquet file with their numbers, from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"reading {path} needs pyarrow: pip install '.[parquet]', or use TSV or JSONL"
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


def text_of(record: Mapping[str, object], name: str) -> str:
    """Return a text field of a record.

    Raises
    ------
    MalformedRowError
        If it is missing or no text.
    """
    text = record.get(name)
    if not isinstance(text, str):
        raise MalformedRowError(f"{name} is {shown(text)}, expected a text")
    try:
        text.encode("utf-8")  # JSON can spell half a surrogate pair, which no text holds
    except UnicodeEncodeError as error:
        raise MalformedRowError(
            f"{name} holds half of a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}"
        ) from None
    return text


def as_text(value: object) -> str:
    """Return a value of a record as it is written in a table of predictions."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    is_json = isinstance(value, bool | int | float | list | dict)
    return json.dumps(value, default=str) if is_json else str(value)  # a date, a decimal number


def shown(value: object) -> str:
    """Return a short description of any value from a file."""
    if isinstance(value, str):
        return f"{value[:100]!r:.140}"
    if value is None or isinstance(value, int | float):
        return f"{value!r:.140}"
    return f"of type {type(value).__name__}"  # its repr may be long, or too deeply nested
