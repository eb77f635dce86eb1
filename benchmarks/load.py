"""Time from a folder of weights on disk to the first logits: spafit against transformers.

    python -m benchmarks.load --repeats 5

Each load is timed in a separate process, in turns. Two times are given: that of loading and the
first forward after the imports, and that of the whole process. The folder is made here, with random
weights; it was just written and read, so it is in the system's page cache for both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.contenders.first_logits import SPAFIT, TOKENS, TRANSFORMERS
from benchmarks.contenders.models import SHAPES
from benchmarks.harness.arguments import add_run_arguments, set_threads
from benchmarks.harness.report import place, write_results
from benchmarks.harness.timing import Rows, WrongResultError, relative_difference, rotated, timings
from spafit.bert import BertForSequenceClassification

_TOLERANCE = 1e-4


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_run_arguments(parser, out="load")
    parser.add_argument("--model-shape", choices=SHAPES, default="large")
    parser.add_argument("--repeats", type=int, default=5)
    parsed = parser.parse_args(arguments)
    set_threads(parsed)

    names = [TRANSFORMERS, SPAFIT]
    load_ms: dict[str, list[float]] = {name: [] for name in names}
    process_ms: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), parsed.model_shape, parsed.seed)
        check_logits({name: load_apart(name, folder) for name in names})
        for number in range(parsed.repeats):
            for name in rotated(names, number):
                began = time.perf_counter()
                found = load_apart(name, folder)
                process_ms[name].append(1000 * (time.perf_counter() - began))
                load_ms[name].append(found["load_ms"])
    rounds = [Rows((0,), TOKENS)] * parsed.repeats
    settings = {"model": parsed.model_shape, "seed": parsed.seed}
    rows: list[dict[str, Any]] = []
    for loading, whole in zip(timings(load_ms, rounds), timings(process_ms, rounds), strict=True):
        columns = loading.columns()
        del columns["examples_per_s"], columns["tokens_per_s"]
        columns |= {"whole_process_ratio": whole.ratio.median, "whole_process_ms": whole.median_ms}
        rows.append({**settings, **columns, **place(torch.device("cpu"), "float32")})
    write_results(parsed.out, rows, f"Loading to the first logits: {parsed.model_shape}")


def write_weights(folder: Path, shape: str, seed: int) -> None:
    """Write config.json and model.safetensors of a shape, with a head of two labels."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(SHAPES[shape], num_labels=2)
    save_file(dict(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    entries = {
        "architectures": ["BertForSequenceClassification"],
        "num_labels": 2,
        **SHAPES[shape].to_json_dict(),
    }
    (folder / "config.json").write_text(json.dumps(entries), encoding="utf-8")


def load_apart(name: str, folder: str) -> dict[str, Any]:
    """Load in a new process; return what :mod:`benchmarks.contenders.first_logits` prints."""
    command = [sys.executable, "-m", "benchmarks.contenders.first_logits", name, folder]
    threads = str(torch.get_num_threads())
    ran = subprocess.run([*command, threads], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"loading by {name} failed:\n{ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def check_logits(found: dict[str, dict[str, Any]]) -> None:
    """Raise a WrongResultError if the two logits differ."""
    theirs, ours = (torch.tensor(found[name]["logits"]) for name in (TRANSFORMERS, SPAFIT))
    difference = relative_difference(ours, theirs)
    if not difference <= _TOLERANCE:
        raise WrongResultError(f"the logits {ours} are not transformers', {theirs}")


if __name__ == "__main__":
    main()
