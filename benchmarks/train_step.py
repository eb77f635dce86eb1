"""One training step on real lengths: spafit against transformers + PEFT doing the same work.

    python -m benchmarks.train_step --task rte --batches 5
    python -m benchmarks.train_step --kept-prefix --padded-128 --memory --profile

Contenders, in turns, batch by batch, from row numbers to updated weights:

- transformers + PEFT, padded to the longest of the batch (the baseline)
- the same, padded to 128 (``--padded-128``)
- spafit
- spafit with the hidden states after group 1 kept in memory, as from the second epoch on
  (``--kept-prefix``); dropout is then off in group 1

Beside the times it gives the floor: the least arithmetic of the step on real tokens,

    floor_gflop = forward of all L layers + backward, to their inputs, of the layers from the first
                  trainable one on; per token and layer 2·(4·D² + 2·D·F) each way, and attention's
                  4·t²·D forward and 8·t²·D backward for each sequence of t tokens; without LoRA

    share = floor_gflop / (rate of matrix products here, GFLOP/s) / (measured time)

at the rates of ``torch.mm`` and of oneDNN at the model's own shapes, measured before and after the
timing; of each the higher is taken. With the prefix kept, the forward of its layers is not counted.
The last layer is counted whole, though only the rows of [CLS] are needed of it, and spafit computes
no others: some 4 % of the floor of 24 layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import operations
from benchmarks.arguments import add_model_arguments, device_of, method_of, settings_of
from benchmarks.arithmetic import (
    MatmulRate,
    matmul_rate_gflops,
    product_shapes,
    step_flop,
)
from benchmarks.baseline import padded_logits, peft_twin
from benchmarks.contenders import (
    LEARNING_RATE,
    SHAPES,
    TOLERANCES,
    WEIGHT_DECAY,
    Training,
    adapted_model,
    kept_logits,
    packed_logits,
)
from benchmarks.harness import Rows, Timing, compare, measure_peak_memory
from benchmarks.lengths import TaskRows, load_rows, random_labels
from benchmarks.report import place, write_results
from spafit.bert import BertForSequenceClassification
from spafit.memory import keep_freed_memory
from spafit.optimisation import make_optimizer

PEFT, PEFT_128 = "transformers + PEFT, longest", "transformers + PEFT, 128"
SPAFIT, SPAFIT_KEPT = "spafit", "spafit, prefix kept"
NAMES = (PEFT, PEFT_128, SPAFIT, SPAFIT_KEPT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_model_arguments(parser, out="train_step")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="times each batch is gone through")
    parser.add_argument("--kept-prefix", action="store_true")
    parser.add_argument("--padded-128", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak of each, in its own process")
    parser.add_argument("--profile", action="store_true", help="time by operation, of each")
    parsed = parser.parse_args(arguments)
    device = device_of(parsed)
    wanted = [PEFT, SPAFIT]
    wanted += [PEFT_128] if parsed.padded_128 else []
    wanted += [SPAFIT_KEPT] if parsed.kept_prefix else []
    names = [name for name in NAMES if name in wanted]

    data = load_rows(parsed.task, "train", parsed.data, parsed.vocab)
    batches = data.draw(parsed.batches, parsed.batch_size, parsed.seed)
    # First, while this process is still small: two models of both sides fill a small machine.
    memory = {name: memory_columns(parsed, name) for name in names}
    keep_freed_memory()  # both sides then have what spafit.fit alone would ask for
    model_config = SHAPES[parsed.model_shape]
    model = adapted_model(model_config, method_of(parsed), parsed.seed, device)
    first_trainable = model.bert.frozen_depth
    trainings = make_trainings(model, names, data, batches, parsed.dtype, parsed.seed)
    contenders = [training.contender() for training in trainings]

    tokens = int(np.median([rows.tokens for rows in batches]))
    dtype = torch.float32 if parsed.dtype == "float32" else torch.bfloat16
    shapes = product_shapes(model_config, tokens)
    rates = [matmul_rate_gflops(shapes, device, dtype)]
    timings = compare(
        contenders[0],
        contenders[1:],
        batches,
        repeats=parsed.repeats,
        tolerance=TOLERANCES[parsed.dtype],
    )
    rates.append(matmul_rate_gflops(shapes, device, dtype))
    if parsed.profile:
        print_profiles(trainings, batches[0], device)
    del model, trainings, contenders

    rows: list[dict[str, Any]] = []
    for timing in timings:
        kept = first_trainable if timing.name == SPAFIT_KEPT else 0
        settings: dict[str, Any] = {
            **settings_of(parsed, data.source),
            "method": method_of(parsed),
            "layers": model_config.num_hidden_layers,
            "intermediate": model_config.intermediate_size,
            **timing.columns(),
        }
        settings |= floor_columns(parsed, data, batches, timing, rates, first_trainable, kept)
        settings |= memory[timing.name]
        rows.append({**settings, **place(device, parsed.dtype)})
    if parsed.memory:
        for row in rows:
            row["peak_memory_ratio"] = row["above_weights_mib"] / rows[0]["above_weights_mib"]
    title = f"Training step: {parsed.model_shape}, {method_of(parsed)}, {parsed.task.upper()}"
    write_results(parsed.out, rows, f"{title}, batches of {parsed.batch_size}")


def make_trainings(
    model: BertForSequenceClassification,
    names: Sequence[str],
    data: TaskRows,
    batches: Sequence[Rows],
    arithmetic: str,
    seed: int,
) -> list[Training]:
    """Set up contenders by name; those of one side share its model and optimizer."""
    encodings, device = data.encodings, model.classifier.weight.device
    labels = random_labels(len(encodings), model.num_labels, seed).to(device)
    ours = make_optimizer(model, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    twin = theirs = None
    if PEFT in names or PEFT_128 in names:
        twin = peft_twin(model)
        trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        theirs = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    trainings = []
    for name in names:
        if name in (PEFT, PEFT_128):
            assert twin is not None and theirs is not None
            pad_to = 128 if name == PEFT_128 else 0
            logits = padded_logits(twin, encodings, arithmetic, pad_to)
            trainings.append(Training(name, twin, logits, theirs, labels))
        else:
            if name == SPAFIT_KEPT:
                logits = kept_logits(model, encodings, batches, arithmetic)
            else:
                logits = packed_logits(model, encodings, arithmetic)
            trainings.append(Training(name, model, logits, ours, labels))
    return trainings


def peak_of_steps(
    *,
    name: str,
    shape: str,
    method: str,
    task: str,
    data: str,
    vocab: str,
    batches: int,
    batch_size: int,
    device: str,
    dtype: str,
    threads: int,
    seed: int,
) -> Callable[[], None]:
    """Set up one contender, and give the steps on all batches as the work to be measured."""
    torch.set_num_threads(threads)
    rows = load_rows(task, "train", Path(data), Path(vocab))
    drawn = rows.draw(batches, batch_size, seed)
    model = adapted_model(SHAPES[shape], method, seed, torch.device(device))
    if name not in (PEFT, PEFT_128):
        keep_freed_memory()  # as spafit.fit does
    [training] = make_trainings(model, [name], rows, drawn, dtype, seed)
    if name in (PEFT, PEFT_128):
        del model  # the twin has its own copies

    def steps() -> None:
        for batch in drawn:
            training.step(batch)

    return steps


def memory_columns(parsed: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure the peak of one contender in its own process, where that is asked for."""
    columns = ("after_setup_mib", "peak_memory_mib", "above_weights_mib", "peak_memory_ratio")
    if not parsed.memory:
        return dict.fromkeys(columns, "")
    peak = measure_peak_memory(
        "benchmarks.train_step:peak_of_steps",
        {
            "name": name,
            "shape": parsed.model_shape,
            "method": method_of(parsed),
            "task": parsed.task,
            "data": str(parsed.data),
            "vocab": str(parsed.vocab),
            "batches": parsed.batches,
            "batch_size": parsed.batch_size,
            "device": str(device_of(parsed)),
            "dtype": parsed.dtype,
            "threads": torch.get_num_threads(),
            "seed": parsed.seed,
        },
    )
    found = (peak.after_setup_mib, peak.peak_mib, peak.above_weights_mib, "")
    return dict(zip(columns, found, strict=True))


def floor_columns(
    parsed: argparse.Namespace,
    data: TaskRows,
    batches: Sequence[Rows],
    timing: Timing,
    rates: Sequence[MatmulRate],
    first_trainable: int,
    first_computed: int,
) -> dict[str, Any]:
    """Give the floor of all rounds together, and its share in their time at each rate."""
    lengths = data.encodings.lengths
    config = SHAPES[parsed.model_shape]
    flop = parsed.repeats * sum(
        step_flop(config, [lengths[row] for row in rows.numbers], first_trainable, first_computed)
        for rows in batches
    )
    flop_per_s = flop / (sum(timing.times_ms) / 1000)
    by_torch = max(rate.torch_gflops for rate in rates)
    by_onednn = max((rate.onednn_gflops or 0.0) for rate in rates)
    best = max(by_torch, by_onednn)
    return {
        "floor_gflop": flop / len(timing.times_ms) / 1e9,
        "torch_mm_gflops": by_torch,
        "onednn_gflops": by_onednn or "",
        "share_at_torch_mm": flop_per_s / 1e9 / by_torch,
        "share_at_onednn": flop_per_s / 1e9 / by_onednn if by_onednn else "",
        "share_at_best": flop_per_s / 1e9 / best,
    }


def print_profiles(trainings: Sequence[Training], rows: Rows, device: torch.device) -> None:
    """Print where the time of one step of each contender goes."""
    for training in trainings:
        print(f"\n{training.name}: one step, {rows.tokens} tokens\n")
        shares = operations.profile_step(partial(training.step, rows), device)
        print(operations.table(shares), "\n")


if __name__ == "__main__":
    main()
