"""Scores beside PEFT's: its own draws train the same, and the test sees what it says it sees."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.grids import write_tasks
from support.written_runs import OF_BENCHMARKS as RECORD
from support.written_runs import SETTINGS, write_run

from benchmarks import peft_scores
from benchmarks.contenders.baseline import peft_twin, plain_name
from benchmarks.glue_minilm import read_rows
from benchmarks.harness.arguments import RESULTS
from benchmarks.harness.report import commit
from spafit.experiments.report.statistics import LEVEL
from spafit.strata import adapt
from spafit.tasks import glue
from spafit.text.tokenization import load_tokenizer
from spafit.training.fit import fit
from spafit.training.settings import TrainConfig
from spafit.weights.pretrained import load_pretrained
from weights_tools.tiny import make_tiny


def test_runs_of_peft_have_the_settings_of_ours(tmp_path: Path) -> None:
    data, tiny = write_tasks(tmp_path / "glue"), make_tiny(tmp_path / "tiny")
    train, dev = (glue.load("rte", split, data) for split in ("train", "dev"))
    for seed in (3, 4):
        model = load_pretrained(tiny, num_labels=2, seed=seed)
        adapt(model, "lora-ii", seed=seed)
        config = TrainConfig(
            out=tmp_path / f"cell/seed-{seed}", seed=seed, epochs=2, warmup=0.1, device="cpu",
            learning_rate=1e-3, batch_size=6, max_length=16, quiet=True,
        )  # fmt: skip
        about = {"model": str(tiny), "data": str(data)}
        fit(model, load_tokenizer(tiny), train, dev, config, about=about)
    out = tmp_path / "rows.csv"
    peft_scores.main([str(tmp_path / "cell"), "--out", str(out)])
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sides = [(row["side"], row["seed"]) for row in rows]
    ours, theirs = peft_scores.SPAFIT, peft_scores.PEFT
    assert sides == [(ours, "3"), (theirs, "3"), (ours, "4"), (theirs, "4")]
    same = ("trainable", "learning_rate", "epochs", "warmup", "train_rows", "dev_rows", "metric")
    for mine, other in zip(rows[::2], rows[1::2], strict=True):
        assert [mine[name] for name in same] == [other[name] for name in same]
    for row in rows[::2]:
        record = json.loads((tmp_path / f"cell/seed-{row['seed']}/run.json").read_text())
        assert float(row["score"]) == pytest.approx(record["result"]["metrics"]["accuracy"])
    assert [row["commit"] for row in rows] == ["", commit()] * 2  # no record has one
    text = out.with_suffix(".md").read_text()
    assert "| rte | Full LoRA-II | accuracy | 2 + 2 |" in text
    assert [line.count("commit") for line in text.splitlines() if " threads, " in line] == [0, 1]
    assert text.count(f", spafit {rows[0]['spafit']}") == 2
    # What is done is not done again.
    before = out.read_bytes()
    peft_scores.main([str(tmp_path / "cell"), "--out", str(out)])
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("running", "it is running, or was killed; the command that began it, given again"),
        ("failed", "it is failed, ConfigError: it was <b>; the command that began it, given"),
        (None, "is not the record of a run, or it is damaged"),
        ("none", "has no run (no seed-*/run.json); name the folder of a cell"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: str | None, said: str
) -> None:
    cell, out = tmp_path / "cell", tmp_path / "rows.csv"
    if status != "none":
        write_run(cell / "seed-3", 0.5, seed=3)
        write_run(cell / "seed-4", 0.5, seed=4, status=status or "finished")
    if status is None:
        (cell / "seed-4" / "run.json").write_text("[]")
    with pytest.raises(SystemExit) as end:
        peft_scores.main([str(cell), "--out", str(out)])
    shown = capsys.readouterr()
    assert end.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    assert said in shown.err
    assert shown.err.startswith(str(cell if status == "none" else cell / "seed-4"))
    assert not out.exists()


def test_runs_with_other_settings_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[float] = []

    def train(record: dict[str, Any]) -> list[dict[str, str]]:
        trained.append(record["settings"]["learning_rate"])
        return [{**row, "side": peft_scores.PEFT} for row in peft_scores.rows_of(record, "")]

    monkeypatch.setattr(peft_scores, "train", train)
    out = tmp_path / "rows.csv"
    for rate in (1e-4, 1e-3):
        for seed in (0, 1):
            settings = {**SETTINGS, "learning_rate": rate}
            write_run(tmp_path / f"{rate}/seed-{seed}", 0.5, seed=seed, settings=settings, **RECORD)
    peft_scores.main([str(tmp_path / "0.0001"), "--out", str(out)])
    before = out.read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        peft_scores.main([str(tmp_path / "0.001"), "--out", str(out)])
    err = capsys.readouterr().err
    assert "seed-0 has other settings than the runs of SPAFIT-1-3-II on rte in " in err
    assert out.read_bytes() == before and trained == [1e-4, 1e-4]


def test_own_draws_are_not_copies(tmp_path: Path) -> None:
    model = load_pretrained(make_tiny(tmp_path / "tiny"), seed=0)
    adapt(model, "lora-ii", seed=0)
    mine = {plain_name(name): each for name, each in model.named_parameters()}
    for own in (False, True):
        twin = peft_twin(model, own_draws=own)
        for name, each in twin.named_parameters():
            if each.requires_grad and ("lora_A" in name or name.endswith("classifier.weight")):
                assert torch.equal(mine[plain_name(name)], each) != own, name
        B = [each for name, each in twin.named_parameters() if "lora_B" in name]
        assert B and not any(each.any() for each in B)


def test_welch_and_the_difference_that_is_seen() -> None:
    """Oracle: scipy, and 4,000 simulated pairs of samples."""
    ours, theirs = [0.1, 0.3, 0.2, 0.25, 0.15], [0.2, 0.31, 0.4, 0.28, 0.22]
    found = peft_scores.compare(ours, theirs)
    stricter = peft_scores.compare(ours, theirs, 0.025)
    welch = stats.ttest_ind(theirs, ours, equal_var=False)
    assert found.p == pytest.approx(welch.pvalue)
    assert found.low < found.difference < found.high
    assert found.difference == pytest.approx(statistics.mean(theirs) - statistics.mean(ours))
    deviation = (statistics.variance(ours) / 2 + statistics.variance(theirs) / 2) ** 0.5
    draw = np.random.default_rng(0)
    x = draw.normal(0, deviation, (4000, 5))
    for seen, level in ((found.seen, 0.05), (stricter.seen, 0.025)):
        y = draw.normal(seen, deviation, (4000, 5))
        p = stats.ttest_ind(x, y, axis=1).pvalue
        assert np.mean(p < level) == pytest.approx(0.8, abs=0.02)


def test_the_recorded_scores_agree() -> None:
    """Welch's test of the first metric of two cells, by Holm's correction; and its power.

    And Cramér and von Mises' test, which sees other differences than those of the means.
    """
    rows = read_rows(RESULTS / "peft_scores.csv")
    cells = [("cola", "SPAFIT-0-2-II", "matthews"), ("mrpc", "Full LoRA-II", "f1")]
    for task, method, metric in cells:
        for side in (peft_scores.SPAFIT, peft_scores.PEFT):
            its = [r for r in rows if (r["task"], r["side"], r["metric"]) == (task, side, metric)]
            assert [(r["method"], r["seed"]) for r in its] == [(method, seed) for seed in "01234"]
    sides = [peft_scores.sides_of(rows)[cell] for cell in cells]
    first = LEVEL / len(cells)  # the level of Holm's first step
    found = [peft_scores.compare(*scores, first) for scores in sides]
    assert min(each.p for each in found) > first  # and so no difference is seen
    assert [round(each.seen, 3) for each in found] == [0.058, 0.036]
    p = [stats.cramervonmises_2samp(*scores).pvalue for scores in sides]
    assert [round(each, 2) for each in p] == [0.62, 0.62]
    assert peft_scores.table(rows) == (RESULTS / "peft_scores.md").read_text(encoding="utf-8")
