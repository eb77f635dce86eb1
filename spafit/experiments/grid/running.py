"""Run the cells of a grid by several worker processes, and show how far they are.

The parent hands out the cells; a worker trains one at a time
(:mod:`spafit.experiments.grid.worker`).
Another command on the same folder is noticed by the locks of the run folders: what it has in work
is left to it, and taken up if it ends without finishing.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spafit.errors import CheckpointError, StoppedError, TrainingError, one_line
from spafit.experiments.grid.cells import Cells
from spafit.experiments.grid.choosing import best_rate, mean_scores, score_of
from spafit.experiments.grid.display import Display, Watched, clock
from spafit.experiments.grid.places import DIVERGED, result_of, steps_of
from spafit.experiments.grid.speeds import Speeds
from spafit.runs.record import RUN, is_in_use, read_run
from spafit.runs.stopping import StopRequests

_LOOK_S = 0.5  # between two looks at the logs of what runs
_MAIN = "from spafit.experiments.grid.worker import main; main()"
_MOST_STARTS = 3  # of workers in a row that end before they are ready


class _Worker:
    """A worker process; what it answers goes into a queue, and None at its end."""

    def __init__(self, start: dict[str, Any], events: queue.Queue[Any], threads: int | None):
        self.cell: int | None = None
        self.is_ready = False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
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


class Running:
    """Runs cells to their end.

    Parameters
    ----------
    cells : Cells
        All cells of the grid.
    numbers : sequence of int
        Those to run, in order.
    out : Path
        The grid's folder.
    data : Path
        GLUE's root.
    rows : mapping of str to int
        The rows to train on of each task.
    workers : int
        How many processes.
    threads : int or None
        The threads of each of them; None leaves it to PyTorch and the environment.
    display : Display
        Where it is shown.
    """

    def __init__(
        self,
        cells: Cells,
        numbers: Sequence[int],
        out: Path,
        data: Path,
        rows: Mapping[str, int],
        *,
        workers: int,
        threads: int | None,
        display: Display,
    ) -> None:
        self.cells, self.numbers, self.out, self.data = cells.cells, numbers, out, data
        self.name, self.choices, self.display = cells.name, cells.choices, display
        self.most, self.threads = workers, threads
        self.steps = {n: steps_of(self.cells[n], rows[self.cells[n].task]) for n in numbers}
        self.examples = {
            n: float(rows[self.cells[n].task] * self.cells[n].settings["epochs"]) for n in numbers
        }
        self.records: dict[int, dict[str, Any] | None] = {}  # None: it diverged while choosing
        self.failed: dict[int, str] = {}
        self.rates: dict[int, float] = {}
        self.speeds = Speeds()
        self._left = dict.fromkeys(numbers)  # in order; what runs is among them
        self._elsewhere: set[int] = set()
        self._killed: dict[int, int] = {}
        self._watched: dict[int, Watched] = {}
        self._workers: list[_Worker] = []
        self._events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._deaths = 0

    def look(self) -> None:
        """Find out what is finished already.

        Raises
        ------
        CheckpointError
            If a folder holds another run than the cell's.
        """
        for number in list(self._left):
            if self.cells[number].purpose == "choice" or self.cells[number].choice is None:
                self._take_up(number)
        self._choose()
        for number in list(self._left):
            self._take_up(number)

    @property
    def bases(self) -> set[tuple[str, str | None]]:
        """The models, with their revisions, of what is left."""
        return {(self.cells[n].model, self.cells[n].revision) for n in self._left}

    def run(self) -> None:
        """Run what is left.

        Raises
        ------
        StoppedError
            If a signal asked for a stop; what was running has a checkpoint.
        """
        done = len(self.records)
        if done:
            self.display.line(f"{done} of {len(self.numbers)} are done already")
        try:
            with StopRequests() as stop:
                while self._left and not stop():
                    self._choose()
                    self._hand_out()
                    self._draw()
                    self._wait(_LOOK_S)
                    self._look_elsewhere()
                if stop.received is not None:
                    self._finish()
                    raise StoppedError(
                        f"stopped by {stop.received.name}: {len(self.records)} of "
                        f"{len(self.numbers)} are done; the same command resumes the grid",
                        stop.received,
                    )
        finally:
            self._finish()
            self.display.draw([])

    def _take_up(self, number: int) -> None:
        """Count a cell as done if its run is finished."""
        cell = self.cells[number]
        rate = None if cell.choice is None else self.rates.get(cell.choice)
        record = result_of(cell, self.out, rate)
        if record is not None and (cell.choice is None or rate is not None):
            self._done(number, record if "result" in record else None)

    def _done(self, number: int, record: dict[str, Any] | None) -> None:
        self._left.pop(number, None)
        self._elsewhere.discard(number)
        self.records[number] = record
        if record is not None:
            self.speeds.add(record)

    def _choose(self) -> None:
        """Choose the learning rates whose runs have all ended."""
        for number, choice in enumerate(self.choices):
            tried = [each for cells in choice.cells.values() for each in cells]
            waiting = [n for n in self._left if self.cells[n].choice == number]
            if number in self.rates or not waiting:
                continue
            lacking = [each for each in tried if each in self.failed]
            if lacking:
                for each in waiting:
                    self._fail(each, f"no learning rate: {self.cells[lacking[0]].title} failed")
            elif all(each in self.records for each in tried):
                means = mean_scores(choice, self.records)
                rate = best_rate(means)
                if rate is None:
                    for each in waiting:
                        self._fail(each, "no learning rate: the runs of all of them diverged")
                    continue
                self.rates[number] = rate
                said = ", ".join(
                    f"{each:g} {'diverged' if mean is None else f'{mean:.4f}'}"
                    for each, mean in means.items()
                )
                self.display.line(f"{choice.title}: learning rate {rate:g} ({said})")

    def _next(self) -> int | None:
        """Return the first cell that can be run now."""
        busy = {worker.cell for worker in self._workers}
        for number in list(self._left):
            choice = self.cells[number].choice
            if number in busy or number in self._elsewhere:
                continue
            if choice is not None and choice not in self.rates:
                continue
            if is_in_use(self.out / self.cells[number].folder):
                self._elsewhere.add(number)
            elif not self._is_done_elsewhere(number):
                return number
        return None

    def _is_done_elsewhere(self, number: int) -> bool:
        """Count a cell as done if another command has finished it meanwhile."""
        try:
            self._take_up(number)
        except CheckpointError as error:
            self._fail(number, str(error))
        if number in self.records:
            self.display.line(f"{self.cells[number].title}: done by another command")
        return number not in self._left

    def _hand_out(self) -> None:
        """Give every idle worker a cell; start more workers while there are cells for them."""
        while True:
            idle = next((each for each in self._workers if each.cell is None), None)
            if idle is None and len(self._workers) >= self.most:
                return
            number = self._next()
            if number is None:
                return
            if idle is None:
                start = {"grid": self.name, "out": str(self.out), "data": str(self.data)}
                idle = _Worker(start | {"threads": self.threads}, self._events, self.threads)
                self._workers.append(idle)
            cell = self.cells[number]
            idle.cell = number
            self._watched[number] = Watched(self.out / cell.folder)
            rate = None if cell.choice is None else self.rates[cell.choice]
            idle.order({"cell": dataclasses.asdict(cell), "learning_rate": rate})

    def _wait(self, seconds: float) -> None:
        """Take what the workers answer, for so long at most."""
        end = time.monotonic() + seconds
        while True:
            try:
                worker, answer = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return
            self._answered(worker, answer)
            if answer is None or "ready" not in answer:
                return  # there may be something to hand out

    def _answered(self, worker: _Worker, answer: dict[str, Any] | None) -> None:
        number = worker.cell
        if answer is None:
            self._workers.remove(worker)
            how = worker.end()
            self._deaths = 0 if worker.is_ready else self._deaths + 1
            if self._deaths >= _MOST_STARTS:
                raise TrainingError(f"no worker can start: the last one {how}")
            if number is not None:
                self._was_killed(number, f"its worker (process {worker.pid}) {how}")
            return
        if "ready" in answer:
            worker.is_ready = True
            return
        worker.cell = None
        assert number is not None
        if "in_use" in answer:
            self._elsewhere.add(number)
            return
        self._ended(number, str(answer.get("failed", "")))

    def _was_killed(self, number: int, how: str) -> None:
        self._killed[number] = self._killed.get(number, 0) + 1
        if self._killed[number] > 1:
            self._fail(number, f"{how}, for the second time")
        else:
            self.display.line(f"{self.cells[number].title}: {how}; it is taken up again")

    def _ended(self, number: int, failure: str) -> None:
        """Count a cell as done or failed, after its worker has said so."""
        cell = self.cells[number]
        if failure:
            if cell.purpose == "choice" and failure.startswith(DIVERGED):
                self._done(number, None)
                self.display.line(f"{cell.title}: {failure}")
            else:
                self._fail(number, failure)
            return
        try:
            record = read_run(self.out / cell.folder / RUN)
        except CheckpointError as error:
            self._fail(number, str(error))
            return
        self._done(number, record)
        name, score = score_of(record)
        words = [f"{len(self.records)} of {len(self.numbers)} done", *self._time_left()]
        self.display.line(f"{cell.title}: {name} {score:.4f} ({', '.join(words)})")

    def _fail(self, number: int, reason: str) -> None:
        self._left.pop(number, None)
        self.failed[number] = reason
        self.display.line(f"{self.cells[number].title}: failed: {one_line(reason, 600)}")

    def _look_elsewhere(self) -> None:
        """See what has become of the cells that other commands have in work."""
        for number in list(self._elsewhere):
            if not is_in_use(self.out / self.cells[number].folder):
                self._elsewhere.discard(number)
                self._is_done_elsewhere(number)

    def _finish(self) -> None:
        """Stop the workers, and wait for them."""
        for worker in self._workers:
            worker.close()
        while self._workers:
            worker, answer = self._events.get()
            if answer is None:
                self._workers.remove(worker)
                worker.end()
            elif "done" in answer and worker.cell is not None:
                self._ended(worker.cell, "")

    def _time_left(self) -> list[str]:
        """Return the time left in words, from the speeds of what is finished, if any is."""
        seconds = 0.0
        for number in self._left:
            cell = self.cells[number]
            whole = self.speeds.seconds(cell.task, cell.method, self.examples[number])
            if whole is None:
                return []
            watched = self._watched.get(number)
            seconds += whole * (1 - (watched.step / self.steps[number] if watched else 0))
        return [f"{clock(seconds / self.most)} left"]

    def _draw(self) -> None:
        running = [worker.cell for worker in self._workers if worker.cell is not None]
        counts = [f"{len(self.records)} of {len(self.numbers)} done"]
        counts += [f"{len(self.failed)} failed"] * bool(self.failed)
        counts += [f"{len(running)} running"]
        counts += [f"{len(self._elsewhere)} elsewhere"] * bool(self._elsewhere)
        counts += [f"{len(self._left) - len(running) - len(self._elsewhere)} waiting"]
        lines = [f"{one_line(self.name)}: {', '.join([*counts, *self._time_left()])}"]
        for number in running:
            watched = self._watched[number]
            watched.look()
            best = f", best {watched.best[0]} {watched.best[1]:.4f}" if watched.best else ""
            where = f"step {watched.step} of {self.steps[number]}{best}"
            lines.append(f"  {where}: {self.cells[number].title}")  # of which the end may be cut
        self.display.draw(lines)
