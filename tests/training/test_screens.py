"""What a run prints fits 80 columns, in the characters of the stream.

Oracle: results with the widest values of GLUE's tasks.
"""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from pathlib import Path

import pytest
import torch

from spafit.bert import BertForSequenceClassification
from spafit.cli import main
from spafit.cli.evaluating import evaluation_screen
from spafit.config import BertConfig
from spafit.runs.journal import Journal
from spafit.runs.progress import Progress
from spafit.strata import adapt
from spafit.summary import GroupSummary, Summary
from spafit.tasks.task import Dataset, Example, Task
from spafit.techniques import TECHNIQUES, Technique
from spafit.training.result import Result, plan_screen, result_screen, spread_screen

SCORES = {"matthews": -0.12345, "spearman": -0.98765}
RESULT = Result(
    metrics=SCORES,
    majority=SCORES,
    best_epoch=100,
    best_step=4_548_100,
    history=(),
    losses=(),
    trainable=333_582_339,
    percent=100.0,
    examples_per_s=12345.6,
    peak_memory_mib=123_456.7,
    seconds=1_234_567.8,
    truncated={"train": 392_702, "dev": 9_832},
    files=(Path("runs/run.json"),),
    skipped=12_345,
)


@pytest.fixture
def summary() -> Summary:
    with torch.device("meta"):
        return adapt(BertForSequenceClassification(BertConfig(), num_labels=3), "SPAFIT-4-14-II")


def fits(text: str) -> bool:
    return max(map(len, text.splitlines())) <= 80


def test_of_a_result(summary: Summary) -> None:
    assert fits(result_screen(RESULT, summary, "MNLI-mm"))


def test_of_many_seeds() -> None:
    seeds = list(range(100_000, 100_030))
    results = [dataclasses.replace(RESULT, metrics={**SCORES, "matthews": 1 / s}) for s in seeds]
    screen = spread_screen(results, seeds)
    assert fits(screen), screen
    assert " ".join(screen.split()).startswith("30 seeds (100000, 100001, ")
    assert "  matthews  mean 0.0000, standard deviation 0.0000, maximum 0.0000\n" in screen
    for constant in ("commonest class", "mean"):  # of classes, and of scores
        assert screen.count(f"\n            (always the {constant}: -0.") == 1


def test_the_best_of_many_errors_is_the_smallest() -> None:
    results = [
        dataclasses.replace(RESULT, metrics={"log_loss": x}, majority={"log_loss": 9.0})
        for x in (0.5, 0.25)
    ]
    assert "minimum 0.2500\n" in spread_screen(results, [0, 1])


def test_of_an_evaluation() -> None:
    stream = io.StringIO()
    found = {"epoch": 10, "step": 454_810, "metrics": SCORES}
    Journal(Progress(9, stream=stream), None).evaluation(found, SCORES, is_best=True)
    assert stream.getvalue() == (
        "epoch 10, step 454810: dev matthews -0.1235 (majority -0.1235),\n"
        "  spearman -0.9877 (majority -0.9877), best so far\n"
    )


def test_of_eval() -> None:
    """One line where it fits, else two."""
    for name, expected in (
        ("t", "t dev (4 examples): accuracy 0.7500   (always the commonest class: 0.5000)\n"),
        ("t" * 40, f"{'t' * 40} dev (4 examples): accuracy 0.7500\n    (always the commonest"),
    ):
        task = Task(name, ("text",), ("a", "b"), ("accuracy",))
        examples = tuple(Example(k, "x", None, "ab"[k % 2]) for k in range(4))
        screen = evaluation_screen(Dataset(task, "dev", examples, "x"), list("abaa"), None, 80)
        assert screen.startswith(expected)


class TestPlan:
    """Oracle: ``str(summary)``, which is always in Unicode and without colours."""

    def test_in_ascii(self, monkeypatch: pytest.MonkeyPatch, summary: Summary) -> None:
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        screen = plan_screen(summary)
        assert re.sub("[─│┌┬┐├┼┤└┴┘]", "#", str(summary)) == re.sub(r"[-|+](?![\dI])", "#", screen)

    def test_in_colours(self, monkeypatch: pytest.MonkeyPatch, summary: Summary) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdout", stream)
        screen = plan_screen(summary)
        assert "\x1b[2mfrozen\x1b[m" in screen
        assert re.sub(r"\x1b\[\d*m", "", screen) == str(summary)

    @pytest.mark.parametrize("technique", TECHNIQUES.values())
    def test_every_technique_has_a_colour(
        self, monkeypatch: pytest.MonkeyPatch, summary: Summary, technique: type[Technique]
    ) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdout", stream)
        words = technique().caption.split()[0]
        groups = (GroupSummary("one", "0-3", (words,), 1),)
        assert re.search(
            rf"\x1b\[\d+m{re.escape(words)}\x1b\[m",
            plan_screen(dataclasses.replace(summary, groups=groups)),
        )

    @pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"LC_ALL": "C"}])
    def test_by_the_command(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        variables: dict[str, str],
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert main(["plan", "bitfit"]) == 0
        out = capsys.readouterr().out
        assert out.isascii()
        assert "| all layers | 0-23   | bias        |   270,336 | 0.08 |\n" in out
