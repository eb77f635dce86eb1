"""What other programs use. Oracle: counts and times made by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from spafit.cli import main
from spafit.machine import busy


def test_all_s_time_but_this_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice, in ticks
    stat = "cpu  1000 200 300 99999 88888 40 50 60 777 66\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    (tmp_path / "stat").write_text(stat)
    monkeypatch.setattr(busy, "_COUNTS", tmp_path / "stat")
    monkeypatch.setattr("os.sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    times = os.times_result((1.0, 2.0, 3.0, 0.25, 12345.0))
    monkeypatch.setattr("os.times", lambda: times)
    assert busy.others_s() == pytest.approx(16.5 - 6.25)


def test_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "_BEGAN", (100.0, 7.0))
    monkeypatch.setattr(busy, "_COUNTS", Path("/nowhere/stat"))
    assert busy.other_load() is None
    assert busy.busy_note(64) == ""


def test_by_time_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "_BEGAN", (100.0, 7.0))
    monkeypatch.setattr("time.monotonic", lambda: 110.0)
    monkeypatch.setattr(busy, "others_s", lambda: 12.0)
    assert busy.other_load() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("load", "threads", "warned"),
    [(0.4, 4, False), (0.6, 4, True), (1.4, 3, False), (1.6, 3, True), (4.0, 1, False)],
)
def test_a_note_where_the_threads_lack_cores(
    load: float, threads: int, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(busy, "other_load", lambda: load)
    note = busy.busy_note(threads)
    assert bool(note) == warned
    assert not warned or f"keep {load} of 4 cores busy: with {threads} threads" in note


def test_training_says_so_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(busy, "busy_note", lambda threads: f"busy, {threads} threads")
    (tmp_path / "file").touch()
    for verb in (
        ["train", "--method", "bitfit", "--data", str(tmp_path / "file")],
        ["demo", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")],
    ):
        assert main(verb) == 2
        note, error = capsys.readouterr().err.splitlines()
        assert note == f"busy, {torch.get_num_threads()} threads"
        assert error.startswith("spafit: ")
