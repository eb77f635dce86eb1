"""The benchmark of probes: rows and figure of a generated task and one of GLUE's."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support.grids import write_tasks

from benchmarks import probes
from benchmarks.harness import report
from benchmarks.harness.arguments import RESULTS
from spafit.experiments.probe import linear_probe
from weights_tools.tiny import make_tiny


def test_a_row_for_each_state_and_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what ``spafit probe`` writes for each seed."""
    monkeypatch.setattr(linear_probe, "STRENGTHS", (1.0,))  # to save time
    tiny, data = make_tiny(tmp_path / "tiny", num_hidden_layers=2), write_tasks(tmp_path / "glue")
    where = ["--model", str(tiny), "--data", str(data), "--folder", str(tmp_path / "p")]
    how = ["--tasks", "order", "rte", "--rows", "40", "--seeds", "1", "2"]
    probes.main([*how, *where, "--out", str(tmp_path / "x")])
    rows = report.read_rows(tmp_path / "x.csv")
    keys = [(row["task"], row["states"], row["layer"]) for row in rows]
    assert keys == [
        (task, states, layer)
        for task in ("order", "rte")
        for states in ("cls", "mean")
        for layer in "012"
    ]
    with (tmp_path / "p" / "rte" / "probe.csv").open(newline="") as file:
        of_seeds = list(csv.DictReader(file))
    for row in rows[6:]:
        its = [
            each
            for each in of_seeds
            if (each["state"], each["layer"]) == (row["states"], row["layer"])
        ]
        for name, of_it in (("score", "accuracy"), ("mix", "mix_accuracy")):
            values = [float(each[of_it]) for each in its]
            assert float(row[name]) == pytest.approx(statistics.mean(values), rel=1e-3)
        spread = statistics.stdev(float(each["accuracy"]) for each in its)
        assert float(row["deviation"]) == pytest.approx(spread, rel=1e-3)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert "| order |" in (tmp_path / "x.md").read_text(encoding="utf-8")


def test_each_panel_has_curves_bands_and_the_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the recorded rows, by what the axes hold."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = report.read_rows(RESULTS / "probes.csv")
    probes.draw(rows, tmp_path / "x.png")
    [figure] = figures
    by_task: dict[str, list[report.Row]] = {}
    for row in rows:
        by_task.setdefault(str(row["task"]), []).append(row)
    assert len(figure.axes) == len(by_task) == 8
    for axes, (task, its) in zip(figure.axes, by_task.items(), strict=True):
        assert axes.get_title() == f"{task} ({its[0]['metric']})"
        cls, mean, chance, commonest = axes.lines
        for line, states in ((cls, "cls"), (mean, "mean")):
            scores = [float(row["score"]) for row in its if row["states"] == states]
            assert list(line.get_ydata()) == scores
        for line, column in ((chance, "chance"), (commonest, "commonest_class")):
            assert set(line.get_ydata()) == {float(its[0][column])}
            assert line.get_label() == column.replace("_", " ")
