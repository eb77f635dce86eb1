"""Decide when to save a run, save it, and handle failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from spafit.errors import CheckpointError, TrainingError
from spafit.files.durable import explain, write_file
from spafit.files.replacing import replacing
from spafit.runs.checkpoint import TensorFile
from spafit.runs.folder import RunFolder
from spafit.tasks.task import Dataset
from spafit.training.state import TrainingState, content
from spafit.training.step import TrainingStep
from spafit.weights.adapter_files import adapter_content
from spafit.weights.safefile import tensor_file

INTERVAL_S = 600.0
"""Seconds between checkpoints if no number of steps is given."""


class Saver:
    """Saves a run: its log, a checkpoint, the best adapter and its answers on dev.

    A save that fails leaves earlier saves unchanged. Training goes on, and the next save that is
    due is another attempt; if that fails too, the run stops.

    Parameters
    ----------
    run : RunFolder
        The folder to save to.
    take_step : TrainingStep
        The run's training step, with the model in training.
    dev : Dataset
        The examples that it is evaluated on.
    save_every : int or None
        Steps between checkpoints; None is every 10 minutes.
    saved : TrainingState
        The state that is saved already, or at which the run begins.
    say : callable of str
        Called with one line that says what went wrong.
    """

    def __init__(
        self,
        run: RunFolder,
        take_step: TrainingStep,
        dev: Dataset,
        save_every: int | None,
        saved: TrainingState,
        say: Callable[[str], object],
    ) -> None:
        self.run, self.take_step, self.dev, self.say = run, take_step, dev, say
        self.save_every = save_every
        self._saved = self._tried = (saved.step, len(saved.history))
        self._adapter_step: int | None = None
        self._is_failing = False
        self._time = time.monotonic()

    def is_due(self, state: TrainingState) -> bool:
        """Return whether a checkpoint is due: at an interval, or after an evaluation.

        It is not due while steps are being skipped: the saved state is then from before them.
        """
        if state.skips_in_a_row:
            return False
        step, evaluations = self._tried  # a failed one is not repeated at every step
        if len(state.history) > evaluations:
            return True
        if self.save_every is None:
            return self._is_time()
        return state.step // self.save_every > step // self.save_every

    @property
    def resuming(self) -> str:
        """How to resume the run, for messages."""
        return f"{self.run.resuming} from there ({self.run.path})"

    def save(self, state: TrainingState, *, last: bool = False) -> None:
        """Save the state of a run.

        Parameters
        ----------
        state : TrainingState
            The state.
        last : bool
            Whether this is the last save; if it fails, a second attempt is made at once.

        Raises
        ------
        TrainingError
            If this was the second attempt in a row that failed; the message says what is saved.
        """
        self._tried = (state.step, len(state.history))
        try:
            self._save(state)
        except CheckpointError as error:
            if self._is_failing:
                raise TrainingError(
                    f"{error}. It failed twice in a row, so the run stops; {self._rescue(state)}"
                ) from error
            self._is_failing = True
            if last:
                self.save(state, last=True)
                return
            self.say(f"{error}; training goes on, and saving is tried again at the next interval")
        else:
            self._is_failing = False
            self._saved = self._tried
        self._time = time.monotonic()

    def save_adapter(self, state: TrainingState) -> None:
        """Write the answers and the adapter of the best evaluation, unless that was done already.

        Raises
        ------
        CheckpointError
            If they cannot be written.
        """
        is_there = state.best_step == self._adapter_step and self.run.adapter.is_file()
        if state.best_step is None or is_there:
            return
        if state.answers:  # a checkpoint of an older version has none
            answers = self._answers(state)
            self._replace(self.run.answers, [answers], len(answers))
        tensors, metadata = adapter_content(self.take_step.model, state.best)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._replace(self.run.adapter, tensor_file(tensors, metadata), needed)
        self._adapter_step = state.best_step

    def _answers(self, state: TrainingState) -> bytes:
        """Return a table: the number of each example of dev, its label, and the prediction."""
        rows = [
            f"{example.index}\t{example.label}\t{answer}\n"
            for example, answer in zip(self.dev, state.answers, strict=True)
        ]
        return "".join(["index\tlabel\tprediction\n", *rows]).encode()

    def _replace(self, path: Path, pieces: Iterable[bytes | memoryview], needed: int) -> None:
        """Replace a file of ``needed`` bytes."""
        try:
            with replacing(path) as temporary:
                temporary.unlink()
                write_file(temporary, pieces)
        except OSError as error:
            reason = explain(error, self.run.path, needed)
            raise CheckpointError(f"{path} cannot be written: {reason}") from error

    def _save(self, state: TrainingState) -> None:
        if self.run.regain():
            self._adapter_step = None
        self.run.log.sync()
        is_saved = (state.step, len(state.history)) == self._saved
        if is_saved and self.run.checkpoints.path(state.step).exists():
            self.save_adapter(state)  # the process may have been killed between the two
            return
        files, values = self._content(state)
        values |= {"record": self.run.record, "log_bytes": self.run.log.nbytes}
        self.run.checkpoints.save(state.step, files, values, state.best_step)
        self.save_adapter(state)

    def _is_time(self) -> bool:
        """Return whether the interval has passed since the last save."""
        return time.monotonic() - self._time >= INTERVAL_S

    def _content(self, state: TrainingState) -> tuple[dict[str, TensorFile], dict[str, Any]]:
        return content(state, self.take_step.model, self.take_step)

    def _rescue(self, state: TrainingState) -> str:
        """Save the best adapter, which is small; return a text that says what is saved."""
        found = []
        with suppress(CheckpointError):  # the folder cannot be read either
            if steps := self.run.checkpoints.steps():
                found.append(f"the checkpoint of step {steps[-1]}, from which {self.run.resuming}")
        if state.best:
            with suppress(CheckpointError):
                self.save_adapter(state)
                found.append(f"the best adapter, {self.run.adapter}")
        return f"saved is {' and '.join(found) or 'nothing'}"
