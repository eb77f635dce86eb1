"""How a file is replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spafit.files.replacing import replacing


class TestReplacing:
    """Oracle: what the system says of the descriptor that is synced, and of the file."""

    def test_what_is_synced_could_be_written_to(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Windows refuses to sync a file that is open for reading only."""
        fcntl = pytest.importorskip("fcntl")
        sync, synced = os.fsync, []

        def spy(file: int) -> None:
            access = fcntl.fcntl(file, fcntl.F_GETFL) & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR)
            synced.append((Path(f"/dev/fd/{file}").is_file(), access, os.fstat(file).st_size))
            sync(file)

        monkeypatch.setattr(os, "fsync", spy)
        with replacing(tmp_path / "file") as temporary:
            temporary.write_bytes(b"seven b")
        files = [(access, size) for is_file, access, size in synced if is_file]
        assert files == [(os.O_RDWR, 7)]
        assert (tmp_path / "file").read_bytes() == b"seven b"

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o222])
    def test_its_mode_is_what_the_umask_asks_for(self, tmp_path: Path, mask: int) -> None:
        """Whatever the mode it is written with; 0444 too, which nobody could open to sync."""
        before = os.umask(mask)
        try:
            with replacing(tmp_path / "file") as temporary:
                temporary.unlink()
                temporary.touch(0o600)
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
