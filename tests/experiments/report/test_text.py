r"""A report in Markdown, CSV and LaTeX.

Oracle: the tables read back by their rules: | and \ in Markdown, csv, & and \\ in LaTeX.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from support.written_runs import LARGE_CASED, write_run

from spafit.experiments.report.statistics import Paired
from spafit.experiments.report.tables import Comparison, make_report
from spafit.experiments.report.text import (
    comma_separated,
    comparison_cells,
    latex,
    markdown,
    millions,
    outcome,
    p_text,
    tex,
)

NASTY = r"_a_b_|50% & <i>\x{y}$#~^*[z]`"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "my_runs"
    for seed, score in enumerate((0.7, 0.72)):
        ours = {"method": "SPAFIT-4-9-II", "base": LARGE_CASED, "trainable": 7_484_418}
        write_run(folder / f"s{seed}", score, seed=seed, **ours)
        write_run(folder / f"n{seed}", score, seed=seed, method=NASTY, trainable=770)
    write_run(folder / "c", 0.5, task="cola", method=NASTY, trainable=12_585_987)
    write_run(folder / "half", 0.5, status="failed", method=NASTY)
    return folder


def cells(line: str) -> list[str]:
    """Read a row of a Markdown table: | ends a cell unless a backslash stands before it."""
    parts = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [re.sub(r"\\(.)", r"\1", part).strip() for part in parts]


def test_markdown(folder: Path) -> None:
    text = markdown(make_report(folder))
    lines = text.splitlines()
    assert lines[0] == "# Report on my_runs"
    assert lines[2] == "5 finished runs of 2 methods on CoLA, RTE; 1 other is not reported."
    table = [cells(line) for line in lines[4:9]]
    heads = "method|params (M)|seeds|CoLA (matthews)|RTE (accuracy)|mean"
    assert table[0] == heads.split("|")
    assert table[2] == ["majority baseline", "", "", "0.500", "0.500", ""]
    assert table[3][:3] == [NASTY, "0.000770-12.59", "1-2"]
    assert table[3][3:5] == ["0.500", "0.710 ± 0.014 (0.720)"]
    assert table[4][4] == "0.710 ± 0.014 (0.720); paper 0.76"
    assert len({len(line) for line in lines[4:9]}) == 1  # aligned for a terminal
    assert "reports the maximum of all its runs" in text
    assert "half" in text and "ConfigError" in text


def test_csv(folder: Path) -> None:
    rows = list(csv.DictReader(comma_separated(make_report(folder)).splitlines()))
    assert [(row["method"], row["task"]) for row in rows] == [
        (NASTY, "cola"),
        (NASTY, "rte"),
        ("SPAFIT-4-9-II", "rte"),
    ]
    last = rows[-1]
    assert float(last["mean"]) == pytest.approx(0.71)
    assert (last["maximum"], last["minimum"], last["n"]) == ("0.72", "0.7", "2")
    assert (last["seeds"], last["paper"], last["majority"]) == ("0 1", "0.76", "0.5")
    assert list(rows[0])[-1] == "paper" and rows[0]["paper"] == ""  # no task has a second metric
    assert rows[0]["standard_deviation"] == ""
    assert [row["trainable"] for row in rows] == ["12585987", "770", "7484418"]


def test_csv_says_where_the_runs_of_a_cell_train_different_numbers(tmp_path: Path) -> None:
    for seed, trainable in enumerate((770, 1155)):
        write_run(tmp_path / str(seed), 0.7, seed=seed, trainable=trainable)
    [row] = csv.DictReader(comma_separated(make_report(tmp_path)).splitlines())
    assert row["trainable"] == "varies"


def test_csv_has_every_metric_of_a_task(tmp_path: Path) -> None:
    """A metric that is a further one of some task, wherever all runs of a row have it."""
    for seed, (f1, accuracy) in enumerate(((0.8, 0.7), (0.9, 0.74))):
        both = {"task": "mrpc", "seed": seed, "metrics": {"accuracy": accuracy, "log_loss": 0.3}}
        write_run(tmp_path / f"m{seed}", f1, **both)
        write_run(tmp_path / f"r{seed}", 0.6 + 0.2 * seed, seed=seed)
        more = {} if seed else {"accuracy": 0.5}
        write_run(tmp_path / f"b{seed}", f1, task="mrpc", method="BitFit", seed=seed, metrics=more)
    write_run(tmp_path / "c", 0.4, task="cola")
    rows = list(csv.DictReader(comma_separated(make_report(tmp_path)).splitlines()))
    found = {(row["method"], row["task"]): row for row in rows}
    assert list(rows[0])[-5:] == [
        *("paper", "accuracy_mean", "accuracy_standard_deviation"),
        *("log_loss_mean", "log_loss_standard_deviation"),
    ]
    mrpc, rte = found["SPAFIT-1-3-II", "mrpc"], found["SPAFIT-1-3-II", "rte"]
    assert (mrpc["metric"], rte["metric"]) == ("f1", "accuracy")
    assert float(mrpc["mean"]) == pytest.approx(0.85)
    assert float(mrpc["accuracy_mean"]) == pytest.approx(0.72)
    assert float(mrpc["accuracy_standard_deviation"]) == pytest.approx(0.02 * 2**0.5)
    assert (mrpc["log_loss_mean"], mrpc["log_loss_standard_deviation"]) == ("0.3", "0.0")
    assert rte["accuracy_mean"] == rte["mean"] and rte["log_loss_mean"] == ""
    for row in (found["SPAFIT-1-3-II", "cola"], found["BitFit", "mrpc"]):
        assert {row[name] for name in list(rows[0])[-4:]} == {""}


def test_latex(folder: Path) -> None:
    lines = latex(make_report(folder)).splitlines()
    begun = [re.findall(r"\\(begin|end)\{(\w+)\}", line) for line in lines]
    assert [each for line in begun for each in line] == [
        ("begin", "table"),
        ("begin", "tabular"),
        ("end", "tabular"),
        ("end", "table"),
    ]
    [columns] = [m[1] for line in lines if (m := re.search(r"\{tabular\}\{(\w+)\}", line))]
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 4
    for row in rows:
        assert len(re.split(r"(?<!\\)&", row)) == len(columns) == 6
    rules = [line for line in lines if line.endswith("rule")]
    assert rules == ["\\toprule", "\\midrule", "\\midrule", "\\bottomrule"]
    assert r"0.710 $\pm$ 0.014 (0.720); paper 0.76" in rows[3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 50%", r"a\_b \& 50\%"),
        ("#1 {x} $", r"\#1 \{x\} \$"),
        (r"\~^", r"\textbackslash{}\textasciitilde{}\textasciicircum{}"),
        ("(IA)³ ± <é>", r"(IA)\textsuperscript{3} $\pm$ \textless{}é\textgreater{}"),
        ("[x] 猫", "{[}x{]} ?"),
    ],
)
def test_escaping_for_latex(text: str, expected: str) -> None:
    assert tex(text) == expected


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (333_582_339, "333.58"),
        (7_485_443, "7.49"),
        (1_000_000, "1.00"),
        (407_042, "0.407"),
        (26_114, "0.0261"),
        (770, "0.000770"),
        (0, "0.00"),
    ],
)
def test_millions(count: int, text: str) -> None:
    assert millions(count) == text


def test_a_comparison_in_words() -> None:
    def of(difference: float, p: float | None, needed: int | None, sign: int = 1) -> Comparison:
        test = Paired(3, difference, difference - 0.01, difference + 0.01, p, needed)
        return Comparison("Full LoRA-II", "RTE", sign, 3, 3, test)

    assert comparison_cells(of(0.02, 0.01234, 4)) == [
        *("Full LoRA-II", "RTE", "3", "+0.020", "0.010 to 0.030", "0.012", "4", "better"),
    ]
    assert comparison_cells(of(-0.00001, 0.9, None))[3:7] == [
        *("0.000", "-0.010 to 0.010", "0.900", "over 100,000"),
    ]
    assert outcome(of(-0.02, 0.04, 4)) == outcome(of(0.02, 0.04, 4, sign=-1)) == "worse"
    assert outcome(of(0.02, 0.05, 4)) == "no difference seen"
    assert [p_text(p) for p in (None, 1e-9, 0.00052)] == ["no spread", "< 0.0001", "0.0005"]
    assert comparison_cells(of(0.0, None, None))[3:] == ["0.000", "", "no spread", "", "the same"]
    assert outcome(of(0.2, None, None)) == "no test"
    single = Comparison("Full LoRA-II", "RTE", 1, 1, 1, None)
    assert comparison_cells(single)[2:] == ["1", "", "", "", "", "no test"]
