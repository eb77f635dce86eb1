"""How much of the machine other programs use while this one runs.

OpenMP's threads wait for each other without sleeping: where one of them has no core to itself, a
training step may take ten times as long.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_COUNTS = Path("/proc/stat")
_MOST = 0.5  # of the cores that the threads need, so many may be busy with other programs


def others_s() -> float | None:
    """Return the processor seconds that all other programs have used since the machine started.

    None where the system does not count them as Linux does.
    """
    try:
        first = _COUNTS.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _, _, *rest = (int(number) for number in first[1:9])
    except (OSError, ValueError):
        return None
    own = os.times()
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system


_BEGAN = time.monotonic(), others_s()


def other_load() -> float | None:
    """Return how many cores other programs kept busy since this process began; None if unknown.

    It is counted from the import of this module; the time of this process, and of those that it has
    waited for, is left out.
    """
    began, before = _BEGAN
    now = others_s()
    if before is None or now is None:
        return None
    return max(0.0, now - before) / max(1e-3, time.monotonic() - began)


def busy_note(threads: int) -> str:
    """Return a warning if other programs need the cores of so many threads, else an empty text."""
    load, cores = other_load(), os.cpu_count() or 1
    if threads == 1 or load is None or load < cores - threads + _MOST:
        return ""
    return (
        f"other programs keep {load:.1f} of {cores} cores busy: with {threads} threads training "
        "may take many times as long; OMP_NUM_THREADS=1 gives it one"
    )


def note_if_busy() -> None:
    """Say, before long work, that other programs need the cores."""
    import torch  # help, which imports this module, does without

    note = busy_note(torch.get_num_threads())
    if note:
        print(note, file=sys.stderr)
