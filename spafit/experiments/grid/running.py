"""Run the cells of a grid to their end, and show how far they are.

They are trained where a pool has it: by worker processes of this machine
(:mod:`spafit.experiments.grid.workers`), or by a Ray cluster
(:mod:`spafit.experiments.grid.ray_tasks`).
Another command on the same folder is noticed by the locks of the run folders: what it has in work
is left to it, and taken up if it ends without finishing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spafit.errors import CheckpointError, StoppedError, one_line
from spafit.experiments.grid.cells import Cell, Cells
from spafit.experiments.grid.choosing import best_rate, mean_scores, score_of
from spafit.experiments.grid.display import Display, Watched, clock
from spafit.experiments.grid.places import DIVERGED, result_of, steps_of
from spafit.experiments.grid.speeds import Speeds
from spafit.runs.record import RUN, is_in_use, read_run
from spafit.runs.stopping import StopRequests

_LOOK_S = 0.5  # between two looks at the logs of what runs


class Pool(Protocol):
    """Where cells are trained; they go by their numbers.

    An answer is the number of a cell and ``{"done": True}``, ``{"in_use": True}`` (its folder is
    another command's), ``{"failed": why}``, or ``{"killed": how}``, after which it may be tried
    again.
    """

    @property
    def taken(self) -> Collection[int]:
        """The cells that it has not answered for."""

    @property
    def running(self) -> Collection[int]:
        """Those of them that train now."""

    @property
    def at_once(self) -> int:
        """How many train at once, for the time left."""

    def has_room(self) -> bool:
        """Return whether it takes another cell."""

    def train(self, number: int, cell: Cell, learning_rate: float | None) -> None:
        """Take a cell; its learning rate is given if it was chosen."""

    def answers(self, seconds: float) -> Sequence[tuple[int, dict[str, Any]]]:
        """Wait for answers, for so long at most."""

    def stop(self) -> Sequence[tuple[int, dict[str, Any]]]:
        """Have all stop after the current step, with a checkpoint; return the last answers."""


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
    rows : mapping of str to int
        The rows to train on of each task.
    display : Display
        Where it is shown.
    threads : int, optional
        The threads of each run; None has as many as this process.
    digests : mapping of str to mapping, optional
        The SHA-256 of each task's train and dev, with which finished runs are compared.
    weights : mapping of (str, str or None) to str, optional
        The fingerprint of each model, with its revision, whose weights are compared likewise.
    """

    def __init__(
        self,
        cells: Cells,
        numbers: Sequence[int],
        out: Path,
        rows: Mapping[str, int],
        display: Display,
        threads: int | None = None,
        digests: Mapping[str, Mapping[str, str]] | None = None,
        weights: Mapping[tuple[str, str | None], str] | None = None,
    ) -> None:
        self.digests, self.weights = digests or {}, weights or {}
        self.cells, self.numbers, self.out = cells.cells, numbers, out
        self.name, self.choices, self.display = cells.name, cells.choices, display
        self.steps = {n: steps_of(self.cells[n], rows[self.cells[n].task]) for n in numbers}
        self.examples = {
            n: float(rows[self.cells[n].task] * self.cells[n].settings["epochs"]) for n in numbers
        }
        self.kinds = {n: self.cells[n].kind for n in numbers}
        self.records: dict[int, dict[str, Any] | None] = {}  # None: it diverged while choosing
        self.failed: dict[int, str] = {}
        self.rates: dict[int, float] = {}
        self.speeds = Speeds(threads)
        self._left = dict.fromkeys(numbers)  # in order; what runs is among them
        self._elsewhere: set[int] = set()
        self._killed: dict[int, int] = {}
        self._watched: dict[int, Watched] = {}
        self._kept: set[tuple[object, ...] | None] = {None}  # states that a run here has saved

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

    def run(self, pool: Pool) -> None:
        """Run what is left.

        Parameters
        ----------
        pool : Pool
            Where it is trained; it is stopped at the end.

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
                    self._hand_out(pool)
                    self._draw(pool)
                    for number, answer in pool.answers(_LOOK_S):
                        self._answered(number, answer, pool.at_once)
                    self._look_elsewhere()
                if stop.received is not None:
                    self._finish(pool)
                    raise StoppedError(
                        f"stopped by {stop.received.name}: {len(self.records)} of "
                        f"{len(self.numbers)} are done; the same command resumes the grid",
                        stop.received,
                    )
        finally:
            self._finish(pool)
            self.display.draw([])

    def _take_up(self, number: int) -> None:
        """Count a cell as done if its run is finished."""
        cell = self.cells[number]
        rate = None if cell.choice is None else self.rates.get(cell.choice)
        data, weights = self.digests.get(cell.task), self.weights.get((cell.model, cell.revision))
        record = result_of(cell, self.out, rate, data, weights)
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

    def _can_run(self, number: int) -> bool:
        """Return whether a cell that is not being run can be run now."""
        choice = self.cells[number].choice
        if number in self._elsewhere or (choice is not None and choice not in self.rates):
            return False
        if is_in_use(self.out / self.cells[number].folder):
            self._elsewhere.add(number)
            return False
        return not self._is_done_elsewhere(number)

    def _is_done_elsewhere(self, number: int) -> bool:
        """Count a cell as done if another command has finished it meanwhile."""
        try:
            self._take_up(number)
        except CheckpointError as error:
            self._fail(number, str(error))
        if number in self.records:
            self.display.line(f"{self.cells[number].title}: done already")
        return number not in self._left

    def _hand_out(self, pool: Pool) -> None:
        """Give the pool what it has room for.

        A run saves the hidden states that it keeps when it ends; one that begins before computes
        them again. So those cells come first that need no states of what is running. The others do
        not wait for it: they compute the states sooner than the whole run is over.
        """
        busy = set(pool.taken)
        computed = {self.cells[each].prefix for each in busy | self._elsewhere} - self._kept
        for again in (False, True):
            for number in list(self._left):
                if not pool.has_room():
                    return
                cell = self.cells[number]
                if number in busy or (cell.prefix in computed and not again):
                    continue
                if self._can_run(number):
                    busy.add(number)
                    self._watched[number] = Watched(self.out / cell.folder)
                    rate = None if cell.choice is None else self.rates[cell.choice]
                    pool.train(number, cell, rate)
                if number in busy or number in self._elsewhere:
                    computed |= {cell.prefix} - self._kept

    def _answered(self, number: int, answer: dict[str, Any], at_once: int) -> None:
        if "killed" in answer:
            self._was_killed(number, answer["killed"])
        elif "in_use" in answer:
            self._elsewhere.add(number)
            self.display.line(f"{self.cells[number].title}: in use elsewhere, and left to that")
        else:
            self._ended(number, str(answer.get("failed", "")), at_once)

    def _was_killed(self, number: int, how: str) -> None:
        self._killed[number] = self._killed.get(number, 0) + 1
        if self._killed[number] > 1:
            self._fail(number, f"{how}, for the second time")
        else:
            self.display.line(f"{self.cells[number].title}: {how}; it is taken up again")

    def _ended(self, number: int, failure: str, at_once: int) -> None:
        """Count a cell as done or failed, after the pool has said so."""
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
        if "result" not in record:
            self._fail(
                number,
                f"it is done, and {self.out / cell.folder} holds a run that is not: where it was "
                "trained that is another folder; give one that all machines share (--out)",
            )
            return
        self._done(number, record)
        self._kept.add(cell.prefix)
        name, score = score_of(record)
        words = [f"{len(self.records)} of {len(self.numbers)} done", *self._time_left(at_once)]
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

    def _finish(self, pool: Pool) -> None:
        """Stop the pool, and count what it has done until then."""
        for number, answer in pool.stop():
            if "done" in answer:
                self._ended(number, "", pool.at_once)

    def _time_left(self, at_once: int) -> list[str]:
        """Return the time left in words, from the speeds of what is finished, if any is."""
        seconds: list[float] = []
        for number in self._left:
            whole = self.speeds.seconds(self.kinds[number], self.examples[number])
            if whole is not None:
                watched = self._watched.get(number)
                done = watched.step / self.steps[number] if watched else 0
                seconds.append(whole * (1 - done))
        if self._left and not seconds:
            return []
        least = "at least " * (len(seconds) < len(self._left))  # of others there is no run yet
        # One run is not divided among several workers.
        return [f"{least}{clock(max([sum(seconds) / at_once, *seconds]))} left"]

    def _draw(self, pool: Pool) -> None:
        running = pool.running
        lines = []
        for number in running:
            watched = self._watched[number]
            watched.look()
            best = f", best {watched.best[0]} {watched.best[1]:.4f}" if watched.best else ""
            where = f"step {watched.step} of {self.steps[number]}{best}"
            lines.append(f"  {where}: {self.cells[number].title}")  # of which the end may be cut
        counts = [f"{len(self.records)} of {len(self.numbers)} done"]
        counts += [f"{len(self.failed)} failed"] * bool(self.failed)
        counts += [f"{len(running)} running"]
        counts += [f"{len(self._elsewhere)} elsewhere"] * bool(self._elsewhere)
        counts += [f"{len(self._left) - len(running) - len(self._elsewhere)} waiting"]
        head = f"{one_line(self.name)}: {', '.join([*counts, *self._time_left(pool.at_once)])}"
        self.display.draw([head, *lines])
