"""What a transfer needs of the disk: a ``.part`` that one process writes, and a folder to itself.

Both are locks of the operating system, which end with their holder, however it ends, and leave
nothing behind. (Windows has no such locks; there nobody is kept out.)
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from spafit.files.durable import BINARY, lock, write_all


class TooLongError(Exception):
    """More came than was announced."""


class PartFile(io.FileIO):
    """A file that is being fetched; nothing is written to it beyond its size to be.

    Parameters
    ----------
    file : int
        The open file; it is closed with this one.
    path : Path
        Where it lies.
    size : int
        Bytes that the whole file will have.
    """

    def __init__(self, file: int, path: Path, size: int) -> None:
        super().__init__(file, "r+")
        self.path = path
        self.size = size

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write all of the data at the present place; the system may take it in several goes."""
        if self.tell() + len(data) > self.size:
            raise TooLongError(f"more came than the {self.size:,} bytes that are expected")
        write_all(self.fileno(), memoryview(data))
        return len(data)

    def restart(self) -> None:
        """Throw away what has come."""
        self.seek(0)
        self.truncate()

    def move_to(self, target: Path) -> None:
        """Put the whole file in its place; those who wait find it there once this one is closed."""
        if sys.platform == "win32":  # which moves no open file
            self.close()
        self.path.replace(target)


@contextlib.contextmanager
def part_of(target: Path, size: int) -> Iterator[PartFile]:
    """Open ``NAME.part`` beside a file that is to be fetched, and keep other processes from it.

    Another process that fetches the same file is waited for; what it has fetched is then found at
    ``target``, so look there again. What is left in the ``.part`` stays for the next call; an
    empty one is removed.

    Parameters
    ----------
    target : Path
        The file to be; its folder exists.
    size : int
        Bytes that it will have.

    Raises
    ------
    OSError
        If the part is a link or no plain file, or cannot be opened.
    """
    path = target.with_name(f"{target.name}.part")
    with PartFile(_open_alone(path), path, size) as part:
        try:
            part.seek(0, os.SEEK_END)
            yield part
        finally:
            if not part.closed and _is_at(part.fileno(), path) and part.seek(0, os.SEEK_END) == 0:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    path.unlink()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Have a folder to oneself among the processes that ask so; others are waited for."""
    if sys.platform == "win32":  # which cannot open a folder
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        lock(file, wait=True)
        yield
    finally:
        os.close(file)


def _open_alone(path: Path) -> int:
    # A link is not followed: it may lead anywhere.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | BINARY
    while True:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link, which is not followed; remove it", str(path))
        file = os.open(path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "it is no plain file; remove it", str(path))
            lock(file, wait=True)
            # The one before may have moved the file to its place between our open and our lock.
            if _is_at(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except OSError:
        return False
