"""Training, evaluating, saving and resuming for an hour: memory, files and threads do not grow.

Run as a program, this file trains for a number of seconds in one process, and prints what it uses
as a line of JSON after each round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import environment
from support.interruptions import interrupted
from support.small_runs import SmallRun

Sized = Callable[[int, int], int]
Promise = Callable[[str, int, str], None]

SETTINGS = {"epochs": 2, "save_every": 2, "eval_every": 3, "overwrite": False}


def used(folder: Path) -> dict[str, Any]:
    """Say what this process uses, and how many files there are."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "open_files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "python_threads": threading.active_count(),
        "files": sum(len(files) for _, _, files in os.walk(folder)),
    }


def turn_over_interned_strings() -> None:
    """Let Python's table of interned strings grow to the size that it keeps.

    pathlib interns each part of every path. The names of temporary files die soon, but their places
    in CPython 3.11's table are free only once it is made anew, twice as large for the first time:
    after some 2,700 rounds, a step of 7 MiB that hides whether anything grows.
    """
    for number in range(1_500_000):
        sys.intern(f"soak {number}")


def soak(weights: Path, folder: Path, seconds: float) -> None:
    """Train in rounds: anew, interrupted twice and gone on with; with a kept prefix, and without.

    At least 10 rounds, however busy the machine is; all are the same but for their seeds, of which
    there are three.
    """
    small, end, rounds = SmallRun(weights), time.monotonic() + seconds, 0
    while time.monotonic() < end or rounds < 10:
        seed = rounds % 3
        first = {"overwrite": True, "epochs": 1}
        small.fit(out=folder / "plain", seed=seed, **{**SETTINGS, **first})
        small.fit(out=folder / "plain", seed=seed, **SETTINGS)
        kept = {"cache_prefix": "disk", "dropout_in_group_1": False}
        small.fit(out=folder / "kept", seed=seed, **kept, **{**SETTINGS, **first})
        interrupted(small, folder / "kept", [6, 9], seed=seed, **kept, **SETTINGS)
        rounds += 1
        if rounds == 2:  # the strings that stay are there by now
            turn_over_interned_strings()
        print(json.dumps({"round": rounds, "left_s": end - time.monotonic(), **used(folder)}))
        sys.stdout.flush()


@pytest.mark.skipif(sys.platform != "linux", reason="what a process uses is read from /proc")
class TestSoak:
    """Oracle: what the system says of the process."""

    @pytest.mark.full
    def test_nothing_grows(
        self, small: SmallRun, tmp_path: Path, sized: Sized, promise: Promise
    ) -> None:
        seconds = sized(8, 3600)
        folder = tmp_path / "runs"
        variables = environment(OMP_NUM_THREADS="1", SPAFIT_CACHE=str(folder / "cache"))
        command = [sys.executable, __file__, str(small.folder), str(folder), str(seconds)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        rounds = [json.loads(line) for line in done.stdout.splitlines()]
        warm = rounds[max(3, len(rounds) // 10) :]  # allocators take what they will need
        window = max(1, len(warm) // 5)
        before = statistics.median(each["rss_mib"] for each in warm[:window])
        after = statistics.median(each["rss_mib"] for each in warm[-window:])
        highest = max(each["rss_mib"] for each in warm)
        said = (
            f"{len(rounds)} rounds, {before:.1f} MiB resident after warming up, {after:.1f} at "
            f"the end, {highest:.1f} at most"
        )
        # Within 2 %; a few rounds are no time for an allocator to settle.
        assert after <= before * sized(6, 2) / 100 + before, said
        for name in ("open_files", "threads", "python_threads"):
            assert len({each[name] for each in warm}) == 1, (name, warm)
        # How many checkpoints are kept depends on which was the best: on the seed alone.
        assert len({(each["round"] % 3, each["files"]) for each in warm}) == 3, warm
        promise("soak, seconds of training and saving", seconds, said)


if __name__ == "__main__":
    soak(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
