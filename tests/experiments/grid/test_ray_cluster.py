"""A grid on a real Ray cluster of two nodes on this machine, of which one and then another dies.

A node that is killed with all its processes is a machine that loses power. One whose processes are
stopped, of which one still holds the lock of its run, is a machine that the others do not see any
more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import environment
from support.grids import is_alive, runs_below, six_runs, undisturbed_runs
from support.tortured_runs import checkpoints

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc for processes"),
]

STEPS = 60  # 12 epochs of 5


class Cluster:
    """A Ray cluster without a dashboard: a head that has no CPU, and two nodes with one each."""

    def __init__(self) -> None:
        cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
        self._place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path is short
        # The head's address is written into Ray's usual folder, which it does not make itself.
        Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)
        self._usual = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        # A dead node is noticed after 2 s, one that does not answer after 20 s, and the tasks of
        # a process that does not answer are begun elsewhere after 10 s (by default 7 minutes).
        settings = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 5_000,
            "health_check_failure_threshold": 4,
            "worker_niceness": 0,
            "grpc_client_keepalive_time_ms": 5_000,
            "grpc_client_keepalive_timeout_ms": 5_000,
        }
        self._cluster = cluster_utils.Cluster()
        self._cluster.add_node(
            num_cpus=0, _system_config=settings, temp_dir=self._place, **self._usual
        )
        self.address = str(self._cluster.address)
        for _ in range(2):
            self.add_node()

    def add_node(self) -> None:
        self._cluster.add_node(num_cpus=1, **self._usual)

    def kill_node_of(self, pid: int) -> None:
        """Kill the raylet whose worker a process is, with all its processes."""
        raylet = parent(pid)
        [node] = [
            each
            for each in self._cluster.worker_nodes
            if each.all_processes["raylet"][0].process.pid == raylet
        ]
        every = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]
        victims = {raylet, *(each for each in every if parent(each) == raylet)}
        for each in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        while any(map(is_alive, victims)):
            time.sleep(0.001)
        self._cluster.remove_node(node, allow_graceful=False)

    def stop_node_of(self, pid: int) -> None:
        """Stop a worker and its raylet, which must not die: its end would wake the worker."""
        raylet = parent(pid)
        os.kill(pid, signal.SIGSTOP)
        os.kill(raylet, signal.SIGSTOP)

    def shutdown(self) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._place, ignore_errors=True)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.shutdown()


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def folders_below(out: Path) -> list[Path]:
    """Return the folders of a grid's runs; in them, files come and go."""
    try:
        return [
            out / cell["folder"] for cell in json.loads((out / "grid.json").read_text())["cells"]
        ]
    except FileNotFoundError:
        return []


class Command:
    """A grid that a command runs."""

    def __init__(self, arguments: list[str], out: Path, log: Path) -> None:
        self.out, self._log = out, log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "spafit", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(OMP_NUM_THREADS="1"),
            )

    def said(self) -> str:
        return self._log.read_text()

    def until(self, what: Callable[[], Any], seconds: float = 300) -> Any:
        """Wait for something while the command runs, and return it."""
        end = time.monotonic() + seconds
        while not (found := what()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end and ": failed: " not in self.said(), self.said()
            time.sleep(0.005)
        return found

    def trained(self, besides: Path | None = None) -> tuple[Path, int] | None:
        """Return a run whose process has saved and is not close to its end, and the process."""
        for folder in folders_below(self.out):
            with contextlib.suppress(OSError):
                lock = folder / "run.lock"
                holder = re.match(r"process (\d+) on ", lock.read_text())
                since = lock.stat().st_mtime_ns
                steps = (folder / "log.jsonl").read_bytes().count(b'"loss"')
                is_at_work = any(each.stat().st_mtime_ns > since for each in checkpoints(folder))
                is_at_work &= steps < STEPS // 2 and folder != besides
                if is_at_work and holder and is_alive(int(holder[1])):
                    return folder, int(holder[1])
        return None


@pytest.fixture(scope="module")
def grid(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return six_runs(tmp_path_factory.mktemp("grid"), root, epochs=12)


@pytest.fixture(scope="module")
def undisturbed(
    grid: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    return undisturbed_runs(grid, tmp_path_factory.mktemp("undisturbed"))


def records_below(out: Path) -> dict[Path, dict[str, Any]]:
    files = [folder / "run.json" for folder in folders_below(out)]
    return {path.parent: json.loads(path.read_text()) for path in files if path.exists()}


def test_a_signal_and_two_nodes_that_die(
    grid: list[str],
    undisturbed: dict[str, dict[str, Any]],
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    """Oracle: the runs of the same grid without Ray, bit for bit; and how often each was resumed.

    What was stopped has a checkpoint and is resumed from it; so is what the dead nodes were at, and
    nothing else. No run is trained by two processes: the lock of the second node's is held by its
    process until that has died, and the run is finished.
    """
    out = tmp_path / "out"
    arguments = [*grid, str(out), "--ray", cluster.address]
    first = Command(arguments, out, tmp_path / "first.txt")
    first.until(first.trained)
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait(120) == 128 + signal.SIGINT, first.said()
    assert "the same command resumes the grid" in first.said()
    ended = {folder: each["status"] for folder, each in records_below(out).items()}
    assert set(ended.values()) <= {"interrupted", "finished"}
    stopped = [each for each in ended if ended[each] == "interrupted" and checkpoints(each)]
    assert stopped

    second = Command(arguments, out, tmp_path / "second.txt")
    lost, pid = second.until(second.trained)
    cluster.kill_node_of(pid)
    cluster.add_node()
    held, pid = second.until(lambda: second.trained(besides=lost))
    try:
        cluster.stop_node_of(pid)
        others = {out / each for each in undisturbed} - {held}
        if "choice" in held.parts:  # these wait for the rate
            others -= {out / "rte/Full-BitFit" / f"seed-{n}" for n in (0, 1)}

        def are_done() -> bool:
            records = records_below(out)
            ended = {each for each in records if records[each]["status"] == "finished"}
            return others <= ended and ": in use elsewhere, and left to that" in second.said()

        second.until(are_done)
        assert records_below(out)[held]["status"] == "running" and is_alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert second.process.wait(300) == 0, second.said()
    assert f"6 of 6 runs are done: {out}" in second.said()
    assert runs_below(out) == undisturbed
    resumed = {folder: len(each.get("resumed", [])) for folder, each in records_below(out).items()}
    expected = dict.fromkeys(resumed, 0)
    for folder in (*stopped, lost, held):
        expected[folder] += 1
    assert resumed == expected
