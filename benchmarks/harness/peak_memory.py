"""Measure the peak memory of each contender in a separate process.

Memory that one contender allocated stays with its process, so they cannot take turns:

    python -m benchmarks.harness.peak_memory benchmarks.train_step:peak_of_steps '{"seed": 0, ...}'
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spafit.machine.versions import peak_memory_mib


@dataclass(frozen=True)
class PeakMemory:
    """Memory of one contender in a separate process: resident, or of the GPU.

    Attributes
    ----------
    after_setup_mib : float
        Once weights and data were there, and nothing had run.
    peak_mib : float
        The most during the work, what was there included.
    reserved_mib : float
        On a GPU the most that the allocator held, the pools of captured graphs included; else 0.
    """

    after_setup_mib: float
    peak_mib: float
    reserved_mib: float = 0.0

    @property
    def above_weights_mib(self) -> float:
        """The memory of the work in addition to the weights."""
        return self.peak_mib - self.after_setup_mib


def measure_peak_memory(function: str, arguments: Mapping[str, Any]) -> PeakMemory:
    """Measure a contender's memory in a new process.

    Parameters
    ----------
    function : str
        "module:function". Called with the arguments it sets everything up, and gives back the work
        as a function without arguments.
    arguments : mapping
        What JSON can write.

    Raises
    ------
    RuntimeError
        If the process fails; the message ends with what it said.
    """
    command = [sys.executable, "-m", "benchmarks.harness.peak_memory", function]
    ran = subprocess.run([*command, json.dumps(arguments)], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{function} failed in its own process:\n{ran.stderr[-2000:]}")
    return PeakMemory(**json.loads(ran.stdout.splitlines()[-1]))


def peak_memory_here(set_up: Callable[[], Callable[[], object]]) -> PeakMemory:
    """Set up and run the work in this process, and return the memory that it took."""
    work = set_up()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        after_setup_mib = torch.cuda.memory_allocated() / 2**20
        work()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return PeakMemory(after_setup_mib, *(each / 2**20 for each in most))
    _return_free_memory()
    after_setup_mib = _status_mib("VmRSS") or peak_memory_mib(torch.device("cpu"))
    with contextlib.suppress(OSError):  # where it may not be, the record includes the set-up
        # Reset the kernel's record of peak resident memory.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    work()
    # The kernel's record of the process; getrusage's would include the parent's at the fork.
    peak_mib = _status_mib("VmHWM") or peak_memory_mib(torch.device("cpu"))
    return PeakMemory(after_setup_mib, peak_mib)


def _status_mib(key: str) -> float | None:
    """Read a size of this process from ``/proc``; None if the system has none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), None)


def _return_free_memory() -> None:
    """Return freed memory to the system, if the C library is glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the memory of one contender as a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("function", metavar="MODULE:FUNCTION")
    parser.add_argument("arguments", metavar="JSON", nargs="?", default="{}")
    parsed = parser.parse_args(arguments)
    module, _, name = parsed.function.partition(":")
    set_up = getattr(importlib.import_module(module), name)
    settings = json.loads(parsed.arguments)
    print(json.dumps(vars(peak_memory_here(lambda: set_up(**settings)))))


if __name__ == "__main__":
    main()
