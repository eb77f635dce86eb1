"""The rows of a run's log, on a disk that accepts all, some, half of one, or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spafit.errors import CheckpointError
from spafit.runs.log import RunLog

ONE, TWO, THREE = ({"step": step} for step in (1, 2, 3))
ROWS = ['{"step": 1}\n', '{"step": 2}\n', '{"step": 3}\n']
FULL = OSError(28, "No space left on device")


def full(*_: object) -> int:
    raise FULL


def open_files() -> int | None:
    """Count this process's open files, where the system says."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else None


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path / "log.jsonl")


def test_rows_are_there_at_once_and_those_before_wait(log: RunLog) -> None:
    log.write(ONE)
    assert (log.is_open, log.path.exists(), log.nbytes) == (False, False, 0)
    assert log.open(0) == 0
    assert log.path.read_text() == ROWS[0]
    log.write(TWO)
    assert log.path.read_text() == "".join(ROWS[:2])
    assert log.nbytes == len("".join(ROWS[:2]))
    log.close()
    assert not log.is_open
    log.close()  # once more is no fault


def test_it_is_cut_where_the_checkpoint_stands(log: RunLog) -> None:
    log.path.write_text("".join(ROWS[:2]) + '{"st')
    assert log.open(len(ROWS[0])) == 0
    log.write(THREE)
    assert log.path.read_text() == ROWS[0] + ROWS[2]


def test_it_says_how_much_was_lost(log: RunLog) -> None:
    log.path.write_text(ROWS[0])
    assert log.open(len(ROWS[0]) + 5) == 5
    log.write(TWO)
    assert log.path.read_text() == "".join(ROWS[:2])


def test_half_a_row_never_stays(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a disk that takes five bytes and is full then, until it has room again."""
    log.open(0)
    log.write(ONE)
    real, room = os.write, [5]

    def write(file: int, part: memoryview) -> int:
        if not room:
            raise FULL
        return real(file, part[: room.pop()])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        log.write(TWO)
        assert log.path.read_text() == ROWS[0]
        with pytest.raises(CheckpointError, match=r"log\.jsonl cannot be written: No space .* 12 "):
            log.sync()
        assert log.path.read_text() == ROWS[0]
    log.write(THREE)
    assert log.path.read_text() == "".join(ROWS)


def test_a_row_that_waits_is_tried_once_more_at_the_end(
    log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.open(0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        log.write(ONE)
    assert log.path.read_text() == ""
    log.close()
    assert log.path.read_text() == ROWS[0]


def test_one_that_was_removed_is_made_anew(log: RunLog) -> None:
    log.open(0)
    log.write(ONE)
    log.path.unlink()
    log.write(TWO)  # into what nobody sees any more
    log.sync()
    assert log.path.read_text() == "".join(ROWS[:2])
    log.write(THREE)
    assert log.path.read_text() == "".join(ROWS)


def test_another_in_its_place_is_replaced(log: RunLog) -> None:
    log.open(0)
    log.write(ONE)
    log.path.unlink()
    log.path.write_text("of somebody else, and longer than what is written here")
    log.sync()
    assert log.path.read_text() == ROWS[0]


def test_rows_that_wait_come_after_those_that_were_written(
    log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is removed while it could not be written to; the file that is gone is let go of."""
    files = open_files()
    log.open(0)
    log.write(ONE)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        log.write(TWO)
    log.path.unlink()
    log.sync()
    assert log.path.read_text() == "".join(ROWS[:2])
    log.close()
    assert open_files() == files


def test_rows_that_did_not_reach_the_disk(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.open(0)
    log.write(ONE)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"log\.jsonl cannot be written: No space left"):
        log.sync()


def test_a_folder_in_its_place(log: RunLog) -> None:
    log.path.mkdir()
    with pytest.raises(IsADirectoryError):
        log.open(0)
    assert not log.is_open
