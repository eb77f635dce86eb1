"""The record of a run, and the step at which it is resumed."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import files_below

from spafit.errors import CheckpointError, PlanError, StoppedError
from spafit.machine import versions as machine_module
from spafit.machine.versions import machine, peak_memory_mib, versions
from spafit.runs import folder as run_folder
from spafit.runs import record as run_record
from spafit.runs.folder import RunFolder
from spafit.runs.record import read_record, refuse_other_run

RECORD: dict[str, Any] = {
    "task": "rte",
    "about": {"model": "tiny"},
    "settings": {"max_length": 53, "precision": "float32", "device": "cpu", "seed": 3},
}


def finish(folder: Path, *, adapter: bool = True) -> Path:
    """Write a finished run."""
    with RunFolder(folder, RECORD, overwrite=False) as run:
        run.log.write({"step": 1, "loss": 0.5})
        if adapter:
            run.adapter.write_bytes(b"weights")
    return folder


def interrupt(folder: Path, *steps: int) -> Path:
    """Write a run with a checkpoint after some steps, and one more row in the log after each."""
    with pytest.raises(KeyboardInterrupt), RunFolder(folder, RECORD, overwrite=False) as run:
        for step in steps:
            run.log.write({"step": step})
            values = {"record": run.record, "log_bytes": run.log.nbytes}
            run.checkpoints.save(step, {}, values)
            run.log.write({"step": step + 1})
        raise KeyboardInterrupt
    return folder


def left_running(folder: Path) -> Path:
    """Write what a killed process leaves: a record that says "running", and a lock file."""
    record = json.loads((finish(folder) / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    (folder / "run.lock").write_text("process 1 on elsewhere\n")
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
            assert (run.checkpoint, run.notes) == (None, [])
            run.log.write({"step": 1, "loss": 0.5})
            assert (out / "log.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'  # at once
            run.log.write({"step": 2, "loss": 0.25})
            run.record["result"] = {"metrics": {"accuracy": 0.75}}
        assert len((out / "log.jsonl").read_text().splitlines()) == 2
        record = json.loads((out / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["result"] == {"metrics": {"accuracy": 0.75}}
        assert {key: record[key] for key in RECORD} == RECORD
        assert (record["versions"], record["machine"]) == (versions(), machine())
        assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "run.json"]  # no lock

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ValueError("no"), "failed"),
            (MemoryError(), "failed"),
            (KeyboardInterrupt(), "interrupted"),
            (SystemExit(3), "interrupted"),
            (StoppedError("stopped by SIGTERM after step 7", signal.SIGTERM), "interrupted"),
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
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "run.json"]

    @pytest.mark.parametrize("make", [finish, lambda folder: interrupt(folder, 4, 9)])
    def test_another_run_is_kept(self, tmp_path: Path, make: Callable[[Path], Path]) -> None:
        make(tmp_path)
        before = files_below(tmp_path)
        mrpc = {**RECORD, "task": "mrpc"}
        other_seed = {**RECORD, "settings": {**RECORD["settings"], "seed": 4}}
        for refused, named in (
            (lambda: RunFolder(tmp_path, mrpc, overwrite=False), "task is 'rte', .* 'mrpc'"),
            (lambda: RunFolder(tmp_path, other_seed, overwrite=False), "seed is 3, .* 4"),
            (lambda: RunFolder(tmp_path, {}, overwrite=False), "task is 'rte', .* None"),
            (lambda: refuse_other_run(tmp_path, "mrpc", {"seed": 3}), "task is 'rte', .* 'mrpc'"),
            (lambda: refuse_other_run(tmp_path, "rte", {"seed": 4}), "seed is 3, .* 4"),
            (
                lambda: refuse_other_run(tmp_path, "rte", {"seed": 3, "max_length": 9}),
                "max_length is 53, .* 9",
            ),
        ):
            match = rf"holds another run: .*{named}.* \(--overwrite\)"
            with pytest.raises(CheckpointError, match=match):
                refused()
            assert files_below(tmp_path) == before

    def test_a_finished_run_without_checkpoints_is_kept(self, tmp_path: Path) -> None:
        finish(tmp_path)
        before = files_below(tmp_path)
        match = r"holds a finished run without checkpoints to resume from; .* \(--overwrite\)"
        with pytest.raises(CheckpointError, match=match):
            RunFolder(tmp_path, RECORD, overwrite=False)
        assert files_below(tmp_path) == before

    @pytest.mark.parametrize(
        "make", [finish, lambda folder: interrupt(folder, 4, 9), lambda folder: damaged(folder)]
    )
    def test_an_old_run_is_replaced_where_asked(
        self, tmp_path: Path, make: Callable[[Path], Path]
    ) -> None:
        """Its adapter and checkpoints go at once: they would be taken for the new run's."""
        make(tmp_path)
        (tmp_path / "adapter.safetensors").write_bytes(b"of the old one")
        (tmp_path / "notes.txt").write_text("mine")
        with RunFolder(tmp_path, RECORD, overwrite=True) as run:
            assert (run.checkpoint, run.notes) == (None, [])
            assert "resumed" not in run.record
            assert not (tmp_path / "adapter.safetensors").exists()
            assert not (tmp_path / "checkpoints").exists()
            assert (tmp_path / "log.jsonl").read_text() == ""
            assert status(tmp_path) == "running"
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_nothing_is_lost_if_the_new_run_is_refused(self, tmp_path: Path) -> None:
        before = files_below(interrupt(tmp_path, 4, 9))
        run = RunFolder(tmp_path, RECORD, overwrite=True)
        run.__exit__(PlanError, PlanError("no"), None)  # as fit does before it begins
        assert files_below(tmp_path) == before

    def test_a_free_place(self, tmp_path: Path) -> None:
        refuse_other_run(tmp_path, "rte", {"seed": 3})
        refuse_other_run(tmp_path / "nowhere", "rte", {"seed": 3})
        assert list(tmp_path.iterdir()) == []
        # The very run, whatever else it is; its record has no warm-up.
        refuse_other_run(finish(tmp_path), "rte", {"seed": 3, "warmup": 0.5})

    def test_a_damaged_record_beside_checkpoints(self, tmp_path: Path) -> None:
        """A checkpoint holds the record too, so that only loading tells."""
        interrupt(tmp_path, 4, 9)
        (tmp_path / "run.json").write_text("{")
        refuse_other_run(tmp_path, "mrpc", {"seed": 4})
        shutil.rmtree(tmp_path / "checkpoints")
        with pytest.raises(CheckpointError, match=r"run\.json cannot be read"):
            refuse_other_run(tmp_path, "rte", {"seed": 3})

    def test_removed_before_it_ends(self, tmp_path: Path) -> None:
        """Its record and its log are made anew."""
        out = tmp_path / "run"
        with RunFolder(out, RECORD, overwrite=False) as run:
            run.log.write({"step": 1})
            shutil.rmtree(out)
            run.log.write({"step": 2})
        assert status(out) == "finished"
        rows = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
        assert rows[:2] == [{"step": 1}, {"step": 2}]
        assert "was removed during its run" in rows[2]["note"]
        assert len(rows) == 3

    def test_a_place_that_is_no_folder(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("")
        for place in (file, file / "below"):
            with pytest.raises(CheckpointError, match=r"cannot be written: .*(exists|directory)"):
                RunFolder(place, RECORD, overwrite=True)

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
            RunFolder(tmp_path / ("x" * 500), RECORD, overwrite=False)

    def test_the_record_is_written_whole_or_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish(tmp_path)
        run = RunFolder(tmp_path, RECORD, overwrite=True)
        run.begin()
        before = (tmp_path / "run.json").read_text()
        run.record["status"] = "finished"

        def half(self: Path, text: str, **_: object) -> None:
            self.write_bytes(text[: len(text) // 2].encode())
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_text", half)
            match = r"run\.json cannot be written: No space left"
            with pytest.raises(CheckpointError, match=match):
                run.write()
            assert (tmp_path / "run.json").read_text() == before
            names = sorted(path.name for path in tmp_path.iterdir())
            assert names == ["log.jsonl", "run.json", "run.lock"]
            with pytest.raises(CheckpointError, match=match):
                run.__exit__(None, None, None)  # a run that ends well says that its record does not
            assert (tmp_path / "run.json").read_text() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "run.json"]


def damaged(folder: Path) -> Path:
    """Write a run of which nothing can be read."""
    interrupt(folder, 4, 9)
    for path in folder.rglob("*.json"):
        path.write_text("{")
    return folder


class TestTakenUpAgain:
    """Oracle: what the first process wrote, row by row."""

    def test_where_the_newest_checkpoint_stands(self, tmp_path: Path) -> None:
        interrupt(tmp_path, 4, 9)
        (tmp_path / "adapter.safetensors").write_bytes(b"the best so far")
        with RunFolder(tmp_path, RECORD, overwrite=False) as run:
            assert run.checkpoint is not None
            assert run.checkpoint.step == 9
            assert run.notes == []
            # The row after the checkpoint is cut off: it is written again.
            log = (tmp_path / "log.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in log] == [4, 5, 9]
            assert status(tmp_path) == "running"
            assert "error" not in run.record
            assert run.adapter.read_bytes() == b"the best so far"
            run.log.write({"step": 10})
        log = (tmp_path / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == [4, 5, 9, 10]
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["resumed"] == [{"step": 9, "changed": {}}]

    def test_every_time_is_recorded_with_what_changed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt(tmp_path, 4)
        before = versions()["spafit"]
        changed = {**RECORD, "settings": {**RECORD["settings"], "epochs": 7, "device": "cuda"}}
        monkeypatch.setattr(machine_module, "__version__", "99.0")
        with RunFolder(tmp_path, changed, overwrite=False) as run:
            run.checkpoints.save(6, {}, {"record": run.record, "log_bytes": run.log.nbytes})
        with RunFolder(tmp_path, changed, overwrite=False) as run:
            first, second = run.record["resumed"]
        assert first["step"] == 4
        assert first["changed"] == {
            "device": ["cpu", "cuda"],
            "epochs": [None, 7],
            "versions.spafit": [before, "99.0"],
        }
        assert second == {"step": 6, "changed": {}}

    def test_without_a_checkpoint_it_begins_anew_and_says_so(self, tmp_path: Path) -> None:
        interrupt(tmp_path)
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
        (tmp_path / "adapter.safetensors").write_bytes(b"of no checkpoint")
        with RunFolder(tmp_path, RECORD, overwrite=False) as run:
            assert run.checkpoint is None
            assert run.notes == ["the run had no checkpoint yet, and starts from the beginning"]
            assert (tmp_path / "log.jsonl").read_text() == ""
            assert not run.adapter.exists()
            assert "resumed" not in run.record

    def test_a_log_that_has_lost_rows(self, tmp_path: Path) -> None:
        interrupt(tmp_path, 4, 9)
        rows = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "log.jsonl").write_bytes(rows[0])
        with RunFolder(tmp_path, RECORD, overwrite=False) as run:
            (note,) = run.notes
            lost = len(rows[1]) + len(rows[2])
            assert note == f"{tmp_path / 'log.jsonl'} has lost {lost} bytes of earlier rows"
            run.log.write({"step": 10})
        assert (tmp_path / "log.jsonl").read_bytes() == rows[0] + b'{"step": 10}\n'

    def test_an_older_checkpoint_where_the_newest_is_damaged(self, tmp_path: Path) -> None:
        interrupt(tmp_path, 4, 9)
        (tmp_path / "checkpoints" / "step-9" / "state.json").write_text("{}")
        with RunFolder(tmp_path, RECORD, overwrite=False) as run:
            assert run.checkpoint is not None
            assert run.checkpoint.step == 4
            (note,) = run.notes
        assert re.search(r"step-9/state\.json is damaged: .*; an older checkpoint is used$", note)

    def test_a_record_that_is_damaged_is_that_of_the_checkpoint(self, tmp_path: Path) -> None:
        """``run.json`` is for readers; what a run is stands in its checkpoint too."""
        interrupt(tmp_path, 4)
        (tmp_path / "run.json").write_text("{")
        with RunFolder(tmp_path, RECORD, overwrite=False) as run:
            assert run.checkpoint is not None
        assert status(tmp_path) == "finished"

    def test_what_a_killed_process_left_is_removed(self, tmp_path: Path) -> None:
        interrupt(tmp_path, 4)
        before = files_below(tmp_path)
        names = [
            *(".run.json.0123abcd.part", ".adapter.safetensors.89ef4567.part"),
            "checkpoints/step-6.tmp-4711/state.json",
        ]
        kept = [".run.json.0123abc.part", "run.json.0123abcd.part", "checkpoints/step-6.tmp/x"]
        for name in (*names, *kept):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("half")
        with RunFolder(tmp_path, RECORD, overwrite=False):
            pass
        assert files_below(tmp_path).keys() == {*before, *kept}


class TestReadRecord:
    """Oracle: what was written, and the damage that was done to it."""

    def test_a_sound_one(self, tmp_path: Path) -> None:
        record = read_record(finish(tmp_path))
        assert {key: record[key] for key in RECORD} == RECORD

    def test_no_run(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for folder, reason in (
            (tmp_path, r"is no run folder: it has no run\.json; name the --out of spafit train"),
            (tmp_path / "nowhere", "nowhere is not there; name the folder of a run"),
            (tmp_path / "file", "file is a file; name the folder of a run"),
        ):
            with pytest.raises(CheckpointError, match=reason):
                read_record(folder)

    def test_seeds_without_a_summary(self, tmp_path: Path) -> None:
        for seed in ("seed-1", "seed-0"):
            (tmp_path / seed).mkdir()
            finish(tmp_path / seed)
        with pytest.raises(CheckpointError) as caught:
            read_record(tmp_path)
        assert "holds seed-0, seed-1, and no summary" in str(caught.value)
        assert str(caught.value).endswith(f"such as {tmp_path / 'seed-0'}")

    def test_a_run_without_an_adapter(self, tmp_path: Path) -> None:
        finish(tmp_path, adapter=False)
        match = r"has no adapter\.safetensors: its run is finished; put it back, or train again"
        with pytest.raises(CheckpointError, match=match):
            read_record(tmp_path)

    def test_a_run_whose_process_died(self, tmp_path: Path) -> None:
        """Its status is still "running", its lock is free: both are told, and it is recorded."""
        folder = left_running(tmp_path)
        found = read_record(folder)
        assert found["status"] == "interrupted"
        assert found["error"].startswith("its process ended without a word")
        assert json.loads((folder / "run.json").read_text()) == found
        assert read_record(folder) == found
        (folder / "adapter.safetensors").unlink()
        with pytest.raises(CheckpointError, match="its run is interrupted, its process ended"):
            read_record(folder)

    def test_one_whose_lock_is_gone_too(self, tmp_path: Path) -> None:
        (left_running(tmp_path) / "run.lock").unlink()
        assert read_record(tmp_path)["status"] == "interrupted"

    def test_one_that_runs_is_left_alone(self, tmp_path: Path) -> None:
        with RunFolder(tmp_path, RECORD, overwrite=False) as run:
            run.adapter.write_bytes(b"weights")
            assert read_record(tmp_path)["status"] == "running"
            assert status(tmp_path) == "running"
            run.log.sync()
        assert status(tmp_path) == "finished"

    def test_one_that_ends_meanwhile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        left_running(tmp_path)
        ended = {**json.loads((tmp_path / "run.json").read_text()), "status": "finished"}

        def lock(file: int, wait: bool) -> bool:
            (tmp_path / "run.json").write_text(json.dumps(ended))
            return True

        monkeypatch.setattr(run_record, "lock", lock)
        assert read_record(tmp_path) == ended
        assert status(tmp_path) == "finished"

    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES])
    def test_where_nothing_is_known_it_is_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """A file system without locks, or a lock of another user's."""

        def fails(file: int, blocking: bool) -> bool:
            raise OSError(number, os.strerror(number))

        left_running(tmp_path)
        monkeypatch.setattr("filelock.lock_descriptor", fails)
        assert read_record(tmp_path)["status"] == status(tmp_path) == "running"

    def test_in_a_folder_that_is_only_read_it_is_told_all_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left_running(tmp_path)

        @contextmanager
        def refuse(path: Path) -> Iterator[Path]:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            yield path

        monkeypatch.setattr(run_record, "replacing", refuse)
        assert read_record(tmp_path)["status"] == "interrupted"
        assert status(tmp_path) == "running"

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


def test_names() -> None:
    """The names are part of what users rely on."""
    names = (run_record.RUN, run_folder.LOG, run_record.ADAPTER)
    assert names == ("run.json", "log.jsonl", "adapter.safetensors")
    assert (run_record.CHECKPOINTS, run_folder.LOCK) == ("checkpoints", "run.lock")
