"""A module of the benchmarks that answers questions, in a thread in place of a process."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from pathlib import Path
from typing import Any


class InThread:
    """Takes the place of ``Popen`` in :mod:`benchmarks.harness.child_process`."""

    def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
        assert command[:2] == [sys.executable, "-m"]
        self.main = importlib.import_module(command[2]).main
        packages, ours = env["PYTHONPATH"].split(os.pathsep)
        assert packages and (Path(ours) / "benchmarks").is_dir()
        (asked, ask), (answered, answer) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(ask, "w"), os.fdopen(answered)
        self.ends = os.fdopen(asked), os.fdopen(answer, "w")
        self.thread = threading.Thread(target=self.work, args=(command[3:],))
        self.thread.start()

    def work(self, arguments: list[str]) -> None:
        questions, answers = self.ends
        with questions, answers:
            self.main(arguments, questions, answers)

    def communicate(self) -> None:
        self.stdin.close()
        self.thread.join()
        self.stdout.close()
