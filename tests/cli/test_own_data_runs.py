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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_runs import SmallRun, make_dataset

import spafit
from spafit.cli import main, predicting
from spafit.cli.evaluating import evaluation_screen
from spafit.tasks.task import Dataset, Example

Capture = pytest.CaptureFixture[str]

KINDS = ("billing", "bug", "praise")


def call(capsys: Capture, *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def table(out: str, delimiter: str = "\t") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(out), delimiter=delimiter))


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
    assert main([*arguments, "--seeds", "1", "2"]) == 0
    return folder


class TestTrained:
    def test_the_record_has_the_task(self, folder: Path) -> None:
        record = json.loads((folder / "runs" / "seed-1" / "run.json").read_text())
        task = spafit.Task.from_json_dict(record["definition"])
        assert (task.name, task.fields, task.label_field) == ("tickets", ("message",), "kind")
        assert task.labels == KINDS
        assert record["about"]["dev_share"] == 0.2
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

    def test_summary_of_the_seeds(self, folder: Path) -> None:
        summary = json.loads((folder / "runs" / "summary.json").read_text())
        assert summary["runs"] == ["seed-1", "seed-2"]
        values = []
        for name in summary["runs"]:
            record = json.loads((folder / "runs" / name / "run.json").read_text())
            values.append(record["result"]["metrics"]["macro_f1"])
        found = summary["metrics"]["macro_f1"]
        assert (found["values"], found["best"]) == (values, max(values))
        assert found["mean"] == pytest.approx(statistics.mean(values))
        assert found["standard_deviation"] == pytest.approx(statistics.stdev(values))
        assert summary["best"] == f"seed-{1 + values.index(max(values))}"


class TestEval:
    def test_the_rows_that_were_split_off(self, capsys: Capture, folder: Path) -> None:
        run = folder / "runs" / "seed-1"
        result = json.loads((run / "run.json").read_text())["result"]
        code, out, _ = call(capsys, "eval", run)
        assert code == 0
        for name, score in result["metrics"].items():
            assert f"examples): {name} {score:.4f}   " in out

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
        assert all(row["kind" if "kind" in row else "label"] != row["prediction"] for row in wrong)
        assert f"({len(wrong)} mistakes)" in out
        assert {row["id"] for row in wrong} <= {f"T-{k}" for k in range(11)}
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

    def test_the_screen_fits(self) -> None:
        """A matrix that is too wide becomes a list of its largest cells."""
        names = tuple(f"a rather long label {k}" for k in range(30))
        task = spafit.Task("t", ("text",), names, ("accuracy",))
        examples = tuple(Example(k, "word " * 50, None, names[k % 30]) for k in range(90))
        predicted = [names[k % 7] for k in range(90)]
        sure = np.full((90, 30), 1 / 30)
        screen = evaluation_screen(Dataset(task, "dev", examples, "x"), list(predicted), sure, 80)
        assert max(map(len, screen.splitlines())) <= 80
        assert "the commonest confusions:" in screen
        narrow = spafit.Task("t", ("text",), names[:3], ("accuracy",))
        few = tuple(Example(k, "word", None, names[k % 3]) for k in range(9))
        screen = evaluation_screen(
            Dataset(narrow, "dev", few, "x"), list(names[:3]) * 3, sure[:9, :3], 80
        )
        assert "    0  3  0  0\n    1  0  3  0\n    2  0  0  3" in screen


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
        arguments = ("predict", folder / "runs" / "seed-1", "--input")
        assert call(capsys, *arguments, folder / "tickets.csv") == whole
        assert len(table(whole[1])) == 40

        class Stdin:
            buffer = io.BufferedReader(io.BytesIO((folder / "tickets.csv").read_bytes()))  # type: ignore[arg-type]

        monkeypatch.setattr(sys, "stdin", Stdin)
        assert call(capsys, *arguments, "-", "--output", "-") == whole

    def test_texts_given(self, capsys: Capture, folder: Path) -> None:
        run = folder / "runs" / "seed-1"
        code, out, _ = call(capsys, "predict", run, "--text", "it crashes", "my bill")
        assert code == 0
        assert [row["row"] for row in table(out)] == ["0", "1"]
        for more in (["--text2", "x", "y"], []):
            where = ["--text", "x", *more] if more else ["--submission", "s"]
            assert call(capsys, "predict", run, *where)[0] == 2

    def test_seeds(self, capsys: Capture, folder: Path) -> None:
        """The best of them, or the mean of their probabilities."""
        arguments: tuple[Any, ...] = ("--text", "it crashes", "--probabilities")
        alone = [
            table(call(capsys, "predict", folder / "runs" / f"seed-{seed}", *arguments)[1])[0]
            for seed in (1, 2)
        ]
        best = json.loads((folder / "runs" / "summary.json").read_text())["best"]
        code, out, err = call(capsys, "predict", folder / "runs", *arguments)
        assert code == 0
        assert f"the best of 2 seeds, {best}" in err
        assert table(out)[0] == alone[int(best[-1]) - 1]
        [row] = table(call(capsys, "predict", folder / "runs", *arguments, "--average")[1])
        for kind in KINDS:
            mean = statistics.mean(float(each[f"p_{kind}"]) for each in alone)
            assert float(row[f"p_{kind}"]) == pytest.approx(mean, abs=1e-5)
        assert row["prediction"] == max(KINDS, key=lambda kind: float(row[f"p_{kind}"]))


def test_scores_pairs_and_a_file_for_dev(capsys: Capture, small: SmallRun, tmp_path: Path) -> None:
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
        "--metric", "mean_absolute_error",
    )  # fmt: skip
    assert code == 0
    assert "scores of train: " in out
    code, out, _ = call(capsys, "eval", tmp_path / "run")
    assert code == 0
    assert out.startswith("train dev (9 examples): mean_absolute_error ")
    code, out, err = call(capsys, "predict", tmp_path / "run", "--text", "one", "--text2", "two")
    assert code == 0, err
    assert -500 < float(table(out)[0]["prediction"]) < 1000
    code, _, err = call(capsys, "predict", tmp_path / "run", "--text", "one")
    assert (code, "needs pairs: give --text2" in err) == (2, True)
