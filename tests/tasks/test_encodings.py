"""Data of one's own in other encodings than UTF-8: read as named or marked, never guessed.

Oracle: Python's own encoders.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import spafit
from spafit.errors import ConfigError, DataError
from spafit.tasks import own
from spafit.tasks.own_files import TableForm, read_rows

# Ċ and ਊ have the byte 0A, the end of a line in UTF-8, as a half of their UTF-16.
ROWS = [("1", "schön, Ċ ਊ", "gut"), ("2", "zwei\nZeilen 😀", "böse"), ("3", "", "gut")]
TABLE = 'id,text,label\r\n1,"schön, Ċ ਊ",gut\r\n2,"zwei\nZeilen 😀",böse\r\n3,,gut\r\n'
JSON = "".join(json.dumps(dict(zip(("id", "text", "label"), row, strict=True)), ensure_ascii=False)
               + "\r\n" for row in ROWS)  # fmt: skip
MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
TASK = spafit.Task("t", ("text",), ("gut", "böse"), ("accuracy",))


def found(data: Any) -> list[tuple[str, str, object]]:
    return [(each.carried["id"], each.text_a, each.label) for each in data]


class TestMarks:
    @pytest.mark.parametrize("encoding", MARKS)
    @pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.jsonl"])
    def test_a_marked_file_is_read(self, tmp_path: Path, encoding: str, name: str) -> None:
        content = JSON if name == "t.jsonl" else TABLE
        (tmp_path / name).write_bytes(MARKS[encoding] + content.encode(encoding))
        data = spafit.dataset(tmp_path / name)
        assert (found(data), data.encoding) == (ROWS, encoding)
        # The mark tells more than a name that is left from another file.
        assert found(spafit.dataset(tmp_path / name, encoding="cp1252")) == ROWS

    @pytest.mark.parametrize("content", [TABLE, JSON])
    def test_a_stream(self, content: str) -> None:
        assert found(read_rows(TASK, io.BytesIO(content.encode("utf-16")))) == ROWS

    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
    def test_lines_are_counted(self, tmp_path: Path, encoding: str) -> None:
        path = tmp_path / "t.csv"
        path.write_bytes(MARKS[encoding] + f"{TABLE}4,x\n".encode(encoding))
        with pytest.raises(DataError, match=r"t\.csv, line 6: expected 3 fields"):
            spafit.dataset(path)
        lone = "\ud800".encode(encoding, "surrogatepass")
        for words in ("xy", "xĊ"):
            row = f"4,{words}".encode(encoding) + lone
            path.write_bytes(MARKS[encoding] + TABLE.encode(encoding) + row + b"\0\0")
            with pytest.raises(DataError, match=f"line 6: not {encoding} at byte 8 of the line"):
                spafit.dataset(path)
        path.write_bytes(MARKS[encoding] + TABLE.encode(encoding)[:-1])
        with pytest.raises(DataError, match=f"line 5: not {encoding} at byte"):
            spafit.dataset(path)

    @pytest.mark.parametrize("mark", MARKS.values())
    def test_a_mark_and_nothing_else(self, tmp_path: Path, mark: bytes) -> None:
        (tmp_path / "t.csv").write_bytes(mark)
        with pytest.raises(DataError, match="is empty"):
            spafit.dataset(tmp_path / "t.csv")

    def test_without_a_mark(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_bytes(TABLE.encode("utf-16-be"))
        with pytest.raises(DataError, match=r"line 1 has a NUL; .*--encoding utf-16-le or"):
            spafit.dataset(tmp_path / "t.csv")
        assert found(spafit.dataset(tmp_path / "t.csv", encoding="utf-16-be")) == ROWS
        with pytest.raises(DataError, match=r"line 1: not utf-16 with a byte-order mark; without"):
            spafit.dataset(tmp_path / "t.csv", encoding="utf-16")

    def test_memory_does_not_grow(self) -> None:
        def endless() -> Iterator[bytes]:
            yield codecs.BOM_UTF16_LE
            for row in itertools.count():  # in pieces that end at the byte 0A, as files give them
                line = ("id,text\n" if row == 0 else f"{row},{'text ' * 50}\n").encode("utf-16-le")
                yield from (line[:-1], line[-1:])

        rows = iter(read_rows(TASK, endless()))  # type: ignore[arg-type]
        assert next(rows).carried == {"id": "1"}
        tracemalloc.start()
        last = next(itertools.islice(rows, 2_000, None))  # 1 MB
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (last.carried["id"], peak < 100_000) == ("2002", True)


class TestNamed:
    @pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "shift_jis", "gb18030", "cp037"])
    @pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
    def test_is_used_and_never_guessed(self, tmp_path: Path, encoding: str, name: str) -> None:
        words = "表示" if encoding in ("shift_jis", "gb18030") else "größer"
        table = f"text,label\na,x\n{words},y\n"
        rows = f'{{"text": "a", "label": "x"}}\n{{"text": "{words}", "label": "y"}}\n'
        path = tmp_path / name
        path.write_bytes((table if name == "t.csv" else rows).encode(encoding))
        with pytest.raises(DataError, match=r"line \d: not UTF-8 at byte|has a NUL|no column|JSON"):
            spafit.dataset(path)
        assert spafit.dataset(path, encoding=encoding).texts_a == ["a", words]
        stream = read_rows(TASK, io.BytesIO(path.read_bytes()), form=TableForm(encoding=encoding),
                           any_label=True)  # fmt: skip
        assert [each.text_a for each in stream] == ["a", words]

    def test_the_message_names_line_bytes_and_option(self, tmp_path: Path) -> None:
        path = tmp_path / "t.csv"
        path.write_bytes("text,label\na,x\nwie größer,y\n".encode("cp1252"))
        match = r"t\.csv, line 3: not UTF-8 at byte 6 of the line \(b'\\xf6\\xdfer'\); name its "
        with pytest.raises(DataError, match=match + "encoding, such as --encoding cp1252"):
            spafit.dataset(path)
        with pytest.raises(DataError, match=r"line 3: not ascii at byte 6 .*--encoding cp1252"):
            spafit.dataset(path, encoding="ascii")
        path.write_bytes("text,label\n表示,x\n表".encode("shift_jis")[:-1])
        with pytest.raises(DataError, match=r"line 3: not shift_jis at byte 0 of the line \(b'"):
            spafit.dataset(path, encoding="shift_jis")
        path.write_bytes(b"text,label\n\x81,x\n")
        with pytest.raises(DataError, match=r"line 2: not cp1252 at byte 0 of the line \(b'\\x81"):
            spafit.dataset(path, encoding="cp1252")

    @pytest.mark.parametrize(
        "name", ["", "nosuch", "hex", "rot13", "zlib", "idna", "punycode", "undefined", "a\0b", 3]
    )
    def test_what_encodes_no_text_is_refused(self, tmp_path: Path, name: Any) -> None:
        (tmp_path / "t.csv").write_text("text,label\na,x\nb,y\n")
        with pytest.raises(ConfigError, match="unknown encoding"):
            spafit.dataset(tmp_path / "t.csv", encoding=name)

    def test_names_of_one_encoding(self) -> None:
        assert TableForm(encoding="latin-1") == TableForm(encoding="ISO-8859-1")
        assert TableForm(encoding="utf-8-sig") == TableForm(encoding="utf8") == TableForm()

    def test_the_hash_is_that_of_the_texts(self, tmp_path: Path) -> None:
        """The same bytes are other data in another encoding, unless the texts are the same."""
        (tmp_path / "t.csv").write_bytes("text,label\nschön,x\nb,y\n".encode("cp1252"))
        hashes = {
            encoding: spafit.dataset(tmp_path / "t.csv", encoding=encoding).sha256
            for encoding in ("cp1252", "latin-1", "cp1251")
        }
        assert hashes["cp1252"] == hashes["latin-1"] != hashes["cp1251"]

    def test_the_report_names_it(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_bytes("text,label\nschön,x\nb,y\n".encode("cp1252"))
        data = spafit.dataset(tmp_path / "t.csv", encoding="cp1252")
        plain = spafit.dataset(["a", "b"], ["x", "y"])
        lines = own.describe(data, plain).splitlines()
        assert lines[0] == f"train: 2 rows of {tmp_path / 't.csv'}, read as cp1252"
        assert lines[1] == "dev:   2 of memory"


def test_a_line_end_inside_the_header(tmp_path: Path) -> None:
    r"""As old Macintoshes wrote it: \r alone."""
    (tmp_path / "t.csv").write_bytes(b"text,label\ra,x\rb,y\r")
    with pytest.raises(DataError, match=r"t\.csv, line 1: not a table of fields \("):
        spafit.dataset(tmp_path / "t.csv")
