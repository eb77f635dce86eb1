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
    """Give a copy of the folder, which is the current one."""
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


def test_a_run_goes_on(work: Path) -> None:
    """One more epoch: the losses that the older commit's own continuation had, to rounding."""
    words = (
        "train --task rte --method SPAFIT-0-1-II --r 2 --alpha 3 --model tiny --data glue --out run"
    )
    more = "--epochs 2 --batch-size 6 --learning-rate 0.01 --max-length 16 --quiet"
    assert main([*words.split(), *more.split()]) == 0
    rows = map(json.loads, (work / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx(EXPECTED["losses"], abs=1e-6)
