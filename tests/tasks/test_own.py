"""Data of one's own: files as programs write them, lists, dicts, frames; the split; the report.

Oracle: pandas' and Python's own writers, and rows written out by hand.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

import spafit
from spafit.errors import DataError
from spafit.tasks import own
from spafit.tasks.own_files import TableForm, read_rows

ROWS = [
    ("1", 'the "new" app, crashes', "bug"),
    ("2", "line one\nline two; three", "bug"),
    ("3", "a\ttab and a | bar", "praise"),
    ("4", "", "praise"),
    ("5", "Ünïcode \u2028 text", "a label"),
]
HEADER = ("id", "text", "label")


def written(path: Path, delimiter: str = ",", newline: str = "\r\n") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=newline)
        writer.writerows([HEADER, *ROWS])
    return path


class TestFiles:
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    def test_tables(self, tmp_path: Path, delimiter: str, newline: str) -> None:
        path = written(tmp_path / "t.csv", delimiter, newline)
        if newline == "\r\n":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        data = spafit.dataset(path)
        assert [(e.carried["id"], e.text_a, e.label) for e in data] == ROWS
        assert data.task.labels == ("a label", "bug", "praise")
        assert data.task.metrics == ("macro_f1", "accuracy", "matthews")
        assert (data.task.name, data.source) == ("t", str(path))

    def test_jsonl_and_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")

        records = [{"id": int(a), "text": b, "label": c, "at": None} for a, b, c in ROWS]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "t.parquet")
        for name in ("t.jsonl", "t.parquet"):
            data = spafit.dataset(tmp_path / name)
            assert [(e.carried["id"], e.text_a, e.label) for e in data] == ROWS
            assert data[0].carried == {"id": "1", "at": ""}

    def test_values_of_parquet_that_json_lacks(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        row = {"text": "x", "day": date(2024, 5, 1), "price": Decimal("9.90"), "n": 7, "of": [1, 2]}
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "t.parquet")
        carried = spafit.dataset(tmp_path / "t.parquet")[0].carried
        assert carried == {"day": "2024-05-01", "price": "9.90", "n": "7", "of": "[1, 2]"}

    def test_columns_of_one_name_are_told_apart(self) -> None:
        task = spafit.Task("t", ("text",), ("a", "b"), ("accuracy",))
        content = b"id,text,id,,id (2),,id\n1,x,2,3,4,5,6\n"
        [row] = read_rows(task, io.BytesIO(content))
        assert row.carried == {
            "id": "1", "id (3)": "2", "": "3", "id (2)": "4", "(2)": "5", "id (4)": "6",
        }  # fmt: skip
        with pytest.raises(DataError, match="has two columns 'label'; rename the one"):
            list(read_rows(task, io.BytesIO(b"label,text,label\na,x,b\n")))

    def test_a_stream(self) -> None:
        """A table, or JSON if it begins so; without labels."""
        task = spafit.Task("t", ("text",), ("a", "b"), ("accuracy",))
        for content in ("id;text\n7;x;y\n", "id;text\n7;x\n", '{"id": 7, "text": "x"}\n'):
            rows = read_rows(task, io.BytesIO(content.encode()), max_bad_rows=1)
            found = [(e.carried["id"], e.text_a, e.label) for e in rows]
            assert found == ([("7", "x", None)] if rows.bad_rows == 0 else [])

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("text,label\nx,a\ny\n", r"t\.csv, line 3: expected 2 fields \(text, label\), found 1"),
            ("text,label\nx,a\ny,\nz,b\n", r"line 3: there is no label in the column 'label'"),
            ('text,label\n"x,a\ny,b\n', r"begins on line 2; if a quote .*\(--unquoted\)"),
            ('text,label\n"x"y,a\n', "line 2: not a table of fields"),
            ("words,label\nx,a\n", "no column 'text'; its columns are words, label: rename"),
            ("text,text,label\nx,y,a\n", "has two columns 'text'"),
            ("text,label\nx,a\ny,a\n", "1 different label in 2 rows"),
            ("text,label\n", "holds no rows"),
            ("", "is empty"),
            ("text,label\nx,a\x07b\ny,c\n", "characters that cannot be printed"),
        ],
    )
    def test_refusals(self, tmp_path: Path, content: str, match: str) -> None:
        (tmp_path / "t.csv").write_text(content, newline="")
        with pytest.raises(DataError, match=match):
            spafit.dataset(tmp_path / "t.csv", labelled=True)

    def test_one_column(self, tmp_path: Path) -> None:
        """Commas are no delimiters in a TSV file; those of a CSV file may be, and are spoken of."""
        for name in ("t.tsv", "t.csv"):
            (tmp_path / name).write_text("text\nHello, world\n")
        assert spafit.dataset(tmp_path / "t.tsv").texts_a == ["Hello, world"]
        match = r"line 2: expected 1 field \(text\), found 2, with ',' between them \(--delimiter\)"
        with pytest.raises(DataError, match=match):
            spafit.dataset(tmp_path / "t.csv")
        tabbed = TableForm(delimiter="\t")
        assert spafit.dataset(tmp_path / "t.csv", form=tabbed).texts_a == ["Hello, world"]
        with pytest.raises(DataError, match=r"no column 'words'; .* between the columns \(--delim"):
            spafit.dataset(tmp_path / "t.tsv", text="words")

    def test_empty_lines_are_no_rows(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("text,label\nx,a\n\ny,b\n\n")
        (tmp_path / "t.jsonl").write_text(
            '{"text": "x", "label": "a"}\n\n{"text": "y", "label": "b"}\n\n'
        )
        for name in ("t.csv", "t.jsonl"):
            data = spafit.dataset(tmp_path / name)
            assert [(each.index, each.text_a) for each in data] == [(0, "x"), (1, "y")]

    def test_quotes_that_are_characters(self, tmp_path: Path) -> None:
        (tmp_path / "t.tsv").write_text('text\tlabel\na 5" disk\tx\n"y\tz\n')
        data = spafit.dataset(tmp_path / "t.tsv", form=TableForm(quoted=False))
        assert data.texts_a == ['a 5" disk', '"y']

    def test_a_text_longer_than_csv_usually_takes(self, tmp_path: Path) -> None:
        before = csv.field_size_limit()
        (tmp_path / "t.csv").write_text(f"text,label\n{'x' * 200_000},a\ny,b\n")
        assert len(spafit.dataset(tmp_path / "t.csv")[0].text_a) == 200_000
        assert csv.field_size_limit() == before

    def test_bad_rows_that_are_allowed(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("text,label\nx,a\ny\nz,\nw,b\n")
        data = spafit.dataset(tmp_path / "t.csv", max_bad_rows=2)
        assert (data.texts_a, data.bad_rows) == (["x", "w"], 2)
        with pytest.raises(DataError, match="Bad row number 2, 1 allowed"):
            spafit.dataset(tmp_path / "t.csv", max_bad_rows=1)


class TestMemory:
    def test_texts_and_labels(self) -> None:
        data = spafit.dataset(["x", "y", "z"], [2, 10, 2.0])
        assert data.task.labels == ("2", "10")  # in the order of their values
        assert data.labels == ["2", "10", "2"]
        assert [each.text_a for each in data] == ["x", "y", "z"]
        assert (len(data), data[1].label, data[1:].texts_a) == (3, "10", ["y", "z"])
        same = spafit.dataset(["x", "y", "z"], ["2", "10", "2"])
        assert same.sha256 == data.sha256 != data[1:].sha256

    def test_pairs(self) -> None:
        data = spafit.dataset([("a", "b"), ("c", "d")], [True, False])
        assert (data.texts_a, data.texts_b) == (["a", "c"], ["b", "d"])
        assert data.task.labels == ("False", "True")
        again = spafit.dataset([("e", "f")], ["True"], task=data.task)
        assert again.task is data.task
        with pytest.raises(DataError, match="unknown label 'maybe'"):
            spafit.dataset([("e", "f")], ["maybe"], task=data.task)
        with pytest.raises(DataError, match="needs pairs of texts"):
            spafit.dataset(["e"], ["True"], task=data.task)

    def test_the_hash_is_of_all_texts_and_labels(self) -> None:
        found = {
            spafit.dataset([("x", second), ("y", "z")], labels).sha256
            for second in "ab"
            for labels in (["p", "q"], ["q", "p"])
        }
        assert len(found) == 4

    def test_rows_of_dicts_and_a_frame(self) -> None:
        rows = [{"s": "x", "y": 1, "n": 7}, {"s": "y", "y": 0, "n": 8}]
        of_dicts = spafit.dataset(rows, text="s", label="y")
        assert of_dicts[1].carried == {"n": "8"}
        pandas = pytest.importorskip("pandas")
        of_frame = spafit.dataset(pandas.DataFrame(rows), text="s", label="y")
        assert of_frame.examples == of_dicts.examples
        assert of_frame.task == of_dicts.task

    def test_numbers_of_a_class_label(self) -> None:
        """As a split of the datasets library has them: names in its features, -1 for none."""

        class ClassLabel:
            names = ("neg", "pos")

        class Split(list):  # type: ignore[type-arg]
            features = {"text": None, "label": ClassLabel()}  # noqa: RUF012

        rows = Split([{"text": "x", "label": 1}, {"text": "y", "label": 0}])
        data = spafit.dataset(rows)
        assert data.labels == ["pos", "neg"]
        Split.features = {"kind": ClassLabel()}
        again = dataclasses.replace(data.task, label_field="kind")
        assert spafit.dataset(Split([{"text": "x", "kind": 1}]), task=again).labels == ["pos"]
        Split.features = {"text": None, "label": ClassLabel()}
        with pytest.raises(DataError, match="there is no label"):
            spafit.dataset(Split([{"text": "x", "label": -1}]), labelled=True)

    def test_scores(self) -> None:
        data = spafit.dataset(["x", "y", "z"], [-100, 0.5, "3e2"], regression=True)
        assert data.labels == [-100.0, 0.5, 300.0]
        center, spread = data.task.scale
        assert center == pytest.approx(66.8333333)
        assert spread == pytest.approx(169.902, abs=1e-3)
        assert data.task.metrics == ("pearson", "spearman", "mean_absolute_error")
        assert spafit.dataset(["x", "y"], [3, 3], regression=True).task.scale == (0.0, 1.0)
        match = "memory, row 1, counted from 0: the score 'high' is not a finite number"
        with pytest.raises(DataError, match=match):
            spafit.dataset(["x", "y"], [1, "high"], regression=True)
        with pytest.raises(DataError, match=r"for scores use regression \(--regression\)"):
            spafit.dataset([str(k) for k in range(50)], [k / 7 for k in range(50)])

    def test_refusals(self) -> None:
        with pytest.raises(DataError, match=r"there are 2 texts and 1 label$"):
            spafit.dataset(["x", "y"], ["a"])
        with pytest.raises(DataError, match="the data, row 1: text is 3, expected a text"):
            spafit.dataset(["x", 3], ["a", "b"])
        with pytest.raises(DataError, match="the data, row 1: text is 3, expected a text"):
            spafit.dataset([{"text": "x", "label": "a"}, {"text": 3, "label": "b"}])
        with pytest.raises(DataError, match="labels in a column; give no others"):
            spafit.dataset([{"text": "x", "label": "a"}], ["a"])
        with pytest.raises(DataError, match="'label' cannot be both the text and the label"):
            spafit.dataset([{"text": "x", "label": "a"}], text="label")
        with pytest.raises(DataError, match="row 1 has 3 texts, expected two"):
            spafit.dataset([("x", "y"), ("x", "y", "z")], ["a", "b"])
        with pytest.raises(DataError, match="row 0: the label is a number that is too large"):
            spafit.dataset(["x", "y"], [10**400, 1])
        with pytest.raises(DataError, match=r"x\.csv is a file, which has its labels in a column"):
            spafit.dataset("x.csv", ["a", "b"])


class TestTask:
    def test_needs_no_more_than_four_things(self) -> None:
        task = spafit.Task("t", ["a", "b"], ["x", "y", "z"], "macro_f1")  # type: ignore[arg-type]
        assert (task.fields, task.metrics, task.display) == (("a", "b"), ("macro_f1",), "t")
        assert spafit.Task.from_json_dict(json.loads(json.dumps(task.to_json_dict()))) == task

    @pytest.mark.parametrize("label", ["می\u200cخواهم", "très\u00a0bien", "良\u3000い"])
    def test_letters_of_every_script(self, label: str) -> None:
        data = spafit.dataset(["x", "y"], [label, "b"])
        assert sorted(data.task.labels) == sorted([label, "b"])

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"metrics": ("f1",)}, "'f1' is defined for two labels; t has 3; t can have accuracy"),
            ({"metrics": ("pearson",)}, "'pearson' does not fit a task with labels"),
            ({"labels": (), "metrics": ("accuracy",)}, "does not fit a task of scores; .* pearson"),
            ({"metrics": ("bleu",)}, "'bleu' is no metric"),
            ({"metrics": ()}, "needs a metric"),
            ({"labels": ("a",)}, "nothing to tell apart"),
            ({"labels": ("a", "a")}, "a name twice"),
            *(
                ({"labels": ("a", f"b{c}b")}, "can be printed")
                for c in "\n\x1b\u2028\u202e\u2066\ud800"
            ),
            ({"fields": ()}, "one text field or two"),
            ({"name": ""}, "not names of a task"),
            ({"scale": (0.0, 0.0)}, "scale of t"),
        ],
    )
    def test_refusals(self, changes: dict[str, object], match: str) -> None:
        usual = {"name": "t", "fields": ("text",), "labels": ("a", "b", "c")}
        with pytest.raises(DataError, match=match):
            spafit.Task(**{**usual, "metrics": ("accuracy",), **changes})  # type: ignore[arg-type]


class TestSplit:
    def test_stratified_whole_and_without_shared_texts(self) -> None:
        texts = [f"text {k // 2}" for k in range(200)]  # each twice
        data = spafit.dataset(texts, ["rare" if k < 20 else "common" for k in range(200)])
        train, dev = own.split(data, 0.2, seed=3)
        assert sorted([*train.examples, *dev.examples], key=lambda e: e.index) == list(data)
        assert (train.split, dev.split) == ("train", "dev")
        assert Counter(dev.labels) == {"rare": 4, "common": 36}
        assert Counter(own.split(data, 0.4, seed=3)[1].labels) == {"rare": 8, "common": 72}
        assert not set(train.texts_a) & set(dev.texts_a)
        assert own.split(data, 0.2, seed=3)[1].sha256 == dev.sha256
        assert own.split(data, 0.2, seed=4)[1].sha256 != dev.sha256

    def test_stays_the_same(self) -> None:
        """Runs are evaluated on what was split off by an older version. Oracle: its rows."""
        data = spafit.dataset([f"t{k}" for k in range(20)], ["b", "a", "b", "b"] * 5)
        _, dev = own.split(data, 0.3, seed=1)
        assert [each.index for each in dev] == [1, 2, 8, 14, 15, 16, 17]

    @pytest.mark.parametrize("share", [0.1, 0.9])
    def test_every_label_is_on_both_sides(self, share: float) -> None:
        """And pairs are the same only if both texts are."""
        data = spafit.dataset([("q", str(k)) for k in range(12)], [*"aabbbbbbbbbb"])
        for part in own.split(data, share, seed=0):
            assert set(part.labels) == {"a", "b"}

    @pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
    def test_no_share(self, share: float) -> None:
        with pytest.raises(DataError, match="share of dev must be between 0 and 1"):
            own.split(spafit.dataset(["x", "y"], ["a", "b"]), share, 0)

    def test_scores_by_tenths(self) -> None:
        scores = [float(k) for k in range(100)]
        data = spafit.dataset([f"t{k}" for k in range(100)], scores, regression=True)
        _, dev = own.split(data, 0.2, seed=0)
        assert Counter(int(float(s or 0)) // 10 for s in dev.labels) == dict.fromkeys(range(10), 2)

    def test_too_little(self) -> None:
        with pytest.raises(DataError, match=r"too few different texts to split; .*\(--dev\)"):
            own.split(spafit.dataset(["x", "x"], ["a", "b"]), 0.5, 0)


def test_the_report_before_training() -> None:
    data = spafit.dataset(["x", " X ", "y", "", "z", "z", "q"], ["a", "b", "a", "b", "a", "a", "b"])
    text = own.describe(data[:6], data[6:])
    for line in (
        "  0  a        4        0",
        "1 empty text (row 3, counted from 0)",
        "2 rows with the text of an earlier one (rows 1, 5, counted from 0)",
        "1 of them with another label (row 1, counted from 0)",
        "no row has the label a",
    ):
        assert line in text
    assert "1 row of dev with a text of train" in own.describe(data[:1], data[1:2])


@pytest.mark.parametrize(("labels", "noted"), [(11, True), (10, False)])
def test_labels_that_may_be_scores_are_noted(labels: int, noted: bool) -> None:
    texts = [f"text {row}" for row in range(3 * labels)]
    data = spafit.dataset(texts, [row % labels + 0.5 for row in range(3 * labels)])
    assert ("11 labels are numbers, taken as names of classes" in own.describe(data, data)) == noted


def test_a_column_of_labels_that_is_not_there(tmp_path: Path) -> None:
    """It is no fault of the rows, so none may be left out for it."""
    (tmp_path / "x.csv").write_text("text,label\nx,a\ny,b\n")
    with pytest.raises(DataError, match=r"x\.csv has no column 'lable' for the label; its columns"):
        spafit.dataset(tmp_path / "x.csv", label="lable", labelled=True, max_bad_rows=9)


def test_rows_left_out_of_one_file_are_counted_once(tmp_path: Path) -> None:
    rows = "".join(f"text {row},{'ab'[row % 2]}\n" for row in range(20))
    (tmp_path / "x.csv").write_text(f"text,label\n{rows}no label,\n")
    data = spafit.dataset(tmp_path / "x.csv", labelled=True, max_bad_rows=1)
    train, dev = own.split(data, 0.2, 0)
    assert (data.bad_rows, train.bad_rows, dev.bad_rows) == (1, 1, 0)
    assert own.describe(train, dev).count("1 row, malformed or without a label, left out") == 1
