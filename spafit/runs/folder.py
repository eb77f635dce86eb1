"""The record of one training run: ``run.json``, ``log.jsonl``, the best adapter, checkpoints.

One process at a time writes a run folder: it holds the lock ``run.lock``. Incomplete files of a
process that was killed are removed by the next one that takes the lock.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from spafit.errors import CheckpointError, StoppedError
from spafit.files.durable import Lock, explain, sync_folder
from spafit.machine.versions import machine, versions
from spafit.runs.checkpoint import Checkpoint, Checkpoints
from spafit.runs.identity import changes, require_same_run
from spafit.runs.log import RunLog
from spafit.runs.record import ADAPTER, ANSWERS, CHECKPOINTS, LOCK, RUN, read_run, write_run

LOG = "log.jsonl"

# The temporary name of spafit.files.replacing.replacing, left behind by a process that was killed.
_PART = r"\.{name}\.[0-9a-f]{{8}}\.part"


class RunFolder:
    """The folder that a run writes and that ``spafit eval`` and ``spafit predict`` read.

    The constructor locks and reads it, and :meth:`begin` starts writing: if the run is refused
    before that, the folder is unchanged. As a context manager it calls :meth:`begin` on entry; on
    exit it records in ``run.json`` whether the run finished, was interrupted or failed, and why,
    and releases the lock.

    Parameters
    ----------
    path : str or Path
        The folder; it is created if it does not exist.
    record : dict
        What is known at the start: settings, data, hashes.
    overwrite : bool
        Whether to replace a run in the folder. Otherwise it is resumed.
    keep : int
        How many checkpoints to keep besides the best one.
    total_steps : int, optional
        The step at which the run ends.

    Attributes
    ----------
    record : dict
        The content of ``run.json``.
    checkpoint : Checkpoint or None
        The checkpoint to resume from; None for a new run.
    notes : list of str
        Notes for the user, such as about damaged checkpoints.
    log : RunLog
        ``log.jsonl``; rows added before :meth:`begin` are written then.
    resuming : str
        How to resume the run, for messages.

    Raises
    ------
    CheckpointError
        If the folder cannot be written to, is in use, or holds another run or one that cannot be
        resumed.
    """

    def __init__(
        self,
        path: str | Path,
        record: dict[str, Any],
        *,
        overwrite: bool,
        keep: int = 2,
        total_steps: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.record = {"status": "running", **record, "versions": versions(), "machine": machine()}
        self.resuming = "the same command resumes the run"
        if overwrite:
            self.resuming = "the same command without overwrite (--overwrite) resumes the run"
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, keep)
        self._overwrites = overwrite
        self.checkpoint: Checkpoint | None = None
        self.notes: list[str] = []
        self._written = ""
        self.log = RunLog(self.path / LOG)
        self._lock = Lock(self.path / LOCK)
        with self._saying_why():
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._sweep()
                is_there = (self.path / RUN).exists() or bool(self.checkpoints.steps())
                if is_there and not overwrite:
                    self._find_checkpoint(record, total_steps)
                elif not overwrite:
                    self._refuse_foreign_files()
            except BaseException:
                self._close()
                raise

    def begin(self) -> None:
        """Start writing: the record, and the log after the checkpoint.

        Raises
        ------
        CheckpointError
            If the folder cannot be written to.
        """
        with self._saying_why():
            if self._overwrites:
                self.checkpoints.clear()
            if self.checkpoint is not None:
                old = self.checkpoint.values["record"]
                entry = {"step": self.checkpoint.step, "changed": changes(old, self.record)}
                self.record["resumed"] = [*old.get("resumed", []), entry]
            self.write()
            kept = 0 if self.checkpoint is None else self.checkpoint.values["log_bytes"]
            if lost := self.log.open(kept):
                self.notes.append(f"{self.log.path} has lost {lost} bytes of earlier rows")
            if self.checkpoint is None:
                # An old adapter could be mistaken for this run's. A link is kept.
                for path in (self.adapter, self.answers):
                    path.resolve().unlink(missing_ok=True)
            sync_folder(self.path)

    @property
    def adapter(self) -> Path:
        """The file of the best adapter."""
        return self.path / ADAPTER

    @property
    def answers(self) -> Path:
        """The file of what the best adapter answers on dev."""
        return self.path / ANSWERS

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the run has written; the folder may have others."""
        paths = (self.adapter, self.answers, self.path / LOG, self.path / RUN)
        return tuple(path for path in paths if path.is_file())

    def write(self) -> None:
        """Replace ``run.json`` atomically.

        Raises
        ------
        CheckpointError
            If it cannot be written.
        """
        self._written = write_run(self.path / RUN, self.record)

    def regain(self) -> bool:
        """Check that the folder still exists and is locked by us; recreate it if it was removed.

        Returns
        -------
        bool
            Whether it was recreated. The log is then restored; the rest must be saved again.

        Raises
        ------
        CheckpointError
            If it cannot be created, or now holds another run.
        """
        if self._lock.is_held():
            return False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path / LOCK)
            lock.acquire()
            try:
                there = self.path / RUN
                if there.exists() and there.read_text(encoding="utf-8") != self._written:
                    raise CheckpointError(
                        f"{self.path} was removed during its run, and now holds another run"
                    )
                self.write()
                self.log.renew()
            except BaseException:
                lock.release()
                raise
            self._lock.release()
            self._lock = lock
        except OSError as error:
            reason = explain(error, self.path)
            raise CheckpointError(
                f"{self.path} was removed during its run, and cannot be created again: {reason}"
            ) from error
        self.log.write({"note": f"{self.path} was removed during its run, and was created again"})
        return True

    def __enter__(self) -> RunFolder:
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.log.is_open:  # the run was refused before begin()
            self._close()
            if self._is_new:
                with suppress(OSError):
                    self.path.rmdir()
            return
        try:
            if error is None:
                self.record["status"] = "finished"
                self.record.pop("error", None)
            else:
                is_failure = isinstance(error, Exception) and not isinstance(error, StoppedError)
                self.record["status"] = "failed" if is_failure else "interrupted"
                self.record["error"] = f"{type(error).__name__}: {error}"
            try:
                self.regain()
                self.write()
            except CheckpointError:
                if error is None:
                    raise  # an error of the run itself matters more
        finally:
            self._close()

    @contextmanager
    def _saying_why(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = explain(error, self.path)
            raise CheckpointError(f"{self.path} cannot be written: {reason}") from None

    def _refuse_foreign_files(self) -> None:
        """Refuse to overwrite an adapter or a log if there is no record of its run."""
        log = self.path / LOG
        if self.adapter.exists() or (log.is_file() and log.stat().st_size):
            found = self.adapter if self.adapter.exists() else log
            raise CheckpointError(
                f"{found} exists, but the folder has no record of its run; give another folder, or "
                "allow it to be replaced with overwrite (--overwrite)"
            )

    def _find_checkpoint(self, record: dict[str, Any], total_steps: int | None) -> None:
        """Read the newest valid checkpoint of the same run."""
        self.checkpoint, faults = self.checkpoints.newest()
        if self.checkpoint is not None:
            old: Any = self.checkpoint.values.get("record")
            require_same_run(self.path, old, record)
            if not isinstance(old.get("resumed", []), list):
                raise CheckpointError(f"{self.checkpoint.path} is damaged: resumed is not a list")
            log_bytes = self.checkpoint.values.get("log_bytes")
            if type(log_bytes) is not int or log_bytes < 0:
                raise CheckpointError(
                    f"{self.checkpoint.path} is damaged: log_bytes is {log_bytes!r:.80}"
                )
            if total_steps is not None and self.checkpoint.step > total_steps:
                raise CheckpointError(
                    f"{self.path} is at step {self.checkpoint.step}, and these settings end at "
                    f"step {total_steps}; give more epochs (--epochs), or another folder"
                )
            self.notes += [f"{fault}; an older checkpoint is used" for fault in faults]
            return
        if faults:
            raise CheckpointError(
                f"{self.path} holds a run without a usable checkpoint: {'; '.join(faults)}; "
                "start it again with overwrite (--overwrite), or give another folder"
            )
        old = read_run(self.path / RUN)
        require_same_run(self.path, old, record)
        if old.get("status") == "finished":
            raise CheckpointError(
                f"{self.path} holds a finished run without checkpoints to resume from; give "
                "another folder, or allow it to be replaced with overwrite (--overwrite)"
            )
        if old.get("start") != record.get("start"):
            raise CheckpointError(
                f"{self.path} holds a run that had no checkpoint yet and began from other "
                "parameter values; load and adapt the model again"
            )
        self.notes.append("the run had no checkpoint yet, and starts from the beginning")

    def _sweep(self) -> None:
        """Remove incomplete files of a process that was killed while writing."""
        self.checkpoints.sweep()
        for name in (RUN, ADAPTER, ANSWERS):
            # Temporary files are beside the target of a link.
            target = (self.path / name).resolve()
            part = re.compile(_PART.format(name=re.escape(target.name)))
            for path in target.parent.iterdir() if target.parent.is_dir() else ():
                if part.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _close(self) -> None:
        self.log.close()
        self._lock.release()
