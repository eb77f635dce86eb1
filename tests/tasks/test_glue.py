"""The table of the tasks, and the readers on real and on hostile files."""

import csv
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spafit import glue
from spafit.errors import DataError
from spafit.tasks.glue import TASKS, Example, get_task, load, read_file, read_rows

PAIR_HEADER = "index\tsentence1\tsentence2\tlabel\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


class TestTable:
    """Oracle: GLUE's table as its paper and its hub copy have it, written out once more here."""

    def test_the_tasks(self) -> None:
        assert list(TASKS) == [
            "cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "mnli-mm", "qnli", "rte", "wnli", "ax",
        ]  # fmt: skip
        for name, task in TASKS.items():
            assert task.name == name
            assert name == "mnli" or task.display.lower() == name
            assert len(task.spelling) == len(task.labels)

    @pytest.mark.parametrize(
        ("name", "rows", "metrics", "labels", "submission"),
        [
            ("cola", (8551, 1043, 1063), "matthews", "unacceptable acceptable", "CoLA.tsv"),
            ("sst-2", (67349, 872, 1821), "accuracy", "negative positive", "SST-2.tsv"),
            ("mrpc", (3668, 408, 1725), "f1 accuracy", "not_equivalent equivalent", "MRPC.tsv"),
            ("sts-b", (5749, 1500, 1379), "pearson spearman", "", "STS-B.tsv"),
            ("qqp", (363846, 40430, 390965), "accuracy f1", "not_duplicate duplicate", "QQP.tsv"),
            ("mnli", (392702, 9815, 9796), "accuracy", "entailment neutral contradiction",
             "MNLI-m.tsv"),
            ("mnli-mm", (None, 9832, 9847), "accuracy", "entailment neutral contradiction",
             "MNLI-mm.tsv"),
            ("qnli", (104743, 5463, 5463), "accuracy", "entailment not_entailment", "QNLI.tsv"),
            ("rte", (2490, 277, 3000), "accuracy", "entailment not_entailment", "RTE.tsv"),
            ("wnli", (635, 71, 146), "accuracy", "not_entailment entailment", "WNLI.tsv"),
            ("ax", (None, None, 1104), "matthews", "entailment neutral contradiction", "AX.tsv"),
        ],
    )  # fmt: skip
    def test_rows_metrics_labels(
        self, name: str, rows: tuple[int | None, ...], metrics: str, labels: str, submission: str
    ) -> None:
        task = get_task(name)
        splits = (task.train, task.dev, task.test)
        assert tuple(split.rows if split else None for split in splits) == rows
        assert task.metrics == tuple(metrics.split())
        assert task.labels == tuple(labels.split())
        assert task.submission == submission
        assert task.num_labels == max(1, len(labels.split()))
        assert task.is_regression == (name == "sts-b")
        assert task.pair == (name not in ("cola", "sst-2"))
        assert task.paper_batch_size == (8 if name in ("mnli", "mnli-mm", "qnli", "qqp") else 16)

    def test_columns_name_what_they_hold(self) -> None:
        """The text and label columns, given by number, bear the names of texts and labels."""
        for task in TASKS.values():
            for split in (task.train, task.dev, task.test):
                if split is None:
                    continue
                texts = [split.columns[c] for c in (split.text_a, split.text_b) if c is not None]
                assert len(texts) == len(task.fields)
                assert all(name.lower()[0:4] in ("sent", "ques", "#1 s", "#2 s") for name in texts)
                assert (split.label is None) == (split is task.test)
                if split.label is not None:
                    known = ("label", "gold_label", "Quality", "is_duplicate", "score")
                    assert split.columns[split.label] in known

    def test_names_in_any_case_and_aliases(self) -> None:
        for alias, name in {
            "RTE": "rte", "CoLA": "cola", "sst2": "sst-2", "SST_2": "sst-2", "stsb": "sts-b",
            "MNLI-m": "mnli", "mnli_mismatched": "mnli-mm", "AX": "ax",
        }.items():  # fmt: skip
            assert get_task(alias) is TASKS[name]
        assert get_task(TASKS["rte"]) is TASKS["rte"]

    def test_unknown_names(self) -> None:
        with pytest.raises(DataError, match=r"'boolq'.*cola.*wnli, ax"):
            get_task("boolq")
        with pytest.raises(DataError, match="MNLI-mm has no split 'train'; it has dev, test"):
            get_task("mnli-mm").split("train")
        with pytest.raises(DataError, match="'validation'; it has train, dev, test"):
            get_task("rte").split("validation")


class TestRealFiles:
    """Oracle: the real files: their published counts, and Python's csv with quoting off."""

    @pytest.mark.parametrize("name", ["cola", "sst-2", "mrpc", "sts-b", "rte", "wnli"])
    @pytest.mark.parametrize("split", ["train", "dev", "test"])
    def test_every_field_of_every_row(self, glue_root: Path, name: str, split: str) -> None:
        task = get_task(name)
        form = task.split(split)
        data = load(name, split, glue_root)
        assert len(data) == form.rows
        assert data.bad_rows == 0
        path = glue_root / task.folder / form.file
        assert data.source == str(path)
        assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        rows = rows[1:] if form.has_header else rows
        assert data.texts_a == [row[form.text_a] for row in rows]
        assert [e.index for e in data.examples] == list(range(form.rows))
        if form.text_b is None:
            assert data.texts_b is None
        else:
            assert data.texts_b == [row[form.text_b] for row in rows]
        if form.label is None:
            assert set(data.labels) == {None}
        elif task.is_regression:
            assert data.labels == [float(row[form.label]) for row in rows]
        else:
            names = dict(zip(task.spelling, task.labels, strict=True))
            assert data.labels == [names[row[form.label]] for row in rows]

    @pytest.mark.parametrize(
        ("name", "split", "counts"),
        [
            ("cola", "train", {"acceptable": 6023, "unacceptable": 2528}),
            ("mrpc", "train", {"equivalent": 2474, "not_equivalent": 1194}),
            ("mrpc", "dev", {"equivalent": 279, "not_equivalent": 129}),
            ("rte", "train", {"entailment": 1249, "not_entailment": 1241}),
            ("rte", "dev", {"entailment": 146, "not_entailment": 131}),
            ("wnli", "train", {"not_entailment": 323, "entailment": 312}),
            ("wnli", "dev", {"not_entailment": 40, "entailment": 31}),
            ("sst-2", "dev", {"positive": 444, "negative": 428}),
        ],
    )
    def test_label_counts(
        self, glue_root: Path, name: str, split: str, counts: dict[str, int]
    ) -> None:
        assert Counter(load(name, split, glue_root).labels) == counts

    @pytest.mark.parametrize(
        ("name", "split", "first", "last"),
        [
            ("cola", "train",
             Example(0, "Our friends won't buy this analysis, let alone the next one we propose.",
                     None, "acceptable"),
             Example(8550, "What all did you get for Christmas?", None, "acceptable")),
            ("cola", "dev",  # no newline at the end of this file
             Example(0, "The sailors rode the breeze clear of the rocks.", None, "acceptable"),
             Example(1042, "John talked to Bill about himself.", None, "acceptable")),
            ("rte", "train",
             Example(0, "No Weapons of Mass Destruction Found in Iraq Yet.",
                     "Weapons of Mass Destruction Found in Iraq.", "not_entailment"),
             Example(2489, "Turkey is unlikely to become involved in, or allow U.S. forces to use "
                     "Turkish territory in a Middle East war that does not threaten her territory "
                     "directly.", "U.S. to use Turkish military bases.", "not_entailment")),
            ("sts-b", "train",
             Example(0, "A plane is taking off.", "An air plane is taking off.", 5.0),
             Example(5748, "Putin spokesman: Doping charges appear unfounded",
                     "The Latest on Severe Weather: 1 Dead in Texas After Tornado", 0.0)),
            ("wnli", "dev",
             Example(0, "The drain is clogged with hair. It has to be cleaned.",
                     "The hair has to be cleaned.", "not_entailment"),
             Example(70, "George got free tickets to the play, but he gave them to Eric, because "
                     "he was not particularly eager to see it.",
                     "Eric was not particularly eager to see it.", "not_entailment")),
        ],
    )  # fmt: skip
    def test_first_and_last_row(
        self, glue_root: Path, name: str, split: str, first: Example, last: Example
    ) -> None:
        examples = load(name, split, glue_root).examples
        assert (examples[0], examples[-1]) == (first, last)

    def test_stsb_mean_score(self, glue_root: Path) -> None:
        scores = [float(x) for x in load("sts-b", "train", glue_root).labels if x is not None]
        assert sum(scores) / len(scores) == pytest.approx(2.701, abs=5e-4)
        assert (min(scores), max(scores)) == (0.0, 5.0)

    def test_blanks_control_characters_and_quotes_are_kept(self, glue_root: Path) -> None:
        sst2 = load("sst-2", "train", glue_root)
        assert sst2.examples[0].text_a == "hide new secretions from the parental units "
        assert sum(text.endswith(" ") for text in sst2.texts_a) > 60000
        assert "".join(load("cola", "train", glue_root).texts_a).count("\x08") == 3
        assert sum(text.count('"') % 2 for text in load("mrpc", "train", glue_root).texts_a) > 50

    def test_the_malformed_row_of_qqp(self, glue_root: Path) -> None:
        path = glue_root / "QQP" / "train_subset.tsv"
        message = r"train_subset.tsv, line 2: expected 6 fields .*found 5.*--max-bad-rows"
        with pytest.raises(DataError, match=message):
            read_file("qqp", path, "train")
        data = read_file("qqp", path, "train", max_bad_rows=1)
        assert data.bad_rows == 1
        assert len(data) == 23496
        assert data.examples[0] == Example(
            1,  # the row left out keeps its number
            "What causes stool color to change to yellow?",
            "What can cause stool to come out as little balls?",
            "not_duplicate",
        )

    def test_mnli_with_all_columns(self, glue_root: Path) -> None:
        data = read_file("mnli", glue_root / "MNLI" / "train_kshot480_full_columns.tsv", "train")
        assert Counter(data.labels) == {"entailment": 160, "neutral": 160, "contradiction": 160}
        assert data.examples[0] == Example(
            0, "Well, he showed them.", "He beat them up.", "neutral"
        )
        assert len(read_file("mnli", glue_root / "MNLI" / "train_subset.tsv", "train")) == 9999

    def test_qnli(self, glue_root: Path) -> None:
        data = read_file("qnli", glue_root / "QNLI" / "train_subset.tsv", "train")
        assert len(data) == 10475
        assert data.examples[0].text_a == "When did the third Digimon series begin?"
        assert data.examples[0].label == "not_entailment"

    def test_the_tasks_own_folder(self, glue_root: Path) -> None:
        assert load("rte", "dev", glue_root / "RTE") == load("RTE", "dev", str(glue_root))

    def test_the_folder_of_another_task(self, glue_root: Path) -> None:
        with pytest.raises(DataError, match="another task than WNLI"):
            load("wnli", "test", glue_root / "RTE")
        with pytest.raises(DataError, match="another task than CoLA"):
            load("cola", "test", glue_root / "SST-2")

    @pytest.mark.parametrize("name", ["cola", "sst-2", "mrpc", "sts-b", "rte", "wnli"])
    def test_a_form_told_by_its_header(self, glue_root: Path, name: str) -> None:
        for split in ("dev", "test"):
            path = glue_root / get_task(name).folder / f"{split}.tsv"
            told, known = read_file(name, path), read_file(name, path, split)
            assert told.examples == known.examples
            assert told.split == "input"


class TestTraps:
    """Oracle: what was written is what is read."""

    # Everything that is not the separator, the line end, or half a surrogate pair.
    texts = st.text(st.characters(exclude_characters="\t\n", exclude_categories=["Cs"]))

    @settings(max_examples=100, deadline=None,
              suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
    @given(
        rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=5),
        bom=st.booleans(),
        end=st.sampled_from(["\n", "\r\n"]),
        last_newline=st.booleans(),
    )
    def test_any_text_survives(
        self, tmp_path: Path, rows: list[tuple[str, str]], bom: bool, end: str, last_newline: bool
    ) -> None:
        lines = [f"{i}\t{a}\t{b}\tentailment" for i, (a, b) in enumerate(rows)]
        content = end.join([PAIR_HEADER[:-1], *lines]) + (end if last_newline else "")
        path = write(tmp_path / "train.tsv", ("\ufeff" if bom else "") + content)
        data = read_file("rte", path, "train")
        assert [(e.text_a, e.text_b) for e in data.examples] == rows
        assert set(data.labels) == {"entailment"}

    def test_what_splitlines_and_csv_would_break(self, tmp_path: Path) -> None:
        text = ' "a\x85b\u2028c\x0bd\x0ce\x1cf\rg\x00h'
        path = write(tmp_path / "test.tsv", f"index\tsentence\n0\t{text} \n1\t\n2\tx\r\n")
        # The header ends in \n alone, so the last \r belongs to the text.
        assert read_file("sst-2", path, "test").texts_a == [text + " ", "", "x\r"]

    def test_line_ends_of_windows(self, tmp_path: Path) -> None:
        path = write(tmp_path / "dev.tsv", "1\t1\t\tOne.\r\n2\t0\t*\tTwo. \r\n3\t1\t\tThree.\n")
        data = read_file("cola", path, "dev")
        assert data.texts_a == ["One.", "Two. ", "Three."]
        assert data.labels == ["acceptable", "unacceptable", "acceptable"]

    def test_a_mark_before_a_file_without_header(self, tmp_path: Path) -> None:
        path = write(tmp_path / "dev.tsv", b"\xef\xbb\xbf1\t1\t\tOne.\n")
        assert read_file("cola", path).examples == (Example(0, "One.", None, "acceptable"),)

    def test_not_utf8(self, tmp_path: Path) -> None:
        body = PAIR_HEADER.encode() + b"0\ta\tb\tentailment\n1\tcaf\xe9\tb\tentailment\n"
        path = write(tmp_path / "train.tsv", body)
        with pytest.raises(DataError, match=r"train.tsv, line 3: not UTF-8 at byte 5.*convert"):
            read_file("rte", path, "train", max_bad_rows=9)

    def test_an_unknown_label_is_never_left_out(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.tsv", PAIR_HEADER + "0\ta\tb\tentailment\n1\ta\tb\tyes\n")
        with pytest.raises(DataError, match=r"line 3: unknown label 'yes'; RTE has 'entailment'"):
            read_file("rte", path, "train", max_bad_rows=9)
        with pytest.raises(DataError, match=r"line 2: unknown label 'entailment'; WNLI has '0'"):
            read_file("wnli", path, "train")

    @pytest.mark.parametrize("score", ["nan", "inf", "-0.1", "5.001", "high", ""])
    def test_an_impossible_score(self, tmp_path: Path, score: str) -> None:
        form = get_task("sts-b").split("dev")
        row = "\t".join(["0"] * 7 + ["a", "b", score])
        path = write(tmp_path / "dev.tsv", "\t".join(form.columns) + f"\n{row}\n")
        with pytest.raises(DataError, match=r"dev.tsv, line 2: the score"):
            read_file("sts-b", path, "dev")

    def test_a_wrong_header(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.tsv", PAIR_HEADER + "0\ta\tb\tentailment\n")
        message = r"line 1: the header of QNLI .*'index\\tquestion\\tsentence\\tlabel', found"
        with pytest.raises(DataError, match=message):
            read_file("qnli", path, "train")
        with pytest.raises(DataError, match="header of RTE"):
            read_file("rte", path, "test")
        with pytest.raises(DataError, match=r"header of RTE is expected to be .* or .*, found"):
            read_file("rte", write(tmp_path / "x.tsv", "0\ta\tb\tentailment\n"))

    def test_bad_rows_up_to_the_number_allowed(self, tmp_path: Path) -> None:
        rows = ["0\ta\tb\tentailment", "1\tshort", "2\tc\td\tentailment", "", "4\te\tf\tg\th"]
        path = write(tmp_path / "train.tsv", PAIR_HEADER + "\n".join(rows) + "\n")
        data = read_file("rte", path, "train", max_bad_rows=3)
        assert [(e.index, e.text_a) for e in data.examples] == [(0, "a"), (2, "c")]
        assert data.bad_rows == 3
        message = r"line 6: expected 4 fields .*found 5.*Bad row number 3, 2 allowed"
        with pytest.raises(DataError, match=message):
            read_file("rte", path, "train", max_bad_rows=2)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no file for the dev split of RTE in .*RTE/dev.tsv, "):
            load("rte", "dev", tmp_path)
        with pytest.raises(DataError, match=r"cannot read .*none.tsv: No such file"):
            read_file("rte", tmp_path / "none.tsv")
        with pytest.raises(DataError, match="cannot tell the form"):
            read_file("rte", write(tmp_path / "rows.csv", "x"))
        with pytest.raises(DataError, match="holds no rows of RTE"):
            read_file("rte", write(tmp_path / "train.tsv", PAIR_HEADER))
        with pytest.raises(DataError, match="line 1: the header"):
            read_file("rte", write(tmp_path / "empty.tsv", ""))
        with pytest.raises(DataError, match="holds no rows of CoLA"):
            read_file("cola", tmp_path / "empty.tsv")


class TestHubForms:
    """Oracle: real TSV rows, written once more in the hub's form (numbers for labels, -1 none)."""

    @staticmethod
    def records(data: glue.Dataset, *, names: bool = False) -> list[dict[str, object]]:
        task = data.task
        records = []
        for e in data.examples:
            texts = (e.text_a,) if e.text_b is None else (e.text_a, e.text_b)
            record: dict[str, object] = dict(zip(task.fields, texts, strict=True))
            if e.label is None:
                record["label"] = -1
            elif isinstance(e.label, float) or names:
                record["label"] = e.label
            else:
                record["label"] = task.labels.index(e.label)
            records.append({**record, "idx": e.index})
        return records

    @pytest.mark.parametrize("name", ["cola", "sst-2", "mrpc", "sts-b", "rte", "wnli"])
    @pytest.mark.parametrize("split", ["dev", "test"])
    def test_jsonl_equals_tsv(self, glue_root: Path, tmp_path: Path, name: str, split: str) -> None:
        data = load(name, split, glue_root)
        records = self.records(data, names=name in ("rte", "cola"))
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        path = write(tmp_path / data.task.folder / f"{split}.jsonl", lines)
        read = load(name, split, tmp_path)
        assert read.examples == data.examples
        assert read.source == str(path)
        assert read_file(name, path).examples == data.examples

    @pytest.mark.parametrize(
        ("name", "split", "file"),
        [
            ("rte", "dev", "rte/validation-00000-of-00001.parquet"),
            ("sst-2", "dev", "sst2/validation.parquet"),
            ("sts-b", "test", "test.parquet"),
        ],
    )
    def test_parquet_equals_tsv(
        self, glue_root: Path, tmp_path: Path, name: str, split: str, file: str
    ) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        data = load(name, split, glue_root)
        (tmp_path / file).parent.mkdir(exist_ok=True)
        table = pyarrow.Table.from_pylist(self.records(data))
        parquet.write_table(table, tmp_path / file, row_group_size=101)
        assert load(name, split, tmp_path).examples == data.examples

    def test_names_of_mnli(self, tmp_path: Path) -> None:
        line = json.dumps({"premise": "a", "hypothesis": "b", "label": 2, "idx": 0})
        write(tmp_path / "mnli" / "validation_mismatched.jsonl", line)
        data = load("mnli-mm", "dev", tmp_path)
        assert data.examples == (Example(0, "a", "b", "contradiction"),)
        with pytest.raises(DataError, match="no file for the dev split of MNLI-m "):
            load("mnli", "dev", tmp_path)

    def test_tsv_goes_first(self, tmp_path: Path) -> None:
        write(tmp_path / "RTE" / "train.jsonl", "not read")
        write(tmp_path / "RTE" / "train.tsv", PAIR_HEADER + "0\ta\tb\tentailment\n")
        assert load("rte", "train", tmp_path).texts_a == ["a"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"sentence1": "a", "sentence2": "b", "label": 2}', "unknown label 2; RTE has 0 ent"),
            ('{"sentence1": "a", "sentence2": "b", "label": true}', "unknown label True"),
            ('{"sentence1": "a", "sentence2": "b", "label": "1"}', "unknown label '1'"),
            ('{"sentence1": "a", "sentence2": "b", "label": 1.5}', "unknown label 1.5"),
            ('{"sentence1": "a", "sentence2": "b", "label": -1}', "there is no label"),
            ('{"sentence1": "a", "sentence2": "b"}', "there is no label"),
        ],
    )
    def test_wrong_labels(self, tmp_path: Path, line: str, message: str) -> None:
        path = write(tmp_path / "train.jsonl", line)
        with pytest.raises(DataError, match=f"train.jsonl, line 1: {message}"):
            read_file("rte", path, "train", max_bad_rows=9)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"sentence1": "a", "label": 1}', "sentence2 is None"),
            ('{"sentence1": "a", "sentence2": 7, "label": 1}', "sentence2 is 7"),
            ('{"sentence1": "a", "sentence2": "\\ud800", "label": 1}', "half of a surrogate pair"),
            ('["a", "b"]', "expected a JSON object"),
            ('{"sentence1": "a"', "not JSON"),
            ("", "not JSON"),
            ("[" * 100_000, "not JSON"),
        ],
    )
    def test_malformed_lines(self, tmp_path: Path, line: str, message: str) -> None:
        good = '{"sentence1": "a\u2028", "sentence2": "b", "label": "entailment"}\n'
        path = write(tmp_path / "train.jsonl", good + line + "\n")
        with pytest.raises(DataError, match=f"train.jsonl, line 2: .*{message}"):
            read_file("rte", path, "train")
        data = read_file("rte", path, "train", max_bad_rows=1)
        assert data.texts_a == ["a\u2028"]
        assert data.bad_rows == 1

    @pytest.mark.parametrize("score", ["6", "NaN", "true", '"3"'])
    def test_wrong_scores(self, tmp_path: Path, score: str) -> None:
        line = f'{{"sentence1": "a", "sentence2": "b", "label": {score}}}'
        with pytest.raises(DataError, match=r"train.jsonl, line 1: the score"):
            read_file("sts-b", write(tmp_path / "train.jsonl", line), "train")

    def test_parquet_without_pyarrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        write(tmp_path / "RTE" / "train.parquet", "x")
        with pytest.raises(DataError, match=r"needs pyarrow: pip install '\.\[parquet\]'"):
            load("rte", "train", tmp_path)

    def test_parquet_that_is_none(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow")
        with pytest.raises(DataError, match="not a readable parquet file"):
            read_file("rte", write(tmp_path / "train.parquet", "PAR1 and then nothing"))


class TestWhatIdentifiesARow:
    """Oracle: the files' own columns, in the order of the rows."""

    @pytest.mark.parametrize(
        ("task", "name", "content", "expected"),
        [
            ("rte", "x.tsv", "index\tsentence1\tsentence2\n49\ta\tb\n9\tc\td\n", "index"),
            ("qqp", "x.tsv", "id\tquestion1\tquestion2\n49\ta\tb\n9\tc\td\n", "id"),
            ("cola", "x.tsv", "g\t1\t\ta\ng\t0\t*\tb\n", None),
            (
                "sst-2",
                "x.jsonl",
                '{"idx": 49, "sentence": "a"}\n{"idx": 9, "sentence": "b"}\n',
                "idx",
            ),
            (
                "sst-2",
                "x.jsonl",
                '{"id": "49", "sentence": "a"}\n{"id": "9", "sentence": "b"}\n',
                "id",
            ),
        ],
    )
    def test_it_is_kept(
        self, tmp_path: Path, task: str, name: str, content: str, expected: str | None
    ) -> None:
        (tmp_path / name).write_text(content)
        found = [example.carried for example in read_file(task, tmp_path / name)]
        values = [{expected: value} for value in ("49", "9")] if expected else [{}, {}]
        assert found == values


class TestColumnsByName:
    """Of a file to predict, whose header is none of GLUE's. Oracle: what was written."""

    @staticmethod
    def read(path: Path, task: str) -> list[tuple[str, str | None, object, dict[str, str]]]:
        rows = read_rows(get_task(task), path, read_labels=False)
        return [(e.text_a, e.text_b, e.label, dict(e.carried)) for e in rows]

    @pytest.mark.parametrize("key", ["id", "idx", "ID", "pairID", "uid", "row_id", "Ticket no."])
    def test_whatever_the_id_is_called(self, tmp_path: Path, key: str) -> None:
        path = write(tmp_path / "x.tsv", f'{key}\tsentence1\tsentence2\nT-9\ta "b\tc\n')
        assert self.read(path, "rte") == [('a "b', "c", None, {key: "T-9"})]
        line = json.dumps({key: "T-9", "sentence1": "a", "sentence2": "b"})
        path = write(tmp_path / "x.jsonl", line)
        assert self.read(path, "rte") == [("a", "b", None, {key: "T-9"})]

    @pytest.mark.parametrize(
        ("task", "header", "row", "expected"),
        [
            ("rte", "sentence1 sentence2", "a b", ("a", "b", None, {})),
            ("rte", "k sentence2 id sentence1", "1 b 2 a", ("a", "b", None, {"k": "1", "id": "2"})),
            ("cola", "k k sentence", "1 2 a", ("a", None, None, {"k": "1", "k (2)": "2"})),
            ("mnli", "id sentence1 sentence2", "1 a b", ("a", "b", None, {"id": "1"})),
            ("mnli", "id premise hypothesis", "1 a b", ("a", "b", None, {"id": "1"})),
            ("mrpc", "k #1_String #2_String", "1 a b", ("a", "b", None, {"k": "1"})),
            ("cola", "id sentence", "1 a", ("a", None, None, {"id": "1"})),
            ("wnli", "sentence1 sentence2 label", "a b 1", ("a", "b", None, {})),
            ("wnli", "sentence1 sentence2 label k", "a b  7", ("a", "b", None, {"k": "7"})),
            ("sst-2", "sentence id label", "a 7 positive", ("a", None, None, {"id": "7"})),
        ],
    )  # fmt: skip
    def test_any_columns_in_any_order(
        self, tmp_path: Path, task: str, header: str, row: str, expected: tuple[object, ...]
    ) -> None:
        text = (
            f"{header}\n{row}\n".replace(" ", "\t").replace("id\t(2)", "id (2)").replace("_", " ")
        )
        assert self.read(write(tmp_path / "x.tsv", text), task) == [expected]

    def test_glue_s_own_files_are_read_as_ever(self, tmp_path: Path) -> None:
        """Without a header too, and a split takes no other columns."""
        path = write(tmp_path / "x.tsv", "gj04\t1\t\tOur friends\n")
        assert self.read(path, "cola") == [("Our friends", None, None, {})]
        path = write(tmp_path / "x.tsv", "index\tsentence1\tsentence2\n5\ta\tb\n")
        assert self.read(path, "rte") == [("a", "b", None, {"index": "5"})]
        path = write(tmp_path / "x.tsv", "id\tsentence1\tsentence2\tlabel\n5\ta\tb\tentailment\n")
        for split in ("dev", None):
            with pytest.raises(DataError, match="line 1: the header of RTE"):
                read_file("rte", path, split)

    def test_a_row_of_another_length(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.tsv", "id\tsentence1\tsentence2\n1\ta\n")
        with pytest.raises(DataError, match=r"line 2: expected 3 fields \(id, sen.*, found 2"):
            self.read(path, "rte")

    @pytest.mark.parametrize("header", ["sentence1\tx", "sentence1\tsentence1\tsentence2", ""])
    def test_a_header_without_the_texts(self, tmp_path: Path, header: str) -> None:
        with pytest.raises(DataError, match="line 1: the header of RTE"):
            self.read(write(tmp_path / "x.tsv", f"{header}\n1\ta\tb\n"), "rte")
