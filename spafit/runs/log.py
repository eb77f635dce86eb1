"""The log of a training run: ``log.jsonl``, one JSON object a line.

A row is in the file when :meth:`RunLog.write` returns, unless the disk does not take it; then it
waits for the next one. The file never ends in half a row, and where a run is taken up again it is
cut where the checkpoint stands.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from spafit.errors import CheckpointError
from spafit.files.durable import BINARY, explain, is_at, write_all


class RunLog:
    """A file of rows, written from :meth:`open` on; rows that come before that wait for it.

    Parameters
    ----------
    path : Path
        The file; its folder is there once it is opened.

    Attributes
    ----------
    nbytes : int
        The length of what is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._unwritten = b""
        self._file: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether rows are written."""
        return self._file is not None

    def open(self, nbytes: int) -> int:
        """Write from now on, after the first bytes of what is there; the rest is cut off.

        Parameters
        ----------
        nbytes : int
            The length of what is kept; 0 begins anew.

        Returns
        -------
        int
            How many of these bytes the file has lost.

        Raises
        ------
        OSError
            If it cannot be opened or written to.
        """
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
        self.nbytes = min(nbytes, os.fstat(self._file).st_size)
        os.ftruncate(self._file, self.nbytes)
        lost = nbytes - self.nbytes
        self._write_rows()
        return lost

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; one that cannot be written now is written later."""
        self._unwritten += json.dumps(row).encode() + b"\n"
        if self._file is not None:
            with suppress(OSError):  # sync says so
                self._write_rows()

    def sync(self) -> None:
        """See all rows to the disk; a file that was removed is made anew.

        Raises
        ------
        CheckpointError
            If they cannot be written.
        """
        assert self._file is not None
        try:
            if not is_at(self._file, self.path):  # removed, or moved away
                self.renew()
            self._write_rows()
            os.fsync(self._file)
        except OSError as error:
            needed = len(self._unwritten) or None
            raise CheckpointError(
                f"{self.path} cannot be written: {explain(error, self.path.parent, needed)}"
            ) from error

    def renew(self) -> None:
        """Make the file anew: what was removed can be read for as long as it is open.

        Its rows wait to be written.

        Raises
        ------
        OSError
            If it cannot be made.
        """
        assert self._file is not None
        old, rows = self._file, os.pread(self._file, self.nbytes, 0)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
        os.close(old)
        self.nbytes, self._unwritten = 0, rows + self._unwritten
        os.ftruncate(self._file, 0)

    def close(self) -> None:
        """Close the file; what still waits is tried once more."""
        if self._file is not None:
            with suppress(OSError):
                self._write_rows()
            file, self._file = self._file, None
            with suppress(OSError):  # what had to be on the disk was seen to it before
                os.close(file)

    def _write_rows(self) -> None:
        assert self._file is not None
        if self._unwritten:
            # Where a row was written in part, the next attempt begins at the same place.
            os.lseek(self._file, self.nbytes, os.SEEK_SET)
            try:
                write_all(self._file, memoryview(self._unwritten))
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, self.nbytes)  # no half of a row
                raise
            self.nbytes += len(self._unwritten)
            self._unwritten = b""
