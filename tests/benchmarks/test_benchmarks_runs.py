"""The benchmark of whole runs has both sides train the same, on the same rows.

Oracle: the plan of the model, and the task's files.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")


from support.tiny_bert import tiny_bert

from benchmarks import train_run
from benchmarks.contenders import trainer_run
from spafit.strata import adapt
from spafit.tasks import glue
from spafit.training.settings import TrainConfig


def test_what_the_trainer_trains() -> None:
    model = tiny_bert()
    summary = adapt(model, "SPAFIT-0-1-II")
    found = train_run.settings_of_trainer(model, TrainConfig(epochs=7, learning_rate=0.25))
    assert found["trainable"] == summary.trainable
    assert found["epochs"] == 7 and found["learning_rate"] == 0.25
    assert "bert.encoder.layer.2.attention.output.dense" in found["lora"]
    assert "bert.encoder.layer.1.output.LayerNorm.bias" in found["biases"]
    assert "bert.encoder.layer.0.output.LayerNorm.bias" not in found["biases"]
    assert (found["r"], found["alpha"]) == (64, 128)


def test_bf16_is_asked_of_both_sides(tmp_path: Path) -> None:
    """In processes of their own, beside those in float32."""
    model, config = tiny_bert(), TrainConfig(epochs=2, batch_size=16, learning_rate=0.25)
    adapt(model, "SPAFIT-0-1-II")
    settings = train_run.settings_of_trainer(model, config)
    parsed = train_run._parsed(["--model", str(tmp_path)])
    processes = train_run.processes_of(tmp_path, parsed, config, settings)
    for name, bf16 in ((train_run.PEFT, False), (train_run.PEFT_BF16, True)):
        told = json.loads(Path(processes[name][-1]).read_text(encoding="utf-8"))
        assert trainer_run.arguments_of_trainer(told, str(tmp_path), 32).bf16 is bf16
    ours = processes[train_run.SPAFIT]
    assert processes[train_run.SPAFIT_BF16] == [*ours, "--precision", "bf16"]


@pytest.mark.parametrize("task", ["cola", "mrpc", "rte"])  # CoLA's file has no header
def test_the_first_rows_alone_are_written(task: str, shared_data: Path, tmp_path: Path) -> None:
    whole = glue.load(task, "train", shared_data / "glue")
    cut = dataclasses.replace(whole, examples=whole.examples[:5])
    train_run.write_data(shared_data / "glue", tmp_path / "data", cut)
    assert glue.load(task, "train", tmp_path / "data").examples == cut.examples
    dev = glue.load(task, "dev", tmp_path / "data")
    assert dev.examples == glue.load(task, "dev", shared_data / "glue").examples


def test_a_process_that_fails_is_named() -> None:
    assert train_run.process(["-c", "print('well')"]) == "well\n"
    with pytest.raises(RuntimeError, match=r"(?s)-c 1/0 failed:.*ZeroDivisionError"):
        train_run.process(["-c", "1/0"])
