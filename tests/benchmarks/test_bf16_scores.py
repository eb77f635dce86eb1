"""Scores in bf16 and float32: runs are told apart by their precision."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from support.written_runs import OF_BENCHMARKS as RECORD
from support.written_runs import SETTINGS, write_run

from benchmarks import bf16_scores
from benchmarks.glue_minilm import read_rows
from benchmarks.harness.arguments import RESULTS
from benchmarks.peft_scores import compare, sides_of
from spafit.experiments.report.statistics import LEVEL

SCORES = {"float32": (0.60, 0.64, 0.62), "bf16": (0.61, 0.62, 0.66)}


def test_the_sides_are_the_precisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = []
    for precision, scores in SCORES.items():
        cells.append(tmp_path / precision / "SPAFIT-1-3-II")
        for seed, score in enumerate(scores):
            settings = {**SETTINGS, "precision": precision}
            write_run(cells[-1] / f"seed-{seed}", score, seed=seed, settings=settings, **RECORD)
    out = tmp_path / "rows.csv"
    bf16_scores.main([*map(str, cells), "--out", str(out)])
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for precision, scores in SCORES.items():
        its = [float(row["score"]) for row in rows if row["side"] == precision]
        assert its == pytest.approx(scores)
    [sides] = sides_of(rows, bf16_scores.PRECISIONS).values()
    found = compare(*sides)
    assert found.difference == pytest.approx(0.63 - 0.62)  # bf16 minus float32
    cells_of_table = (
        "| rte | SPAFIT-1-3-II | accuracy | 3 + 3 | 0.6200 ± 0.0200 | 0.6300 ± 0.0265 |"
    )
    assert cells_of_table in capsys.readouterr().out
    assert cells_of_table in out.with_suffix(".md").read_text(encoding="utf-8")


def test_runs_that_are_not_finished_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "cell" / "seed-0", 0.5, status="running")
    with pytest.raises(SystemExit):
        bf16_scores.main([str(tmp_path / "cell"), "--out", str(tmp_path / "rows.csv")])
    assert "seed-0 is not finished" in capsys.readouterr().err
    assert not (tmp_path / "rows.csv").exists()


def test_the_recorded_scores_agree() -> None:
    """Fixed before the runs: Welch's test of each task's first metric, by Holm's correction."""
    rows = read_rows(RESULTS / "bf16_scores.csv")
    assert {row["method"] for row in rows} == {"SPAFIT-1-3-II"}
    first = {"rte": "accuracy", "mrpc": "f1", "cola": "matthews", "sts-b": "pearson"}
    for side in bf16_scores.PRECISIONS:
        for task, metric in first.items():
            its = [r for r in rows if (r["side"], r["task"], r["metric"]) == (side, task, metric)]
            assert sorted(row["seed"] for row in its) == list("01234")
            assert len({(row["learning_rate"], row["epochs"]) for row in its}) == 1
    sides = sides_of(rows, bf16_scores.PRECISIONS)
    p = sorted(compare(*sides[task, "SPAFIT-1-3-II", metric]).p for task, metric in first.items())
    assert p[0] * len(p) > LEVEL  # Holm's first step, and so no difference is seen
    assert bf16_scores.table(rows, bf16_scores.PRECISIONS) == (
        RESULTS / "bf16_scores.md"
    ).read_text(encoding="utf-8")
