"""Replacing a file atomically."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from spafit.errors import ConfigError, SpafitError, WeightsError
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


class TestFailures:
    """Oracle: what the system says of the same path, and the file that was there."""

    PLACES = ("missing/file", "file/under", "folder", "loop")

    def prepare(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"old")
        (tmp_path / "folder").mkdir()
        (tmp_path / "loop").symlink_to(tmp_path / "loop")

    @pytest.mark.parametrize("place", PLACES)
    def test_is_the_system_s_own_error(self, tmp_path: Path, place: str) -> None:
        self.prepare(tmp_path)
        with pytest.raises(OSError) as found, replacing(tmp_path / place):
            pytest.fail("nothing can be written there")
        assert type(found.value) is not OSError or found.value.errno == errno.EINVAL
        assert found.value.strerror

    @pytest.mark.parametrize("kind", [WeightsError, ConfigError])
    @pytest.mark.parametrize("place", PLACES)
    def test_is_the_caller_s_error_where_one_is_asked_for(
        self, tmp_path: Path, place: str, kind: type[SpafitError]
    ) -> None:
        self.prepare(tmp_path)
        with pytest.raises(kind) as found, replacing(tmp_path / place, kind):
            pytest.fail("nothing can be written there")
        assert str(found.value).startswith(f"{tmp_path / place} cannot be written: ")
        assert isinstance(found.value.__cause__, OSError)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "loop"]
        assert (tmp_path / "file").read_bytes() == b"old"

    @pytest.mark.parametrize("kind", [None, WeightsError])
    def test_an_error_of_the_caller_s_own_passes(
        self, tmp_path: Path, kind: type[SpafitError] | None
    ) -> None:
        with pytest.raises(KeyError), replacing(tmp_path / "file", kind):
            raise KeyError("x")
        assert list(tmp_path.iterdir()) == []

    def test_a_name_that_no_file_has(self, tmp_path: Path) -> None:
        for error in (None, WeightsError):
            match = r"'\S+a\\x00b' cannot be written: no file has such a name"
            with (
                pytest.raises(error or ConfigError, match=match),
                replacing(tmp_path / "a\0b", error),
            ):
                pass
