"""Files of kept hidden states: one file for each cache, written atomically.

A file contains, one after the other::

    data    (N, D) numbers, little-endian, example by example; zeros where an example is not kept
    index   JSON: what the states belong to, the length and the CRC-32 of each example
    tail    length of the index (8 bytes), its SHA-256 (32 bytes), b"spafitp1"

It is written under a temporary name while its writer holds a lock on it, fsynced, and then renamed.
A renamed file never changes: a process that has it open can read it even after it was replaced or
removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import uuid
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from spafit.config import parse_json
from spafit.errors import CheckpointError, ConfigError
from spafit.files.durable import lock, write_all

FORMAT = 1
"""Part of every index and every file name: another format is another file."""

_SUFFIX = ".prefix"
_TAIL = struct.Struct("<Q32s8s")
_MAGIC = b"spafitp1"
_KEPT_NAME = re.compile(r"[0-9a-f]{64}\.prefix")
_TEMPORARY_NAME = re.compile(r"[0-9a-f]{64}\.tmp-[0-9]+-[0-9a-f]{8}")

_MEND = "give a folder that can be written to and has room, or keep the prefix in memory"


class UnusableError(ValueError):
    """A file that is damaged or does not belong to its name. It is rebuilt."""


class MappedFile:
    """The mmapped data of one open file; it shows what :meth:`write` writes.

    Attributes
    ----------
    path : Path
        Its path when it was opened or renamed.
    array : numpy.ndarray
        The data (N, D), read-only. Reading it after the file was truncated kills the process: call
        :meth:`is_whole` first.
    """

    def __init__(self, path: Path, file: BinaryIO, shape: tuple[int, int], dtype: str) -> None:
        self.path = path
        self._file = file
        self._row_bytes = data_bytes((1, shape[1]), dtype)
        self._data_bytes = data_bytes(shape, dtype)
        # A plain view, because slicing a memmap is slow; an empty file cannot be mapped.
        self.array: NDArray[Any] = np.asarray(
            np.memmap(file, dtype, "r", shape=shape) if self._data_bytes else np.empty(shape, dtype)
        )

    def is_whole(self) -> bool:
        """Return whether the file is still at least as long as its data."""
        try:
            return os.fstat(self._file.fileno()).st_size >= self._data_bytes
        except OSError:
            return False

    def write(self, start: int, values: NDArray[Any]) -> None:
        """Write values (n, D) from row ``start`` on; for new files only.

        Writing does not use the mapping: a full disk would kill the process instead of raising.
        """
        try:
            self._write(start * self._row_bytes, values.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise _unwritable(self.path.parent, error) from error

    def move_into_place(self, path: Path, index: bytes) -> None:
        """Write the index, fsync the file, and rename it."""
        try:
            tail = _TAIL.pack(len(index), _sha256(index), _MAGIC)
            self._write(self._data_bytes, memoryview(index + tail))
            os.fsync(self._file.fileno())
            self.path.replace(path)
        except OSError as error:
            raise _unwritable(path.parent, error) from error
        self.path = path

    def close(self) -> None:
        """Close the file without removing it."""
        # No explicit munmap: reading a view of the array that is still in use would crash.
        with contextlib.suppress(OSError):  # the data was fsynced before
            self._file.close()

    def discard(self) -> None:
        """Remove the file; if that fails, a later run removes it."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self.close()

    def _write(self, place: int, content: memoryview) -> None:
        """Write all of it, unbuffered."""
        self._file.seek(place)
        write_all(self._file.fileno(), content)


def kept_path(folder: Path, digest: str) -> Path:
    """Return the path of the file for a digest."""
    return folder / (digest + _SUFFIX)


def data_bytes(shape: tuple[int, int], dtype: str) -> int:
    """Return the size of the states in bytes."""
    return shape[0] * shape[1] * np.dtype(dtype).itemsize


def index_bytes(about: dict[str, Any]) -> int:
    """Return the most bytes that a file takes besides its data."""
    return len(encode_index(about, [2**32 - 1] * len(about["lengths"]))) + _TAIL.size


def encode_index(about: dict[str, Any], checksums: list[int | None]) -> bytes:
    """Return an index: what the states belong to, and the CRC-32 of each kept example."""
    return json.dumps({**about, "crc32": checksums}, separators=(",", ":")).encode()


def open_kept(
    path: Path, about: dict[str, Any], shape: tuple[int, int], dtype: str
) -> tuple[MappedFile, list[int | None]]:
    """Open a finished file, and read its index.

    Parameters
    ----------
    path : Path
        The file.
    about : dict
        The content that its index must have.
    shape, dtype
        Of its data.

    Returns
    -------
    MappedFile
        The data. Only its size has been checked.
    list of (int or None)
        CRC-32 of each example, None if it is not kept.

    Raises
    ------
    UnusableError
        If the file cannot be opened, is damaged, or belongs to other states.
    FileNotFoundError
        If there is no file.
    """
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(path.open("rb"))
            checksums = _read_index(file, about, data_bytes(shape, dtype))
            mapped = MappedFile(path, file, shape, dtype)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UnusableError(f"cannot be read: {error.strerror or error}") from None
        opened.pop_all()
    return mapped, checksums


def create(folder: Path, digest: str, shape: tuple[int, int], dtype: str) -> MappedFile:
    """Create a file under a temporary name and lock it, which tells it from an abandoned one.

    Raises
    ------
    CheckpointError
        If the folder cannot be written to.
    """
    try:
        while True:
            path = folder / f"{digest}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            file = path.open("x+b", buffering=0)
            try:
                lock(file.fileno(), wait=True)  # without locks nothing is removed
                # Another process may have removed it as abandoned before it was locked.
                if path.exists():
                    file.truncate(data_bytes(shape, dtype))
                    return MappedFile(path, file, shape, dtype)
            except BaseException:
                path.unlink(missing_ok=True)
                file.close()
                raise
            file.close()
    except OSError as error:
        raise _unwritable(folder, error) from error


def prepare(folder: Path) -> None:
    """Create a folder, and remove temporary files of killed processes from it.

    Raises
    ------
    CheckpointError
        If it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        leftovers = [path for path in folder.iterdir() if _TEMPORARY_NAME.fullmatch(path.name)]
    except OSError as error:
        raise _unwritable(folder, error) from error
    for path in leftovers:
        # Only the end of its process releases a lock. Unlike a process id, this is reliable even
        # if ids are reused, or belong to another container or machine.
        try:
            with path.open("r+b") as file:
                if lock(file.fileno(), wait=False):
                    path.unlink()
        except OSError:
            continue  # not ours to remove


def make_room(folder: Path, digest: str, needed: int, limit: int) -> list[Path]:
    """Remove the least recently used files until a new one fits.

    Parameters
    ----------
    folder : Path
        The folder; all its files and temporary files count, except those of ``digest``, which the
        new file replaces.
    digest : str
        The digest of the new file.
    needed : int
        The size of the new file in bytes.
    limit : int
        The most bytes for all files together.

    Returns
    -------
    list of Path
        The removed files.

    Raises
    ------
    ConfigError
        If it does not fit in the limit or on the disk; nothing is removed then.
    CheckpointError
        If a file cannot be removed.
    """
    kept, used = [], 0
    try:
        for path in folder.iterdir():
            is_kept = _KEPT_NAME.fullmatch(path.name)
            if path.name.startswith(digest) or not (
                is_kept or _TEMPORARY_NAME.fullmatch(path.name)
            ):
                continue
            try:
                about = path.stat()
            except FileNotFoundError:
                continue  # removed meanwhile by another process
            used += about.st_size
            if is_kept:
                kept.append((about.st_mtime_ns, about.st_size, path))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _unwritable(folder, error) from error
    victims = []
    for _, size, path in sorted(kept):
        if used + needed <= limit:
            break
        victims.append(path)
        used -= size
        free += size
    if used + needed > limit:
        raise ConfigError(
            f"{folder}: keeping the prefix takes {needed} bytes, and {used} are being written by "
            f"other runs; the limit is {limit} bytes: raise it, or wait for those runs"
        )
    if free < needed:
        raise ConfigError(
            f"{folder}: keeping the prefix takes {needed} bytes, the disk has {free} free; make "
            "room, give a folder on another disk, or do not keep the prefix"
        )
    try:
        for path in victims:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return victims


def _read_index(file: BinaryIO, about: dict[str, Any], expected_bytes: int) -> list[int | None]:
    size = os.fstat(file.fileno()).st_size
    if size < expected_bytes + _TAIL.size:
        raise UnusableError(f"is truncated: {size} bytes, its data alone take {expected_bytes}")
    file.seek(size - _TAIL.size)
    length, digest, magic = _TAIL.unpack(file.read(_TAIL.size))
    if magic != _MAGIC or expected_bytes + length + _TAIL.size != size:
        raise UnusableError("is truncated or damaged: its tail is invalid")
    file.seek(expected_bytes)
    index = file.read(length)
    if _sha256(index) != digest:
        raise UnusableError("has a damaged index")
    try:
        content = parse_json(index)
    except ValueError as error:
        raise UnusableError(f"has an index that cannot be used: {error}") from None
    checksums = content.pop("crc32", None) if isinstance(content, dict) else None
    if content != about:
        raise UnusableError("belongs to another model, other texts or another format")
    if (
        not isinstance(checksums, list)
        or len(checksums) != len(about["lengths"])
        or not all(crc is None or (type(crc) is int and 0 <= crc < 2**32) for crc in checksums)
    ):
        raise UnusableError("has an index without a checksum for each example")
    return checksums


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be written: {error.strerror or error}; {_MEND}")
