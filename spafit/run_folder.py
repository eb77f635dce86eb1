"""The record of one training run: ``run.json``, ``log.jsonl``, the best adapter, checkpoints.

One process at a time writes a run folder: it holds the lock ``run.lock`` there. What a process left
half-written when it was killed is removed by the next one that takes the lock.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from spafit.checkpoint import Checkpoint, Checkpoints
from spafit.durable import BINARY, Lock, explain, sync_folder, write_all
from spafit.errors import CheckpointError, SpafitError, StoppedError
from spafit.folders import replacing
from spafit.machine import machine, versions
from spafit.run_identity import changes, require_same_run

RUN = "run.json"
LOG = "log.jsonl"
ADAPTER = "adapter.safetensors"
CHECKPOINTS = "checkpoints"
LOCK = "run.lock"

# What spafit.folders.replacing leaves of these files where it is killed.
_PART = r"\.{name}\.[0-9a-f]{{8}}\.part"


class RunFolder:
    """A folder that one run writes and that ``spafit eval`` and ``spafit predict`` read.

    A context manager: on the way out ``run.json`` says whether the run is finished, was interrupted
    or failed, and why; and the lock is given back.

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

    Attributes
    ----------
    record : dict
        What ``run.json`` says.
    checkpoint : Checkpoint or None
        Where the run is taken up again; None where it begins.
    notes : list of str
        What was found on the way.
    log_bytes : int
        The length of ``log.jsonl``.

    Raises
    ------
    CheckpointError
        If the folder cannot be written to, is in use, holds another run or one that cannot be taken
        up again.
    """

    def __init__(
        self, path: str | Path, record: dict[str, Any], *, overwrite: bool, keep: int = 2
    ) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, keep)
        self.checkpoint: Checkpoint | None = None
        self.notes: list[str] = []
        self.log_bytes = 0
        self._unwritten = b""
        self._written = ""
        self._file: int | None = None
        self._lock = Lock(self.path / LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._begin(record, overwrite)
            except BaseException:
                self._close()
                raise
        except OSError as error:
            reason = explain(error, self.path)
            raise CheckpointError(f"{self.path} cannot be written: {reason}") from None

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
        content = json.dumps(self.record, indent=2) + "\n"
        try:
            with replacing(self.path / RUN) as temporary:
                temporary.write_text(content, encoding="utf-8")
        except SpafitError as error:
            reason = str(error)
            if isinstance(error.__cause__, OSError):
                reason = explain(error.__cause__, self.path, len(content.encode()))
                reason = f"{self.path / RUN} cannot be written: {reason}"
            raise CheckpointError(reason) from error
        self._written = content

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to ``log.jsonl``; one that cannot be written now is written later."""
        self._unwritten += json.dumps(row).encode() + b"\n"
        with suppress(OSError):  # the next checkpoint says so
            self._write_rows()

    def sync_log(self) -> None:
        """See all rows to the disk.

        Raises
        ------
        CheckpointError
            If they cannot be written.
        """
        assert self._file is not None
        try:
            self._write_rows()
            os.fsync(self._file)
        except OSError as error:
            needed = len(self._unwritten) or None
            raise CheckpointError(
                f"{self.path / LOG} cannot be written: {explain(error, self.path, needed)}"
            ) from error

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
        assert self._file is not None
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
                # The log that was removed can be read for as long as it is open.
                rows = os.pread(self._file, self.log_bytes, 0)
                self.write()
                log = os.open(self.path / LOG, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
            except BaseException:
                lock.release()
                raise
            self._lock.release()
            os.close(self._file)
            self._lock, self._file = lock, log
            self.log_bytes, self._unwritten = 0, rows + self._unwritten
            os.ftruncate(log, 0)
        except OSError as error:
            reason = explain(error, self.path)
            raise CheckpointError(
                f"{self.path} was removed while its run went on, and cannot be made anew: {reason}"
            ) from error
        self.log({"note": f"{self.path} was removed while its run went on, and was made anew"})
        return True

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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

    def _begin(self, record: dict[str, Any], overwrite: bool) -> None:
        """Find out what is there, and begin anew or take the run up again."""
        self._sweep()
        if overwrite:
            self.checkpoints.clear()
        elif (self.path / RUN).exists() or self.checkpoints.steps():
            self._find_checkpoint(record)
        self.record = {"status": "running", **record, "versions": versions(), "machine": machine()}
        file = os.open(self.path / LOG, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
        self._file = file
        if self.checkpoint is None:
            # It would be taken for this run's. A link stays one.
            self.adapter.resolve().unlink(missing_ok=True)
        else:
            self._resume_log(file)
            old = self.checkpoint.values["record"]
            entry = {"step": self.checkpoint.step, "changed": changes(old, self.record)}
            self.record["resumed"] = [*old.get("resumed", []), entry]
        os.ftruncate(file, self.log_bytes)
        self.write()
        sync_folder(self.path)

    def _find_checkpoint(self, record: dict[str, Any]) -> None:
        """Read the newest sound checkpoint of this very run."""
        self.checkpoint, faults = self.checkpoints.newest()
        if self.checkpoint is not None:
            old = self.checkpoint.values.get("record")
            require_same_run(self.path, old, record)
            self.notes += [f"{fault}; an older checkpoint is taken" for fault in faults]
            return
        if faults:
            raise CheckpointError(
                f"{self.path} holds a run of which no checkpoint can be used: {'; '.join(faults)}; "
                "begin it anew with overwrite (--overwrite), or give another folder"
            )
        old = _read_run(self.path / RUN)
        require_same_run(self.path, old, record)
        if old.get("status") == "finished":
            raise CheckpointError(
                f"{self.path} holds a finished run, without checkpoints to go on from; give "
                "another folder, or allow it to be replaced with overwrite (--overwrite)"
            )
        self.notes.append("the run had no checkpoint yet, and begins anew")

    def _resume_log(self, file: int) -> None:
        """Cut the log where the checkpoint stands; rows after it are written again."""
        assert self.checkpoint is not None
        wanted = self.checkpoint.values.get("log_bytes")
        length = os.fstat(file).st_size
        if type(wanted) is not int or wanted < 0:
            raise CheckpointError(f"{self.checkpoint.path} is damaged: log_bytes is {wanted!r:.80}")
        if length < wanted:
            self.notes.append(f"{self.path / LOG} has lost {wanted - length} bytes of earlier rows")
        self.log_bytes = min(wanted, length)

    def _write_rows(self) -> None:
        assert self._file is not None
        if self._unwritten:
            # Where a row was written in part, the next attempt begins at the same place.
            os.lseek(self._file, self.log_bytes, os.SEEK_SET)
            try:
                write_all(self._file, memoryview(self._unwritten))
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, self.log_bytes)  # no half of a row
                raise
            self.log_bytes += len(self._unwritten)
            self._unwritten = b""

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
        if self._file is not None:
            with suppress(OSError):
                self._write_rows()
            file, self._file = self._file, None
            with suppress(OSError):  # what had to be on the disk was seen to it before
                os.close(file)
        self._lock.release()


def refuse_other_run(folder: str | Path, task: str, seed: int) -> None:
    """Raise a CheckpointError if a folder holds a run of another task or seed.

    This is known before anything was loaded; :class:`RunFolder` compares the rest.
    """
    path = Path(folder) / RUN
    if path.exists():
        old = _read_run(path)
        settings = old.get("settings")
        found = settings.get("seed") if isinstance(settings, dict) else None
        known = {"task": old.get("task"), "settings": {"seed": found}}
        require_same_run(path.parent, known, {"task": task, "settings": {"seed": seed}})


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read the ``run.json`` of a run folder.

    Raises
    ------
    CheckpointError
        If there is none, it is damaged, or the run left no adapter.
    """
    path = Path(folder) / RUN
    record = _read_run(path)
    if not _is_record(record):
        raise CheckpointError(f"{path} is not the record of a run, or it is damaged")
    if not (Path(folder) / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} has no {ADAPTER}: its run is {record.get('status', 'of unknown status')}"
        )
    return record


def _read_run(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path} is no file")
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no run folder: it has no {RUN}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is not the record of a run, or it is damaged")
    return record


def _is_record(record: dict[str, Any]) -> bool:
    """Whether what reading a run needs is there, and is of its type."""
    if not isinstance(record.get("task"), str):
        return False
    settings, about = record.get("settings"), record.get("about")
    if not isinstance(settings, dict) or not isinstance(about, dict):
        return False
    types = {"max_length": int, "precision": str, "device": str}
    return all(isinstance(settings.get(name), kind) for name, kind in types.items())
