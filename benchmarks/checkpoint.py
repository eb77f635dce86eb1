"""The cost of a checkpoint: writing, fsync, reading back and verifying; and of resuming.

    python -m benchmarks.checkpoint --repeats 7

The baseline writes the same tensors with torch.save: one pickle, neither fsynced nor read back.
Both take turns writing to a new folder on the same disk. ``nbytes_mib`` is the size of a checkpoint
there, ``restore_ms`` the time to verify it and restore model, optimizer and random generators.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders.models import SHAPES
from benchmarks.harness.arguments import add_run_arguments, method_of, set_threads
from benchmarks.harness.report import place, write_results
from benchmarks.harness.timing import Rows, WrongResultError, rotated, timings
from spafit.bert import BertForSequenceClassification
from spafit.methods import plan
from spafit.runs.checkpoint import Checkpoints
from spafit.strata import adapt
from spafit.training.loop import values_that_train
from spafit.training.optimisation import make_optimizer
from spafit.training.state import TrainingState, content, restore
from spafit.training.step import TrainingStep

_STEPS = 1000
TORCH, SPAFIT = "torch.save", "spafit"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_run_arguments(parser, out="checkpoint")
    parser.add_argument("--model-shape", choices=SHAPES, default="large")
    parser.add_argument("--method", help="default: SPAFIT-4-9-II, or SPAFIT-1-3-II for minilm")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parsed = parser.parse_args(arguments)
    set_threads(parsed)

    torch.manual_seed(parsed.seed)
    model, step = trained_one_step(parsed.model_shape, method_of(parsed))
    state = TrainingState(_STEPS, [0.5] * _STEPS, best=values_that_train(model), best_step=1)
    state.history = [{"step": 1, "epoch": 1, "metrics": {"accuracy": 0.5}}]
    save_ms: dict[str, list[float]] = {TORCH: [], SPAFIT: []}
    restore_ms: list[float] = []
    with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
        number = itertools.count()

        def fresh() -> Path:
            folder = Path(name) / str(next(number))
            folder.mkdir()
            return folder

        def by_torch() -> None:
            files, values = content(state, model, step)
            torch.save((files, values), fresh() / "checkpoint.pt")

        def by_spafit() -> Path:
            folder = fresh()
            files, values = content(state, model, step)
            Checkpoints(folder).save(_STEPS, files, values)
            return folder

        saved = by_spafit()
        nbytes = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        check(saved, model, step)
        ways: dict[str, Callable[[], object]] = {TORCH: by_torch, SPAFIT: by_spafit}
        for turn in range(parsed.repeats):
            for way in rotated(list(ways), turn):
                save_ms[way].append(milliseconds(ways[way]))
            restore_ms.append(milliseconds(lambda: take_up(saved, model, step)))
    settings = {"model": parsed.model_shape, "method": method_of(parsed), "seed": parsed.seed}
    rows: list[dict[str, Any]] = []
    for timing in timings(save_ms, [Rows((0,), 1)] * parsed.repeats):
        columns = timing.columns()
        del columns["examples_per_s"], columns["tokens_per_s"]
        columns["nbytes_mib"] = nbytes / 2**20
        columns["restore_ms"] = statistics.median(restore_ms)
        rows.append({**settings, **columns, **place(torch.device("cpu"), "float32")})
    write_results(parsed.out, rows, f"Saving a checkpoint: {parsed.model_shape}")


def trained_one_step(shape: str, method: str) -> tuple[BertForSequenceClassification, TrainingStep]:
    """Return a model with random weights, and a step that has updated it once."""
    model = BertForSequenceClassification(SHAPES[shape], num_labels=2)
    adapt(model, plan(method, SHAPES[shape].num_hidden_layers))
    optimizer = make_optimizer(model, learning_rate=1e-4, weight_decay=0.01)
    step = TrainingStep(model, optimizer)
    for parameter in step.trained:
        parameter.grad = torch.randn_like(parameter)
    step.update()
    return model, step


def take_up(folder: Path, model: BertForSequenceClassification, step: TrainingStep) -> None:
    """Verify the newest checkpoint of a folder and restore its whole state."""
    newest, faults = Checkpoints(folder).newest()
    if newest is None or faults:
        raise WrongResultError(f"the checkpoint cannot be read: {faults}")
    restore(newest, model, step)


def check(folder: Path, model: BertForSequenceClassification, step: TrainingStep) -> None:
    """Raise a WrongResultError if reading does not return what was written."""
    before = values_that_train(model), {k: v.clone() for k, v in step.state()[0].items()}
    for parameter in step.trained:
        parameter.data.zero_()
    take_up(folder, model, step)
    after = values_that_train(model), step.state()[0]
    for wanted, found in zip(before, after, strict=True):
        wrong = [key for key in wanted if not torch.equal(wanted[key], found[key])]
        if wrong or wanted.keys() != found.keys():
            raise WrongResultError(f"not what was saved: {wrong}")


def milliseconds(function: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
