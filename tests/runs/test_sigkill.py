"""A training process that is killed at any time loses at most one interval between checkpoints."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.interruptions import differences, everything
from support.tortured_runs import (
    INTERVAL,
    Trainer,
    Uninterrupted,
    Zygote,
    arguments,
    checkpoints,
    leftovers,
    logged_steps,
    newest_sound,
    record_of,
    step_of,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")

Sized = Callable[[int, int], int]
Promise = Callable[[str, int, str], None]


class Victim:
    """A run folder that is looked at from outside, after each death of its process."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.newest = 0
        self.swept = 0
        self._leftovers: set[str] = set()
        self._begun: tuple[int, int] | None = None

    def check(self, pid: int) -> None:
        """Require the folder of a dead process to be as promised."""
        out = self.out
        newest = newest_sound(out)
        assert newest >= max(logged_steps(out), default=0) - INTERVAL
        # What was once saved is never lost again.
        assert newest >= self.newest
        self.newest = newest
        found = leftovers(out)
        begun = self._run_json()
        if begun != self._begun:  # it is written once the start has swept
            assert not found & self._leftovers, "leftovers of an earlier process"
            assert all(name.endswith((f"tmp-{pid}", f"tmp-{pid}-old", ".part")) for name in found)
            self.swept += len(self._leftovers)
        self._leftovers, self._begun = found, begun

    def check_finished(self, uninterrupted: Uninterrupted) -> None:
        out = self.out
        assert record_of(out)["status"] == "finished"
        assert sorted(path.name for path in out.iterdir()) == [
            "adapter.safetensors",
            "checkpoints",
            "dev.tsv",
            "log.jsonl",
            "run.json",
        ]
        assert not leftovers(out)
        assert differences(everything(out), uninterrupted.everything) == []

    def _run_json(self) -> tuple[int, int] | None:
        try:
            found = (self.out / "run.json").stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns


def temporaries(out: Path) -> set[str]:
    try:
        found = {path.name for path in (out / "checkpoints").iterdir()}
        return {name for name in found if ".tmp-" in name}
    except FileNotFoundError:
        return set()


class TestRandomKills:
    """Oracle: the manifests, read by json and hashlib, the log, and an uninterrupted run."""

    def test_forked_trainers(
        self,
        zygote: Zygote,
        root: Path,
        tmp_path: Path,
        uninterrupted: Uninterrupted,
        sized: Sized,
        promise: Promise,
    ) -> None:
        seed, trials = 20, sized(20, 500)
        draw = random.Random(seed)
        killed = runs = in_saves = swept = 0
        victim = Victim(tmp_path / "run-0")
        trial = 0
        while killed < trials:
            trial += 1
            where = f"seed {seed}, trial {trial}, folder {victim.out.name}"
            before = temporaries(victim.out)
            trainer = zygote.train(arguments(root, victim.out))
            if draw.random() < 0.5:
                time.sleep(draw.uniform(0, 0.8 * uninterrupted.seconds))
            else:
                # After some saves of this life, within one, to the last of its operations.
                for _ in range(draw.randint(1, 3)):
                    there = victim.out
                    trainer.until(lambda: bool(temporaries(there) - before))  # noqa: B023
                    before |= temporaries(there)
                time.sleep(draw.choice([0, draw.uniform(0, 0.002), draw.uniform(0, 0.02)]))
            if not trainer.ended():
                trainer.kill()
            code = trainer.wait()
            assert code in (0, -signal.SIGKILL), f"{where}: {trainer.said()}"
            try:
                victim.check(trainer.pid)
                killed += code != 0
                in_saves += code != 0 and bool(leftovers(victim.out))
                if code == 0:
                    victim.check_finished(uninterrupted)
            except AssertionError as error:
                raise AssertionError(f"{where}, exit code {code}: {error}") from error
            if code == 0:
                runs, swept = runs + 1, swept + victim.swept
                shutil.rmtree(victim.out)
                victim = Victim(tmp_path / f"run-{runs}")
        # The last one is trained to its end too.
        trainer = zygote.train(arguments(root, victim.out))
        assert trainer.wait() == 0, trainer.said()
        victim.check(trainer.pid)
        victim.check_finished(uninterrupted)
        assert in_saves >= trials / 20
        promise(
            "SIGKILL at random moments",
            killed,
            f"0 unreadable, 0 lost more than an interval, 0 leftovers ({runs + 1} runs to their "
            f"end, bit for bit; {in_saves} kills within a save)",
        )

    def test_the_console_command(
        self,
        zygote: Zygote,
        root: Path,
        tmp_path: Path,
        uninterrupted: Uninterrupted,
        sized: Sized,
        promise: Promise,
    ) -> None:
        """Started anew each time, and killed once it has begun to train."""
        seed, trials = 21, sized(1, 25)
        draw = random.Random(seed)
        victim = Victim(tmp_path / "run-0")
        killed = runs = 0
        while killed < trials:
            out = victim.out
            steps = logged_steps(out)[-1:]
            command = [sys.executable, "-m", "spafit", *arguments(root, out)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while process.poll() is None and logged_steps(out)[-1:] == steps:
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.25 * uninterrupted.seconds))
            process.kill()
            _, said = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), said
            victim.check(process.pid)
            killed += process.returncode != 0
            if process.returncode == 0:
                victim.check_finished(uninterrupted)
                runs += 1
                victim = Victim(tmp_path / f"run-{runs}")
        trainer = zygote.train(arguments(root, victim.out))
        assert trainer.wait() == 0, trainer.said()
        victim.check_finished(uninterrupted)
        promise("SIGKILL of the console command", killed, f"0 lost ({runs + 1} runs to their end)")


class TestKillsBetweenAnyTwoOperations:
    """Oracle: as above; the process kills itself before the n-th operation of a save, for all n.

    The quick set has those n at which what a reader finds changes: on both sides of each operation
    that gives or takes a name, and within the first file.
    """

    # Which saves: the first; one that prunes, with a new best; the last; and one of the same step.
    @pytest.mark.parametrize("kind", ["first", "pruning", "last", "same step"])
    def test_every_operation(
        self,
        zygote: Zygote,
        root: Path,
        tmp_path: Path,
        uninterrupted: Uninterrupted,
        sized: Sized,
        promise: Promise,
        kind: str,
    ) -> None:
        start = tmp_path / "start"
        steps = {"first": None, "pruning": 10, "last": 29, "same step": 14}[kind]
        if steps is not None:
            stop_after(zygote, root, start, steps)
        found = {step_of(path) for path in checkpoints(start)}
        if kind == "same step":  # what is missing is its evaluation
            assert max(found) == 14
        if kind == "last":  # as a kill leaves it between a checkpoint and the best adapter
            adapter = start / "adapter.safetensors"
            saved = [(path / adapter.name).read_bytes() for path in checkpoints(start)]
            adapter.write_bytes(next(each for each in saved if each != adapter.read_bytes()))
        has_best = (start / "adapter.safetensors").is_file()
        whole, _ = killed_before(zygote, root, start, tmp_path / "whole", 0)
        chosen = list(range(1, len(whole) + 1)) if sized(0, 1) else turning_points(whole)
        for number in chosen:
            out = tmp_path / f"killed-{number}"
            names, trainer = killed_before(zygote, root, start, out, number)
            where = f"{kind}, before operation {number}, {names[-1]}"
            assert trainer.code == -signal.SIGKILL, f"{where}: {trainer.said()}"
            assert names == whole[:number]
            victim = Victim(out)
            victim.newest = max(found, default=0)
            victim_check(victim, trainer.pid, where)
            assert not has_best or (out / "adapter.safetensors").is_file(), where
            trainer = zygote.train(arguments(root, out))
            assert trainer.wait() == 0, f"{where}: {trainer.said()}"
            victim_check(victim, trainer.pid, where)
            victim.check_finished(uninterrupted)
            shutil.rmtree(out)
        assert {"open", "write", "fsync", "mkdir", "rename"} <= set(whole)
        promise("SIGKILL before each operation of a save", len(chosen), "0 lost")


def killed_before(
    zygote: Zygote, root: Path, start: Path, out: Path, number: int
) -> tuple[list[str], Trainer]:
    """Go on from a copy of ``start``, and die before that operation of the first save; 0 is never.

    Returns the names of the operations until then, with that one.
    """
    if start.exists():
        shutil.copytree(start, out)
    report = out.with_suffix(".names")
    tampering = {"save": 1, "operation": number, "names": str(report)}
    trainer = zygote.train(arguments(root, out), kill_at=tampering)
    trainer.wait()
    return report.read_text().splitlines(), trainer


def turning_points(names: list[str]) -> list[int]:
    """Return the numbers of the operations, from 1, before and after which other names are there.

    The first write, half of a file, is one too.
    """
    numbers = {names.index("write") + 2}
    for number, name in enumerate(names, 1):
        if name in ("rename", "replace", "rmdir"):
            numbers |= {number, number + 1}
    return sorted(numbers & set(range(1, len(names) + 1)))


def victim_check(victim: Victim, pid: int, where: str) -> None:
    try:
        victim.check(pid)
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error


def stop_after(zygote: Zygote, root: Path, out: Path, step: int) -> None:
    """Leave a run stopped after so many steps; one that is due is evaluated when it goes on."""
    trainer = zygote.train(arguments(root, out), stop_after=step)
    assert trainer.wait() == 128 + signal.SIGTERM, trainer.said()
    assert logged_steps(out)[-1] == step


class TestSeedsTogether:
    """Oracle: each seed by itself, uninterrupted."""

    def test_killed_in_each_of_them(self, zygote: Zygote, root: Path, tmp_path: Path) -> None:
        """In step 14 of the first; then in the second, 10 steps after the first has ended."""
        frozen = ("--no-dropout-in-group-1", "--eval-every", "15", "--quiet")
        out, mark = tmp_path / "runs", tmp_path / "mark"
        both = arguments(root, out, *frozen, "--seeds", "3", "5", "--together")
        for number, step in ((signal.SIGKILL, 14), (signal.SIGTERM, 18 + 10)):
            trainer = zygote.train(both, held_steps={"mark": str(mark), "from": step})
            assert trainer.until(mark.exists), trainer.said()
            trainer.kill(number)
            mark.unlink()
            assert trainer.wait() == (-9 if number == signal.SIGKILL else 128 + number)
        assert record_of(out / "seed-3")["status"] == "finished"
        assert record_of(out / "seed-5")["status"] == "interrupted"
        assert newest_sound(out / "seed-5") == 10
        trainer = zygote.train(both)
        assert trainer.wait() == 0, trainer.said()
        for seed in ("3", "5"):
            alone = tmp_path / seed
            memory = (*frozen, "--seeds", seed, "--cache-prefix", "memory")
            trainer = zygote.train(arguments(root, alone, *memory))
            assert trainer.wait() == 0, trainer.said()
            found = everything(out / f"seed-{seed}")
            assert differences(found, everything(alone)) == []
