"""The record of a run, and what is shown while it goes on."""

from __future__ import annotations

import io
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spafit import progress as progress_module
from spafit import run_folder
from spafit.errors import CheckpointError
from spafit.progress import Progress
from spafit.run_folder import (
    RunFolder,
    machine,
    peak_memory_mib,
    read_record,
    refuse_run,
    versions,
)

RECORD: dict[str, Any] = {
    "task": "rte",
    "about": {"model": "tiny"},
    "settings": {"max_length": 53, "precision": "float32", "device": "cpu"},
}


def finish(folder: Path, *, adapter: bool = True) -> Path:
    """Write a finished run."""
    with RunFolder(folder, RECORD, overwrite=False) as run:
        run.log({"step": 1, "loss": 0.5})
        if adapter:
            run.adapter.write_bytes(b"weights")
    return folder


def status(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


class TestRunFolder:
    """Oracle: the files, read back."""

    def test_a_run_that_ends_well(self, tmp_path: Path) -> None:
        out = tmp_path / "a" / "b"
        with RunFolder(out, RECORD, overwrite=False) as run:
            assert status(out) == "running"
            assert [path.name for path in run.files] == ["log.jsonl", "run.json"]
            run.log({"step": 1, "loss": 0.5})
            assert (out / "log.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'  # at once
            run.log({"step": 2, "loss": 0.25})
            run.record["result"] = {"metrics": {"accuracy": 0.75}}
        assert len((out / "log.jsonl").read_text().splitlines()) == 2
        record = json.loads((out / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["result"] == {"metrics": {"accuracy": 0.75}}
        assert {key: record[key] for key in RECORD} == RECORD
        assert (record["versions"], record["machine"]) == (versions(), machine())

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ValueError("no"), "failed"),
            (MemoryError(), "failed"),
            (KeyboardInterrupt(), "interrupted"),
            (SystemExit(3), "interrupted"),
        ],
        ids=repr,
    )
    def test_a_run_that_does_not(self, tmp_path: Path, error: BaseException, expected: str) -> None:
        with (
            pytest.raises(type(error)),
            RunFolder(tmp_path, RECORD, overwrite=False),
        ):
            raise error
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["status"] == expected
        assert record["error"] == f"{type(error).__name__}: {error}"

    def test_an_old_run_is_kept(self, tmp_path: Path) -> None:
        finish(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for refused in (
            lambda: RunFolder(tmp_path, {}, overwrite=False),
            lambda: refuse_run(tmp_path),
        ):
            with pytest.raises(CheckpointError, match=r"holds a run already; .* \(--overwrite\)"):
                refused()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_an_old_run_is_replaced_where_asked(self, tmp_path: Path) -> None:
        """Its adapter goes at once: it would be taken for the new run's."""
        finish(tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        RunFolder(tmp_path, RECORD, overwrite=True)
        assert not (tmp_path / "adapter.safetensors").exists()
        assert (tmp_path / "log.jsonl").read_text() == ""
        assert status(tmp_path) == "running"
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_free_place(self, tmp_path: Path) -> None:
        refuse_run(tmp_path)
        refuse_run(tmp_path / "nowhere")
        assert list(tmp_path.iterdir()) == []

    def test_a_place_that_is_no_folder(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("")
        for place in (file, file / "below"):
            with pytest.raises(CheckpointError, match=r"cannot be written: .*(exists|directory)"):
                RunFolder(place, RECORD, overwrite=True)

    def test_the_record_is_written_whole_or_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = RunFolder(finish(tmp_path), RECORD, overwrite=True)
        before = (tmp_path / "run.json").read_text()
        run.record["status"] = "finished"

        def half(self: Path, text: str, **_: object) -> None:
            self.write_bytes(text[: len(text) // 2].encode())
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", half)
        with pytest.raises(Exception, match=r"run\.json cannot be written: No space left"):
            run.write()
        assert (tmp_path / "run.json").read_text() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "run.json"]


class TestReadRecord:
    """Oracle: what was written, and the damage that was done to it."""

    def test_a_sound_one(self, tmp_path: Path) -> None:
        record = read_record(finish(tmp_path))
        assert {key: record[key] for key in RECORD} == RECORD

    def test_no_run(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(CheckpointError, match=r"is no run folder: it has no run\.json"):
                read_record(folder)

    def test_a_run_without_an_adapter(self, tmp_path: Path) -> None:
        finish(tmp_path, adapter=False)
        match = r"has no adapter\.safetensors: its run is finished"
        with pytest.raises(CheckpointError, match=match):
            read_record(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "\udcff", "[" * 100_000], ids=["", "{", "byte", "["])
    def test_not_json(self, tmp_path: Path, text: str) -> None:
        finish(tmp_path)
        (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=r"run\.json cannot be read: "):
            read_record(tmp_path)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda record: [],
            lambda record: None,
            lambda record: {},
            lambda record: {**record, "task": 7},
            lambda record: {**record, "about": None},
            lambda record: {**record, "settings": []},
            lambda record: {**record, "settings": {}},
            lambda record: {**record, "settings": {**record["settings"], "max_length": "53"}},
            lambda record: {**record, "settings": {**record["settings"], "precision": None}},
            lambda record: {**record, "settings": {**record["settings"], "device": 0}},
        ],
    )
    def test_damaged(self, tmp_path: Path, damage: Callable[[Any], Any]) -> None:
        record = json.loads((finish(tmp_path) / "run.json").read_text())
        (tmp_path / "run.json").write_text(json.dumps(damage(record)))
        with pytest.raises(CheckpointError, match=r"run\.json is not the record of a run"):
            read_record(tmp_path)


class TestMachine:
    """Oracle: platform, torch and the process itself."""

    def test_versions(self) -> None:
        found = versions()
        assert found["torch"] == torch.__version__
        assert found["python"] == platform.python_version()
        assert all(re.match(r"\d+\.\d+", version) for version in found.values())

    def test_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        found = machine()
        assert found["torch_threads"] == torch.get_num_threads()
        assert found["platform"] == platform.platform()
        assert "gpu" not in found
        assert json.loads(json.dumps(found)) == found

    def test_with_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
        assert machine()["gpu"] == "Tesla V100"

    def test_peak_memory_is_the_kernels(self) -> None:
        status = Path("/proc/self/status")
        if not status.is_file():
            pytest.skip("this system does not say it in /proc")
        found = peak_memory_mib(torch.device("cpu"))
        (peak_kib,) = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
        assert found == pytest.approx(int(peak_kib) / 1024, rel=0.05)

    def test_peak_memory_of_a_gpu_is_torchs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 3 * 2**20)
        assert peak_memory_mib(torch.device("cuda")) == 3.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give a clock that stands still until its one entry is set."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    return now


class TestProgress:
    """Oracle: a clock that is set by hand."""

    def test_plain_lines_every_ten_seconds_and_at_the_end(self, clock: list[float]) -> None:
        stream = io.StringIO()
        with Progress(5000, stream=stream) as progress:
            for step in range(1, 5001):
                clock[0] = 1000 + step / 10
                progress.step(step, 1 + step // 2501, 2 / step, 123.45)
        lines = stream.getvalue().splitlines()
        assert len(lines) == 50
        assert lines[0] == "step 100/5000, epoch 1, loss 0.0200, 123.5 examples/s, 8:10 left"
        assert lines[-1] == "step 5000/5000, epoch 2, loss 0.0004, 123.5 examples/s, 0:00 left"

    def test_hours(self, clock: list[float]) -> None:
        stream = io.StringIO()
        progress = Progress(1000, stream=stream)
        clock[0] += 10
        progress.step(1, 1, 0.5, 1.0)
        assert stream.getvalue().endswith("2:46:30 left\n")

    def test_a_bar_on_a_terminal(self, clock: list[float]) -> None:
        stream = Terminal()
        with Progress(3, stream=stream) as progress:
            for step in (1, 2, 3):
                clock[0] += 1
                progress.step(step, 1, 0.25, 7.0)
            progress.line("epoch 1: dev accuracy 0.5")
        shown = stream.getvalue()
        assert "3/3" in shown
        assert "epoch 1, loss 0.2500, 7.0 examples/s" in shown
        assert "epoch 1: dev accuracy 0.5\n" in shown
        assert "step 3/3" not in shown  # no plain lines beside the bar

    @pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["plain", "terminal"])
    def test_quiet(self, stream: io.StringIO, clock: list[float]) -> None:
        with Progress(3, quiet=True, stream=stream) as progress:
            clock[0] += 100
            progress.step(3, 1, 0.25, 7.0)
            progress.line("a line")
        assert stream.getvalue() == ""

    def test_standard_error_by_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        Progress(1).step(1, 1, 0.5, 2.0)
        out, err = capsys.readouterr()
        assert out == ""
        assert err == "step 1/1, epoch 1, loss 0.5000, 2.0 examples/s, 0:00 left\n"


def test_names() -> None:
    """The names are part of what users rely on."""
    names = (run_folder.RUN, run_folder.LOG, run_folder.ADAPTER)
    assert names == ("run.json", "log.jsonl", "adapter.safetensors")
