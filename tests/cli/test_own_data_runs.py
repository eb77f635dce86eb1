"""Data of one's own from the command line: train, evaluate, predict, several seeds.

Oracle: the same in Python, and the files' own rows.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import statistics
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import Capture, call, table
from support.interruptions import stopped_after
from support.small_runs import SmallRun, make_dataset, read_log, write_glue

import spafit
from spafit.cli import main, predicting, trained
from spafit.cli.evaluating import evaluation_screen, write_mistakes
from spafit.cli.trained import Trained
from spafit.tasks import own, scoring
from spafit.tasks.own_files import TableForm
from spafit.tasks.task import Dataset, Example
from spafit.text.tokenization import Encodings
from spafit.training import inference
from spafit.training.inference import Predictions

KINDS = ("billing", "bug", "praise")


@pytest.fixture(scope="module")
def folder(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tickets with unbalanced labels, quoted texts and ids; train three seeds on them."""
    folder = tmp_path_factory.mktemp("own")
    examples = make_dataset("rte", 40, seed=7).examples
    with (folder / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "message", "kind"])
        for row, each in enumerate(examples):
            writer.writerow([f"T-{row}", f'{each.text_a}, "{row}"', KINDS[min(row % 5, 2)]])
    words = "--text message --label kind --method SPAFIT-0-1-II --r 5 --epochs 2 --batch-size 6"
    more = "--learning-rate 1e-2 --max-length 16 --device cpu --quiet --class-weights balanced"
    places = ["--model", str(small.folder), "--data", str(folder / "tickets.csv")]
    arguments = ["train", *words.split(), *more.split(), *places, "--out", str(folder / "runs")]
    split = ["--dev-share", "0.25", "--split-seed", "4"]
    assert main([*arguments, *split, "--seeds", "2", "1", "3"]) == 0
    return folder


class TestTrained:
    def test_the_record_has_the_task(self, folder: Path) -> None:
        record = json.loads((folder / "runs" / "seed-1" / "run.json").read_text())
        task = spafit.Task.from_json_dict(record["definition"])
        assert (task.name, task.fields, task.label_field) == ("tickets", ("message",), "kind")
        assert task.labels == KINDS
        about = record["about"]
        assert [about[name] for name in ("dev_share", "split_seed", "quoted")] == [0.25, 4, True]
        every = spafit.dataset(folder / "tickets.csv", text="message", label="kind")
        for part in own.split(every, 0.25, 4):
            assert record["data"][part.split]["sha256"] == part.sha256
        assert set(record["settings"]["class_weights"]) == set(KINDS)

    def test_one_run_and_several_seeds_do_not_share_a_folder(
        self, capsys: Capture, folder: Path, small: SmallRun
    ) -> None:
        words = ["train", "--text", "message", "--label", "kind", "--method", "SPAFIT-0-1-II"]
        words += ["--model", str(small.folder), "--data", str(folder / "tickets.csv")]
        before = sorted((folder / "runs").rglob("*"))
        for out, seeds, reason in (
            (folder / "runs", ["3"], "holds the runs of several seeds"),
            (folder / "runs" / "seed-1", ["1", "2"], "holds one run"),
        ):
            code, _, error = call(capsys, *words, "--out", out, "--overwrite", "--seeds", *seeds)
            assert (code, error.count("\n")) == (2, 1)
            assert f"{reason}; give another folder (--out)" in error
        assert sorted((folder / "runs").rglob("*")) == before

    def test_no_summary_while_the_seeds_are_trained_again(
        self, capsys: Capture, folder: Path, small: SmallRun, tmp_path: Path
    ) -> None:
        """The best of the runs before is not that of these."""
        runs = tmp_path / "runs"
        shutil.copytree(folder / "runs", runs)
        words = ["train", "--text", "message", "--label", "kind", "--method", "SPAFIT-0-1-II"]
        words += ["--model", str(small.folder), "--data", str(folder / "tickets.csv"), "--quiet"]
        words += ["--max-length", "16", "--device", "cpu", "--out", str(runs), "--overwrite"]
        with stopped_after(2):
            assert call(capsys, *words, "--seeds", "2", "1", "3")[0] == 128 + 15
        code, _, err = call(capsys, "eval", runs)
        assert (code, "and no summary of all seeds" in err) == (2, True)

    def test_summary_of_the_seeds(self, folder: Path) -> None:
        summary = json.loads((folder / "runs" / "summary.json").read_text())
        assert (summary["seeds"], summary["runs"]) == ([2, 1, 3], ["seed-2", "seed-1", "seed-3"])
        values = []
        for name in summary["runs"]:
            record = json.loads((folder / "runs" / name / "run.json").read_text())
            values.append(record["result"]["metrics"]["macro_f1"])
        found = summary["metrics"]["macro_f1"]
        assert (found["values"], found["best"]) == (values, max(values))
        assert found["mean"] == pytest.approx(statistics.mean(values))
        assert found["standard_deviation"] == pytest.approx(statistics.stdev(values))
        assert summary["best"] == summary["runs"][values.index(max(values))]


class TestEval:
    def test_the_rows_that_were_split_off(self, capsys: Capture, folder: Path) -> None:
        run = folder / "runs" / "seed-1"
        record = json.loads((run / "run.json").read_text())
        rows = record["data"]["train"]["rows"]
        code, out, _ = call(capsys, "eval", run, "--split", "train")
        assert (code, f"tickets train ({rows} examples): macro_f1 " in out) == (0, True)
        code, out, _ = call(capsys, "eval", run)
        assert code == 0
        for name, score in record["result"]["metrics"].items():
            assert f"examples): {name} {score:.4f}" in out

    def test_other_rows_and_all_mistakes(
        self, capsys: Capture, folder: Path, tmp_path: Path
    ) -> None:
        lines = (folder / "tickets.csv").read_text().splitlines(keepends=True)
        (tmp_path / "new.csv").write_text("".join(lines[:12]))
        arguments = ("eval", folder / "runs" / "seed-1", "--data", tmp_path / "new.csv")
        code, out, _ = call(capsys, *arguments, "--errors", tmp_path / "e.tsv")
        assert code == 0
        assert "tickets new.csv (11 examples): macro_f1 " in out
        wrong = table((tmp_path / "e.tsv").read_text())
        assert wrong
        assert all(row["label"] != row["prediction"] for row in wrong)
        assert f"({len(wrong)} mistakes)" in out
        rows = {row["id"]: row for row in table((tmp_path / "new.csv").read_text(), ",")}
        for row in wrong:
            true = rows[row["id"]]
            assert (row["label"], row["message"]) == (true["kind"], true["message"])
        code, _, err = call(capsys, *arguments, "--errors", tmp_path / "new.csv")
        assert code == 2
        assert "is the data itself" in err

    def test_data_that_has_changed(self, capsys: Capture, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder / "runs" / "seed-1", tmp_path / "run")
        shutil.copy(folder / "tickets.csv", tmp_path / "tickets.csv")
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        record["about"]["data"] = str(tmp_path / "tickets.csv")
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        assert call(capsys, "eval", tmp_path / "run")[0] == 0
        with (tmp_path / "tickets.csv").open("a") as file:
            file.write("T-99,another text,bug\n")
        code, _, err = call(capsys, "eval", tmp_path / "run")
        assert code == 2
        assert "has changed since the run was trained; name the rows to score with --data" in err
        del record["about"]["split_seed"]
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        code, _, err = call(capsys, "eval", tmp_path / "run")
        assert (code, "does not say how its data was split; give --data" in err) == (2, True)

    def test_the_screen_fits(self) -> None:
        """A matrix that is too wide becomes a list of its largest cells."""
        names = tuple(f"a rather long label {k}" for k in range(30))
        task = spafit.Task("t", ("text",), names, ("accuracy",))
        examples = tuple(Example(k, "word " * 50, None, names[k % 30]) for k in range(90))
        predicted = [names[5 if k % 30 == 3 else 2 if k in (8, 38) else k % 30] for k in range(90)]
        sure = np.full((90, 30), 1 / 30)
        screen = evaluation_screen(Dataset(task, "dev", examples, "x"), list(predicted), sure, 80)
        assert max(map(len, screen.splitlines())) <= 80
        assert (
            "the commonest confusions:\n"
            "      3  a rather long label 3 taken for a rather long label 5\n"
            "      2  a rather long label 8 taken for a rather long label 2\n\n"
        ) in screen
        screen = evaluation_screen(Dataset(task, "dev", examples, "x"), [names[0]] * 90, sure, 80)
        assert screen.partition("of 87 mistakes:\n")[2].count("\n") == 9  # ten lines

    def test_the_screen_and_the_file_of_mistakes(self, capsys: Capture, tmp_path: Path) -> None:
        """Worked out by hand."""
        task = spafit.Task("t", ("text",), ("a", "b", "c"), ("accuracy",))
        examples = tuple(Example(k, f"text {k}", None, each) for k, each in enumerate("aaabbc"))
        data, predicted = Dataset(task, "dev", examples, "x"), list("abbbba")
        sure = np.full((6, 3), 0.25)
        sure[2, 1], sure[5, 0] = 0.5, 0.75
        low, high = scoring.intervals(task, predicted, data.labels)["accuracy"]
        lines = evaluation_screen(data, predicted, sure, 80).splitlines()
        assert lines == [
            "t dev (6 examples): accuracy 0.5000   (always the commonest class: 0.5000)",
            f"    95 % of bootstrap samples: {low:.4f} to {high:.4f}",
            "",
            "     label  precision  recall      F1    rows",
            "  0  a         0.5000  0.3333  0.4000       3",
            "  1  b         0.5000  1.0000  0.6667       2",
            "  2  c         0.0000  0.0000  0.0000       1",
            "",
            "true label (rows) and predicted label (columns), by number:",
            "       0  1  2",
            "    0  1  2  0",
            "    1  0  2  0",
            "    2  1  0  0",
            "",
            "the most confident of 3 mistakes:",
            "  0.750  a, is c (row 5): text 5",
            "  0.500  b, is a (row 2): text 2",
            "  0.250  b, is a (row 1): text 1",
        ]
        for name, between in (("e.csv", ","), ("e.tsv", "\t")):
            write_mistakes(tmp_path / name, data, predicted, sure)
            found = table((tmp_path / name).read_text(), between)
            assert list(found[0]) == ["row", "label", "prediction", "probability", "text"]
            assert list(found[0].values()) == ["5", "c", "a", "0.75", "text 5"]
            assert [each["row"] for each in found] == ["5", "2", "1"]

    def test_texts_move_no_cursor(self) -> None:
        """A terminal shows what stands in the data, and obeys none of it."""
        task = spafit.Task("t", ("text",), ("a", "b"), ("accuracy",))
        carried = {"id\x1b[1m": "\x1b]0;title\x07"}
        wrong = Example(0, "one\x1b[2Jtwo\u202e a\\b", None, "a", carried)
        data = Dataset(task, "x\x1b[1m.tsv", (wrong, Example(1, "x", None, "b")), "x")
        screen = evaluation_screen(data, ["b", "b"], np.array([[0.25, 0.75], [0, 1]]), 90)
        assert screen.replace("\n", "").isprintable()
        assert screen.endswith(
            "the most confident of 1 mistake:\n"
            r"  0.750  b, is a (id\x1b[1m \x1b]0;title\x07): one\x1b[2Jtwo\u202e a\b"
        )

    def test_a_return_in_a_text_is_read_back(self, capsys: Capture, tmp_path: Path) -> None:
        """The csv module writes it without the quotes that it needs to read it."""
        task = spafit.Task("t", ("text",), ("a", "b"), ("accuracy",))
        data = Dataset(task, "dev", (Example(0, "one\rtwo", None, "a"),), "x")
        for name in ("e.csv", "e.tsv"):
            write_mistakes(tmp_path / name, data, ["b"], np.array([[0.25, 0.75]]))
            content = (tmp_path / name).read_bytes().decode()
            assert content.count("\n") == content.count("\r") + 1 == 2
            again = spafit.dataset(tmp_path / name, task=task)
            assert (again.texts_a, again.labels) == (["one\rtwo"], ["a"])


class TestPredict:
    def rows(self, path: Path) -> Path:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow(["message", "id", "when"])
            writer.writerows([["my bill; again", "T-7", "x"], ["it crashes", "T-9", ""]])
        return path

    def test_columns_come_through(self, capsys: Capture, folder: Path, tmp_path: Path) -> None:
        """Without the data that it was trained on."""
        shutil.copytree(folder / "runs" / "seed-1", tmp_path / "run")
        source = self.rows(tmp_path / "new.csv")
        code, out, err = call(
            capsys, "predict", tmp_path / "run", "--input", source, "--probabilities"
        )
        assert (code, err) == (0, "")
        found = table(out)
        header = ["id", "when", "prediction", *(f"p_{kind}" for kind in KINDS)]
        assert list(found[0]) == header
        assert [(row["id"], row["when"]) for row in found] == [("T-7", "x"), ("T-9", "")]
        for row in found:
            sure = {kind: float(row[f"p_{kind}"]) for kind in KINDS}
            assert sum(sure.values()) == pytest.approx(1, abs=1e-4)
            assert row["prediction"] == max(KINDS, key=lambda kind: sure[kind])
        for name in ("o.csv", "o.jsonl"):
            arguments = ("predict", tmp_path / "run", "--input", source, "--probabilities")
            assert call(capsys, *arguments, "--output", tmp_path / name)[0] == 0
        assert table((tmp_path / "o.csv").read_text(), ",") == found
        lines = (tmp_path / "o.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["T-7", "T-9"]

    def test_labels_are_not_read(self, capsys: Capture, folder: Path, tmp_path: Path) -> None:
        """Some tickets bear a new label, none, or one that could be no label."""
        run = folder / "runs" / "seed-1"
        with (folder / "tickets.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        whole = call(capsys, "predict", run, "--input", folder / "tickets.csv")
        for row, label in zip(rows, ("refund", "", "a\x07b"), strict=False):
            row["kind"] = label
        with (tmp_path / "new.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "message", "kind"])
            writer.writeheader()
            writer.writerows(rows)
        (tmp_path / "new.jsonl").write_text(
            "".join(json.dumps({**row, "kind": ["x"]}) + "\n" for row in rows)
        )
        for name in ("new.csv", "new.jsonl"):
            assert call(capsys, "predict", run, "--input", tmp_path / name) == whole
        code, _, err = call(capsys, "eval", run, "--data", tmp_path / "new.csv")
        assert (code, "unknown label 'refund'; tickets has billing" in err) == (2, True)

    def test_columns_that_are_called_like_ours(
        self, capsys: Capture, folder: Path, tmp_path: Path
    ) -> None:
        """As where a table of predictions is predicted again."""
        p = f"p_{KINDS[0]}"
        (tmp_path / "new.csv").write_text(f"prediction,message,{p},row\nx,it crashes,0.5,7\n")
        run = folder / "runs" / "seed-1"
        arguments = ("predict", run, "--input", tmp_path / "new.csv")
        [row] = table(call(capsys, *arguments)[1])
        assert list(row) == ["prediction (2)", p, "row", "prediction"]
        [row] = table(call(capsys, *arguments, "--probabilities")[1])
        assert (row["prediction (2)"], row[f"{p} (2)"], row["row"]) == ("x", "0.5", "7")
        assert row["prediction"] in KINDS
        assert call(capsys, *arguments, "--output", tmp_path / "o.jsonl")[0] == 0
        record = json.loads((tmp_path / "o.jsonl").read_text())
        assert record["prediction (2)"] == "x"

    def test_in_pieces(
        self, capsys: Capture, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = call(
            capsys, "predict", folder / "runs" / "seed-1", "--input", folder / "tickets.csv"
        )
        monkeypatch.setattr(predicting, "_CHUNK", 7)
        sizes, usual = [], inference.predict_logits

        def noted(model: Any, encodings: Encodings, **settings: Any) -> Any:
            sizes.append(len(encodings))
            return usual(model, encodings, **settings)

        monkeypatch.setattr(inference, "predict_logits", noted)
        arguments = ("predict", folder / "runs" / "seed-1", "--input")
        assert call(capsys, *arguments, folder / "tickets.csv") == whole
        assert sizes == [7, 7, 7, 7, 7, 5]
        assert len(table(whole[1])) == 40

        class Stdin:
            buffer = io.BufferedReader(io.BytesIO((folder / "tickets.csv").read_bytes()))  # type: ignore[arg-type]

        monkeypatch.setattr(sys, "stdin", Stdin)
        assert call(capsys, *arguments, "-", "--output", "-") == whole

    def test_memory_does_not_grow_with_the_file(
        self, capsys: Capture, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a made-up model; what Python holds at most is counted by tracemalloc."""
        monkeypatch.setattr(predicting, "_CHUNK", 200)
        monkeypatch.setattr(
            inference,
            "predict_logits",
            lambda _, encodings, **__: np.eye(3, dtype=np.float32)[
                [number % 3 for number in encodings.lengths]
            ],
        )
        peaks = []
        data, out = tmp_path / "many.csv", tmp_path / "out.csv"
        for rows in (2_000, 16_000):
            words = [f"{number},{'it crashes ' * (number % 5)}" for number in range(rows)]
            data.write_text("\n".join(["id,message", *words]))
            del words
            tracemalloc.start()
            found = call(
                capsys, "predict", folder / "runs" / "seed-1", "--input", data, "--output", out
            )
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert found == (0, f"written: {out} ({rows} predictions)\n", "")
            predicted = table(out.read_text(), ",")
            assert [row["id"] for row in predicted] == [str(number) for number in range(rows)]
            assert [row["prediction"] for row in predicted[5:]] == [
                row["prediction"] for row in predicted[:-5]
            ]
        assert len({row["prediction"] for row in predicted}) > 1
        assert peaks[1] < peaks[0] + 1e6

    def test_an_error_in_a_later_part_leaves_no_file(
        self, capsys: Capture, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(predicting, "_CHUNK", 5)
        data, out = tmp_path / "new.csv", tmp_path / "out.csv"
        data.write_text("id,message\n" + "1,it crashes\n" * 19 + "1,it,crashes\n")
        given = ("predict", folder / "runs" / "seed-1", "--input", data, "--output", out)
        code, _, err = call(capsys, *given)
        assert (code, "line 21: expected 2 fields" in err) == (2, True)
        assert [each.name for each in tmp_path.iterdir()] == ["new.csv"]

    def test_the_precision_is_that_of_the_training_or_as_asked_for(
        self, capsys: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, asked = folder / "runs" / "seed-1", []
        usual = inference.predict_logits

        def noted(*given: Any, precision: str, **settings: Any) -> Any:
            flat = settings["flat"]
            asked.append((precision, None if flat is None else flat.dtype))
            return usual(*given, precision=precision, **settings)

        monkeypatch.setattr(inference, "predict_logits", noted)
        monkeypatch.setattr(trained, "WORTH_MERGING", 2)  # it takes longer for the one text
        for more in ((), ("--precision", "bf16")):
            assert call(capsys, "predict", run, "--text", "my bill", *more)[0] == 0
            assert call(capsys, "eval", run, *more)[0] == 0
        assert asked == [
            ("float32", None),
            ("float32", torch.float32),
            ("bf16", None),
            ("bf16", torch.bfloat16),
        ]
        code, _, err = call(capsys, "predict", run, "--text", "my bill", "--precision", "fp16")
        assert (code, "fp16 needs a GPU" in err) == (2, True)

    def test_texts_given(self, capsys: Capture, folder: Path) -> None:
        run = folder / "runs" / "seed-1"
        code, out, _ = call(capsys, "predict", run, "--text", "it crashes", "my bill")
        assert code == 0
        assert [row["row"] for row in table(out)] == ["0", "1"]
        for more in (["--text2", "x", "y"], []):
            where = ["--text", "x", *more] if more else ["--submission", "s"]
            assert call(capsys, "predict", run, *where)[0] == 2
        code, _, err = call(capsys, "predict", run, "--input", "x.csv", "--text2", "y")
        assert (code, "--text2 needs --text" in err) == (2, True)

    def test_seeds(self, capsys: Capture, folder: Path) -> None:
        """The best of them, or the mean of their probabilities."""
        arguments: tuple[Any, ...] = ("--text", "it crashes", "--probabilities")
        alone = [
            table(call(capsys, "predict", folder / "runs" / f"seed-{seed}", *arguments)[1])[0]
            for seed in (1, 2, 3)
        ]
        best = json.loads((folder / "runs" / "summary.json").read_text())["best"]
        code, out, err = call(capsys, "predict", folder / "runs", *arguments)
        assert code == 0
        assert f"the best of 3 seeds, {best}" in err
        assert table(out)[0] == alone[int(best[-1]) - 1]
        [row] = table(call(capsys, "predict", folder / "runs", *arguments, "--average")[1])
        for kind in KINDS:
            mean = statistics.mean(float(each[f"p_{kind}"]) for each in alone)
            assert float(row[f"p_{kind}"]) == pytest.approx(mean, abs=1e-5)
        assert row["prediction"] == max(KINDS, key=lambda kind: float(row[f"p_{kind}"]))
        one = folder / "runs" / "seed-1"
        code, _, err = call(capsys, "predict", one, *arguments, "--average")
        assert (code, "is for a folder of several seeds" in err) == (2, True)

    def test_the_label_of_an_average(self) -> None:
        """By hand, of two heads that number their labels differently."""
        found = [
            Predictions(np.log(np.array([sure], dtype=np.float32)), [names[0]], 0, names)
            for sure, names in (((0.6, 0.4), ("a", "b")), ((0.9, 0.1), ("b", "a")))
        ]
        task = spafit.Task("t", ("text",), ("a", "b"), ("accuracy",))
        labels, sure = trained._mean(found, task)
        assert labels == ["b"]
        assert sure is not None
        assert sure.tolist() == [pytest.approx([0.35, 0.65])]

    @pytest.mark.parametrize(
        ("about", "unquoted", "quoted"),
        [
            ({}, False, True),
            ({"quoted": False}, False, False),
            ({"quoted": True}, True, False),
            ({"quoted": "damaged"}, False, True),
        ],
    )
    def test_quotes_are_as_in_training(self, about: Any, unquoted: bool, quoted: bool) -> None:
        run = Trained.__new__(Trained)
        run.record = {"about": about}
        assert run.table_form(";", unquoted, None) == TableForm(";", quoted)


def test_the_delimiter_is_as_in_training(capsys: Capture, small: SmallRun, tmp_path: Path) -> None:
    """One that no first line shows. The file's name ends in a space, a label has a non-joiner."""
    data = tmp_path / "my mail .csv"
    labels = ("a\u200cb", "c")
    rows = [f"{each.text_a}^{labels[each.index % 2]}\n" for each in make_dataset("rte", 20)]
    data.write_text("text^label\n" + "".join(rows))
    words = ["train", "--method", "bitfit", "--epochs", "1", "--max-length", "16", "--quiet"]
    places = ["--model", small.folder, "--data", data, "--out", tmp_path / "run"]
    assert call(capsys, *words, *places, "--device", "cpu", "--delimiter", "^")[0] == 0
    assert call(capsys, *words, *places, "--device", "cpu", "--delimiter", "^")[0] == 0  # there
    for arguments in (["eval", tmp_path / "run"], ["predict", tmp_path / "run", "--input", data]):
        code, _, err = call(capsys, *arguments)
        assert (code, err) == (0, "")
        code, _, err = call(capsys, *arguments, "--delimiter", ";")
        assert (code, "between the columns (--delimiter)" in err) == (2, True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["about"]["delimiter"] == "^"
    assert (record["task"], record["labels"]) == ("my mail", list(labels))
    for damage in (";;", 7, None):
        run = Trained.__new__(Trained)
        run.record = {"about": {"delimiter": damage}}
        assert run.table_form(None, False, None) == TableForm()


def test_scores_pairs_and_a_file_for_dev(
    capsys: Capture, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, n in (("train", 24), ("dev", 9)):
        rows = [
            {"a": each.text_a, "b": each.text_b, "score": 100 * float(each.label or 0)}
            for each in make_dataset("stsb", n, seed=n).examples
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--text a --text2 b --label score --regression --method bitfit --epochs 1"
    places = ["--model", small.folder, "--data", tmp_path / "train.jsonl"]
    more = ["--dev", tmp_path / "dev.jsonl", "--out", tmp_path / "run", "--device", "cpu"]
    code, out, _ = call(
        capsys, "train", *words.split(), *places, *more, "--max-length", "16", "--quiet",
        "--metric", "mean_absolute_error", "--seeds", "1", "2",
    )  # fmt: skip
    assert code == 0
    assert "scores of train: " in out
    runs = [tmp_path / "run" / f"seed-{seed}" for seed in (1, 2)]
    results = [json.loads((run / "run.json").read_text())["result"]["metrics"] for run in runs]
    errors = [each["mean_absolute_error"] for each in results]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["mean_absolute_error"]["best"] == min(errors)
    code, out, err = call(capsys, "eval", tmp_path / "run")
    assert (code, f"the best of 2 seeds, seed-{1 + errors.index(min(errors))}" in err) == (0, True)
    assert out.startswith(f"train dev (9 examples): mean_absolute_error {min(errors):.4f}\n")
    pair = ("--text", "one", "--text2", "two")
    alone = [float(table(call(capsys, "predict", run, *pair)[1])[0]["prediction"]) for run in runs]
    assert -500 < min(alone) < max(alone) < 1000
    code, out, err = call(capsys, "predict", tmp_path / "run", *pair, "--average")
    assert code == 0, err
    assert float(table(out)[0]["prediction"]) == pytest.approx(statistics.mean(alone))
    monkeypatch.setattr(trained, "load_pretrained", None)  # what is wrong is said before
    for more, says in (
        ((), "needs pairs: give --text2"),
        (("--text2", "two", "three"), "--text has 1 text, and --text2 2"),
        (("--text2", "two", "--probabilities"), "has scores, which have no --probabilities"),
    ):
        code, _, err = call(capsys, "predict", tmp_path / "run", "--text", "one", *more)
        assert (code, says in err) == (2, True)


class TestEncoding:
    """A CSV of an old Excel, in cp1252; its words are not those of other encodings.

    Oracle: the same rows in UTF-8.
    """

    def write(self, path: Path, encoding: str) -> Path:
        lines = ["text,label"]
        for row, each in enumerate(make_dataset("rte", 20, seed=5).examples):
            lines.append(f"{each.text_a} grüße {row},{('bug', 'praise')[row % 2]}")
        path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
        return path

    def train(self, small: SmallRun, data: Path, out: Path, *more: str | Path) -> list[str | Path]:
        words = "train --method bitfit --epochs 2 --batch-size 6 --max-length 16 --device cpu"
        places = ["--model", small.folder, "--data", data, "--out", out]
        return [*words.split(), "--quiet", "--learning-rate", "1e-2", *places, *more]

    def test_from_training_to_predictions(
        self, capsys: Capture, small: SmallRun, tmp_path: Path
    ) -> None:
        data = self.write(tmp_path / "old.csv", "cp1252")
        dev = self.write(tmp_path / "dev.csv", "cp1252")
        asked = ("--encoding", "cp1252", "--dev", dev)
        train = self.train(small, data, tmp_path / "run", *asked)
        code, _, err = call(capsys, *train[: -len(asked)], "--dev", dev)
        assert (code, "line 2: not UTF-8" in err, "--encoding cp1252" in err) == (2, True, True)

        with stopped_after(3):
            assert call(capsys, *train)[0] == 128 + 15
        code, _, err = call(capsys, *self.train(small, data, tmp_path / "run", "--encoding",
                                                "cp1251", "--dev", dev))  # fmt: skip
        assert (code, "holds another run: data.dev.sha256 is " in err) == (2, True)
        code, out, _ = call(capsys, *train)
        assert (code, f"rows of {data}, read as cp1252\n" in out) == (0, True)
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["about"]["encoding"] == "cp1252"
        whole = self.train(small, data, tmp_path / "whole", *asked)
        assert call(capsys, *whole)[0] == 0
        found = [tmp_path / run / "adapter.safetensors" for run in ("run", "whole")]
        assert found[0].read_bytes() == found[1].read_bytes()
        losses = [
            [(row["step"], row["loss"]) for row in read_log(tmp_path / run, "loss")]
            for run in ("run", "whole")
        ]
        assert losses[0] == losses[1]

        code, out, err = call(capsys, "eval", tmp_path / "run")
        assert (code, err) == (0, f"{dev}: read as cp1252 (--encoding)\n")
        code, old, err = call(capsys, "predict", tmp_path / "run", "--input", data)
        assert (code, err) == (0, f"{data}: read as cp1252 (--encoding)\n")
        new = self.write(tmp_path / "new.csv", "utf-8")
        asked = ("--encoding", "utf-8")
        arguments = ("predict", tmp_path / "run", "--input", new)
        assert call(capsys, *arguments, "--encoding", "utf-8") == (0, old, "")
        marked = self.write(tmp_path / "marked.csv", "utf-16")
        code, out, err = call(capsys, "predict", tmp_path / "run", "--input", marked)
        assert (code, out, err.count("read as utf-16-le")) == (0, old, 1)
        for where in (["--text", "x"], ["--submission", tmp_path / "s"]):
            code, _, err = call(capsys, "predict", tmp_path / "run", *where, *asked)
            assert (code, "--encoding needs --input" in err) == (2, True)
        # In this encoding the texts are the same, and so is the run.
        same = self.train(small, data, tmp_path / "run", "--encoding", "latin-1", "--dev", dev)
        assert call(capsys, *same)[0] == 0

    def test_files_of_glue_are_in_utf_8(
        self, capsys: Capture, small: SmallRun, tmp_path: Path
    ) -> None:
        write_glue(tmp_path / "glue")
        run = tmp_path / "run"
        code, *_ = call(capsys, *self.train(small, tmp_path / "glue", run, "--task", "rte"))
        assert code == 0
        dev = tmp_path / "glue" / "RTE" / "dev.tsv"
        for arguments in (("eval", run), ("predict", run, "--input", dev)):
            code, _, err = call(capsys, *arguments, "--encoding", "cp1252")
            assert (code, "those of RTE are in UTF-8" in err) == (2, True)
        table = "sentence1,sentence2\r\ncafé,the dog\r\n".encode("cp1252")
        (tmp_path / "t.csv").write_bytes(table)
        arguments = ("predict", run, "--input", tmp_path / "t.csv", "--encoding", "cp1252")
        assert call(capsys, *arguments)[0] == 0
        # Labels are not read, those of GLUE's own form neither.
        whole = call(capsys, "predict", run, "--input", dev)
        lines = dev.read_text().splitlines()
        cut = [line.rpartition("\t")[0] for line in lines[1:]]
        dev.write_text("\n".join([lines[0], *(f"{line}\tnew" for line in cut)]) + "\n")
        assert call(capsys, "predict", run, "--input", dev) == whole
        fields = [line.split("\t") for line in cut]
        rows = [{"idx": int(a), "sentence1": b, "sentence2": c, "label": 7} for a, b, c in fields]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, out, _ = call(capsys, "predict", run, "--input", tmp_path / "d.jsonl")
        assert out.splitlines()[1:] == whole[1].splitlines()[1:]
