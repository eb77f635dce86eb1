"""Several processes start a run in one folder: one gets the lock, the others report its holder."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.interruptions import differences, everything
from support.tortured_runs import (
    Trainer,
    Uninterrupted,
    Zygote,
    arguments,
    leftovers,
    logged_steps,
    record_of,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's means are used")

Sized = Callable[[int, int], int]
Promise = Callable[[str, int, str], None]

AT_ONCE = 8


def check_refused(trainer: Trainer, out: Path, holder: int) -> None:
    """Require that a trainer was turned away, and said by whom."""
    assert trainer.wait() == 2, trainer.said()
    said = trainer.said().strip().splitlines()[-1]
    assert said.startswith(f"spafit: {out} is in use by process {holder} on "), said
    assert said.endswith("; wait for it, stop it, or give another folder"), said


class TestRaces:
    """Oracle: exit codes, messages, and an uninterrupted run."""

    def test_eight_at_once(
        self,
        zygote: Zygote,
        root: Path,
        tmp_path: Path,
        uninterrupted: Uninterrupted,
        sized: Sized,
        promise: Promise,
    ) -> None:
        """In a new folder, then in one whose holder was killed, and so on to the run's end."""
        trials = sized(3, 50)
        gate, held = tmp_path / "gate", tmp_path / "held"
        os.mkfifo(gate)
        out, begun = tmp_path / "run-0", 0
        for trial in range(trials):
            held.unlink(missing_ok=True)
            trainers = [
                zygote.train(
                    arguments(root, out),
                    gate=str(gate),
                    held_steps={"mark": str(held), "from": 7},
                )
                for _ in range(AT_ONCE)
            ]
            wait_until_all_wait(trainers)
            with gate.open("wb"):
                pass  # all of them read its end now
            for trainer in trainers:
                trainer.until(held.exists)
            where = f"trial {trial}"
            won = [trainer for trainer in trainers if not trainer.ended()]
            end = time.monotonic() + 10
            while len(won) > 1 and time.monotonic() < end:  # those that are about to end
                time.sleep(0.01)
                won = [trainer for trainer in trainers if not trainer.ended()]
            if len(won) != 1:
                held.unlink(missing_ok=True)
                raise AssertionError(f"{where}: {[trainer.said() for trainer in trainers]}")
            for trainer in trainers:
                if trainer is not won[0]:
                    check_refused(trainer, out, won[0].pid)
            won[0].kill()
            assert won[0].wait() == -signal.SIGKILL
            if logged_steps(out)[-1] >= 20:
                last = zygote.train(arguments(root, out))
                assert last.wait() == 0, last.said()
                assert differences(everything(out), uninterrupted.everything) == [], where
                begun += 1
                out = tmp_path / f"run-{begun}"
        promise("8 processes on one folder at once", trials, "one has it, 7 say which")


def wait_until_all_wait(trainers: list[Trainer]) -> None:
    """Wait until all are in front of the gate; where that cannot be seen, for a while."""
    end = time.monotonic() + 60
    for trainer in trainers:
        marks = trainer.output.with_suffix(".waits")
        while not marks.exists():
            assert not trainer.ended(), trainer.said()
            assert time.monotonic() < end
            time.sleep(0.002)


class TestLockFiles:
    """Oracle: exit codes, messages and the files."""

    def test_a_holder_and_its_death(
        self, zygote: Zygote, root: Path, tmp_path: Path, uninterrupted: Uninterrupted
    ) -> None:
        out, held = tmp_path / "run", tmp_path / "held"
        holder = zygote.train(arguments(root, out), held_steps={"mark": str(held), "from": 10})
        assert holder.until(held.exists), holder.said()
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        for more in ((), ("--overwrite",)):
            check_refused(zygote.train(arguments(root, out, *more)), out, holder.pid)
        # It has touched nothing.
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
        holder.kill()
        holder.wait()
        assert f"process {holder.pid} " in (out / "run.lock").read_text()
        following = zygote.train(arguments(root, out))
        assert following.wait() == 0, following.said()
        assert "resumed after step 8" in following.said()
        assert not (out / "run.lock").exists()
        assert differences(everything(out), uninterrupted.everything) == []

    @pytest.mark.parametrize("content", ["of a process that lives", "", "\x00\x01\n" * 99])
    def test_a_file_alone_is_no_lock(
        self, zygote: Zygote, root: Path, tmp_path: Path, content: str
    ) -> None:
        """The number of a dead holder may be another process's by now: this one's."""
        out = tmp_path / "run"
        out.mkdir()
        alive = f"process {os.getpid()} on {socket.gethostname()}, since 2026-01-01\n"
        (out / "run.lock").write_text(alive if "lives" in content else content)
        trainer = zygote.train(arguments(root, out))
        assert trainer.wait() == 0, trainer.said()
        assert sorted(path.name for path in out.iterdir()) == [
            "adapter.safetensors",
            "checkpoints",
            "dev.tsv",
            "log.jsonl",
            "run.json",
        ]
        assert not leftovers(out)
        assert record_of(out)["status"] == "finished"

    def test_a_lock_file_that_is_removed_lets_no_two_write(
        self, zygote: Zygote, root: Path, tmp_path: Path
    ) -> None:
        """By somebody who takes it for a leftover: who was there first sees it, and stops."""
        out, held, holds = tmp_path / "run", tmp_path / "held", tmp_path / "holds"
        first = zygote.train(arguments(root, out), held_steps={"mark": str(held), "from": 10})
        assert first.until(held.exists), first.said()
        (out / "run.lock").unlink()
        second = zygote.train(arguments(root, out), held_steps={"mark": str(holds), "from": 3})
        assert second.until(holds.exists), second.said()
        held.unlink()
        assert first.wait() == 1, first.said()
        said = first.said().strip().splitlines()[-1]
        assert re.search(rf"in use by process {second.pid} on .* so the run stops; ", said), said
        holds.unlink()
        assert second.wait() == 0, second.said()
        assert record_of(out)["status"] == "finished"
