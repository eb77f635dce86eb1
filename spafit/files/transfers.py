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
    """The server sent more bytes than it announced."""


class PartFile(io.FileIO):
    """A file that is being fetched; never written beyond its final size.

    Parameters
    ----------
    file : int
        The open file; it is closed with this one.
    path : Path
        Its path.
    size : int
        Bytes of the complete file.
    """

    def __init__(self, file: int, path: Path, size: int) -> None:
        super().__init__(file, "r+")
        self.path = path
        self.size = size

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write all of the data at the current position, in as many calls as the system needs."""
        if self.tell() + len(data) > self.size:
            raise TooLongError(f"received more than the expected {self.size:,} bytes")
        write_all(self.fileno(), memoryview(data))
        return len(data)

    def restart(self) -> None:
        """Discard what was received."""
        self.seek(0)
        self.truncate()

    def move_to(self, target: Path) -> None:
        """Move the complete file into place; a waiting process finds it there after the close."""
        if sys.platform == "win32":  # an open file cannot be moved
            self.close()
        self.path.replace(target)


@contextlib.contextmanager
def part_of(target: Path, size: int) -> Iterator[PartFile]:
    """Open and lock ``NAME.part`` beside a file that is to be fetched.

    This waits for another process that fetches the same file; afterwards the file may be complete
    at ``target``, so look there again. An incomplete ``.part`` stays for the next call; an empty
    one is removed.

    Parameters
    ----------
    target : Path
        The complete file's path; its folder exists.
    size : int
        Bytes of the complete file.

    Raises
    ------
    OSError
        If the part is a link or not a regular file, or cannot be opened.
    """
    path = target.with_name(f"{target.name}.part")
    file, _ = open_locked(path, wait=True)
    with PartFile(file, path, size) as part:
        try:
            part.seek(0, os.SEEK_END)
            yield part
        finally:
            if not part.closed and is_at(part.fileno(), path) and part.seek(0, os.SEEK_END) == 0:
                with contextlib.suppress(OSError):  # Windows cannot remove an open file
                    path.unlink()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock ``spafit.lock`` of a folder, after waiting for other processes that hold it."""
    lock = Lock(folder / "spafit.lock")
    lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
