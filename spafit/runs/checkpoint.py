"""Checkpoints of a run: folders written atomically and verified by SHA-256, without pickle.

They are in the folder ``checkpoints`` of the run folder::

    step-120/                 after 120 steps of the optimizer
        adapter.safetensors   trained values at that step; an adapter file like any other
        best.safetensors      trained values of the best step so far, if it is another step
        state.safetensors     optimizer state, random states, losses
        state.json            everything that is not a tensor
        manifest.json         size and SHA-256 of each of these files; written last
    step-160.tmp-4711/        being written by process 4711

A checkpoint is written under a temporary name. Every file is fsynced, the manifest last; all files
are read back and compared with the manifest; then the folder is renamed and its parent fsynced.
Older checkpoints are removed only after that. A folder with a temporary name is incomplete: the
process that holds the run's lock removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spafit.config import parse_json
from spafit.errors import CheckpointError, WeightsError
from spafit.files.durable import (
    FileRecord,
    Piece,
    explain,
    is_plain_name,
    measure,
    sync_folder,
    write_file,
)
from spafit.weights.safefile import SafeFile, tensor_file

FORMAT = 1
"""Recorded in every manifest."""

STATE, MANIFEST = "state.json", "manifest.json"

#: Tensors and metadata of one safetensors file.
TensorFile = tuple[Mapping[str, torch.Tensor], Mapping[str, str]]

_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_ASIDE = "-old"
_TEMPORARY_NAME = re.compile(r"step-[0-9]+\.tmp-[0-9]+(-old)?")


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint: its files match its manifest.

    Attributes
    ----------
    path : Path
        Its folder.
    step : int
        Optimizer steps done.
    values : dict
        The content of ``state.json``.
    files : tuple of str
        The names of its files.
    """

    path: Path
    step: int
    values: dict[str, Any]
    files: tuple[str, ...]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read one of its safetensors files.

        Raises
        ------
        CheckpointError
            If it cannot be read.
        """
        try:
            with SafeFile(self.path / name) as file:
                return {each: file.read(each) for each in file.tensors}
        except WeightsError as error:
            raise CheckpointError(f"the checkpoint cannot be read: {error}") from None


class Checkpoints:
    """The checkpoints of one run, whose lock this process holds.

    Parameters
    ----------
    folder : Path
        Their folder, created at the first save. It may be a symbolic link to a folder.
    keep : int
        How many of the latest to keep, at least 2; the best one is kept in addition.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints in the folder, valid or damaged, in order."""
        matches = [_NAME.fullmatch(path.name) for path in self._entries()]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step-{step}"

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest valid checkpoint, and why newer ones are invalid."""
        faults: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.read(step), faults
            except CheckpointError as error:
                faults.append(str(error))
        return None, faults

    def read(self, step: int) -> Checkpoint:
        """Read a checkpoint and compare all its files with its manifest.

        Raises
        ------
        CheckpointError
            If it is damaged; the message names the file.
        """
        path = self.path(step)
        records = _verify(path, step)
        return Checkpoint(path, step, _read_json(path / STATE), tuple(records))

    def save(
        self,
        step: int,
        files: Mapping[str, TensorFile],
        values: Mapping[str, Any],
        best_step: int | None = None,
    ) -> Path:
        """Write a checkpoint, verify it, and remove older ones that need not be kept.

        Parameters
        ----------
        step : int
            Optimizer steps done.
        files : mapping of str to (tensors, metadata)
            The safetensors files, by name.
        values : mapping
            The content of ``state.json``.
        best_step : int, optional
            The step whose checkpoint is always kept.

        Returns
        -------
        Path
            Its folder.

        Raises
        ------
        CheckpointError
            If it cannot be written. Nothing incomplete remains, and older checkpoints are
            unchanged; the message says how many bytes were needed and how many are free.
        """
        path = self.path(step)
        temporary = self.folder / f"{path.name}.tmp-{os.getpid()}"
        state = _json_bytes(values)
        needed = len(state) + sum(
            tensor.numel() * tensor.element_size()
            for tensors, _ in files.values()
            for tensor in tensors.values()
        )
        try:
            self._make_folder()
            self.sweep()  # a failed save may have left a folder that it could not remove
            temporary.mkdir()
            try:
                records = {
                    name: write_file(temporary / name, tensor_file(*content))
                    for name, content in files.items()
                }
                records[STATE] = write_file(temporary / STATE, [state])
                write_file(temporary / MANIFEST, _manifest(step, records))
                sync_folder(temporary)
                _verify(temporary, step)
                self._move_into_place(temporary, path)
            except BaseException:
                _discard(temporary)
                raise
            sync_folder(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: "
                f"{explain(error, self.folder, needed)}"
            ) from error
        self._prune(step, best_step)
        return path

    def sweep(self) -> None:
        """Remove temporary folders of a process that ended while writing or removing one."""
        for path in self._entries():
            if _TEMPORARY_NAME.fullmatch(path.name):
                place = self.folder / path.name.partition(".")[0]
                if path.name.endswith(_ASIDE) and not place.exists():
                    path.rename(place)  # the replacement was not finished
                else:
                    _discard(path)

    def clear(self) -> None:
        """Remove all checkpoints, when a run is overwritten."""
        self.sweep()
        for step in self.steps():
            self._remove(step)
        with contextlib.suppress(OSError):  # a link, or it holds other files
            self.folder.rmdir()

    def _entries(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error.strerror}") from None

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            place = self.folder.resolve()  # the target of a link may not exist yet
            place.mkdir()
            sync_folder(place.parent)

    def _move_into_place(self, temporary: Path, path: Path) -> None:
        """Rename a finished checkpoint, replacing one of the same step left by a failed save."""
        aside = self.folder / f"{temporary.name}{_ASIDE}"
        is_replaced = path.exists()
        if is_replaced:
            path.rename(aside)
        try:
            temporary.rename(path)
            if is_replaced:
                sync_folder(self.folder)  # before the old one is removed
        except BaseException:
            if is_replaced:
                if path.exists():
                    path.rename(temporary)
                aside.rename(path)
            raise
        _discard(aside)

    def _prune(self, step: int, best_step: int | None) -> None:
        """Remove all but the latest and the best; any of later steps are damaged."""
        try:
            steps = self.steps()
        except CheckpointError:  # tried again after the next save
            return
        kept = {*[each for each in steps if each <= step][-self.keep :], best_step}
        for each in steps:
            if each not in kept:
                with contextlib.suppress(OSError):  # tried again after the next save
                    self._remove(each)

    def _remove(self, step: int) -> None:
        # Renamed first: a folder named step-N is always a complete checkpoint.
        leaving = self.folder / f"step-{step}.tmp-{os.getpid()}"
        self.path(step).rename(leaving)
        _discard(leaving)


def _discard(folder: Path) -> None:
    """Remove a folder as far as possible."""
    with contextlib.suppress(OSError):  # some are raised despite ignore_errors
        shutil.rmtree(folder, ignore_errors=True)


def _manifest(step: int, records: Mapping[str, FileRecord]) -> list[Piece]:
    files = {name: asdict(record) for name, record in records.items()}
    return [_json_bytes({"format": FORMAT, "step": step, "files": files})]


def _verify(path: Path, step: int) -> dict[str, FileRecord]:
    """Compare the files of a checkpoint with its manifest; return the manifest's records."""
    manifest = _read_json(path / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_record, files.values())):
        raise CheckpointError(f"{path / MANIFEST} is damaged")
    if (manifest.get("format"), manifest.get("step")) != (FORMAT, step) or STATE not in files:
        raise CheckpointError(f"{path / MANIFEST} is not of step {step} in format {FORMAT}")
    records = {name: FileRecord(each["nbytes"], each["sha256"]) for name, each in files.items()}
    for name, record in records.items():
        if not is_plain_name(name):
            raise CheckpointError(f"{path / MANIFEST} names {name!r:.200}, not a plain file name")
        try:
            found = measure(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from None
        if found != record:
            raise CheckpointError(
                f"{path / name} is damaged: {found.nbytes} bytes with SHA-256 {found.sha256[:16]}, "
                f"its manifest says {record.nbytes} and {record.sha256[:16]}"
            )
    return records


def _is_record(entry: object) -> bool:
    """Return whether an entry of a manifest is a :class:`FileRecord`."""
    if not isinstance(entry, dict) or entry.keys() != {"nbytes", "sha256"}:
        return False
    return type(entry["nbytes"]) is int and isinstance(entry["sha256"], str)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())  # of any length; its size was verified
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object")
    return content


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n"
