"""Writing files durably, and locking a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spafit.errors import CheckpointError
from spafit.files import durable
from spafit.files.durable import Lock, explain, measure, sync_folder, write_all, write_file

# Takes a lock, says so, and holds it until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from spafit.files.durable import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def open_files() -> int:
    """Count the files that this process has open; 0 where that cannot be known."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


class TestWriteFile:
    """Oracle: what was to be written, and the mode that ``Path.write_bytes`` gives."""

    def test_pieces_of_every_size(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(durable, "_PART_BYTES", 7)
        draw = random.Random(4)
        pieces = [draw.randbytes(n) for n in (0, 1, 6, 7, 8, 13, 14, 23, 0)]
        record = write_file(tmp_path / "file", [pieces[0], memoryview(pieces[1]), *pieces[2:]])
        content = (tmp_path / "file").read_bytes()
        assert content == b"".join(pieces)
        assert record.nbytes == len(content) == 72
        assert record.sha256 == hashlib.sha256(content).hexdigest()
        assert measure(tmp_path / "file") == record

    def test_no_pieces(self, tmp_path: Path) -> None:
        record = write_file(tmp_path / "file", [])
        assert (record.nbytes, record.sha256) == (0, hashlib.sha256().hexdigest())
        assert (tmp_path / "file").read_bytes() == b""

    @pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
    def test_the_mode_is_the_users(self, tmp_path: Path, mask: int) -> None:
        with umask(mask):
            write_file(tmp_path / "ours", [b"x"])
            (tmp_path / "plain").write_bytes(b"x")
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
        assert modes == [0o666 & ~mask] * 2

    def test_a_file_that_is_there_stays_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"mine")
        with pytest.raises(FileExistsError):
            write_file(tmp_path / "file", [b"other"])
        assert (tmp_path / "file").read_bytes() == b"mine"

    def test_it_is_closed_and_synced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Synced after the last byte; closed also where that fails."""
        done = []
        for name in ("write", "fsync", "close"):
            function = getattr(os, name)

            def noted(*arguments: object, _name: str = name, _function=function) -> object:
                done.append(_name)
                return _function(*arguments)

            monkeypatch.setattr(os, name, noted)
        write_file(tmp_path / "file", [b"abc", b"de"])
        assert done == ["write", "write", "fsync", "close"]

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", full)
        before = open_files()
        with pytest.raises(OSError, match="No space left"):
            write_file(tmp_path / "other", [b"abc"])
        after = open_files()
        assert before == after

    def test_writes_that_take_less(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, part: write(file, part[: len(part) // 2 + 1]))
        content = random.Random(5).randbytes(1031)
        assert write_file(tmp_path / "file", [content]).nbytes == 1031
        assert (tmp_path / "file").read_bytes() == content

    def test_a_write_that_takes_nothing_is_no_endless_loop(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "write", lambda *_: 0)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            write_all(1, memoryview(b"abc"))


class TestMeasure:
    """Oracle: hashlib on the whole content."""

    def test_a_file_of_several_parts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(durable, "_PART_BYTES", 11)
        content = random.Random(6).randbytes(101)
        (tmp_path / "file").write_bytes(content)
        record = measure(tmp_path / "file")
        assert (record.nbytes, record.sha256) == (101, hashlib.sha256(content).hexdigest())

    def test_one_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            measure(tmp_path / "file")


class TestSyncFolder:
    """Oracle: the calls of the system, and the file numbers that are open."""

    def test_it_is_synced_and_closed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced = []
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
        sync_folder(tmp_path)
        assert synced == [tmp_path.stat().st_ino]

        def fails(_: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        opened = []
        open_file = os.open
        monkeypatch.setattr(os, "open", lambda *a: opened.append(open_file(*a)) or opened[-1])
        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            sync_folder(tmp_path)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(opened[0])


class TestExplain:
    """Oracle: the text, and what the disk says is free."""

    def test_needed_and_free(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        error = OSError(errno.ENOSPC, "No space left on device")
        assert explain(error, tmp_path) == "No space left on device"
        usage = os.statvfs(tmp_path)
        found = explain(error, tmp_path / "a" / "b", 1_234_567)
        free = int(found.rpartition("needed, ")[2].partition(" ")[0].replace(",", ""))
        assert found.startswith("No space left on device; 1,234,567 bytes are needed, ")
        assert found.endswith(" bytes are free there")
        assert abs(free - usage.f_bavail * usage.f_frsize) < 2**32  # others write too

        def broken(_: object) -> None:
            raise OSError(errno.EIO, "no")

        monkeypatch.setattr(durable.shutil, "disk_usage", broken)
        assert "an unknown number of bytes are free there" in explain(error, tmp_path, 5)

    def test_an_error_without_a_number(self, tmp_path: Path) -> None:
        assert explain(OSError("odd"), tmp_path) == "odd"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
class TestLock:
    """Oracle: a second holder, in another process or by another opening, and the files."""

    def test_from_acquire_to_release(self, tmp_path: Path) -> None:
        path = tmp_path / "run.lock"
        lock = Lock(path)
        assert not lock.is_held()
        lock.acquire()
        assert lock.is_held()
        about = path.read_text()
        assert about.startswith(f"process {os.getpid()} on {socket.gethostname()}, since 2")
        with pytest.raises(CheckpointError) as caught:
            Lock(path).acquire()
        assert str(caught.value) == (
            f"{tmp_path} is in use by {about.strip()}; wait for it, stop it, or give another folder"
        )
        assert lock.is_held()
        lock.release()
        lock.release()
        assert not lock.is_held()
        assert not path.exists()
        Lock(path).acquire()

    def test_another_process_and_its_death(self, tmp_path: Path) -> None:
        path = tmp_path / "run.lock"
        command = [sys.executable, "-c", HOLDER, str(path)]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        lock = Lock(path)
        with pytest.raises(CheckpointError, match=f"in use by process {holder.pid} on "):
            lock.acquire()
        holder.kill()
        holder.communicate()
        assert f"process {holder.pid} " in path.read_text()  # the file stays, and holds nothing
        lock.acquire()
        assert f"process {os.getpid()} " in path.read_text()
        lock.release()

    @pytest.mark.parametrize("content", ["process 1 on {host}, since then\n", "", "\x00\xff" * 999])
    def test_a_file_alone_is_no_lock(self, tmp_path: Path, content: str) -> None:
        """Not even with the number of a process that lives, which is another one by now."""
        path = tmp_path / "run.lock"
        path.write_text(content.format(host=socket.gethostname()), encoding="utf-8")
        lock = Lock(path)
        lock.acquire()
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        assert path.read_text().count("\n") == 1
        lock.release()

    def test_a_folder_that_was_removed_is_not_held(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        lock = Lock(folder / "run.lock")
        lock.acquire()
        (folder / "run.lock").unlink()
        folder.rmdir()
        assert not lock.is_held()
        folder.mkdir()
        other = Lock(folder / "run.lock")
        other.acquire()
        assert not lock.is_held()
        lock.release()  # not the other's file
        assert other.is_held()
        other.release()

    def test_a_file_that_is_removed_between_open_and_lock(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As the holder before does it at its end: the lock of a file of no name is none."""
        path = tmp_path / "run.lock"
        path.write_text("")
        before = path.stat().st_ino
        plain = durable.lock
        calls = []

        def removing(file: int, *, wait: bool) -> bool | None:
            calls.append(os.fstat(file).st_ino)
            if len(calls) == 1:
                (tmp_path / "keeps the number").hardlink_to(path)
                path.unlink()
            return plain(file, wait=wait)

        monkeypatch.setattr(durable, "lock", removing)
        lock = Lock(path)
        lock.acquire()
        assert calls[0] == before != calls[1]
        assert lock.is_held()
        assert path.stat().st_ino == calls[1]
        lock.release()

    def test_a_holder_that_has_not_said_yet_who_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has locked the file of a dead one, or a new one, and writes its name any moment."""
        path = tmp_path / "run.lock"
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        lock = Lock(path)
        lock.acquire()
        about = path.read_text()
        states = iter([f"process {dead.pid} on {socket.gethostname()}, since 1\n", "", "proc"])

        def next_state(_: float) -> None:
            path.write_text(next(states, about))

        next_state(0)
        monkeypatch.setattr(time, "sleep", next_state)
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on "):
            Lock(path).acquire()
        monkeypatch.setattr(time, "sleep", lambda _: None)
        path.write_text("")
        with pytest.raises(CheckpointError, match="in use by another process; wait"):
            Lock(path).acquire()
        lock.release()

    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
    def test_a_file_system_without_locks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def fails(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", fails)
        lock = Lock(tmp_path / "run.lock")
        lock.acquire()
        assert lock.is_held()
        lock.release()

    def test_one_that_cannot_be_made(self, tmp_path: Path) -> None:
        lock = Lock(tmp_path / "nowhere" / "run.lock")
        with pytest.raises(FileNotFoundError):
            lock.acquire()
        assert not lock.is_held()
        lock.release()


class TestPlainNames:
    """Oracle: two lists, of plain names and of those that lead elsewhere on some system."""

    @pytest.mark.parametrize("name", ["state.json", ".hidden", "a b", "été", "x" * 255])
    def test_names_of_a_file_in_the_folder(self, name: str) -> None:
        assert durable.is_plain_name(name)

    @pytest.mark.parametrize(
        "name",
        [
            *("", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "c:x", '"', "x" * 256),
            *("a\0b", "a\nb", "\ud800", "\x1b[31m", None, 7, b"x", ["x"]),
        ],
        ids=lambda name: ascii(name)[:20],
    )
    def test_all_others(self, name: object) -> None:
        assert not durable.is_plain_name(name)
