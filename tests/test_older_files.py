"""Run folders and adapter files that an older version wrote.

Oracle: tests/golden/ddacf0a, which commit ddacf0a made (its generate.py), and ``expected.json``
there, which holds what that commit computed from these files.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import spafit
from spafit.cli import main

GOLDEN = Path(__file__).parent / "golden" / "ddacf0a"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the folder, which is the current one."""
    shutil.copytree(GOLDEN, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "work"


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("delta", "delta.safetensors"),
        ("direct", "direct.safetensors"),
        ("run", "run/adapter.safetensors"),
    ],
)
def test_adapters_give_their_logits(work: Path, kind: str, file: str) -> None:
    model = spafit.load_pretrained(work / "tiny", num_labels=2)
    spafit.load_adapter(model, work / file)
    tokenizer = spafit.load_tokenizer(work / "tiny")
    batch = tokenizer.encode(["the cat sees", "old dog"], max_length=16).batch([0, 1])
    logits = model.eval()(*batch)
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits"][kind]), atol=1e-6, rtol=0)


def test_a_run_is_evaluated(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("eval run --model tiny --data glue".split()) == 0
    [score] = EXPECTED["result"].values()
    assert f"{score:.4f}" in capsys.readouterr().out


def test_a_run_predicts(work: Path) -> None:
    words = "predict run --model tiny --input glue/RTE/dev.tsv --output predicted.tsv"
    assert main(words.split()) == 0
    assert (work / "predicted.tsv").read_text(encoding="utf-8").count("\n") == 10


def train(run: Path, *more: str) -> int:
    """Train for one more epoch; gives the exit code."""
    words = "train --task rte --method SPAFIT-0-1-II --r 2 --alpha 3 --model tiny --data glue "
    words += "--epochs 2 --batch-size 6 --learning-rate 0.01 --max-length 16 --quiet"
    return main([*words.split(), "--out", str(run), *more])


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_goes_on(work: Path) -> None:
    """One more epoch: the losses that the older commit's own continuation had, to rounding."""
    assert train(work / "run") == 0
    assert losses(work / "run") == pytest.approx(EXPECTED["losses"], abs=1e-6)


def test_a_finished_run_has_no_answers(work: Path) -> None:
    """Its checkpoint does not hold what it predicted, and nothing is made up."""
    assert train(work / "run", "--epochs", "1") == 0
    assert not (work / "run" / "dev.tsv").exists()


@pytest.mark.parametrize("option", ["--no-dropout-in-group-1", "--no-frozen-dropout"])
def test_a_run_without_dropout_in_group_1_goes_on(work: Path, option: str) -> None:
    """Its record says ``frozen_dropout``, as the setting was named then."""
    run = work / "run_without_dropout"
    assert json.loads((run / "run.json").read_text())["settings"]["frozen_dropout"] is False
    assert train(run, option) == 0
    expected = EXPECTED["losses without dropout in group 1"]
    assert losses(run) == pytest.approx(expected, abs=1e-6)
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert settings["dropout_in_group_1"] is False
    assert "frozen_dropout" not in settings


def test_a_run_without_dropout_in_group_1_is_not_taken_for_one_with_it(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(work / "run_without_dropout") == 2
    assert "dropout_in_group_1 is False, asked for is True" in capsys.readouterr().err
    assert train(work / "run", "--no-frozen-dropout") == 2
    assert "dropout_in_group_1 is True, asked for is False" in capsys.readouterr().err
