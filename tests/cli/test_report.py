"""``spafit report``: from real runs to tables, and to GLUE's submission.

Oracle: the runs' own records, and what ``spafit predict`` writes of the same run.
"""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import pytest
from support.small_runs import SmallRun, make_dataset

from spafit.cli import main
from spafit.tasks.table import TASKS


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
    assert f"written: {there / 'submission.zip'}\n" in capsys.readouterr().out
    with zipfile.ZipFile(there / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(task.submission for task in TASKS.values())
        assert archive.read("WNLI.tsv") == (there / "WNLI.tsv").read_bytes()


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
