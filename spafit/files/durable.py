"""Files that are on the disk once they are said to be, and a lock that ends with its holder.

Everything goes through the operating system's own calls (``os.open``, ``os.write``, ``os.fsync``
...), one operation a call, so that a test can make each of them fail in its turn.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spafit.errors import CheckpointError

if sys.platform != "win32":
    import fcntl

#: What can be written: bytes, or the memory of an array.
Piece = bytes | memoryview

#: For ``os.open``: on Windows line ends would else be written in two bytes.
BINARY: int = getattr(os, "O_BINARY", 0)

# A piece is handed over in parts of this size, so that a large tensor is hashed while it is warm.
_PART_BYTES = 2**22


@dataclass(frozen=True)
class FileRecord:
    """What a file is known by.

    Attributes
    ----------
    nbytes : int
        Its size.
    sha256 : str
        Of its content, in hexadecimal.
    """

    nbytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable[Piece]) -> FileRecord:
    """Write a new file and see it to the disk; its mode is what the user's umask asks for.

    Parameters
    ----------
    path : Path
        It must not exist.
    pieces : iterable of bytes or memoryview
        The content.

    Raises
    ------
    OSError
        If any operation fails; what was written is then left to the caller to remove.
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
    """Write all of a part; the system may take it in several goes."""
    while len(part):
        done = os.write(file, part)
        if done == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        part = part[done:]


def measure(path: Path) -> FileRecord:
    """Read a file and say what it is known by."""
    digest, nbytes = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while part := file.read(_PART_BYTES):
            digest.update(part)
            nbytes += len(part)
    return FileRecord(nbytes, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """See the names in a folder to the disk: what was made, moved and removed."""
    if sys.platform == "win32":  # which cannot open a folder
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def explain(error: OSError, folder: Path, needed: int | None = None) -> str:
    """Say why something in a folder cannot be written; with ``needed`` bytes, what is free."""
    reason = error.strerror or str(error)
    if needed is None:
        return reason
    free = "an unknown number of"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(_existing(folder)).free:,}"
    return f"{reason}; {needed:,} bytes are needed, {free} bytes are free there"


class Lock:
    """A file that one process at a time holds, from :meth:`acquire` to :meth:`release`.

    The system lets go of it when its holder ends, however it ends, so that a dead holder holds
    nothing. The file says who the holder is. (Windows has no such locks; there nobody is kept out.)

    Parameters
    ----------
    path : Path
        The file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        CheckpointError
            If another process has it; the message says which.
        OSError
            If the file cannot be made.
        """
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                # None: better a run without a lock than no run.
                if lock(file, wait=False) is False:
                    raise CheckpointError(
                        f"{self.path.parent} is in use by {_holder(file)}; wait for it, stop it, "
                        "or give another folder"
                    )
                # The one before may have removed the file between our open and our lock.
                if is_at(file, self.path):
                    about = f"process {os.getpid()} on {socket.gethostname()}, since {_now()}\n"
                    os.ftruncate(file, 0)
                    os.write(file, about.encode())
                    self._file = file
                    return
            finally:
                if self._file is None:
                    os.close(file)

    def is_held(self) -> bool:
        """Whether the lock is ours, and its file is where it was: the folder is the same one."""
        return self._file is not None and is_at(self._file, self.path)

    def release(self) -> None:
        """Remove the file and let go."""
        if self._file is None:
            return
        if is_at(self._file, self.path):
            with contextlib.suppress(OSError):
                self.path.unlink()
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            os.close(file)


def lock(file: int, *, wait: bool) -> bool | None:
    """Lock an open file until it is closed, as one process at a time can.

    Parameters
    ----------
    file : int
        Its descriptor.
    wait : bool
        Whether to wait for another process that has it.

    Returns
    -------
    bool or None
        Whether it is ours; None where the file system has no locks. On Windows always True: there
        what another has open cannot be removed or moved, and nothing else is kept out.
    """
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
        return None
    return True


def is_at(file: int, path: Path) -> bool:
    """Whether an open file is what lies at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # it cannot be told now, which does not make it another file
        return True


def _holder(file: int) -> str:
    """Say who holds a lock: it may have it already, and not yet have said so."""
    for _ in range(50):
        found = os.pread(file, 200, 0).decode(errors="replace")
        if found.endswith("\n") and _may_be_alive(found):
            return found.strip()
        time.sleep(0.02)
    return "another process"


def _may_be_alive(about: str) -> bool:
    """Whether the process that a lock file names is not known to have ended."""
    match = re.match(rf"process ([0-9]{{1,9}}) on {re.escape(socket.gethostname())},", about)
    if match is None:
        return True
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _existing(folder: Path) -> Path:
    """Give a folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
