"""Reading the record of a training run, ``run.json``, which :mod:`spafit.runs.folder` writes.

It holds the task, method, settings, data and base of a run, its results, and the versions and
machine that it ran with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from spafit.config import read_json
from spafit.errors import CheckpointError, one_line
from spafit.files.durable import explain, lock
from spafit.files.replacing import replacing
from spafit.runs.checkpoint import Checkpoints
from spafit.runs.identity import RENAMED, require_same_run
from spafit.weights.hub import pinned_revision

RUN = "run.json"
ADAPTER = "adapter.safetensors"
ANSWERS = "dev.tsv"
"""What the best adapter answers on dev: index, label, prediction, a row for each example."""

CHECKPOINTS = "checkpoints"
LOCK = "run.lock"

_SUDDEN_END = (
    "its process ended without a word: it was killed (as for want of memory), a file that it had "
    "mapped was written to in place, or the machine stopped"
)


def name_of_model(model: str) -> str:
    """Return the name of a model as the record of a run has it: of a folder the whole path."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def about_model(
    model: str,
    *,
    revision: str | None,
    split_special_tokens: bool,
    lowercase: bool | None = None,
) -> dict[str, Any]:
    """Return what a run's record says of its model, and of how texts become its tokens."""
    return {
        "model": name_of_model(model),
        "revision": revision,
        "commit": pinned_revision(model, revision),
        "split_special_tokens": split_special_tokens,
        "lowercase": lowercase,
    }


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read the ``run.json`` of a run folder.

    A process that was killed leaves a run with the status "running", whose lock is free. It is
    recorded as interrupted, if the folder can be written to.

    Raises
    ------
    CheckpointError
        If there is none, it is damaged, or the run left no adapter.
    """
    path = Path(folder) / RUN
    record = read_run(path)
    if not _is_record(record):
        raise CheckpointError(f"{path} is not the record of a run, or it is damaged")
    if record.get("status") == "running":
        record = _settled(path, record)
    if not (Path(folder) / ADAPTER).is_file():
        status = status_of(record)
        mend = (
            "; put it back, or train again (--overwrite of spafit train)"
            if status == "finished"
            else ""
        )
        raise CheckpointError(f"{folder} has no {ADAPTER}: its run is {status}{mend}")
    return record


def status_of(record: dict[str, Any]) -> str:
    """Return a run's status for a message, with the reason for its end if it has one."""
    reason = f", {record['error']}" if record.get("error") else ""
    return one_line(f"{record.get('status', 'of unknown status')}{reason}", 400)


def read_run(path: Path) -> dict[str, Any]:
    """Read a ``run.json``, of a finished or an unfinished run.

    Raises
    ------
    CheckpointError
        If there is none, or it is damaged.
    """
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(_why_no_record(path.parent)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is not the record of a run, or it is damaged")
    return record


def write_run(path: Path, record: dict[str, Any]) -> str:
    """Replace a ``run.json`` atomically; return its content.

    Raises
    ------
    CheckpointError
        If it cannot be written.
    """
    content = json.dumps(record, indent=2, allow_nan=False) + "\n"
    try:
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    except OSError as error:
        reason = explain(error, path.parent, len(content.encode()))
        raise CheckpointError(f"{path} cannot be written: {reason}") from error
    return content


def is_in_use(folder: Path) -> bool:
    """Return whether another process holds the lock of a run folder at the moment."""
    try:
        file = os.open(folder / LOCK, os.O_RDWR)
    except OSError:  # there is none
        return False
    try:
        return lock(file, wait=False) is False
    except OSError:  # the lock of another user
        return True
    finally:
        os.close(file)


def _settled(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Record that a run was interrupted if no process holds its lock; return its record."""
    file = None
    try:
        with suppress(FileNotFoundError):
            file = os.open(path.parent / LOCK, os.O_RDWR)
        if file is not None and lock(file, wait=False) is not True:
            return record  # it is running, or the file system cannot tell
        record = read_run(path)  # it may have ended properly meanwhile
        if record.get("status") == "running":
            record |= {"status": "interrupted", "error": _SUDDEN_END}
            with suppress(CheckpointError):  # a folder that is only read
                write_run(path, record)
    except OSError:  # the lock of another user
        return record
    finally:
        if file is not None:
            os.close(file)
    return record


def refuse_other_run(folder: str | Path, task: str, settings: Mapping[str, Any]) -> None:
    """Raise a CheckpointError if a folder holds a run of another task, seed or settings.

    This can be checked before anything is loaded; the run folder compares the rest.

    Parameters
    ----------
    folder : str or Path
        The run folder.
    task : str
        The name of the task.
    settings : mapping of str to object
        The settings that are known already, the seed among them. What an older record lacks is not
        compared.
    """
    path = Path(folder) / RUN
    if path.exists():
        try:
            old = read_run(path)
        except CheckpointError:
            if Checkpoints(Path(folder) / CHECKPOINTS).steps():
                return  # a checkpoint may be valid all the same
            raise
        found: dict[str, Any] = {"seed": None}
        if isinstance(recorded := old.get("settings"), dict):
            found |= {RENAMED.get(str(key), str(key)): each for key, each in recorded.items()}
        both = found.keys() & settings.keys()
        require_same_run(
            path.parent,
            {"task": old.get("task"), "settings": {key: found[key] for key in both}},
            {"task": task, "settings": {key: settings[key] for key in both}},
        )


def _why_no_record(folder: Path) -> str:
    """Return why a folder has no record of a run, and what to give instead."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        return f"{folder} is {what}; name the folder of a run (--out of spafit train)"
    seeds = sorted(path.parent.name for path in folder.glob(f"*/{RUN}"))
    if seeds:
        return (
            f"{folder} holds {', '.join(seeds):.200}, and no summary of all seeds: the training "
            f"was interrupted; repeat its command, or name one run, such as {folder / seeds[0]}"
        )
    return f"{folder} is no run folder: it has no {RUN}; name the --out of spafit train"


def _is_record(record: dict[str, Any]) -> bool:
    """Return whether a record has the entries needed to use its adapter, of the right types."""
    if not isinstance(record.get("task"), str):
        return False
    settings, about = record.get("settings"), record.get("about")
    if not isinstance(settings, dict) or not isinstance(about, dict):
        return False
    types = {"max_length": int, "precision": str, "device": str}
    return all(isinstance(settings.get(name), kind) for name, kind in types.items())
