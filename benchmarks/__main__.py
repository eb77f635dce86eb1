"""Run the short set: the most important benchmarks, in under 10 minutes.

    python -m benchmarks --out runs/bench                  on 2 CPU cores
    python -m benchmarks --device cuda --out runs/gpu      on one GPU
    python -m benchmarks --device cuda --precision fp16    on one without bf16, such as a V100

On a CPU: training step, inference, nine tasks on one base, and loading. On a GPU: training steps
with two batch sizes on three tasks, memory, query, key and value alone, a profile of a step, and a
part of Table 2's projection. Each benchmark runs in a separate process and writes its CSV, table
and figure to the folder. Run the scripts themselves for the full benchmarks and all options. Those
that use torch.compile run last, because compiling takes the most time.

Each row has its command and what other programs used meanwhile; where that was much, or the rounds
differ much, a warning says so, once more at the end. A line a minute says what is running. Failures
do not stop the other benchmarks; they and the places of the results are listed at the end.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.quiet import warnings
from benchmarks.harness.report import read_rows

EVERY_S = 60.0

#: Name of the output -> module and options.
SHORT_SET = {
    "train_step_large": "train_step --task rte --batches 3 --kept-prefix",
    "train_step_minilm": "train_step --task rte --batches 5 --model-shape minilm --memory",
    "inference_large": "inference --task rte --rows 64 --repeats 3",
    "many_tasks_large": (
        "many_tasks --task cola --batch-size 1 --batches 3 --repeats 1 --contests every own"
    ),
    "load_large": "load --repeats 3",
}

_UNCOMPILED = "--contenders peft eager captured captured-kept"
_MNLI = "train_step --task mnli --max-length 128"

#: The same for a GPU; ``--device`` and ``--precision`` are added.
GPU_SET = {
    "train_step_rte": f"train_step --task rte --batches 6 --repeats 4 {_UNCOMPILED}",
    "train_step_cola": f"train_step --task cola --batches 6 --repeats 4 {_UNCOMPILED}",
    "train_step_mnli": f"{_MNLI} --batches 6 --repeats 4 {_UNCOMPILED}",
    "train_step_rte_128": (
        f"train_step --task rte --batch-size 128 --batches 2 --repeats 8 {_UNCOMPILED}"
    ),
    "train_step_mnli_128": f"{_MNLI} --batch-size 128 --batches 2 --repeats 8 {_UNCOMPILED}",
    "memory_mnli": f"{_MNLI} --batches 4 --contenders peft eager captured --memory",
    "qkv": "lora_linear --maps 3 --tokens 4096 --repeats 20",
    "profile_16": "profile_step --task rte",
    "profile_128": "profile_step --task rte --batch-size 128",
    "table2_part": "table2 --tasks rte mnli --batches 3 --rounds 1",
    "train_step_compiled": (
        "train_step --task rte --batches 3 --repeats 4 "
        "--contenders peft peft-compiled captured compiled"
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the short set of a device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="a folder")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--precision", default="bf16", help="on a GPU (bf16)")
    parser.add_argument("--only", choices=(*SHORT_SET, *GPU_SET), nargs="+")
    parsed = parser.parse_args(arguments)
    commands = commands_of(parsed)
    began = time.monotonic()
    failed, warned, written = [], [], []
    for number, (name, command) in enumerate(commands.items(), start=1):
        print(f"\npython -m {shlex.join(command)}\n", flush=True)
        out = parsed.out / name
        earlier = len(read_rows(out.with_suffix(".csv")))
        if run(command, f"{number} of {len(commands)}, {name}", began):
            failed.append(name)
        rows = read_rows(out.with_suffix(".csv"))[earlier:]
        warned += [f"{name}: {warning}" for warning in warnings(rows)]
        written += sorted(map(str, parsed.out.glob(f"{name}.*"))) if rows else []
    print(f"\nDone after {time.monotonic() - began:.0f} s. Written:", *written, sep="\n  ")
    for warning in warned:
        print(f"Warning: {warning}.")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(command: Sequence[str], what: str, began: float) -> int:
    """Run a module in a process, and say each minute what is running; return its exit code."""
    with subprocess.Popen([sys.executable, "-m", *command]) as process:
        while True:
            try:
                return process.wait(timeout=EVERY_S)
            except subprocess.TimeoutExpired:
                print(f"[{what}: {time.monotonic() - began:.0f} s so far]", flush=True)


def commands_of(parsed: argparse.Namespace) -> dict[str, list[str]]:
    """Return the module and the options of each requested benchmark."""
    is_gpu = parsed.device != "cpu"
    its_set = GPU_SET if is_gpu else SHORT_SET
    unknown = [name for name in parsed.only or () if name not in its_set]
    if unknown:
        sys.exit(f"not in the set of {parsed.device}: {', '.join(unknown)}")
    commands = {}
    for name in parsed.only or its_set:
        module, *options = its_set[name].split()
        where = ["--device", parsed.device, "--precision", parsed.precision] if is_gpu else []
        out = ["--out", str(parsed.out / name)]
        commands[name] = [f"benchmarks.{module}", *options, *where, *out]
    return commands


if __name__ == "__main__":
    main()
