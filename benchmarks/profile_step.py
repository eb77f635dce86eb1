"""Profile a training step on a GPU by kind of work, with the least time for each kind.

    python -m benchmarks.profile_step --device cuda --precision bf16 --task rte
    python -m benchmarks.profile_step --device cuda --precision bf16 --batch-size 128 --step eager

There is one row for each kind of work: the time of its kernels, its share of the step, its
operations and bytes, and the floor, the larger of

    operations / rate of large matrix products      bytes / rate of a large copy

at the rates measured here (:mod:`benchmarks.harness.roofline` has the formulas), for the real
tokens of one batch. "gaps" is the part of the step's time that no kernel covers. The step is timed
without the profiler, the median of ``--repeats``; the kernels are those of the same batch launched
eagerly, where the operation of each is known; for a captured step "kernels, replayed" is the time
for which the GPU was busy in a replay. Kinds without a floor of their own (dropout, other) show 0.

On a CPU there are no kernels: the times are the operations' own, which is useful only for tests.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks.contenders.models import DTYPES, LEARNING_RATE, MAX_GRAD_NORM, SHAPES, WEIGHT_DECAY
from benchmarks.contenders.steps import FORMS, ProductTraining, make_trainings
from benchmarks.harness.arguments import (
    add_model_arguments,
    device_of,
    method_of,
    output_of,
    settings_of,
)
from benchmarks.harness.arithmetic import CARD_SIZES, COPY_BYTES, best_matmul_gflops, copy_gb_per_s
from benchmarks.harness.kernel_kinds import KINDS, Busy, Sizes, profile_busy, profile_kinds
from benchmarks.harness.lengths import MAX_LENGTH, TaskRows, load_rows
from benchmarks.harness.report import place, write_results
from benchmarks.harness.roofline import Floor, Trained, step_floors
from benchmarks.harness.timing import Rows, take_turns
from spafit.config import BertConfig
from spafit.layout import PackedBatch
from spafit.training.optimisation import make_optimizer
from spafit.training.step import TrainingStep

GAPS, REPLAYED, WHOLE = "gaps", "kernels, replayed", "whole step"
_WARM_UP = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_model_arguments(parser, out="profile_step")
    spafits = [name for name, form in FORMS.items() if form.step in ("eager", "captured")]
    parser.add_argument("--step", choices=spafits, help="default: captured; on a CPU eager")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed (20)")
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, help="cut rows to it")
    parser.add_argument("--card-sizes", type=int, nargs="+", default=CARD_SIZES, help="of products")
    parser.add_argument("--copy-bytes", type=int, default=COPY_BYTES)
    parsed = parser.parse_args(arguments)
    device = device_of(parsed)
    is_gpu = device.type == "cuda"
    name = parsed.step or ("captured" if is_gpu else "eager")
    config, dtype = SHAPES[parsed.model_shape], DTYPES[parsed.dtype]

    data = load_rows(parsed.task, "train", parsed.data, parsed.vocab, parsed.max_length)
    [rows] = data.draw(1, parsed.batch_size, parsed.seed)
    with ExitStack() as opened:
        [training] = make_trainings(
            [name],
            config,
            method_of(parsed),
            data,
            [rows],
            precision=parsed.dtype,
            seed=parsed.seed,
            device=device,
            opened=opened,
        )
        assert isinstance(training, ProductTraining)
        trained = Trained.of(training.model)
        busy = kinds_of_step(training, rows, trained, config)
        [timing] = take_turns(
            [training.contender()], [rows], repeats=parsed.repeats, every_shape=True
        )
        replayed_ms = None
        if FORMS[name].step == "captured":
            replayed_ms = profile_busy(partial(training.step, rows), device)
    gflops, _ = best_matmul_gflops(device, dtype, parsed.card_sizes)
    gb_per_s = copy_gb_per_s(device, parsed.copy_bytes)
    floors = step_floors(
        config,
        lengths_of(data, rows),
        trained,
        element_bytes=dtype.itemsize,
        first_computed=trained.first_trainable if FORMS[name].kept else 0,
    )
    settings: dict[str, Any] = {
        **settings_of(parsed, data.source),
        "max_length": parsed.max_length,
        "method": method_of(parsed),
        "layers": config.num_hidden_layers,
        "intermediate": config.intermediate_size,
        "contender": training.name,
        "tokens": rows.tokens,
        "card_gflops": gflops,
        "copy_gb_per_s": gb_per_s,
    }
    found = lines(busy, floors, timing.median_ms, replayed_ms, 1e9 * gflops, 1e9 * gb_per_s)
    where = place(device, parsed.dtype)
    title = f"A step of {training.name}: {parsed.model_shape}, {parsed.task.upper()}"
    write_results(
        output_of(parsed, device), [{**settings, **line, **where} for line in found], title
    )


def kinds_of_step(
    training: ProductTraining, rows: Rows, trained: Trained, config: BertConfig
) -> Busy:
    """Profile an eager step of the same shape as a contender's, before the contender starts."""
    optimizer = make_optimizer(
        training.model, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    step = TrainingStep(
        training.model, optimizer, precision=training.precision, max_grad_norm=MAX_GRAD_NORM
    )
    training.model.train()

    def take() -> None:
        step([training.part(rows)[1]], LEARNING_RATE)

    for _ in range(_WARM_UP):
        take()
    batch = training.part(rows)[1].batch
    assert isinstance(batch, PackedBatch)
    N = batch.layout.rows
    ranks = {r for _, _, r in trained.lora}
    sizes = Sizes.of(sorted(ranks), [N, config.hidden_size, config.intermediate_size])
    busy = profile_kinds(take, training.device, sizes)
    training.restart()
    return busy


def lines(
    busy: Busy,
    floors: Sequence[Floor],
    step_ms: float,
    replayed_ms: float | None,
    flop_per_s: float,
    bytes_per_s: float,
) -> list[dict[str, str | float]]:
    """Return the rows of the table: the kinds, then the gaps, the replayed kernels and the whole.

    Parameters
    ----------
    busy : Busy
        The kernels' times.
    floors : sequence of Floor
        The least of each kind.
    step_ms : float
        The whole step.
    replayed_ms : float or None
        What of it a GPU was at work in a replay; None where nothing is replayed, and the sum of the
        kinds stands for it.
    flop_per_s, bytes_per_s : float
        The device's rates.
    """
    by_kind = {floor.kind: floor for floor in floors}

    def line(kind: str, time_ms: float, floor_ms: float, largest: str = "") -> dict[str, Any]:
        flop = by_kind[kind].flop if kind in by_kind else 0.0
        moved = by_kind[kind].traffic_bytes if kind in by_kind else 0.0
        return {
            "kind": kind,
            "time_ms": time_ms,
            "percent": 100 * time_ms / step_ms,
            "gflop": flop / 1e9,
            "mib": moved / 2**20,
            "floor_ms": floor_ms,
            "times_the_floor": time_ms / floor_ms if floor_ms else "",
            "most_of_it": largest[:60].replace("|", "/"),
        }

    found = []
    for kind in KINDS:
        floor = by_kind.get(kind)
        floor_ms = floor.floor_ms(flop_per_s, bytes_per_s) if floor else 0.0
        found.append(line(kind, busy.by_kind.get(kind, 0.0), floor_ms, busy.largest.get(kind, "")))
    at_work = busy.total_ms if replayed_ms is None else replayed_ms
    whole_floor = sum(floor.floor_ms(flop_per_s, bytes_per_s) for floor in floors)
    found.append(line(GAPS, max(0.0, step_ms - at_work), 0.0))
    found.append(line(REPLAYED, at_work, whole_floor, f"{busy.kernels} kernels"))
    found.append(line(WHOLE, step_ms, whole_floor))
    return found


def lengths_of(data: TaskRows, rows: Rows) -> list[int]:
    """Return the real tokens of each sequence of a batch."""
    return [data.encodings.lengths[row] for row in rows.numbers]


if __name__ == "__main__":
    main()
