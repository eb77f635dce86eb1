"""Project the time of all runs of the paper's Table 2 from measured steps.

    python -m benchmarks.table2 --device cuda --precision bf16
    python -m benchmarks.table2 --device cuda --precision bf16 --tasks rte cola --rounds 3
    python -m benchmarks.table2 --device cuda --precision bf16 --contender peft

For each of the ten methods and nine tasks, ``--batches`` batches with the task's lengths are drawn
in the paper's batch size (16; 8 for MNLI, QNLI and QQP), and each is trained on ``--rounds`` times
after a warm-up of every shape. From them it projects

    hours = epochs · ceil(rows of train / batch size) · mean time of a step / 3,600,000 ms

with the rows of the whole task (spafit.tasks.table). It is a projection, not a measurement: no run
was made, and it does not include evaluation, tokenizing, loading, and capturing or compiling the
shapes that the sample lacks. ``low_hours`` and ``high_hours`` are two standard errors of the
sample's mean below and above: the uncertainty from the choice of batches.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contenders.models import SHAPES, TOLERANCES
from benchmarks.contenders.steps import FORMS, ProductTraining, make_trainings, product_model
from benchmarks.harness.arguments import add_run_arguments, device_of, output_of
from benchmarks.harness.lengths import (
    DATA,
    MAX_LENGTH,
    TASKS,
    VOCABULARY,
    TaskRows,
    load_rows,
    random_labels,
)
from benchmarks.harness.report import place, write_results
from benchmarks.harness.timing import Rows, take_turns
from spafit import METHODS
from spafit.tasks.table import get_task

EPOCHS = 10  # the paper's
_MS_PER_HOUR = 3_600_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, project, print and record."""
    parsed = parse(arguments)
    device = device_of(parsed)
    name = parsed.contender or ("captured" if device.type == "cuda" else "eager")
    data = {
        task: load_rows(task, "train", parsed.data, parsed.vocab, parsed.max_length)
        for task in parsed.tasks
    }
    rows = []
    where = place(device, parsed.dtype)
    for method in parsed.methods:
        for task, (times_ms, batch_size) in measured(parsed, name, method, data, device):
            row: dict[str, Any] = {
                "task": task,
                "lengths": data[task].source,
                "method": method,
                "model": parsed.model_shape,
                "max_length": parsed.max_length,
                "batch_size": batch_size,
                "epochs": EPOCHS,
                "train_rows": train_rows(task),
                "seed": parsed.seed,
                "contender": FORMS[name].name,
                "sampled_steps": len(times_ms) * parsed.rounds,
                **projection(times_ms, train_rows(task), batch_size),
            }
            rows.append({**row, **where})
            print(f"{method}, {task}: {row['hours']:.3g} hours projected", flush=True)
    cell = ("task", "method", "batch_size", "train_rows")
    title = "Table 2, projected"
    write_results(output_of(parsed, device), rows, title, cell, summary(rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_run_arguments(parser, out="table2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batches", type=int, default=6, help="drawn of each task (6)")
    parser.add_argument("--rounds", type=int, default=2, help="steps timed on each batch (2)")
    parser.add_argument("--contender", choices=FORMS, help="default: captured; on a CPU eager")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument(
        "--precision", "--dtype", dest="dtype", choices=TOLERANCES, default="float32"
    )
    parser.add_argument("--model-shape", choices=SHAPES, default="large")
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, help="cut rows to it")
    parser.add_argument("--data", type=Path, default=DATA, help="GLUE's root")
    parser.add_argument("--vocab", type=Path, default=VOCABULARY, help="folder of a vocabulary")
    return parser.parse_args(arguments)


def measured(
    parsed: argparse.Namespace,
    name: str,
    method: str,
    data: Mapping[str, TaskRows],
    device: torch.device,
) -> Iterator[tuple[str, tuple[list[float], int]]]:
    """Return, for each task, the time of a step on each drawn batch, and the batch size.

    spafit's model is built once for all tasks of a method.
    """
    form, config = FORMS[name], SHAPES[parsed.model_shape]
    how: dict[str, Any] = {"precision": parsed.dtype, "seed": parsed.seed, "device": device}
    with ExitStack() as opened:
        model = product_model(config, method, opened=opened, **how) if form.step else None
        for task, rows in data.items():
            batch_size = get_task(task).paper_batch_size
            batches = rows.draw(parsed.batches, batch_size, parsed.seed)
            training: Any
            if model is None:
                [training] = make_trainings(
                    [name], config, method, rows, batches, opened=opened, **how
                )
            else:
                labels = random_labels(len(rows.encodings), 2, parsed.seed)
                training = ProductTraining(form, model, rows, batches, parsed.dtype, labels)
            [timing] = take_turns(
                [training.contender()],
                batches,
                repeats=parsed.rounds,
                every_shape=True,
                calls=4 if device.type == "cuda" else 1,
            )
            if model is not None:
                training.take_step.close()
            del training
            yield task, (by_batch(timing.times_ms, batches), batch_size)
        del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def by_batch(times_ms: Sequence[float], batches: Sequence[Rows]) -> list[float]:
    """Return the mean time of each batch; each round goes through all batches."""
    means = np.reshape(times_ms, (-1, len(batches))).mean(axis=0)
    return [float(mean) for mean in means]


def train_rows(task: str) -> int:
    """Return the number of rows of a task's whole train split."""
    train = get_task(task).train
    assert train is not None
    return train.rows


def projection(times_ms: Sequence[float], rows: int, batch_size: int) -> dict[str, float]:
    """Project a whole run from the times of a step on a sample of its batches.

    Parameters
    ----------
    times_ms : sequence of float
        One of each batch.
    rows : int
        Of the whole task.
    batch_size : int
        Examples of a step.
    """
    steps = EPOCHS * math.ceil(rows / batch_size)
    mean = float(np.mean(times_ms))
    error = float(np.std(times_ms, ddof=1) / len(times_ms) ** 0.5) if len(times_ms) > 1 else 0.0
    hours = [steps * each / _MS_PER_HOUR for each in (mean, mean - 2 * error, mean + 2 * error)]
    return {
        "steps_per_s": 1000 / mean,
        "step_time_ms": mean,
        "steps": steps,
        "hours": hours[0],
        "low_hours": hours[1],
        "high_hours": hours[2],
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Write the projected hours as a table of methods by tasks, with sums."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    hours = {(row["method"], row["task"]): row["hours"] for row in rows}
    lines = [
        f"Hours, projected from measured steps ({EPOCHS} epochs; no evaluation)\n",
        f"| method | {' | '.join(tasks)} | all |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    for method in methods:
        its = [hours[method, task] for task in tasks]
        lines.append(f"| {method} | {' | '.join(f'{h:.3g}' for h in its)} | {sum(its):.3g} |")
    sums = [sum(hours[method, task] for method in methods) for task in tasks]
    lines.append(f"| all | {' | '.join(f'{h:.3g}' for h in sums)} | {sum(sums):.3g} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
