"""Train the cells of a grid by worker processes of this machine.

A worker trains one cell at a time (:mod:`spafit.experiments.grid.worker`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spafit.errors import TrainingError, one_line
from spafit.experiments.grid.cells import Cell

_MAIN = "from spafit.experiments.grid.worker import main; main()"
_MOST_STARTS = 3  # of workers in a row that end before they are ready


class _Worker:
    """A worker process; what it answers goes into a queue, and None at its end."""

    def __init__(
        self,
        start: dict[str, Any],
        events: queue.Queue[Any],
        threads: int | None,
        gpu: str | None,
    ) -> None:
        self.cell: int | None = None
        self.gpu = gpu
        self.is_ready = False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self._process = subprocess.Popen(
            # With our path, so that it imports what we did, wherever it is started.
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {_MAIN}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which stops the workers once
        )
        self.pid = self._process.pid
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()
        self.order(start)

    def _listen(self, events: queue.Queue[Any]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            events.put((self, json.loads(line)))
        events.put((self, None))

    def order(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which the queue says
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Have it stop: after the current step, with a checkpoint."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def end(self) -> str:
        """Wait for its end, and return how it ended."""
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        self._said.close()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return one_line(f"{how}: {lines[-1]}" if lines else how, 300)


class Workers:
    """A pool of worker processes (:class:`~spafit.experiments.grid.running.Pool`).

    Parameters
    ----------
    grid : str
        The grid's name, for the records.
    out : Path
        The grid's folder.
    data : Path
        GLUE's root.
    most : int
        How many processes at most; one is started when there is a cell for it.
    threads : int or None
        The threads of each of them; None leaves it to PyTorch and the environment.
    gpus : sequence of str
        The GPUs that are dealt out to them, one each; none leaves all to all of them.
    """

    def __init__(
        self,
        grid: str,
        out: Path,
        data: Path,
        most: int,
        threads: int | None,
        gpus: Sequence[str] = (),
    ) -> None:
        self._start = {"grid": grid, "out": str(out), "data": str(data), "threads": threads}
        self.at_once, self._threads, self._gpus = most, threads, gpus
        self._workers: list[_Worker] = []
        self._events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._deaths = 0

    @property
    def taken(self) -> list[int]:
        """The cells that are trained."""
        return [worker.cell for worker in self._workers if worker.cell is not None]

    running = taken

    def has_room(self) -> bool:
        """Return whether a worker is idle or may be started."""
        return len(self.taken) < self.at_once

    def train(self, number: int, cell: Cell, learning_rate: float | None) -> None:
        """Give a cell to an idle worker, or to a new one."""
        worker = next((each for each in self._workers if each.cell is None), None)
        if worker is None:
            taken = [each.gpu for each in self._workers]
            gpu = min(self._gpus, key=taken.count, default=None)
            worker = _Worker(self._start, self._events, self._threads, gpu)
            self._workers.append(worker)
        worker.cell = number
        worker.order({"cell": dataclasses.asdict(cell), "learning_rate": learning_rate})

    def answers(self, seconds: float) -> list[tuple[int, dict[str, Any]]]:
        """Wait until a worker has answered or ended, for so long at most.

        Raises
        ------
        TrainingError
            If no worker can be started.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                worker, answer = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return []
            if answer is not None and "ready" in answer:
                worker.is_ready = True
                continue
            number, worker.cell = worker.cell, None
            if answer is None:
                self._workers.remove(worker)
                how = worker.end()
                self._deaths = 0 if worker.is_ready else self._deaths + 1
                if self._deaths >= _MOST_STARTS:
                    raise TrainingError(f"no worker can start: the last one {how}")
                answer = {"killed": f"its worker (process {worker.pid}) {how}"}
            return [] if number is None else [(number, answer)]

    def stop(self) -> list[tuple[int, dict[str, Any]]]:
        """Have the workers stop, each with a checkpoint, and wait for them."""
        found = []
        for worker in self._workers:
            worker.close()
        while self._workers:
            worker, answer = self._events.get()
            if answer is None:
                self._workers.remove(worker)
                worker.end()
            elif "done" in answer and worker.cell is not None:
                found.append((worker.cell, answer))
        return found
