"""Download into a ``.part`` file that one process at a time writes, and lock a folder."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from spafit.files.durable import Lock, is_at, open_locked, write_all


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
    file, _ = open_locked(path, wait=True)
    with PartFile(file, path, size) as part:
        try:
            part.seek(0, os.SEEK_END)
            yield part
        finally:
            if not part.closed and is_at(part.fileno(), path) and part.seek(0, os.SEEK_END) == 0:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    path.unlink()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep out of a folder all other processes that call this for it, by ``spafit.lock`` there."""
    lock = Lock(folder / "spafit.lock")
    lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
