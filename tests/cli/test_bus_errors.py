"""A process whose mapped file is cut short says why it ends, in one line.

Oracle: standard error and the exit code of a process that reads a mapped file.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from spafit.cli import bus_errors, main
from spafit.cli import parser as cli

# Hashing releases the interpreter's lock, as PyTorch's operations do.
SCRIPT = """
import hashlib, importlib.util, mmap, os, sys
specification = importlib.util.spec_from_file_location("bus_errors", sys.argv[1])
bus_errors = importlib.util.module_from_spec(specification)
specification.loader.exec_module(bus_errors)
with open(sys.argv[2], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with bus_errors.explained("mend it"):
        hashlib.sha256(mapped)
        file.truncate(0)
        hashlib.sha256(mapped)
"""

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="there is no SIGBUS here")


def test_one_line_and_the_exit_code(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(2**20))
    command = [sys.executable, "-S", "-c", SCRIPT, str(bus_errors.__file__), str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert found.stderr == (
        "spafit: bus error: a file in use was cut short or written to in place; mend it\n"
    )
    assert (found.stdout, found.returncode) == ("", 128 + signal.SIGBUS)


def test_everything_is_as_before_afterwards() -> None:
    def state() -> tuple[object, ...]:
        woken = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(woken)
        lowest_free = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest_free)
        return signal.getsignal(signal.SIGBUS), woken, threading.active_count(), lowest_free

    before = state()
    with pytest.raises(KeyError), bus_errors.explained("mend it"):
        assert state() != before
        raise KeyError
    assert state() == before


def test_outside_the_main_thread_nothing_is_done() -> None:
    found = []

    def look() -> None:
        with bus_errors.explained("mend it"):
            found.append(signal.getsignal(signal.SIGBUS))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGBUS)]


def test_every_command_runs_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def run(_: object) -> int:
        found.append(signal.getsignal(signal.SIGBUS))
        return 0

    monkeypatch.setattr("spafit.cli.verbs.plan.run", run)
    before = signal.getsignal(signal.SIGBUS)
    assert main(["plan", "bitfit"]) == 0
    assert found != [before]
    assert signal.getsignal(signal.SIGBUS) == before


def test_an_option_is_offered_where_there_is_one() -> None:
    mends = [cli._mend_of_bus_error(argparse.Namespace(**more)) for more in ({}, {"mapped": None})]
    assert ["--no-mapped" in mend for mend in mends] == [False, True]
