"""``spafit report``: from real runs to tables, and to GLUE's submission.

Oracle: the runs' own records, and what ``spafit predict`` writes of the same run.
"""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import pytest
from support.small_runs import WORDS, SmallRun, make_dataset

import spafit
from spafit.cli import main
from spafit.cli.trained import Trained
from spafit.tasks.table import TASKS
from spafit.tasks.task import Dataset, Example


@pytest.fixture(scope="module")
def runs(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds on WNLI, which has the smallest test file, trained by fit; and GLUE's file."""
    root = tmp_path_factory.mktemp("report")
    (root / "glue" / "WNLI").mkdir(parents=True)
    lines = ["index\tsentence1\tsentence2"]
    test = make_dataset("wnli", TASKS["wnli"].test.rows, "test", 7)
    lines += [f"{each.index}\t{each.text_a}\t{each.text_b}" for each in test]
    (root / "glue" / "WNLI" / "test.tsv").write_text("\n".join(lines) + "\n")
    data = make_dataset("wnli", 25, seed=1), make_dataset("wnli", 11, "dev", seed=2)
    about = {"model": str(small.folder), "data": str(root / "glue")}
    for seed, rate in ((0, 3e-3), (1, 1e-7)):
        out = root / "runs" / f"seed-{seed}"
        small.fit(data=data, about=about, out=out, seed=seed, epochs=3, learning_rate=rate)
    return root / "runs"


def record(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    return json.loads((folder / "run.json").read_text())


def test_the_report_of_real_runs(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# Report on runs\n\n2 finished runs of 2 methods on WNLI.")
    assert f"written: {tmp_path / 'out' / 'report.html'}\n" in out
    assert (tmp_path / "out" / "report.md").read_text() in out
    rows = list(csv.DictReader((tmp_path / "out" / "report.csv").read_text().splitlines()))
    scores = [record(runs / f"seed-{k}")["result"]["metrics"]["accuracy"] for k in (0, 1)]
    assert {float(row["mean"]) for row in rows} == set(scores)
    assert [row["method"].partition(" ")[2] for row in rows] == [
        *("(learning_rate 1e-07)", "(learning_rate 0.003)"),
    ]
    assert not (runs / "report.md").exists()


def test_a_terminal_without_these_characters(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    assert main(["report", str(runs), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.isascii()
    assert "mean ± standard deviation" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_it_stands_in_the_folder_itself(runs: Path) -> None:
    assert main(["report", str(runs)]) == 0
    assert main(["report", str(runs)]) == 0  # and is no run
    for name in ("report.md", "report.csv", "report.tex", "report.html"):
        (runs / name).unlink()


def test_submission(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No zip until all eleven files are there; WNLI's is that of the better run."""
    scores = {
        name: record(runs / name)["result"]["metrics"]["accuracy"] for name in ("seed-0", "seed-1")
    }
    best = max(scores, key=lambda name: scores[name])
    assert len(set(scores.values())) == 2
    main(["predict", str(runs / best), "--submission", str(tmp_path / "alone")])
    capsys.readouterr()
    there = tmp_path / "there"
    report = ["report", str(runs), "--out", str(tmp_path), "--submission", str(there)]
    assert main(report) == 1
    said = capsys.readouterr()
    assert f"WNLI: {best}, SPAFIT-0-1-II, dev accuracy {scores[best]:.4f}\n" in said.out
    assert [path.name for path in there.iterdir()] == ["WNLI.tsv"]
    assert (there / "WNLI.tsv").read_bytes() == (tmp_path / "alone" / "WNLI.tsv").read_bytes()
    for name in ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "QNLI", "RTE"):
        assert f"{name}: no finished run with an adapter\n" in said.err
    assert "no zip is written, because GLUE's server takes all 11 files or none; " in said.err
    lacking = "CoLA.tsv, SST-2.tsv, MRPC.tsv, STS-B.tsv, QQP.tsv, MNLI-m.tsv, MNLI-mm.tsv, QNLI.tsv"
    assert said.err.endswith(f"{there} lacks {lacking}, RTE.tsv, AX.tsv\n")
    for task in TASKS.values():  # what is lacking may be put there
        value = task.spelling[0] if task.spelling else "2.500"
        rows = "".join(f"{k}\t{value}\n" for k in range(task.test.rows))
        if task.name != "wnli":
            (there / task.submission).write_text(f"index\tprediction\n{rows}")
    assert main(report) == 0
    others = "CoLA.tsv, SST-2.tsv, MRPC.tsv, STS-B.tsv, QQP.tsv, MNLI-m.tsv, MNLI-mm.tsv, AX.tsv, "
    others += "QNLI.tsv, RTE.tsv"
    assert capsys.readouterr().out.endswith(
        f"of no run here, as they were in {there}: {others}\nwritten: {there / 'submission.zip'}\n"
    )
    with zipfile.ZipFile(there / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(task.submission for task in TASKS.values())
        assert archive.read("WNLI.tsv") == (there / "WNLI.tsv").read_bytes()
    (tmp_path / "glue" / "WNLI").mkdir(parents=True)
    (tmp_path / "glue" / "WNLI" / "test.tsv").write_text("not what GLUE has\n")
    assert main([*report, "--data", str(tmp_path / "glue")]) == 1
    said = capsys.readouterr()
    assert said.err.endswith("; predictions failed that would replace WNLI.tsv\n")
    assert f"removed: {there / 'submission.zip'}, of an earlier call\n" in said.out
    assert not (there / "submission.zip").exists()
    assert (there / "WNLI.tsv").read_bytes() == (tmp_path / "alone" / "WNLI.tsv").read_bytes()


@pytest.fixture
def mnli(small: SmallRun, tmp_path: Path) -> Path:
    """A run of MNLI, and the test sets of both its halves and of AX, of one word a text."""
    root = tmp_path / "mnli"
    data = make_dataset("mnli", 25, seed=1), make_dataset("mnli", 11, "dev", seed=2)
    about = {"model": str(small.folder), "data": str(root / "glue")}
    small.fit(small.model(num_labels=3), data=data, about=about, out=root / "runs" / "a")
    for shift, name in enumerate(FAMILY):
        task = TASKS[name]
        (root / "glue" / task.folder).mkdir(parents=True, exist_ok=True)
        rows = "".join(
            json.dumps(dict(zip(("premise", "hypothesis"), words(k + shift), strict=True))) + "\n"
            for k in range(task.test.rows)
        )
        (root / "glue" / task.folder / task.test.file).with_suffix(".jsonl").write_text(rows)
    return root


FAMILY = ("mnli", "mnli-mm", "ax")


def words(k: int) -> tuple[str, str]:
    return WORDS[k % 13], WORDS[k // 13 % 13]


def test_one_run_predicts_both_halves_of_mnli_and_ax(
    mnli: Path,
    small: SmallRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the Python interface, on each pair of words once. A half left out is a failure."""
    model = spafit.load_pretrained(small.folder, num_labels=3)
    spafit.load_adapter(model, mnli / "runs" / "a" / "adapter.safetensors")
    examples = tuple(Example(k, *words(k), None) for k in range(13 * 13))
    pairs = Dataset(TASKS["mnli"], "test", examples, "words")
    expected = spafit.predict(model, small.tokenizer, pairs, max_length=16).labels
    assert len(set(expected)) > 1
    there = tmp_path / "there"
    report = ["report", str(mnli / "runs"), "--out", str(tmp_path), "--submission", str(there)]
    assert main(report) == 1
    assert capsys.readouterr().err.endswith("QNLI.tsv, RTE.tsv, WNLI.tsv\n")
    for shift, name in enumerate(FAMILY):
        _, *lines = (there / TASKS[name].submission).read_text().splitlines()
        assert lines == [
            f"{k}\t{expected[(k + shift) % 169]}" for k in range(TASKS[name].test.rows)
        ]
    (mnli / "glue" / "MNLI" / "test_mismatched.jsonl").unlink()
    monkeypatch.setattr(Trained, "predict", lambda _, rows: (["neutral"] * len(rows), None))
    assert main(report) == 1
    said = capsys.readouterr().err
    assert f"mnli-mm left out, and {there / 'MNLI-mm.tsv'} is of an earlier call: no file" in said
    assert said.endswith("; predictions failed that would replace MNLI-mm.tsv\n")


def test_a_task_that_cannot_be_predicted_does_not_stop_the_others(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["report", str(runs), "--out", str(tmp_path), "--submission", str(tmp_path / "x")]
    assert main([*command, "--data", str(tmp_path)]) == 2
    assert "has no test set of WNLI" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "WNLI").mkdir()
    (tmp_path / "WNLI" / "test.tsv").write_text("not what GLUE has\n")
    assert main([*command, "--data", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "WNLI left out: " in err
    assert "WNLI.tsv" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not there; name a folder with runs below it"),
        (["."], ". has no run below it (no run.json)"),
        ([".", "--data", "glue"], "--data and --model are for --submission"),
        ([".", "--out", "file"], "file cannot be written"),
        ([".", "--submission", "file"], "file cannot be written"),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
