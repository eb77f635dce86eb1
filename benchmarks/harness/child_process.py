"""A process that answers questions, a line of JSON each way: for what needs packages of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any


class ChildProcess:
    """A module of this package, run by another Python that first looks for packages elsewhere.

    Parameters
    ----------
    module : str
        Its name; it is to write one answer when it is ready, and then one for each question.
    arguments : sequence of str
        Its arguments.
    packages : Path
        The folder in which packages are installed (``pip install --target``).

    Attributes
    ----------
    ready : dict
        Its first answer.
    """

    def __init__(self, module: str, arguments: Sequence[str], packages: Path) -> None:
        self._module = module
        paths = (packages.resolve(), Path(__file__).parents[2])
        # As keep_freed_memory does here.
        memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
        self._process = Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=PIPE,
            stdout=PIPE,
            text=True,
            env={**os.environ, **memory, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        )
        self.ready = self._answer()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a question."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin)
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} has ended; what it said is above")
        found: dict[str, Any] = json.loads(line)
        return found
