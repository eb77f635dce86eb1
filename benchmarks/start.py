"""Time of commands that compute nothing: whole processes, from their start to their end.

    python -m benchmarks.start --repeats 9

Help, the version and an argument error need no PyTorch; ``spafit plan`` does. Two processes of
Python alone are the limits: one that does nothing, and one that imports torch. All take turns.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness.arguments import add_run_arguments, set_threads
from benchmarks.harness.report import place, write_results
from benchmarks.harness.timing import Contender, Rows, Spread, WrongResultError, take_turns

#: Arguments of Python -> exit code, and a part of what is printed.
PROCESSES: dict[tuple[str, ...], tuple[int, str]] = {
    ("-c", "pass"): (0, ""),
    ("-m", "spafit", "--version"): (0, "spafit "),
    ("-m", "spafit", "--help"): (0, "exit codes:"),
    ("-m", "spafit", "train", "--help"): (0, "--method"),
    ("-m", "spafit", "train", "--epoch", "3"): (2, "unknown option --epoch"),
    ("-c", "import torch"): (0, ""),
    ("-m", "spafit", "plan", "SPAFIT-4-9-II"): (0, "7,485,443 of 333,582,339 numbers train"),
    ("-m", "spafit", "plan", "SPAFIT-1-3-II", "--model", "minilm"): (0, "numbers train"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_run_arguments(parser, out="start")
    parser.add_argument("--repeats", type=int, default=9)
    parsed = parser.parse_args(arguments)
    set_threads(parsed)

    contenders = [process(each) for each in PROCESSES]
    rows: list[dict[str, Any]] = []
    for timing in take_turns(contenders, [Rows((0,), 0)], repeats=parsed.repeats):
        times = Spread.of(timing.times_ms)
        columns = {
            "contender": timing.name,
            "rounds": len(timing.times_ms),
            "median_time_ms": times.median,
            "time_ms_min": times.minimum,
            "time_ms_max": times.maximum,
        }
        rows.append({**columns, **place(torch.device("cpu"), "float32")})
    write_results(parsed.out, rows, "What it costs to start")


def process(arguments: tuple[str, ...]) -> Contender:
    """Return what runs one of PROCESSES to its end, and checks what it prints."""
    code, part = PROCESSES[arguments]

    def run(rows: Rows) -> None:
        command = [sys.executable, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True)
        printed = ran.stdout + ran.stderr
        if ran.returncode != code or part not in printed:
            raise WrongResultError(f"{arguments}: exit code {ran.returncode}, {printed[-2000:]}")

    return Contender(shlex.join(["python", *arguments]), run, lambda rows: {})


if __name__ == "__main__":
    main()
