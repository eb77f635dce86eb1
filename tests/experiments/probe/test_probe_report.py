"""``spafit probe``: its table, its files, its figure, and what it refuses.

Oracle: the files against each other and against the probes themselves.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import SmallRun, write_glue

from spafit.cli import main
from spafit.experiments.probe import figure, linear_probe, linguistic
from spafit.experiments.probe import report as probe_report
from spafit.experiments.probe.layers import Probed
from spafit.experiments.probe.report import screen
from spafit.experiments.probe.states import FILE

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    small: SmallRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Return a function that probes the tiny model, and returns exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(linear_probe, "STRENGTHS", (1.0, 0.1))  # to save time

    def probe(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        given = ["probe", "--model", str(small.folder), "--quiet", *arguments]
        try:
            code = main(given)
        except SystemExit as end:
            code = int(str(end.code))
        out, err = capsys.readouterr()
        return code, out, err

    return probe


def small_task(monkeypatch: pytest.MonkeyPatch) -> None:
    real = linguistic.datasets
    monkeypatch.setattr(linguistic, "datasets", lambda name: real(name, 0, 40, 20))


@pytest.mark.parametrize(
    ("majority", "masks"),
    [
        (0.8, {"chance": 0.5, "the commonest class": 0.8}),
        (0.503, {"chance, the commonest class": 0.503}),  # one line would hide the other
    ],
)
def test_the_figure_has_scores_and_masks(
    majority: float, masks: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    saved: list[Any] = []
    monkeypatch.setattr(figure, "save", lambda drawn, path: saved.append(drawn))
    of_seeds = np.array([[0.5, 0.6], [0.7, 0.9], [0.8, 0.6]])  # by layer
    probed = Probed({"accuracy": of_seeds}, of_seeds, of_seeds, of_seeds, of_seeds)
    summary = {"chance": {"accuracy": 0.5}, "majority": {"accuracy": majority}}
    summary |= {"seeds": [0, 1], "display": "RTE", "model": "tiny"}
    figure.draw({"mean": probed}, summary, tmp_path / "probe.png")
    [axes] = saved[0].axes
    scores, *lines = axes.lines
    assert list(scores.get_ydata()) == pytest.approx([0.55, 0.8, 0.7])
    assert {line.get_label(): line.get_ydata()[0] for line in lines} == masks


def test_of_a_generated_task(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_task(monkeypatch)
    code, out, _ = run("--task", "order", "--seeds", "4", "7")
    assert code == 0
    folder = tmp_path / "probes" / "order"
    names = {"probe.csv", "probe.json", "probe.png", FILE}
    assert {path.name for path in folder.iterdir()} == names
    assert f"written: probe.csv, probe.json, {FILE}, probe.png in probes/order" in out

    summary = json.loads((folder / "probe.json").read_text())
    assert summary["rows"] == {"train": 40, "dev": 20} and summary["seeds"] == [4, 7]
    assert summary["majority"]["accuracy"] == 0.5
    with (folder / "probe.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    header = ["state", "layer", "seed", "accuracy", "strength", "mix_accuracy", "mix_weight"]
    assert list(rows[0]) == header
    assert [(each["layer"], each["seed"]) for each in rows[:3]] == [
        ("0", "4"),
        ("0", "7"),
        ("1", "4"),
    ]
    for state in ("cls", "mean"):
        one = summary["states"][state]
        of_state = [each for each in rows if each["state"] == state]
        scores = np.array([float(each["accuracy"]) for each in of_state]).reshape(5, 2)
        weights = np.array([float(each["mix_weight"]) for each in of_state]).reshape(5, 2)
        assert one["scores"]["accuracy"]["mean"] == pytest.approx(scores.mean(1))
        deviations = scores.std(1, ddof=1)
        assert one["scores"]["accuracy"]["standard_deviation"] == pytest.approx(deviations)
        gravity = (np.arange(5)[:, None] * weights).sum(0)
        assert one["center_of_gravity"]["mean"] == pytest.approx(gravity.mean())

    table = out[out.index("Word order") : out.index("written")].splitlines()
    assert all(len(line) <= 80 for line in table), table
    [last] = [line for line in table if line.startswith("    4 ")]
    for state in ("cls", "mean"):
        scores = summary["states"][state]["scores"]["accuracy"]
        text = f"{scores['mean'][4]:.3f} ± {scores['standard_deviation'][4]:.3f}"
        assert text in last
    assert summary["says"] in " ".join(" ".join(table).split())


def test_the_states_are_used_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    small_task(monkeypatch)
    probe = functools.lru_cache(lambda seed, **_: real(*given, [seed]))
    real, given = probe_report.probe, []

    def once(*arguments, quiet):
        """The states are what is asked about; the probes on them take longer."""
        given[:] = given or arguments[:3]
        for split, states in arguments[0].items():
            for name, each in states.items():
                assert torch.equal(each, given[0][split][name])
        return probe(0)

    monkeypatch.setattr(probe_report, "probe", once)
    arguments = ("--task", "number", "--seeds", "0", "--out", "new/here")
    first, again = run(*arguments), run(*arguments)
    assert again[1] == f"states: those kept in new/here/{FILE}\n" + first[1]


def test_of_glue_and_of_own_data(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_glue(tmp_path / "glue")
    code, out, _ = run("--task", "rte", "--data", "glue", "--seeds", "0", "--rows", "10")
    assert code == 0 and "accuracy on 10 rows of dev of a linear probe" in " ".join(out.split())
    assert "for a figure of it: pip install '.[plot]'" in out
    assert not (tmp_path / "probes" / "rte" / "probe.png").exists()

    text = "".join(f"the cat sees {k} dogs,{k % 7 * 800 + 1.5}\n" for k in range(40))
    (tmp_path / "scores.csv").write_text("text,label\n" + text)
    code, out, _ = run("--data", "scores.csv", "--regression", "--seeds", "0")
    assert code == 0 and "scores, " in out and "always the mean" in out
    assert (tmp_path / "probes" / "scores" / "probe.json").exists()


def test_negative_scores_and_a_long_name_fit_the_table() -> None:
    scores = np.array([[-0.75, -0.5], [-0.5, -0.25]])
    one = Probed({"matthews": scores}, scores, scores, np.full((2, 2), 0.5), scores)
    summary = {
        "display": "Made",
        "model": "m" * 200,
        "rows": {"train": 10_000, "dev": 2_000},
        "seeds": [0, 1],
        "says": "Nothing.",
        "states": {name: probe_report._summary(one) for name in ("cls", "mean")},
        "chance": {"matthews": -0.125},
        "majority": {"matthews": 0.0},
    }
    found = {"cls": one, "mean": one}
    lines = screen(found, summary).splitlines()
    assert max(map(len, lines)) <= 80
    assert "    1   " + "-0.375 ± 0.177 * -0.375 ± 0.177   " * 2 in [f"{x}   " for x in lines]
    [gravity] = [line.split() for line in lines if line.startswith("centre of gravity")]
    assert gravity[3:] == 2 * ["0.50", "±", "0.00"]
    for name in ("cls", "mean"):  # of a mix that does no better, the centre tells nothing
        summary["states"][name]["expected_layer"] = None
    assert sum(line.count("no gain over 0") for line in screen(found, summary).splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--task order --text sentence", "--text is for a file of your own; the task order is"),
        ("--task order --data .", "--data . is a folder, and the task order is generated; leave"),
        ("--task order --regression", "--regression is for a file of your own"),
        ("--task order --rows 9", "a probe needs 10 rows or more, asked for are 9"),
        ("--task order --seeds 1 2 1", "--seeds has a duplicate: 1 2 1"),
        ("--task order --out file", "file cannot be written"),
        ("--task foo", "unknown GLUE task 'foo'"),
        ("--task ordr", "the tasks that are generated are pos, number, depth, order"),
        ("", "name a task of GLUE with --task"),
    ],
)
def test_what_is_refused(run: Run, tmp_path: Path, arguments: str, said: str) -> None:
    (tmp_path / "file").write_text("hello")
    code, _, err = run(*arguments.split())
    assert code == 2 and said in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
