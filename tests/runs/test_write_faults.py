"""Disks that are full, broken or read-only: earlier saves are unchanged, and training continues.

Here each operation of a save in turn is made to fail; test_write_faults_real.py has faults that
the system itself produces.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.file_faults import ERRORS, Arguments, Failing, FileOperations, raised, save_failing
from support.interruptions import differences, everything, stopped_after
from support.small_runs import SmallRun, read_log
from support.tortured_runs import (
    checkpoints,
    faults_of,
    leftovers,
    newest_sound,
    record_of,
    step_of,
)

from spafit.errors import CheckpointError, TrainingError
from spafit.runs.checkpoint import Checkpoints, TensorFile
from spafit.training.saving import Saver

Sized = Callable[[int, int], int]
Promise = Callable[[str, int, str], None]

RUN = {"epochs": 4, "save_every": 4, "eval_every": 7}
"""20 steps; saved after 4, 7, 8, 12, 14, 16 and 20."""


def some_files(step: int) -> dict[str, TensorFile]:
    draw = torch.Generator().manual_seed(step)
    return {
        "adapter.safetensors": ({"a": torch.randn(5, 3, generator=draw)}, {"is": "one"}),
        "state.safetensors": (
            {"b": torch.randn(7, generator=draw), "c": torch.arange(step)},
            {},
        ),
    }


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with checkpoints of steps 3, the best, 5 and 8."""
    out = tmp_path_factory.mktemp("before") / "run"
    out.mkdir()
    for step in (3, 5, 8):
        Checkpoints(out / "checkpoints").save(step, some_files(step), {"n": step}, best_step=3)
    assert [step_of(path) for path in checkpoints(out)] == [3, 5, 8]
    return out


class TestEachOperationOfASave:
    """Oracle: manifests read by json and hashlib, and the names that are there."""

    # The next step, where 3 and 5 are then removed; and a step that is there already.
    @pytest.mark.parametrize("step", [13, 8])
    @pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
    @pytest.mark.parametrize("kind", ERRORS)
    def test_what_was_there_stays(
        self,
        before: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        lasting: bool,
        step: int,
        promise: Promise,
    ) -> None:
        monkeypatch.setattr(os, "fsync", lambda _: None)  # of thousands of files
        files, n, refused = some_files(13), 0, 0
        while True:
            n += 1
            out = tmp_path / f"run-{n}"
            shutil.copytree(before, out)
            failing = Failing(kind, n, lasting=lasting)
            error = None
            with FileOperations(failing) as operations:
                try:
                    Checkpoints(out / "checkpoints").save(step, files, {"n": 13}, best_step=13)
                except CheckpointError as caught:
                    error = caught
            if not failing.failed and n > len(operations.names):
                break
            where = f"{kind}, operation {n}, {failing.failed}: {error}"
            there = [step_of(path) for path in checkpoints(out)]
            assert not [fault for path in checkpoints(out) for fault in faults_of(path)], where
            if error is not None:
                refused += 1
                assert str(out) in str(error), where
                assert "\n" not in str(error)
                assert len(str(error)) < 400 + len(str(out))
                if "cannot be written" in str(error):
                    assert " bytes are needed, " in str(error), where
                    assert " bytes are free there" in str(error), where
                    assert os.strerror(ERRORS[kind]) in str(error), where
                aside = any(name.endswith("-old") for name in leftovers(out))
                assert {3, 5} <= set(there), where
                assert 8 in there or (aside and lasting), where
            else:
                assert step in there, where
            # Only what itself could not be removed is still there.
            removal_failed = {"unlink", "rmdir", "scandir", "rename"} & set(failing.failed)
            removal_failed |= {"open", "close"} & set(failing.failed) if n > 20 else set()
            if not lasting or failing.error in (errno.ENOSPC, errno.EDQUOT):
                assert not leftovers(out) or removal_failed, where
            # The fault is over.
            Checkpoints(out / "checkpoints").sweep()
            assert not leftovers(out), where
            newest = newest_sound(out)
            assert newest == step or (error is not None and newest == 8), where
            saved = Checkpoints(out / "checkpoints").save(21, some_files(21), {"n": 21})
            assert faults_of(saved) == []
            assert not leftovers(out)
            found = [step_of(path) for path in checkpoints(out)]
            assert found == [newest, 21], where
            shutil.rmtree(out)
        assert refused > 5
        promise("write faults at each operation of a save", n - 1, "0 checkpoints lost or torn")

    def test_writes_that_take_half(self, before: Path, tmp_path: Path) -> None:
        shutil.copytree(before, tmp_path / "run")

        def half(_: int, name: str, arguments: Arguments) -> int | None:
            return len(arguments[1]) // 2 + 1 if name == "write" else None

        with FileOperations(half) as operations:
            Checkpoints(tmp_path / "run" / "checkpoints").save(13, some_files(13), {"n": 13})
        assert operations.names.count("write") > 20
        assert newest_sound(tmp_path / "run") == 13

    def test_the_bytes_that_are_needed(self, tmp_path: Path) -> None:
        """Oracle: the size of a checkpoint that could be written; headers are not counted."""
        files: dict[str, TensorFile] = {"state.safetensors": ({"b": torch.zeros(997, 7)}, {})}
        saved = Checkpoints(tmp_path / "one").save(13, files, {"n": 13})
        size = sum(path.stat().st_size for path in saved.iterdir())

        def full(_: int, name: str, __: Arguments) -> None:
            if name == "write":
                raise raised(errno.ENOSPC)

        with (
            FileOperations(full),
            pytest.raises(CheckpointError, match="No space left") as caught,
        ):
            Checkpoints(tmp_path / "two").save(13, files, {"n": 13})
        needed = int(str(caught.value).partition("device; ")[2].partition(" ")[0].replace(",", ""))
        assert 0.97 * size < needed <= size


@pytest.fixture(scope="module")
def clean(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Give all that a run leaves that nothing happened to, and the operations of its third save."""
    out = tmp_path_factory.mktemp("clean") / "run"
    with save_failing(3, lambda *_: None, lasting=False) as operations:
        small.fit(out=out, **RUN)
    return {"everything": everything(out), "operations": operations.names}


def moments(clean: dict[str, Any], trials: int, seed: int) -> list[tuple[int, str]]:
    """Draw operations and errors; the first of each run of writes more often than the others."""
    draw = random.Random(seed)
    names = clean["operations"]
    changes = [n for n, name in enumerate(names, 1) if name not in ("stat", names[n - 2])]
    return [(draw.choice(changes), list(ERRORS)[n % len(ERRORS)]) for n in range(trials)]


class TestTraining:
    """Oracle: a run that nothing happened to, bit for bit."""

    def test_a_save_that_fails_costs_nothing_but_itself(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any], sized: Sized, promise: Promise
    ) -> None:
        trials = sized(3, 150)
        for trial, (n, kind) in enumerate(moments(clean, trials, seed=23)):
            out = tmp_path / f"run-{trial}"
            failing = Failing(kind, n, lasting=False)
            with save_failing(3, failing, lasting=False):
                small.fit(out=out, **RUN)
            where = f"operation {n} of the third save, {kind}, {failing.failed}"
            assert failing.failed, where
            assert differences(everything(out), clean["everything"]) == [], where
            assert record_of(out)["status"] == "finished"
            assert newest_sound(out) == 20
            assert not leftovers(out), where
            for row in read_log(out, "note"):
                assert "training goes on, and saving is tried again at the" in row["note"]
                # Where reading or syncing fails, there is nothing that needs room.
                needless = ("cannot be read", "log.jsonl cannot be written")
                is_needless = any(each in row["note"] for each in needless)
                assert is_needless or " bytes are needed, " in row["note"], row
            shutil.rmtree(out)
        promise("training on through a save that failed", trials, "0 differences")

    def test_two_failures_in_a_row_stop_the_run(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any], sized: Sized, promise: Promise
    ) -> None:
        """And once there is room again, the same command goes on from what is saved."""
        trials = sized(3, 150)
        for trial, (n, kind) in enumerate(moments(clean, trials, seed=24)):
            out = tmp_path / f"run-{trial}"
            failing = Failing(kind, n, lasting=True)
            with save_failing(3, failing, lasting=True), pytest.raises(TrainingError) as caught:
                small.fit(out=out, **RUN)
            message = str(caught.value)
            where = f"from operation {n} of the third save on, {kind}: {message}"
            assert "It failed twice in a row, so the run stops; saved is " in message, where
            assert "\n" not in message
            newest = newest_sound(out)
            assert newest in (7, 8), where
            if kind != "EIO":
                assert f"saved is the checkpoint of step {newest}, from which the" in message, where
            small.fit(out=out, **RUN)
            assert not leftovers(out), where
            assert differences(everything(out), clean["everything"]) == [], where
            shutil.rmtree(out)
        promise("two failed saves in a row", trials, "stopped, resumed with 0 differences")

    def test_the_next_attempt_is_at_the_next_interval(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any]
    ) -> None:
        steps: list[int] = []
        save = Saver._save

        def saving(self: Saver, state: Any) -> None:
            steps.append(state.step)
            if state.step in (7, 12, 16):
                raise CheckpointError("no")
            save(self, state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Saver, "_save", saving)
            small.fit(out=tmp_path / "run", **RUN)
        assert steps == [4, 7, 8, 12, 14, 16, 20]
        assert differences(everything(tmp_path / "run"), clean["everything"]) == []

    def test_the_last_save_is_tried_twice_at_once(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any]
    ) -> None:
        with save_failing(7, Failing("ENOSPC", 9, lasting=False), lasting=False):
            small.fit(out=tmp_path / "run", **RUN)
        assert differences(everything(tmp_path / "run"), clean["everything"]) == []

    def test_what_the_message_says_is_saved(self, small: SmallRun, tmp_path: Path) -> None:
        """Of a run whose checkpoints' folder alone is read-only: the best adapter is saved."""
        out = tmp_path / "run"

        def read_only(_: int, name: str, arguments: Arguments) -> None:
            if name == "mkdir" and "checkpoints" in str(arguments[0]):
                raise raised(errno.EROFS)

        with FileOperations(read_only), pytest.raises(TrainingError) as caught:
            small.fit(out=out, **RUN)
        assert str(caught.value).endswith(f"saved is the best adapter, {out}/adapter.safetensors")
        assert (out / "adapter.safetensors").is_file()
        assert record_of(out)["status"] == "failed"
        with (
            FileOperations(Failing("EROFS", 1, lasting=True)),
            pytest.raises(CheckpointError, match="cannot be written: Read-only file system"),
        ):
            small.fit(out=tmp_path / "other", **RUN)

    def test_stopped_on_a_full_disk(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any]
    ) -> None:
        """A stop while saving fails: what is there stays there, and is gone on from."""
        out = tmp_path / "run"
        with (
            stopped_after(9),
            save_failing(4, Failing("ENOSPC", 5, lasting=True), lasting=True),
            pytest.raises(TrainingError, match="saved is the checkpoint of step 8, from which"),
        ):
            small.fit(out=out, **RUN)
        assert newest_sound(out) == 8
        assert not leftovers(out)
        small.fit(out=out, **RUN)
        assert differences(everything(out), clean["everything"]) == []
