"""Named cases of hostile data files: each is refused at once with a one-line error."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spafit.errors import ConfigError, DataError
from spafit.tasks.glue import load, read_file
from spafit.tasks.table import TASKS, get_task

HEADER = "index\tsentence1\tsentence2\tlabel\n"
ROW = "0\ta\tb\tentailment\n"
GOOD = {"sentence1": "a", "sentence2": "b", "label": 1}


@pytest.fixture(autouse=True)
def in_no_time() -> Iterator[None]:
    """Nothing here may take long, whatever its size; what would never end fails."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Write RTE's train file as it is to be."""

    def write(content: str | bytes, name: str = "train.tsv") -> Path:
        path = tmp_path / "RTE" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refused(
    path: Path,
    match: str,
    *,
    task: str = "rte",
    split: str | None = "train",
    max_bad_rows: int = 0,
) -> str:
    """Expect a DataError in one line that names the file, and give it."""
    with pytest.raises(DataError, match=match) as caught:
        read_file(task, path, split, max_bad_rows=max_bad_rows)
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 600
    return message


class TestContents:
    """Oracle: the rules in glue.py's docstring; the line is counted by hand."""

    def test_an_empty_file(self, file: Callable[..., Path]) -> None:
        refused(file(""), r"train.tsv, line 1: the header of RTE .* found ''; is this the right")

    def test_a_mark_and_nothing_else(self, file: Callable[..., Path]) -> None:
        refused(file(b"\xef\xbb\xbf", "x.jsonl"), "holds no rows of RTE; is it the right file")

    def test_a_header_and_nothing_else(self, file: Callable[..., Path]) -> None:
        for content in (HEADER, HEADER.rstrip("\n"), HEADER.replace("\n", "\r\n")):
            refused(file(content), "holds no rows of RTE; is it the right file, and complete")

    def test_one_row(self, file: Callable[..., Path]) -> None:
        for content in (HEADER + ROW, HEADER + ROW.rstrip("\n"), "\ufeff" + HEADER + ROW):
            assert read_file("rte", file(content), "train").texts_a == ["a"]

    def test_only_bad_rows(self, file: Callable[..., Path]) -> None:
        path = file(HEADER + "x\n" * 7)
        refused(path, "line 2: expected 4 fields .* 0 allowed: correct the file, or allow more")
        refused(path, "line 8: .* Bad row number 7, 6 allowed", max_bad_rows=6)
        refused(path, "holds no rows of RTE, 7 malformed ones left out", max_bad_rows=7)

    @pytest.mark.parametrize("is_huge", [False, True])
    def test_a_row_of_a_megabyte_and_one_of_a_hundred(
        self, file: Callable[..., Path], sized: Callable[[int, int], int], is_huge: bool
    ) -> None:
        """Such a text is read as it is; where it is at fault, the message stays short."""
        size = sized(10**7, 10**8) if is_huge else 2**20
        text = "x" * size
        path = file(f"{HEADER}0\t{text}\tb\tentailment\n")
        assert len(read_file("rte", path, "train").texts_a[0]) == size
        refused(file(f"{HEADER}0\ta\tb\t{text}\n"), "line 2: unknown label 'xxx")
        refused(file(f"{HEADER}{text}\n"), "line 2: expected 4 fields .* found 1: 'xxx")
        refused(file(f"{text}\n"), "line 1: the header of RTE")
        path.unlink()

    def test_no_newline_at_all(self, file: Callable[..., Path]) -> None:
        refused(file(b"\x00" * 10**7), "line 1: the header of RTE")
        refused(file(HEADER.encode() + b"\x00" * 10**7), "line 2: expected 4 fields .* found 1")

    def test_many_lines_of_nothing(self, file: Callable[..., Path]) -> None:
        path = file(HEADER + "\n" * 200_000)
        refused(path, "line 2: expected 4 fields .* found 1: ''")
        refused(path, "no rows of RTE, 200000 malformed ones left out", max_bad_rows=10**9)

    def test_a_million_tabs(self, file: Callable[..., Path]) -> None:
        refused(file(HEADER + "\t" * 10**6), "line 2: expected 4 fields .*, found 1000001: ")

    def test_nul(self, file: Callable[..., Path]) -> None:
        """A NUL is a character of a text like any other, and of a label that is none."""
        assert read_file("rte", file(HEADER + "0\ta\0\tb\tentailment\n")).texts_a == ["a\0"]
        refused(
            file(HEADER + "0\ta\tb\tentailment\0\n"), r"line 2: unknown label 'entailment\\x00'"
        )

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    def test_another_encoding(self, file: Callable[..., Path], encoding: str) -> None:
        content = (HEADER + ROW + "1\tcafé\tb\tentailment\n").encode(encoding)
        line = 3 if encoding == "latin-1" else 1
        refused(file(content), rf"train.tsv, line {line}: (not UTF-8 at byte|the header of RTE)")
        refused(file(content), rf"line {line}: ", max_bad_rows=1000)

    @pytest.mark.parametrize(
        "raw", [b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"]
    )
    def test_what_only_looks_like_utf8(self, file: Callable[..., Path], raw: bytes) -> None:
        """Overlong forms, surrogates, beyond the last code point, half a character."""
        content = HEADER.encode() + b"0\t" + raw + b"\tb\tentailment\n"
        refused(file(content), r"line 2: not UTF-8 at byte 2 of the line .*; convert the file")

    def test_packed(self, file: Callable[..., Path]) -> None:
        content = gzip.compress((HEADER + ROW).encode())
        refused(file(content), "line 1: not UTF-8 at byte 1 .* unpack it if it is compressed")

    def test_line_ends_of_windows(self, file: Callable[..., Path]) -> None:
        data = read_file("rte", file((HEADER + ROW * 3).replace("\n", "\r\n")), "train")
        assert set(data.labels) == {"entailment"}
        # Half-converted: the first line decides, and a label does not end in \r.
        refused(file(HEADER + ROW.replace("\n", "\r\n")), r"line 2: unknown label 'entailment\\r'")

    def test_line_ends_of_old_macs(self, file: Callable[..., Path]) -> None:
        refused(file((HEADER + ROW).replace("\n", "\r")), "line 1: the header of RTE")

    @pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.dev])
    @pytest.mark.parametrize(
        "label", ["", " ", "2", " 1", "1.0", "１", "nan", "None", "-1", "x" * 9999]
    )
    def test_labels_unknown_to_the_task(self, tmp_path: Path, name: str, label: str) -> None:
        task = get_task(name)
        form = task.split("dev")
        assert form.label is not None
        fields = ["a"] * len(form.columns)
        fields[form.label] = label
        path = tmp_path / "dev.tsv"
        head = "\t".join(form.columns) + "\n" if form.has_header else ""
        path.write_text(head + "\t".join(fields) + "\n", encoding="utf-8")
        if task.is_regression and label in ("2", "1.0"):
            assert read_file(task, path, "dev").labels == [float(label)]
            return
        line = 2 if form.has_header else 1
        with pytest.raises(DataError, match=rf"dev.tsv, line {line}: ") as caught:
            read_file(task, path, "dev", max_bad_rows=9)
        assert repr(label)[:100].strip("'") in str(caught.value)
        shown = ("outside [0, 5]", "0 to 5") if task.is_regression else (repr(task.spelling[0]),)
        assert any(each in str(caught.value) for each in shown)
        assert len(str(caught.value)) < len(str(path)) + 400

    @pytest.mark.parametrize(
        "score", ["1_0", " 1", "1 ", "\u0663", "１", "0x1", "1,5", "+", "", "1e"]
    )
    def test_scores_that_python_would_take(self, tmp_path: Path, score: str) -> None:
        """float() reads the first five."""
        form = get_task("sts-b").split("dev")
        path = tmp_path / "dev.tsv"
        row = "\t".join(["0"] * 7 + ["a", "b", score])
        path.write_text("\t".join(form.columns) + f"\n{row}\n", encoding="utf-8")
        with pytest.raises(
            DataError, match=r"line 2: the score .* is not a number; STS-B has 0 to"
        ):
            read_file("sts-b", path, "dev")


class TestPlaces:
    """Oracle: what the operating system says lies at a path; nothing is opened that may not end."""

    @pytest.mark.parametrize("split", ["train", "dev", "test"])
    def test_missing_files(self, file: Callable[..., Path], split: str) -> None:
        root = file("").parent.parent
        (root / "RTE" / "train.tsv").unlink()
        for folder in (root, root / "RTE", root / "nowhere", root / "a" / "b"):
            match = (
                rf"no file for the {split} split of RTE in .*looked for RTE/{split}.tsv, .*fetch"
            )
            with pytest.raises(DataError, match=match):
                load("rte", split, folder)

    def test_a_folder_in_place_of_the_file(self, tmp_path: Path) -> None:
        folder = tmp_path / "RTE" / "train.tsv"
        folder.mkdir(parents=True)
        refused(folder, "cannot read .*train.tsv: it is a folder; name a file with the rows")
        with pytest.raises(DataError, match=r"no file .* \(RTE/train.tsv is a folder\)"):
            load("rte", "train", tmp_path)

    def test_a_file_in_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "RTE").write_text("x")
        for folder in (tmp_path, tmp_path / "RTE"):
            with pytest.raises(DataError, match="no file for the train split of RTE"):
                load("rte", "train", folder)

    def test_a_pipe(self, tmp_path: Path) -> None:
        """Opening it would wait for a writer without end."""
        pipe = tmp_path / "RTE" / "train.tsv"
        pipe.parent.mkdir()
        os.mkfifo(pipe)
        refused(pipe, "it is a pipe or a device")
        with pytest.raises(DataError, match=r"\(RTE/train.tsv is a pipe or a device\)"):
            load("rte", "train", tmp_path)

    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/full"])
    def test_a_device(self, tmp_path: Path, device: str) -> None:
        link = tmp_path / "train.tsv"
        link.symlink_to(device)
        refused(link, "it is a pipe or a device")

    def test_links_in_a_circle_and_to_nothing(self, tmp_path: Path) -> None:
        one, two, three = (tmp_path / "RTE" / f"{name}.tsv" for name in ("train", "dev", "test"))
        one.parent.mkdir()
        one.symlink_to(two)
        two.symlink_to(one)
        three.symlink_to(tmp_path / "nowhere")
        refused(one, "it is inaccessible: Too many levels of symbolic links")
        refused(three, "it is a link to nothing")
        with pytest.raises(DataError, match=r"\(RTE/train.tsv is inaccessible"):
            load("rte", "train", tmp_path)
        with pytest.raises(DataError, match=r"\(RTE/test.tsv is a link to nothing\)"):
            load("rte", "test", tmp_path)

    def test_a_link_to_a_file_is_a_file(self, file: Callable[..., Path], tmp_path: Path) -> None:
        link = tmp_path / "train.tsv"
        link.symlink_to(file(HEADER + ROW))
        assert read_file("rte", link, "train").texts_a == ["a"]

    @pytest.mark.parametrize("name", ["a\0b.tsv", "x" * 5000 + ".tsv", "\udcff.tsv"])
    def test_names_that_no_file_has(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match="cannot read"):
            read_file("rte", tmp_path / name)
        with pytest.raises(DataError, match="no file for the dev split"):
            load("rte", "dev", tmp_path / name)

    def test_what_may_not_be_read(self, file: Callable[..., Path]) -> None:
        path = file(HEADER + ROW)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
        refused(path, "cannot read .*: Permission denied; check who may read it")

    @pytest.mark.parametrize("good_openings", [0, 1], ids=["hash", "rows"])
    def test_a_disk_that_fails_in_the_middle(
        self, file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, good_openings: int
    ) -> None:
        """Oracle: a file that is opened to be hashed, and for its rows."""

        class Failing(io.FileIO):
            def readinto(self, place: Any) -> int:
                raise OSError(5, "Input/output error")

            def readall(self) -> bytes:
                raise OSError(5, "Input/output error")

        path, openings, real = file("gj04\t1\t\tA word.\n", "dev.tsv"), 0, Path.open

        def failing(self: Path, *args: Any, **kwargs: Any) -> Any:
            nonlocal openings
            openings += 1
            if openings <= good_openings:
                return real(self, *args, **kwargs)
            return io.BufferedReader(Failing(self))

        monkeypatch.setattr(Path, "open", failing)
        refused(path, "cannot read .*dev.tsv: Input/output error; check the disk", task="cola")
        assert openings == good_openings + 1

    @pytest.mark.parametrize("bad", [-1, 1.5, float("nan"), True, "3", None, 10**400])
    def test_absurd_numbers_of_bad_rows(self, file: Callable[..., Path], bad: Any) -> None:
        """NaN would have allowed any number of them."""
        path = file(HEADER + "x\n" + ROW)
        if bad == 10**400:
            assert read_file("rte", path, "train", max_bad_rows=bad).bad_rows == 1
            return
        with pytest.raises(ConfigError, match="max_bad_rows must be a whole number of at least 0"):
            read_file("rte", path, "train", max_bad_rows=bad)

    @pytest.mark.parametrize("name", ["", " ", "x" * 5000, "rte\n", 7, None, b"rte"])
    def test_absurd_names_of_tasks(self, name: Any) -> None:
        with pytest.raises(DataError, match=r"unknown GLUE task .{,90}; the tasks are cola,"):
            get_task(name)


def written(value: str, key: str = "label") -> str:
    """One JSON record with a value as it stands."""
    rest = json.dumps({k: v for k, v in GOOD.items() if k != key})[1:-1]
    return "{" + f'{rest}, "{key}": {value}' + "}\n"


class TestJson:
    """Oracle: RFC 8259, and the fields of the hub."""

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (written("NaN"), "unknown label nan; RTE has 0 entailment, 1 not_entailment"),
            (written("Infinity"), "unknown label inf"),
            (written("1e999"), "unknown label inf"),
            (written("9" * 400), "unknown label 999"),
            (written("9" * 4000), "unknown label 999"),
            (written("[" * 90 + "]" * 90), "unknown label of type list"),
            (written('{"a": 1}'), "unknown label of type dict"),
            (written('"' + "x" * 10**6 + '"'), "unknown label 'xxx"),
        ],
        ids=lambda text: f"{text:.40}",
    )
    def test_values_for_a_label(self, file: Callable[..., Path], line: str, reason: str) -> None:
        path = file(json.dumps(GOOD) + "\n" + line, "train.jsonl")
        refused(path, rf"train.jsonl, line 2: {reason}", max_bad_rows=9)

    @pytest.mark.parametrize(
        "value", ["9" * 400, "-" + "9" * 400, "1e999", "NaN", "-Infinity", "5.1"]
    )
    def test_values_for_a_score(self, tmp_path: Path, value: str) -> None:
        """float() of the first is an OverflowError."""
        path = tmp_path / "train.jsonl"
        path.write_text(written(value))
        with pytest.raises(DataError, match=r"line 1: the score .* of STS-B is outside \[0, 5\]"):
            read_file("sts-b", path, "train", max_bad_rows=9)

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (written("1")[:-2] + ', "label": 0}\n', r"not JSON \(it holds twice: label\)"),
            (written("1")[:-2] + ', "more": {"a": 1, "a": 1}}\n', r"it holds twice: a\)"),
            (written("1")[:-2] + ', "a\\nb": 1, "a\\nb": 1}\n', r"it holds twice: a.{1,2}b\)"),
            (written("[" * 100_000), r"not JSON \(maximum recursion depth"),
            (written("9" * 10_000), r"not JSON \(|unknown label"),
            (written('"' + "\\ud800" + '"', "sentence1"), "sentence1 holds half of a surrogate"),
            (written("[" * 90 + "]" * 90, "sentence1"), "sentence1 is of type list"),
            (written("9" * 400, "sentence2"), "sentence2 is 999"),
            ("NaN\n", "expected a JSON object, found 'NaN'"),
            ("null\n", "expected a JSON object, found 'null'"),
            ('"' + "x" * 10**6 + '"\n', "expected a JSON object, found '\"xxx"),
            ("\ufeff{}\n", "not JSON"),  # a mark may come first, and only there
            ("[" + json.dumps(GOOD) + "]\n", "expected a JSON object"),
            (json.dumps(GOOD, indent=1) + "\n", "not JSON"),
        ],
        ids=lambda text: f"{text[:40]!r}",
    )
    def test_lines_that_are_malformed(
        self, file: Callable[..., Path], line: str, reason: str
    ) -> None:
        path = file(json.dumps(GOOD) + "\n" + line, "train.jsonl")
        refused(path, rf"train.jsonl, line 2: .*({reason})")

    def test_nested_as_deep_as_can_be(self, file: Callable[..., Path]) -> None:
        """Where the parser still gets to the bottom, showing the value must not fail either."""
        for depth in range(850, 1010, 3):
            for begin, middle, end in (("[", "", "]"), ('{"a":', "1", "}")):
                value = begin * depth + middle + end * depth
                path = file(written(value) + written(value, "sentence1"), "train.jsonl")
                refused(path, r"line 1: (unknown label of type|not JSON \(maximum recursion)")
                refused(file(written(value, "sentence1"), "train.jsonl"), "is of type|not JSON")

    def test_an_object_of_a_hundred_thousand_keys(self, file: Callable[..., Path]) -> None:
        """Its one key that stands twice is found in no time."""
        keys = ", ".join(f'"{number}": 0' for number in range(100_000))
        path = file("{" + keys + ', "7": 1}\n', "train.jsonl")
        refused(path, r"line 1: not JSON \(it holds twice: 7\)")

    def test_a_whole_list_is_no_file_of_lines(self, file: Callable[..., Path]) -> None:
        refused(file(json.dumps([GOOD] * 3, indent=0), "train.jsonl"), "line 1: not JSON")

    @pytest.mark.parametrize("ending", ["", ".TSV.gz", ".csv", ".json", ".tsv.zip", ".pkl", ".pt"])
    def test_endings_that_are_not_read(self, file: Callable[..., Path], ending: str) -> None:
        path = file(HEADER + ROW, f"train{ending}")
        refused(path, "cannot tell the form of .*: expected .tsv, .jsonl or .parquet")


class TestParquet:
    """Oracle: the rows that were written; damage gives them or a DataError, and nothing else."""

    @pytest.fixture
    def whole(self, tmp_path: Path) -> bytes:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [{**GOOD, "sentence1": f"text {number}"} for number in range(23)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "whole", compression="none")
        return (tmp_path / "whole").read_bytes()

    def test_flipped_bits_and_cuts(
        self,
        file: Callable[..., Path],
        whole: bytes,
        sized: Callable[[int, int], int],
        promise: Callable[[str, int, str], None],
    ) -> None:
        n = sized(300, 3_000)
        read = 0
        for number in range(n):
            draw = random.Random(f"parquet:{number}")
            content = bytearray(whole)
            for _ in range(draw.randint(1, 4)):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            if draw.random() < 0.2:
                del content[draw.randrange(len(content)) :]
            path = file(bytes(content), "train.parquet")
            try:
                data = read_file("rte", path, "train", max_bad_rows=3)
            except DataError as error:
                message = str(error)
                assert message.startswith(str(path)), (number, message)
                assert len(message.splitlines()) == 1, (number, message)
                assert len(message) < len(str(path)) + 600, (number, message)
            except Exception as error:  # any at all is a finding
                pytest.fail(f"random.Random('parquet:{number}'): {error!r}")
            else:
                read += 1
                assert all(label in data.task.labels for label in data.labels)
        assert 0 < read < n
        promise("fuzzed data files", n, "0 other exceptions")

    def test_columns_of_other_types(self, file: Callable[..., Path]) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        for column, values, reason in (
            ("label", [b"\xff"], "unknown label of type bytes"),
            ("label", [1.0], "unknown label 1.0"),
            ("label", [[1]], "unknown label of type list"),
            ("label", [None], "there is no label"),
            ("sentence1", [b"a"], "sentence1 is of type bytes"),
            ("sentence2", [None], "sentence2 is None"),
            ("sentence2", [{"a": 1}], "sentence2 is of type dict"),
        ):
            path = file("", "train.parquet")
            columns = {**{key: [value] for key, value in GOOD.items()}, column: values}
            parquet.write_table(pyarrow.table(columns), path)
            refused(path, f"line 1: .*{reason}")

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"x" * 100, b"PAR1" * 10**5])
    def test_no_parquet_at_all(self, file: Callable[..., Path], content: bytes) -> None:
        pytest.importorskip("pyarrow")
        refused(file(content, "train.parquet"), "is not a readable parquet file: .*fetch it again")
