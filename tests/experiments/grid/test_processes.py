"""A grid of real processes: workers and parents that are killed, and commands side by side."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.grids import is_alive, runs_below, six_runs, undisturbed_runs
from support.tortured_runs import Trainer, Zygote

pytestmark = pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(),
    reason="the system does not say which processes are whose children",
)


def children(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except FileNotFoundError:
        return []


@pytest.fixture(scope="module")
def grid(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return six_runs(tmp_path_factory.mktemp("grid"), root, epochs=4)


@pytest.fixture(scope="module")
def undisturbed(
    grid: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    return undisturbed_runs(grid, tmp_path_factory.mktemp("undisturbed"))


def steps_below(out: Path) -> int:
    """Return how many steps the logs of all runs have."""
    return sum(path.read_bytes().count(b'"loss"') for path in out.rglob("log.jsonl"))


def reached(parent: Trainer, what: Callable[[], bool]) -> None:
    assert parent.until(what, 120, pause=0.01), parent.said()


class TestKills:
    """Oracle: the runs of the grid with which nothing happened, bit for bit, and /proc."""

    def test_a_worker_and_the_parent_and_all_at_once_and_then_two_commands(
        self,
        zygote: Zygote,
        grid: list[str],
        undisturbed: dict[str, dict[str, Any]],
        tmp_path: Path,
        sized: Callable[[int, int], int],
        promise: Callable[[str, int, str], None],
    ) -> None:
        for trial in range(sized(1, 12)):
            draw, out = random.Random(trial), tmp_path / str(trial)
            first = draw.randrange(20)
            command = [*grid, str(out)]
            parent = zygote.train([*command, "--workers", "2"], forked_workers=True)
            reached(parent, lambda out=out, n=first: steps_below(out) > n)  # type: ignore[misc]
            workers = children(parent.pid)
            victim = draw.choice(workers)
            os.kill(victim, signal.SIGKILL)
            before = steps_below(out)
            reached(parent, lambda parent=parent: "is taken up again" in parent.said())  # type: ignore[misc]
            assert f"its worker (process {victim}) was killed by signal 9" in parent.said()
            reached(parent, lambda out=out, n=before: steps_below(out) > n)  # type: ignore[misc]
            workers = [pid for pid in {*workers, *children(parent.pid)} if is_alive(pid)]
            parent.kill()
            assert parent.wait() == -signal.SIGKILL
            end = time.monotonic() + 30
            while any(map(is_alive, workers)) and time.monotonic() < end:
                time.sleep(0.01)
            assert not any(map(is_alive, workers)), "orphans"
            parent = zygote.train([*command, "--workers", "2"], forked_workers=True)
            last = steps_below(out) + draw.randrange(20)
            reached(parent, lambda out=out, n=last: steps_below(out) > n)  # type: ignore[misc]
            os.kill(parent.pid, signal.SIGSTOP)  # it starts no other worker meanwhile
            workers = children(parent.pid)
            for pid in (*workers, parent.pid):
                os.kill(pid, signal.SIGKILL)  # as where the power fails
            assert parent.wait() == -signal.SIGKILL and workers
            both = [zygote.train(command, forked_workers=True) for _ in range(2)]
            assert [each.wait(120) for each in both] == [0, 0], [each.said() for each in both]
            assert runs_below(out) == undisturbed
            lines = [line for each in both for line in each.said().splitlines()]
            done = [line.partition(": accuracy ")[0] for line in lines if ": accuracy " in line]
            assert len(set(done)) == len(done), "trained twice"
        promise("grids killed at random points", sized(1, 12), "complete, as if undisturbed")

    @pytest.mark.parametrize("is_killed", [True, False])
    def test_a_worker_that_is_in_a_step(
        self, zygote: Zygote, grid: list[str], tmp_path: Path, is_killed: bool
    ) -> None:
        """It stops after that step, where its parent is killed, and where all get the signal.

        The worker then has it twice, from the scheduler and for its parent, and has to save.
        """
        out, mark = tmp_path / "out", tmp_path / "mark"
        held = {"mark": str(mark), "from": 3}
        parent = zygote.train([*grid, str(out)], forked_workers=True, held_steps=held)
        reached(parent, mark.exists)
        [worker] = children(parent.pid)
        if not is_killed:
            os.kill(worker, signal.SIGTERM)
        parent.kill(signal.SIGKILL if is_killed else signal.SIGTERM)
        time.sleep(
            0.3 if is_killed else 1.0
        )  # until the worker has heard of it, and is in the step
        assert is_alive(worker)
        mark.unlink()
        assert parent.wait() == (-signal.SIGKILL if is_killed else 128 + signal.SIGTERM)
        end = time.monotonic() + 30
        while is_alive(worker) and time.monotonic() < end:
            time.sleep(0.01)
        assert not is_alive(worker)
        [record] = [json.loads(path.read_text()) for path in out.rglob("run.json")]
        assert record["status"] == "interrupted"
        assert record["error"].startswith("StoppedError: stopped by SIGTERM after step 3")
        assert (Path(record["settings"]["out"]) / "checkpoints" / "step-3").is_dir()

    def test_a_signal_stops_a_worker_that_was_started_as_a_command(
        self, zygote: Zygote, grid: list[str], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        parent = zygote.train([*grid, str(out)])
        reached(parent, lambda: steps_below(out) > 2)
        [worker] = children(parent.pid)
        parent.kill(signal.SIGINT)
        assert parent.wait() == 128 + signal.SIGINT, parent.said()
        assert "the same command resumes the grid" in parent.said()
        assert not is_alive(worker)
        for path in out.rglob("run.json"):
            assert json.loads(path.read_text())["status"] in ("finished", "interrupted")
