"""The log of a training run: ``log.jsonl``, one JSON object a line.

A row is in the file when :meth:`RunLog.write` returns; if the disk refuses it, it is written with
the next one. The file never ends in an incomplete row. When a run is resumed, rows after its
checkpoint are cut off.
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
    """A file of rows. Rows given before :meth:`open` are kept in memory until then.

    Parameters
    ----------
    path : Path
        The file; its folder must exist when it is opened.

    Attributes
    ----------
    nbytes : int
        Bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._unwritten = b""
        self._file: int | None = None

    @property
    def is_open(self) -> bool:
        """Return whether the file is open."""
        return self._file is not None

    def open(self, nbytes: int) -> int:
        """Open the file, keep its first bytes, cut off the rest, and write from there on.

        Parameters
        ----------
        nbytes : int
            How many bytes are kept; 0 empties the file.

        Returns
        -------
        int
            How many of these bytes are missing from the file.

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
        """Append one row; if it cannot be written now, it is written later."""
        self._unwritten += json.dumps(row).encode() + b"\n"
        if self._file is not None:
            with suppress(OSError):  # sync() reports it
                self._write_rows()

    def sync(self) -> None:
        """Write all rows and fsync the file; if it was removed, it is made again.

        Raises
        ------
        CheckpointError
            If they cannot be written.
        """
        assert self._file is not None
        try:
            if not is_at(self._file, self.path):  # it was removed or moved
                self.renew()
            self._write_rows()
            os.fsync(self._file)
        except OSError as error:
            needed = len(self._unwritten) or None
            raise CheckpointError(
                f"{self.path} cannot be written: {explain(error, self.path.parent, needed)}"
            ) from error

    def renew(self) -> None:
        """Make the file again after it was removed; its rows are read from the open descriptor.

        They are written with the next row.

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
        """Close the file, after one more attempt to write what is left."""
        if self._file is not None:
            with suppress(OSError):
                self._write_rows()
            file, self._file = self._file, None
            with suppress(OSError):  # sync() has reported what matters
                os.close(file)

    def _write_rows(self) -> None:
        assert self._file is not None
        if self._unwritten:
            # After a partial write the next attempt begins at the same offset.
            os.lseek(self._file, self.nbytes, os.SEEK_SET)
            try:
                write_all(self._file, memoryview(self._unwritten))
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, self.nbytes)  # no incomplete row
                raise
            self.nbytes += len(self._unwritten)
            self._unwritten = b""
