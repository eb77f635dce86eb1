"""Write files durably (hashed while written, then fsynced), and lock files.

Every operation is a single system call (``os.open``, ``os.write``, ``os.fsync`` ...), so that a
test can make each of them fail in turn.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spafit.errors import InUseError

#: What can be written: bytes, or the memory of an array.
Piece = bytes | memoryview

#: For ``os.open``: without it, Windows writes each line end as two bytes.
BINARY: int = getattr(os, "O_BINARY", 0)

# A piece is hashed and written in parts of this size, so that each part is still in the cache.
_PART_BYTES = 2**22


@dataclass(frozen=True)
class FileRecord:
    """The size and hash of a file.

    Attributes
    ----------
    nbytes : int
        Its size.
    sha256 : str
        SHA-256 of its content, in hexadecimal.
    """

    nbytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable[Piece]) -> FileRecord:
    """Write a new file with the mode that the umask gives, and fsync it.

    Parameters
    ----------
    path : Path
        It must not exist.
    pieces : iterable of bytes or memoryview
        The content.

    Raises
    ------
    OSError
        If any operation fails; the caller then removes the incomplete file.
    """
    digest, nbytes = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for start in range(0, len(view), _PART_BYTES):
                part = view[start : start + _PART_BYTES]
                digest.update(part)
                write_all(file, part)
            nbytes += len(view)
        os.fsync(file)
    finally:
        os.close(file)
    return FileRecord(nbytes, digest.hexdigest())


def write_all(file: int, part: memoryview) -> None:
    """Write all of a part, in as many calls as the system needs."""
    while len(part):
        done = os.write(file, part)
        if done == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        part = part[done:]


def measure(path: Path) -> FileRecord:
    """Read a file, and return its size and hash."""
    digest, nbytes = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while part := file.read(_PART_BYTES):
            digest.update(part)
            nbytes += len(part)
    return FileRecord(nbytes, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that files created, moved and removed in it stay so after a crash."""
    if sys.platform == "win32":  # which cannot open a folder
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def is_plain_name(name: object) -> bool:
    """Return whether a name is printable and names a file in the same folder on every system."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name.isprintable()
        and name not in (".", "..")
        and not any(character in name for character in '/\\:"')
    )


def explain(error: OSError, folder: Path, needed: int | None = None) -> str:
    """Say why writing to a folder failed; with ``needed`` bytes, also how many are free."""
    reason = error.strerror or str(error)
    if needed is None:
        return reason
    free = "an unknown number of"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(_existing(folder)).free:,}"
    return f"{reason}; {needed:,} bytes are needed, {free} bytes are free there"


class Lock:
    """A file that one process at a time holds, from :meth:`acquire` to :meth:`release`.

    The system releases the lock when its process ends, even if it is killed. The file names the
    process that holds the lock, which filelock's own classes do not do.

    Parameters
    ----------
    path : Path
        The file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self, *, wait: bool = False) -> None:
        """Take the lock.

        Parameters
        ----------
        wait : bool
            Whether to wait until another process releases it.

        Raises
        ------
        InUseError
            Without ``wait``, if another process holds it; the message says which.
        OSError
            If the file cannot be created.
        """
        file, is_ours = open_locked(self.path, wait=wait)
        try:
            if not is_ours:
                raise InUseError(
                    f"{self.path.parent} is in use by {_holder(file)}; wait for it, stop it, "
                    "or give another folder"
                )
            about = f"process {os.getpid()} on {socket.gethostname()}, since {_now()}\n"
            os.ftruncate(file, 0)
            os.write(file, about.encode())
            self._file = file
        finally:
            if self._file is None:
                os.close(file)

    def is_held(self) -> bool:
        """Return whether we hold the lock and its file was not moved, removed or replaced."""
        return self._file is not None and is_at(self._file, self.path)

    def release(self) -> None:
        """Remove the file and release the lock."""
        if self._file is None:
            return
        file, self._file = self._file, None
        is_there = is_at(file, self.path)
        if sys.platform == "win32":  # an open file cannot be removed, neither ours nor another's
            os.close(file)
        with contextlib.suppress(OSError):
            if is_there:
                self.path.unlink()
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                os.close(file)


def open_locked(path: Path, *, wait: bool) -> tuple[int, bool]:
    """Open a file for reading and writing (created if missing), and lock it until it is closed.

    Parameters
    ----------
    path : Path
        The file. A symbolic link is not followed: it may lead anywhere.
    wait : bool
        Whether to wait until another process releases its lock.

    Returns
    -------
    int
        The file's descriptor.
    bool
        Whether the lock is ours; also True on a file system without locks, where a run goes on
        unlocked. False only without ``wait``.

    Raises
    ------
    OSError
        If it is a link or not a regular file, or cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | BINARY
    while True:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link, which is not followed; remove it", str(path))
        file = os.open(path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file; remove it", str(path))
            is_ours = lock(file, wait=wait) is not False
            # Its last holder may have removed or moved the file between our open and our lock.
            if not is_ours or is_at(file, path):
                return file, is_ours
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def lock(file: int, *, wait: bool) -> bool | None:
    """Lock an open file until it is closed; one process at a time holds the lock.

    Parameters
    ----------
    file : int
        Its descriptor.
    wait : bool
        Whether to wait until another process releases it.

    Returns
    -------
    bool or None
        Whether the lock is ours; None where the file system has no locks.
    """
    from filelock import lock_descriptor  # here, because its import takes 20 ms

    try:
        return lock_descriptor(file, blocking=wait)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
        return None


def is_at(file: int, path: Path) -> bool:
    """Return whether a path leads to an open file (and not to another that replaced it)."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # unknown, as on a failing disk: taken to be the same file
        return True


def _holder(file: int) -> str:
    """Say which process holds a lock; wait a little for one that has not written its name yet."""
    for _ in range(50):
        # On Windows other processes cannot read a locked file's first byte: the p of "process".
        os.lseek(file, 1, os.SEEK_SET)
        found = "p" + os.read(file, 200).decode(errors="replace")
        if found.endswith("\n") and _may_be_alive(found):
            return found.strip()
        time.sleep(0.02)
    return "another process"


def _may_be_alive(about: str) -> bool:
    """Return whether the process that a lock file names may still be running."""
    match = re.match(rf"process ([0-9]{{1,9}}) on {re.escape(socket.gethostname())},", about)
    if match is None:
        return True
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        return True
    return True


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
