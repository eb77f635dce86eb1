"""One training step on real lengths: spafit against transformers + PEFT doing the same work.

    python -m benchmarks.train_step --task rte --batches 5
    python -m benchmarks.train_step --kept-prefix --padded-128 --memory --profile
    python -m benchmarks.train_step --precision bf16 --memory
    python -m benchmarks.train_step --device cuda --precision bf16 --task cola --repeats 5
    python -m benchmarks.train_step --device cuda --precision bf16 --batch-size 128 --batches 2
    python -m benchmarks.train_step --device cuda --precision bf16 --task mnli --max-length 128 \
        --contenders peft captured --memory

The contenders (``--contenders``) take turns, batch by batch, from row numbers to updated weights:

- peft: transformers + PEFT, padded to the longest of the batch (the baseline)
- peft-128: the same, padded to 128
- peft-float32, float32: the baseline and eager in float32, whatever the precision
- peft-compiled: the baseline under torch.compile (``dynamic=None``; ``--compile-mode``)
- peft-compiled-static: the same, padded to multiples of 64, each length compiled by itself
- eager: spafit on packed batches, its step launched operation by operation
- kept: the same with the hidden states after group 1 kept in memory, as from the second epoch on;
  dropout is then off in group 1
- recomputed: eager, with the layers of groups 2 and 3 recomputed in backward
- compiled: spafit's step="compiled"
- captured, captured-kept: spafit's step="captured", CUDA graphs of fixed shapes, on a GPU alone

On a CPU the default is peft and eager, in bf16 also peft-float32, float32 and peft-compiled; on a
GPU all but peft-128, peft-compiled-static, recomputed, kept and those in float32.
There every contender first runs all batches until it has nothing new to capture or compile, and a
round is ``--calls`` steps on one batch, with a synchronization before the first and after the last.

With the times it gives the floor: the least arithmetic of the step on real tokens,

    floor_gflop = forward of all L layers + backward, to their inputs, of the layers from the first
                  trainable one on; per token and layer 2·(4·D² + 2·D·F) each way, and attention's
                  4·t²·D forward and 8·t²·D backward for each sequence of t tokens; without LoRA

    share = floor_gflop / (rate of matrix products here, GFLOP/s) / (measured time)

at the rates of ``torch.mm`` and of oneDNN at the model's own shapes, measured before and after the
timing; of each the higher is taken. On a GPU, instead, at the rate of ``torch.mm`` at the model's
own shapes, and at the card's best rate (``share_of_card``), that of large square products in the
same precision. With the prefix kept, the forward of its layers is not counted.
The last layer is counted whole, although only its [CLS] rows are needed, and spafit computes only
these: some 4 % of the floor of 24 layers.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.contenders.baseline import padded_logits, plain_name
from benchmarks.contenders.models import DTYPES, SHAPES, TOLERANCES, Training
from benchmarks.contenders.steps import BASELINE, FORMS, Form, ProductTraining, make_trainings
from benchmarks.harness import operations
from benchmarks.harness.arguments import (
    add_model_arguments,
    device_of,
    method_of,
    output_of,
    settings_of,
)
from benchmarks.harness.arithmetic import (
    MatmulRate,
    best_matmul_gflops,
    matmul_rate_gflops,
    product_shapes,
    step_flop,
)
from benchmarks.harness.lengths import MAX_LENGTH, TaskRows, load_rows
from benchmarks.harness.peak_memory import measure_peak_memory
from benchmarks.harness.report import place, write_results
from benchmarks.harness.timing import Rows, Timing, compare
from spafit.machine.memory import keep_freed_memory

#: On a CPU, where the precision is asked for.
IN_BF16: tuple[str, ...] = ("peft", "peft-float32", "peft-compiled", "eager", "float32")
ON_A_GPU: tuple[str, ...] = (
    "peft",
    "peft-compiled",
    "eager",
    "captured",
    "compiled",
    "captured-kept",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parsed = parse(arguments)
    device = device_of(parsed)
    names = names_of(parsed, device)
    data = load_rows(parsed.task, "train", parsed.data, parsed.vocab, parsed.max_length)
    batches = data.draw(parsed.batches, parsed.batch_size, parsed.seed)
    # First, while this process is still small: two models of both sides fill a small machine.
    memory = {name: memory_columns(parsed, name, device) for name in names}
    keep_freed_memory()  # both sides then have what spafit.fit alone would ask for
    config = SHAPES[parsed.model_shape]
    is_gpu = device.type == "cuda"
    dtype = DTYPES[parsed.dtype]
    tokens = int(np.median([rows.tokens for rows in batches]))
    shapes = product_shapes(config, tokens)
    with ExitStack() as opened:
        trainings = make_trainings(
            names,
            config,
            method_of(parsed),
            data,
            batches,
            precision=parsed.dtype,
            seed=parsed.seed,
            device=device,
            opened=opened,
            frozen_weights=parsed.frozen_weights,
            compile_mode=parsed.compile_mode,
            impl=parsed.impl,
        )
        first_trainable = first_trainable_of(trainings[0].model)
        contenders = [training.contender() for training in trainings]
        by_truth = parsed.dtype != "float32" and parsed.tolerance is None
        dtypes = {DTYPES[FORMS[name].precision or parsed.dtype] for name in names}
        rates = {each: [matmul_rate_gflops(shapes, device, each)] for each in dtypes}
        timings = compare(
            contenders[0],
            contenders[1:],
            batches,
            repeats=parsed.repeats,
            tolerance=parsed.tolerance or TOLERANCES["float32"],
            truth=truth_of(trainings[0], data) if by_truth else None,
            every_shape=is_gpu or any(FORMS[name].prepares for name in names),
            calls=parsed.calls or (4 if is_gpu else 1),
        )
        for each, found in rates.items():
            found.append(matmul_rate_gflops(shapes, device, each))
        if parsed.profile:
            print_profiles(trainings, batches[0], device)
        prepared = {each.name: each.prepared() for each in contenders}
        del trainings, contenders
    best = best_matmul_gflops(device, dtype) if is_gpu else (0.0, 0)

    rows: list[dict[str, Any]] = []
    for name, timing in zip(names, timings, strict=True):
        form = FORMS[name]
        settings: dict[str, Any] = {
            **settings_of(parsed, data.source),
            "method": method_of(parsed),
            "layers": config.num_hidden_layers,
            "intermediate": config.intermediate_size,
        }
        if is_gpu:
            settings |= {"max_length": parsed.max_length, "frozen_weights": stored(form, parsed)}
            settings |= {"launched": launched(form, parsed), "prepared": prepared[timing.name]}
            settings |= {"impl": parsed.impl if form.step else ""}
        settings |= timing.columns()
        flop = floor_flop(parsed, data, batches, first_trainable, form.kept)
        precision = form.precision or parsed.dtype
        settings |= floor_columns(flop, timing, rates[DTYPES[precision]], best)
        settings |= memory[name]
        rows.append({**settings, **place(device, precision)})
    if parsed.memory:
        for row in rows:
            row["peak_memory_ratio"] = row["above_weights_mib"] / rows[0]["above_weights_mib"]
            if is_gpu:
                row["whole_memory_ratio"] = row["peak_memory_mib"] / rows[0]["peak_memory_mib"]
    title = f"Training step: {parsed.model_shape}, {method_of(parsed)}, {parsed.task.upper()}"
    title += f", batches of {parsed.batch_size}"
    write_results(output_of(parsed, device), rows, title)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_model_arguments(parser, out="train_step")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="times each batch is gone through")
    parser.add_argument("--calls", type=int, help="steps of a round; default: 1, on a GPU 4")
    parser.add_argument("--contenders", nargs="+", choices=FORMS, help="see above")
    parser.add_argument("--kept-prefix", action="store_true", help="add the form kept")
    parser.add_argument("--padded-128", action="store_true", help="add the form peft-128")
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, help="cut rows to it")
    parser.add_argument(
        "--frozen-weights",
        choices=("auto", "float32", "half"),
        default="auto",
        help="of spafit, as in spafit train",
    )
    parser.add_argument(
        "--impl",
        choices=("auto", "fused", "triton", "reference"),
        default="auto",
        help="the forms of spafit's operations",
    )
    parser.add_argument(
        "--compile-mode", default="default", help="of peft-compiled, such as reduce-overhead"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference from the baseline, as a share of its largest magnitude;\n"
        f"default: {TOLERANCES['float32']} in float32, else twice the baseline's own distance from "
        "its float32",
    )
    parser.add_argument("--memory", action="store_true", help="peak of each, in its own process")
    parser.add_argument("--profile", action="store_true", help="time by operation, of each")
    return parser.parse_args(arguments)


def names_of(parsed: argparse.Namespace, device: torch.device) -> list[str]:
    """Return the requested contenders, in the order of the tables."""
    on_a_cpu = (BASELINE, "eager") if parsed.dtype == "float32" else IN_BF16
    default = ON_A_GPU if device.type == "cuda" else on_a_cpu
    wanted = {BASELINE, *(parsed.contenders or default)}
    wanted |= {"peft-128"} if parsed.padded_128 else set()
    wanted |= {"kept"} if parsed.kept_prefix else set()
    return [name for name in FORMS if name in wanted]


def truth_of(
    baseline: Training | ProductTraining, data: TaskRows
) -> Callable[[Rows], Mapping[str, torch.Tensor]]:
    """Return the results of the baseline in float32."""
    assert isinstance(baseline, Training)
    logits = padded_logits(baseline.model, data.encodings)
    return dataclasses.replace(baseline, logits=logits, precision="float32").results


def first_trainable_of(model: nn.Module) -> int:
    """Return the first layer that trains in either side's model; 0 if the embeddings do."""
    names = [plain_name(name) for name, each in model.named_parameters() if each.requires_grad]
    if any(".embeddings." in name for name in names):
        return 0
    layers = [int(name.split(".layer.")[1].split(".")[0]) for name in names if ".layer." in name]
    return min(layers)


def stored(form: Form, parsed: argparse.Namespace) -> str:
    """Return the type in which a contender on a GPU stores its frozen matrices."""
    is_half = parsed.dtype != "float32" and parsed.frozen_weights != "float32"
    return str(parsed.dtype) if form.step and is_half else "float32"


def launched(form: Form, parsed: argparse.Namespace) -> str:
    """Return how a contender's operations are launched."""
    is_other = form.compiled and parsed.compile_mode != "default"
    return f"{form.launched}, {parsed.compile_mode}" if is_other else form.launched


def peak_of_steps(
    *,
    name: str,
    shape: str,
    method: str,
    task: str,
    data: str,
    vocab: str,
    max_length: int,
    batches: int,
    batch_size: int,
    device: str,
    dtype: str,
    frozen_weights: str,
    compile_mode: str,
    impl: str,
    threads: int,
    seed: int,
) -> Callable[[], None]:
    """Set up one contender, and return a function that runs its steps on all batches."""
    torch.set_num_threads(threads)
    rows = load_rows(task, "train", Path(data), Path(vocab), max_length)
    drawn = rows.draw(batches, batch_size, seed)
    if FORMS[name].step:
        keep_freed_memory()  # as spafit.fit does
    opened = ExitStack()
    atexit.register(opened.close)  # not in the work: it brings the pre-trained weights back
    [training] = make_trainings(
        [name],
        SHAPES[shape],
        method,
        rows,
        drawn,
        precision=dtype,
        seed=seed,
        device=torch.device(device),
        opened=opened,
        frozen_weights=frozen_weights,
        compile_mode=compile_mode,
        impl=impl,
    )
    if isinstance(training, ProductTraining) and device == "cpu" and dtype == "bf16":
        # The frozen matrices are laid out at their first use; they are weights, not work.
        training.results(Rows(drawn[0].numbers[:1], 0))
        training.restart()
    # A shape is captured at its second sight, and replayed at the third.
    passes = 3 if FORMS[name].step == "captured" else 1

    def steps() -> None:
        for _ in range(passes):
            for batch in drawn:
                training.step(batch)

    return steps


def memory_columns(parsed: argparse.Namespace, name: str, device: torch.device) -> dict[str, Any]:
    """Measure the peak memory of one contender in its own process, if requested."""
    columns = ["after_setup_mib", "peak_memory_mib", "above_weights_mib", "peak_memory_ratio"]
    if device.type == "cuda":
        columns += ["reserved_mib", "whole_memory_ratio"]
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
            "max_length": parsed.max_length,
            "batches": parsed.batches,
            "batch_size": parsed.batch_size,
            "device": str(device),
            "dtype": parsed.dtype,
            "frozen_weights": parsed.frozen_weights,
            "compile_mode": parsed.compile_mode,
            "impl": parsed.impl,
            "threads": torch.get_num_threads(),
            "seed": parsed.seed,
        },
    )
    found = (peak.after_setup_mib, peak.peak_mib, peak.above_weights_mib, "", peak.reserved_mib, "")
    return dict(zip(columns, found, strict=False))


def floor_flop(
    parsed: argparse.Namespace,
    data: TaskRows,
    batches: Sequence[Rows],
    first_trainable: int,
    is_kept: bool,
) -> float:
    """Return the floor of all rounds together, in operations."""
    lengths, config = data.encodings.lengths, SHAPES[parsed.model_shape]
    first_computed = first_trainable if is_kept else 0
    return float(
        parsed.repeats
        * sum(
            step_flop(
                config, [lengths[row] for row in rows.numbers], first_trainable, first_computed
            )
            for rows in batches
        )
    )


def floor_columns(
    flop: float, timing: Timing, rates: Sequence[MatmulRate], best: tuple[float, int]
) -> dict[str, Any]:
    """Return the floor, and its share of the time of all rounds at each rate.

    Parameters
    ----------
    flop : float
        Operations of all rounds together.
    timing : Timing
        What they took.
    rates : sequence of MatmulRate
        At the model's shapes, before and after.
    best : (float, int)
        The rate of a GPU at large square products, and their size; 0 on a CPU.
    """
    gflop_per_s = flop / (sum(timing.times_ms) / 1000) / 1e9
    by_torch = max(rate.torch_gflops for rate in rates)
    floor = {"floor_gflop": flop / len(timing.times_ms) / 1e9, "torch_mm_gflops": by_torch}
    at_torch = {"share_at_torch_mm": gflop_per_s / by_torch}
    if best[1]:
        card = max(best[0], by_torch)
        floor |= {"card_gflops": card, "card_size": best[1]}
        return {**floor, **at_torch, "share_of_card": gflop_per_s / card}
    by_onednn = max((rate.onednn_gflops or 0.0) for rate in rates)
    return {
        **floor,
        "onednn_gflops": by_onednn or "",
        **at_torch,
        "share_at_onednn": gflop_per_s / by_onednn if by_onednn else "",
        "share_at_best": gflop_per_s / max(by_torch, by_onednn),
    }


def print_profiles(
    trainings: Sequence[Training | ProductTraining], rows: Rows, device: torch.device
) -> None:
    """Print a profile of one step of each contender."""
    for training in trainings:
        print(f"\n{training.name}: one step, {rows.tokens} tokens\n")
        shares = operations.profile_step(partial(training.step, rows), device)
        print(operations.table(shares), "\n")


if __name__ == "__main__":
    main()
