"""Arguments shared by several benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.contenders.models import METHODS, SHAPES, TOLERANCES
from benchmarks.harness.lengths import DATA, TASKS, VOCABULARY
from spafit.machine.precision import resolve_device

RESULTS = Path(__file__).parents[1] / "results"


def add_run_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the arguments of every benchmark."""
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / out, help="writes OUT.csv, OUT.md and OUT.png"
    )


def add_data_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the arguments of benchmarks on batches of a task."""
    add_run_arguments(parser, out)
    parser.add_argument("--task", choices=TASKS, default="rte")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument(
        "--precision",
        "--dtype",
        dest="dtype",
        choices=TOLERANCES,
        default="float32",
        help="bf16 and fp16 are autocast",
    )
    parser.add_argument("--data", type=Path, default=DATA, help="GLUE's root")
    parser.add_argument("--vocab", type=Path, default=VOCABULARY, help="folder of a vocabulary")


def add_model_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the arguments of benchmarks of a whole model on such batches."""
    add_data_arguments(parser, out)
    parser.add_argument("--model-shape", choices=SHAPES, default="large")
    parser.add_argument("--method", help="default: SPAFIT-4-9-II, or SPAFIT-1-3-II for minilm")


def set_threads(parsed: argparse.Namespace) -> None:
    """Set the requested number of threads."""
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)


def output_of(parsed: argparse.Namespace, device: torch.device) -> Path:
    """Return the path of the results; the default is different on a GPU.

    Rows of a GPU have more columns, so they cannot be in the same table as a CPU's.
    """
    out: Path = parsed.out
    if device.type == "cpu" or out.parent != RESULTS:
        return out
    return out.with_name(f"{out.name}_{device.type}")


def device_of(parsed: argparse.Namespace) -> torch.device:
    """Set the number of threads, and return the requested device."""
    set_threads(parsed)
    return resolve_device(parsed.device)


def settings_of(parsed: argparse.Namespace, source: str) -> dict[str, str | int | float]:
    """Return the columns that describe what was measured, common to benchmarks on batches."""
    return {
        "task": parsed.task,
        "lengths": source,
        "model": parsed.model_shape,
        "hidden": SHAPES[parsed.model_shape].hidden_size,
        "batch_size": parsed.batch_size,
        "seed": parsed.seed,
    }


def method_of(parsed: argparse.Namespace) -> str:
    """Return the requested method, or the shape's own."""
    return str(parsed.method or METHODS[parsed.model_shape])
