"""SIGTERM, SIGINT and SIGUSR1 stop a run after the current step, saved; a second one at once."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.interruptions import differences, everything
from support.sweeps import quick
from support.tortured_runs import (
    INTERVAL,
    Trainer,
    Uninterrupted,
    Zygote,
    arguments,
    leftovers,
    logged_steps,
    newest_sound,
    record_of,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")

Sized = Callable[[int, int], int]
Promise = Callable[[str, int, str], None]

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def check_stopped(trainer: Trainer, out: Path, number: signal.Signals) -> None:
    """Require that a run was stopped by a signal as it should be: all its steps are saved."""
    assert trainer.wait() == 128 + number, trainer.said()
    said = trainer.said().strip().splitlines()[-1]
    assert said.startswith(f"spafit: stopped by {number.name} after step "), said
    assert str(out) in said
    record = record_of(out)
    assert record["status"] == "interrupted"
    assert record["error"].startswith("StoppedError: stopped by ")
    assert newest_sound(out) == max(logged_steps(out), default=0)
    assert not leftovers(out)
    assert not (out / "run.lock").exists()


def finish(zygote: Zygote, root: Path, out: Path, uninterrupted: Uninterrupted) -> None:
    """Go on to the end, and require what an uninterrupted run leaves."""
    trainer = zygote.train(arguments(root, out))
    assert trainer.wait() == 0, trainer.said()
    assert record_of(out)["status"] == "finished"
    assert differences(everything(out), uninterrupted.everything) == []


def begun(out: Path, trainer: Trainer) -> Callable[[], bool]:
    """Return whether a trainer has the folder: from then on signals are heeded."""

    def has_begun() -> bool:
        try:
            return f"process {trainer.pid} " in (out / "run.lock").read_text()
        except FileNotFoundError:
            return False

    return has_begun


class TestRandomMoments:
    """Oracle: the exit code, the log, the manifests, and an uninterrupted run."""

    def test_a_run_that_is_stopped_again_and_again(
        self,
        zygote: Zygote,
        root: Path,
        tmp_path: Path,
        uninterrupted: Uninterrupted,
        sized: Sized,
        promise: Promise,
    ) -> None:
        seed, trials = 22, sized(3, 50)
        draw = random.Random(seed)
        stopped = runs = 0
        out = tmp_path / "run-0"
        while stopped < trials:
            where = f"seed {seed}, stop {stopped + 1}, folder {out.name}"
            trainer = zygote.train(arguments(root, out))
            assert trainer.until(begun(out, trainer)), f"{where}: {trainer.said()}"
            time.sleep(draw.uniform(0, 0.7 * uninterrupted.seconds))
            if not trainer.ended():
                trainer.kill(signal.SIGTERM)
            code = trainer.wait()
            if record_of(out)["status"] == "finished":
                assert code in (0, -signal.SIGTERM), f"{where}: {trainer.said()}"
                assert differences(everything(out), uninterrupted.everything) == [], where
                runs += 1
                out = tmp_path / f"run-{runs}"
                continue
            try:
                check_stopped(trainer, out, signal.SIGTERM)
            except AssertionError as error:
                raise AssertionError(f"{where}: {error}") from error
            stopped += 1
        finish(zygote, root, out, uninterrupted)
        promise(
            "SIGTERM at random moments",
            stopped,
            f"exit code 143 each time, 0 steps lost, {runs + 1} runs to their end bit for bit",
        )


class TestMoments:
    """Oracle: as above. The trainer is made slow where the signal is to come."""

    @pytest.mark.parametrize(
        ("moment", "number"),
        quick(
            itertools.product(["slow_start", "slow_steps", "slow_evaluations"], SIGNALS),
            [
                ("slow_start", signal.SIGTERM),
                *itertools.product(["slow_steps"], SIGNALS),
                ("slow_evaluations", signal.SIGUSR1),
            ],
        ),
    )
    def test_anywhere(
        self,
        zygote: Zygote,
        root: Path,
        tmp_path: Path,
        uninterrupted: Uninterrupted,
        moment: str,
        number: signal.Signals,
        promise: Promise,
    ) -> None:
        out, mark = tmp_path / "run", tmp_path / "mark"
        slow = {"mark": str(mark), "seconds": 20}
        trainer = zygote.train(arguments(root, out), **{moment: slow})
        assert trainer.until(mark.exists), trainer.said()
        trainer.kill(number)
        check_stopped(trainer, out, number)
        # The step in hand is ended, an evaluation is not: it is done when the run goes on.
        expected = {"slow_start": 0, "slow_steps": 1, "slow_evaluations": 7}[moment]
        assert newest_sound(out) == expected
        finish(zygote, root, out, uninterrupted)
        promise("signals before, in and after steps, in saves", 1, "exit code 128 + n, resumed")

    @pytest.mark.parametrize("number", quick(SIGNALS, [signal.SIGINT]))
    def test_during_a_save(
        self,
        zygote: Zygote,
        root: Path,
        tmp_path: Path,
        uninterrupted: Uninterrupted,
        number: signal.Signals,
        promise: Promise,
    ) -> None:
        out, mark = tmp_path / "run", tmp_path / "mark"
        trainer = zygote.train(arguments(root, out), slow_saves={"mark": str(mark), "seconds": 20})
        assert trainer.until(mark.exists), trainer.said()
        trainer.kill(number)
        check_stopped(trainer, out, number)
        # The save is done, and at most the step that follows.
        assert newest_sound(out) in (INTERVAL, INTERVAL + 1)
        finish(zygote, root, out, uninterrupted)
        promise("signals before, in and after steps, in saves", 1, "exit code 128 + n, resumed")

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            pytest.param(signal.SIGTERM, signal.SIGTERM, marks=pytest.mark.full),
            pytest.param(signal.SIGINT, signal.SIGINT, marks=pytest.mark.full),
            (signal.SIGUSR1, signal.SIGTERM),
            (signal.SIGTERM, signal.SIGINT),
        ],
    )
    def test_a_second_one_leaves_at_once(
        self,
        zygote: Zygote,
        root: Path,
        tmp_path: Path,
        uninterrupted: Uninterrupted,
        first: signal.Signals,
        second: signal.Signals,
        promise: Promise,
    ) -> None:
        """In the middle of a save that takes minutes; what was saved before is sound."""
        out, mark = tmp_path / "run", tmp_path / "mark"
        slow = {"mark": str(mark), "seconds": 120, "from": 5, "deaf": True}
        trainer = zygote.train(arguments(root, out), slow_saves=slow)
        assert trainer.until(mark.exists), trainer.said()
        trainer.kill(first)
        time.sleep(0.2)
        assert not trainer.ended()
        start = time.monotonic()
        trainer.kill(second)
        assert trainer.wait() == -second, trainer.said()
        assert time.monotonic() - start < 5
        assert newest_sound(out) == INTERVAL
        finish(zygote, root, out, uninterrupted)
        assert not leftovers(out)
        promise("a second signal in a slow save", 1, "leaves at once, resumed")


class TestOtherRuns:
    """Oracle: the exit code, and what is there."""

    def test_several_seeds(self, zygote: Zygote, root: Path, tmp_path: Path) -> None:
        """A stop stops all."""
        out, mark = tmp_path / "runs", tmp_path / "mark"
        slow = {"mark": str(mark), "seconds": 20}
        trainer = zygote.train(arguments(root, out, "--seeds", "0", "1"), slow_steps=slow)
        assert trainer.until(mark.exists), trainer.said()
        trainer.kill(signal.SIGTERM)
        check_stopped(trainer, out / "seed-0", signal.SIGTERM)
        assert [path.name for path in out.iterdir()] == ["seed-0"]
        trainer = zygote.train(arguments(root, out, "--seeds", "0", "1"))
        assert trainer.wait() == 0, trainer.said()
        assert [record_of(out / f"seed-{seed}")["status"] for seed in (0, 1)] == ["finished"] * 2

    @pytest.mark.parametrize(
        ("number", "expected"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
    )
    def test_one_that_comes_when_all_steps_are_done(
        self, zygote: Zygote, root: Path, tmp_path: Path, number: int, expected: int
    ) -> None:
        """Too late for the first seed's run, which is finished; the second's does not begin."""
        out, mark = tmp_path / "runs", tmp_path / "mark"
        slow = {"mark": str(mark), "seconds": 20}
        trainer = zygote.train(arguments(root, out, "--seeds", "0", "1"), slow_end=slow)
        assert trainer.until(mark.exists), trainer.said()
        trainer.kill(number)
        assert trainer.wait() == expected, trainer.said()
        assert record_of(out / "seed-0")["status"] == "finished"
        assert [path.name for path in out.iterdir()] == ["seed-0"]

    @pytest.mark.parametrize(
        ("number", "expected"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
    )
    def test_without_a_folder_it_ends_as_any_program(
        self, zygote: Zygote, root: Path, tmp_path: Path, number: int, expected: int
    ) -> None:
        mark = tmp_path / "mark"
        slow = {"mark": str(mark), "seconds": 60}
        trainer = zygote.train(arguments(root, None), slow_steps=slow)
        assert trainer.until(mark.exists), trainer.said()
        trainer.kill(number)
        assert trainer.wait() == expected, trainer.said()

    def test_the_console_command(
        self,
        zygote: Zygote,
        root: Path,
        tmp_path: Path,
        uninterrupted: Uninterrupted,
        promise: Promise,
    ) -> None:
        """One line says what happened, and is the last one."""
        out = tmp_path / "run"
        command = [sys.executable, "-m", "spafit", *arguments(root, out)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and not logged_steps(out):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 143, said
        steps = logged_steps(out)[-1]
        assert said.splitlines()[-1] == (
            f"spafit: stopped by SIGTERM after step {steps}; the same command resumes "
            f"the run from there ({out})"
        )
        assert "Traceback" not in said
        assert record_of(out)["status"] == "interrupted"
        finish(zygote, root, out, uninterrupted)
        promise("SIGTERM at random moments", 1, "the console command likewise")
