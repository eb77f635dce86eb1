"""The benchmark of forgetting: rows, table and figure from the folders of tiny runs."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support.small_runs import write_glue

from benchmarks import forgetting
from benchmarks.harness import report
from spafit.cli import main
from spafit.experiments.probe import linear_probe
from weights_tools.tiny import make_tiny


def test_a_row_for_each_run_and_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the table against the rows, and what ``spafit inspect`` says of one of the runs."""
    monkeypatch.setattr(linear_probe, "STRENGTHS", (1.0,))  # to save time
    weights = str(make_tiny(tmp_path / "tiny", style="old", num_hidden_layers=3))
    data = str(write_glue(tmp_path / "glue"))
    (tmp_path / "texts.txt").write_text("a cat sees the dog\nthe old teacher sleeps\n")
    runs = {
        "full": ["full"],
        "direct": ["bitfit", "--bias", "direct"],
        "spafit": ["SPAFIT-0-1-II", "--seeds", "1"],
        "again": ["SPAFIT-0-1-II", "--seeds", "2"],
    }
    for name, method in runs.items():
        more = ["--epochs", "1", "--max-length", "16", "--learning-rate", "1e-2", "--quiet"]
        where = ["--model", weights, "--data", data, "--out", str(tmp_path / name)]
        assert main(["train", "--task", "rte", "--method", *method, *where, *more]) == 0
    options = ["--tasks", "rte", "--data", data, "--seeds", "3", "--out", str(tmp_path / "x")]
    folders = [str(tmp_path / name) for name in runs]
    forgetting.main([*folders, *options, "--texts", str(tmp_path / "texts.txt")])
    rows = report.read_rows(tmp_path / "x.csv")
    assert len(rows) == 4 * 3
    off = {row["method"]: row["off"] for row in rows}
    assert off == {
        "Full Fine-tuning": "not possible",
        "Full BitFit, direct": "the base",
        "SPAFIT-0-1-II": "the base",
    }
    assert [row["run_seed"] for row in rows[6:]] == ["1"] * 3 + ["2"] * 3
    assert {row["probed"] for row in rows} == {"rte", "masked tokens"}
    capsys.readouterr()
    arguments = ["--forgetting", "--tasks", "rte", "--data", data, "--seeds", "3", "--quiet"]
    assert main(["inspect", str(tmp_path / "again"), *arguments]) == 0
    shown = capsys.readouterr().out
    for row, label in zip(rows[9:11], ("[CLS]", "mean"), strict=True):
        [line] = [
            each for each in shown.splitlines() if each.startswith("rte      ") and label in each
        ]
        before, after, difference = line.split()[3:]
        assert float(row["before"]) == pytest.approx(float(before), abs=6e-4)
        assert float(row["after"]) == pytest.approx(float(after), abs=6e-4)
        assert float(row["difference"]) == pytest.approx(float(difference), abs=6e-4)
    table = (tmp_path / "x.md").read_text()
    losses = [float(row["difference"]) for row in rows[6:] if row["probed"] == "masked tokens"]
    text = f"{statistics.mean(losses):+.3f} ± {statistics.stdev(losses):.3f}"
    [line] = [
        each for each in table.splitlines() if each.startswith("| SPAFIT-0-1-II | the base |")
    ]
    assert line.split(" | ")[2] == "2" and text in line
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_several_tasks_are_told_apart() -> None:
    rows = [{"method": "bitfit", "trained_on": task} for task in ("RTE", "MRPC")]
    assert [row["method"] for row in forgetting.apart(rows)] == ["bitfit on RTE", "bitfit on MRPC"]
    assert forgetting.apart(rows[:1] * 2) == rows[:1] * 2
