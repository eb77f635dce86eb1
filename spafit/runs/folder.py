"""The record of one training run: ``run.json``, ``log.jsonl``, the best adapter, checkpoints.

One process at a time writes a run folder: it holds the lock ``run.lock`` there. What a process left
half-written when it was killed is removed by the next one that takes the lock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from spafit.errors import CheckpointError, StoppedError
from spafit.files.durable import Lock, explain, sync_folder
from spafit.files.replacing import replacing
from spafit.machine.versions import machine, versions
from spafit.runs.checkpoint import Checkpoint, Checkpoints
from spafit.runs.identity import changes, require_same_run
from spafit.runs.log import RunLog
from spafit.runs.record import ADAPTER, CHECKPOINTS, RUN, read_run

LOG = "log.jsonl"
LOCK = "run.lock"

# What spafit.files.replacing.replacing leaves of these files where it is killed.
_PART = r"\.{name}\.[0-9a-f]{{8}}\.part"


class RunFolder:
    """A folder that one run writes and that ``spafit eval`` and ``spafit predict`` read.

    It is locked and looked into at once, and written to from :meth:`begin` on, so that what is
    refused before that stays as it was. A context manager, which begins: on the way out
    ``run.json`` says whether the run is finished, was interrupted or failed, and why; and the lock
    is given back.

    Parameters
    ----------
    path : str or Path
        The folder; it is made.
    record : dict
        What is known at the start: settings, data, hashes.
    overwrite : bool
        Whether a run that is there already is replaced. Otherwise it is taken up again.
    keep : int
        How many checkpoints are kept beside the best one.
    total_steps : int, optional
        Where the run is to end.

    Attributes
    ----------
    record : dict
        What ``run.json`` says.
    checkpoint : Checkpoint or None
        Where the run is taken up again; None where it begins.
    notes : list of str
        What was found on the way.
    log : RunLog
        ``log.jsonl``; rows that are written before :meth:`begin` wait for it.
    going_on : str
        Which command takes the run up again, as the beginning of a sentence.

    Raises
    ------
    CheckpointError
        If the folder cannot be written to, is in use, holds another run or one that cannot be taken
        up again.
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
        self.going_on = "the same command goes on"
        if overwrite:
            self.going_on = "the same command without overwrite (--overwrite) goes on"
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, keep)
        self.checkpoint: Checkpoint | None = None
        self.notes: list[str] = []
        self._written = ""
        self.log = RunLog(self.path / LOG)
        self._lock = Lock(self.path / LOCK)
        self._is_new = not self.path.exists()
        with self._saying_why():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._sweep()
                if overwrite:
                    self.checkpoints.clear()
                elif (self.path / RUN).exists() or self.checkpoints.steps():
                    self._find_checkpoint(record, total_steps)
                else:
                    self._refuse_foreign_files()
            except BaseException:
                self._close()
                raise

    def begin(self) -> None:
        """Write from now on: the record, and the log from where the run is taken up again.

        Raises
        ------
        CheckpointError
            If the folder cannot be written to.
        """
        with self._saying_why():
            if self.checkpoint is not None:
                old = self.checkpoint.values["record"]
                entry = {"step": self.checkpoint.step, "changed": changes(old, self.record)}
                self.record["resumed"] = [*old.get("resumed", []), entry]
            self.write()
            kept = 0 if self.checkpoint is None else self.checkpoint.values["log_bytes"]
            if lost := self.log.open(kept):
                self.notes.append(f"{self.log.path} has lost {lost} bytes of earlier rows")
            if self.checkpoint is None:
                # It would be taken for this run's. A link stays one.
                self.adapter.resolve().unlink(missing_ok=True)
            sync_folder(self.path)

    @property
    def adapter(self) -> Path:
        """Where the best adapter goes."""
        return self.path / ADAPTER

    @property
    def files(self) -> tuple[Path, ...]:
        """What the run has written; other files of the folder are not its own."""
        paths = (self.adapter, self.path / LOG, self.path / RUN)
        return tuple(path for path in paths if path.is_file())

    def write(self) -> None:
        """Write ``run.json`` anew, whole or not at all.

        Raises
        ------
        CheckpointError
            If it cannot be written.
        """
        content = json.dumps(self.record, indent=2, allow_nan=False) + "\n"
        try:
            with replacing(self.path / RUN) as temporary:
                temporary.write_text(content, encoding="utf-8")
        except OSError as error:
            reason = explain(error, self.path, len(content.encode()))
            raise CheckpointError(f"{self.path / RUN} cannot be written: {reason}") from error
        self._written = content

    def regain(self) -> bool:
        """Make sure that the folder is there and ours; one that was removed is made anew.

        Returns
        -------
        bool
            Whether it had to be made anew. The log is then what it was; the rest has to be saved.

        Raises
        ------
        CheckpointError
            If it cannot be made, or another run has taken its place.
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
                        f"{self.path} was removed while its run went on, and holds another run now"
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
                f"{self.path} was removed while its run went on, and cannot be made anew: {reason}"
            ) from error
        self.log.write(
            {"note": f"{self.path} was removed while its run went on, and was made anew"}
        )
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
        if not self.log.is_open:  # refused before it began
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
                    raise  # else the error that is on its way matters more
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
        """Refuse to write over what no run of this folder can have left."""
        log = self.path / LOG
        if self.adapter.exists() or (log.is_file() and log.stat().st_size):
            found = self.adapter if self.adapter.exists() else log
            raise CheckpointError(
                f"{found} is there, but no run that wrote it; give another folder, or allow it to "
                "be replaced with overwrite (--overwrite)"
            )

    def _find_checkpoint(self, record: dict[str, Any], total_steps: int | None) -> None:
        """Read the newest sound checkpoint of this very run."""
        self.checkpoint, faults = self.checkpoints.newest()
        if self.checkpoint is not None:
            old: Any = self.checkpoint.values.get("record")
            require_same_run(self.path, old, record)
            if not isinstance(old.get("resumed", []), list):
                raise CheckpointError(f"{self.checkpoint.path} is damaged: resumed is no list")
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
            self.notes += [f"{fault}; an older checkpoint is taken" for fault in faults]
            return
        if faults:
            raise CheckpointError(
                f"{self.path} holds a run of which no checkpoint can be used: {'; '.join(faults)}; "
                "begin it anew with overwrite (--overwrite), or give another folder"
            )
        old = read_run(self.path / RUN)
        require_same_run(self.path, old, record)
        if old.get("status") == "finished":
            raise CheckpointError(
                f"{self.path} holds a finished run, without checkpoints to go on from; give "
                "another folder, or allow it to be replaced with overwrite (--overwrite)"
            )
        if old.get("start") != record.get("start"):
            raise CheckpointError(
                f"{self.path} holds a run that had no checkpoint yet, and began from other values "
                "of what trains; load and adapt the model afresh"
            )
        self.notes.append("the run had no checkpoint yet, and begins anew")

    def _sweep(self) -> None:
        """Remove what a process left that was killed while it wrote."""
        self.checkpoints.sweep()
        for name in (RUN, ADAPTER):
            target = (self.path / name).resolve()  # of a link: there it is written
            part = re.compile(_PART.format(name=re.escape(target.name)))
            for path in target.parent.iterdir() if target.parent.is_dir() else ():
                if part.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _close(self) -> None:
        self.log.close()
        self._lock.release()
