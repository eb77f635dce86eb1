"""Ray's part of a grid without a cluster: what is asked of Ray, and what a node does."""

from __future__ import annotations

import dataclasses
import json
import platform
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.grids import InProcess, cells_of, write_grid
from support.pages import page

from spafit.cli import main
from spafit.errors import ConfigError
from spafit.experiments.grid import ray_tasks, running, workers
from spafit.experiments.grid.cells import Cell, Cells
from spafit.experiments.grid.places import begin
from spafit.experiments.grid.ray_tasks import RayTasks
from spafit.files.durable import Lock

Capture = pytest.CaptureFixture[str]


class RayError(Exception):
    pass


class Ray(SimpleNamespace):
    """In place of Ray, a cluster of one node in this process: a task is done when it is asked for.

    ``before`` is called first; what it raises is what the task raises.
    """

    def __init__(self, **resources: float) -> None:
        super().__init__(exceptions=SimpleNamespace(RayError=RayError))
        self.resources = resources
        self.asked: list[dict[str, Any]] = []
        self.orders: list[dict[str, Any]] = []
        self.cancelled: list[Any] = []
        self.threads: list[int] = []
        self.reached: list[tuple[str, int]] = []
        self.is_left = False
        self.before: Callable[[], None] = lambda: None

    def init(self, address: str, **_: Any) -> None:
        if address == "none:1":
            raise ConnectionError("no\n  cluster")
        self.address = address

    def connect(self, place: tuple[str, int], timeout: float) -> SimpleNamespace:
        if place[0] == "nowhere":
            raise ConnectionRefusedError("Connection refused")
        self.reached.append(place)
        return SimpleNamespace(close=lambda: None)

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}
        return [dead, {"Alive": True, "Resources": self.resources}]

    def remote(self, **asked: Any) -> Callable[[Any], Any]:
        def decorated(function: Callable[..., Any]) -> Any:
            def submit(order: dict[str, Any]) -> Any:
                self.asked.append(asked)
                self.orders.append(json.loads(json.dumps(order)))
                return function, len(self.orders) - 1

            return SimpleNamespace(options=lambda name: SimpleNamespace(remote=submit))

        return decorated

    def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        assert tasks  # as Ray has it
        return tasks[:1], tasks[1:]

    def get(self, task: Any) -> Any:
        if task in self.cancelled:
            raise RayError("cancelled")
        self.before()
        function, number = task
        return function(self.orders[number])

    def cancel(self, task: Any) -> None:
        self.cancelled.append(task)

    def shutdown(self) -> None:
        self.is_left = True


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray(CPU=2.0)
    # Here, where others wait for the cores, two threads would wait for each other.
    monkeypatch.setattr(ray_tasks.torch, "set_num_threads", ray.threads.append)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(socket, "create_connection", ray.connect)
    return ray


@pytest.fixture
def arguments(root: Path, tmp_path: Path) -> list[str]:
    """Return the arguments of a grid of two runs."""
    block = {"method": "bitfit", "learning_rate": 1e-3, "seed": [0, 1]}
    file = write_grid(tmp_path / "g.json", root / "tiny", block)
    return ["grid", str(file), "--data", str(root / "glue"), "--out", str(tmp_path / "out")]


@pytest.fixture
def cells(arguments: list[str], root: Path) -> Cells:
    return cells_of(Path(arguments[1]), root / "glue")


def on_gpu(cell: Cell, device: str) -> Cell:
    return dataclasses.replace(cell, settings={**cell.settings, "device": device})


class TestTheCommand:
    """Oracle: what Ray was asked for, and the runs."""

    def test_every_cell_is_a_task(
        self,
        ray: Ray,
        arguments: list[str],
        root: Path,
        tmp_path: Path,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Its places are given from the root on, whatever the command's working folder is."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "tiny").symlink_to(root / "tiny")
        local = ["--model", "tiny", "--out", "out", "--ray", "head:6379", "--threads", "2"]
        assert main([*arguments, *local]) == 0
        assert ray.address == "head:6379" and ray.reached == [("head", 6379)] and ray.is_left
        assert ray.asked == [{"num_cpus": 2, "num_gpus": 0}] * 2 and ray.threads == [2, 2]
        assert [each["out"] for each in ray.orders] == [str(tmp_path / "out")] * 2
        assert [each["data"] for each in ray.orders] == [str(root / "glue")] * 2
        assert [each["cell"]["model"] for each in ray.orders] == [str(root / "tiny")] * 2
        said = capsys.readouterr()
        assert said.out == "2 of 2 runs are done: out\n" and "no node" not in said.err
        for seed in (0, 1):
            path = tmp_path / f"out/rte/Full-BitFit/seed-{seed}/run.json"
            assert json.loads(path.read_text())["status"] == "finished"
        assert main([*arguments, *local]) == 0
        assert len(ray.orders) == 2

    def test_a_lost_task_is_begun_again_as_often_as_the_guide_says(self) -> None:
        """Oracle: Ray's own default, which the order above leaves as it is."""
        constants = pytest.importorskip("ray._private.ray_constants", reason="Ray is not installed")
        said = "as often as Ray does by default (three times)"
        assert said in page("docs/guide/grids.md")
        assert constants.DEFAULT_TASK_MAX_RETRIES == 3

    def test_locks_are_asked_once_a_turn(
        self, ray: Ray, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first turn ends with an answer for the first run, so that the second one is left."""
        asked: list[Path] = []
        monkeypatch.setattr(ray_tasks, "is_in_use", asked.append)
        assert main([*arguments, "--ray", "auto"]) == 0
        assert asked == [tmp_path / "out/rte/Full-BitFit/seed-1"]

    def test_a_task_that_ray_gives_up_has_failed(
        self, ray: Ray, arguments: list[str], tmp_path: Path, capsys: Capture
    ) -> None:
        errors = iter([RayError("its node\n died")])

        def before() -> None:
            for error in errors:
                raise error

        ray.before = before
        assert main([*arguments, "--ray", "auto"]) == 1
        title = "failed: rte, Full BitFit, seed 0"
        assert f"{title}: RayError: its node died (" in capsys.readouterr().out
        assert (tmp_path / "out/rte/Full-BitFit/seed-1/run.json").exists()

    @pytest.mark.parametrize(
        ("has_ray", "options", "said"),
        [
            (False, ["--ray=auto"], "--ray needs Ray: pip install '.[ray]'"),
            (True, ["--ray=none:1"], "no Ray cluster can be used at none:1: no cluster"),
            (True, ["--ray=nowhere:1"], "can be used at nowhere:1: Connection refused"),
            (True, ["--ray=auto", "--workers=2"], "not allowed with argument"),
        ],
    )
    def test_refusals(
        self,
        ray: Ray,
        arguments: list[str],
        tmp_path: Path,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
        has_ray: bool,
        options: list[str],
        said: str,
    ) -> None:
        """In one line, and nothing is made."""
        if not has_ray:
            monkeypatch.setitem(sys.modules, "ray", None)
        try:
            code: Any = main([*arguments, *options])
        except SystemExit as end:
            code = end.code
        err = capsys.readouterr().err
        assert code == 2 and said in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists()


class TestThePool:
    """Oracle: what Ray was asked for."""

    def pool(self, cells: Cells, out: Path, say: Callable[[str], None] = print) -> RayTasks:
        return RayTasks("auto", cells.name, out, Path("data"), 2, say)

    def test_gpus(self, ray: Ray, cells: Cells, tmp_path: Path) -> None:
        """One for a cell whose device is one, whichever; and runs that no node has them for say so.

        Oracle also: a node that is dead has plenty.
        """
        said: list[str] = []
        pool = self.pool(cells, tmp_path, said.append)
        assert ray.reached == []  # "auto" has no host
        for number, device in enumerate(("cpu", "cuda", "cuda:3")):
            pool.train(number, on_gpu(cells.cells[0], device), None)
        assert [each["num_gpus"] for each in ray.asked] == [0, 1, 1]
        assert [each["cell"]["training"]["device"] for each in ray.orders] == ["cpu"] + ["cuda"] * 2
        assert {each["cell"]["training"]["precision"] for each in ray.orders} == {"float32"}
        waits = "no node of the Ray cluster has 2 CPUs and a GPU; runs wait until one joins it"
        assert said == [waits]
        ray.resources = {"CPU": 1.0, "GPU": 1.0}
        pool = self.pool(cells, tmp_path, said.append)
        for number in (0, 1):
            pool.train(number, cells.cells[0], None)
        assert said[1:] == ["no node of the Ray cluster has 2 CPUs; runs wait until one joins it"]

    def test_what_is_locked_runs(
        self, ray: Ray, cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray, "wait", lambda tasks, timeout: ([], tasks))  # none has ended
        pool = self.pool(cells, tmp_path)
        for number, cell in enumerate(cells.cells):
            pool.train(number, cell, None)
        assert (pool.taken, pool.running, pool.at_once) == ([0, 1], [], 1)
        locks, found = [], []
        for cell in cells.cells[::-1]:
            (tmp_path / cell.folder).mkdir(parents=True)
            locks.append(Lock(tmp_path / cell.folder / "run.lock"))
            locks[-1].acquire()
            assert pool.answers(0.0) == []
            found.append((pool.taken, pool.running, pool.at_once))
        assert found == [([0, 1], [1], 1), ([0, 1], [0, 1], 2)]
        for lock in locks:
            lock.release()

    def test_stopping_cancels_and_waits(self, ray: Ray, cells: Cells, tmp_path: Path) -> None:
        pool = self.pool(cells, tmp_path)
        for number, cell in enumerate(cells.cells):
            pool.train(number, cell, None)
        assert [number for number, _ in pool.stop()] == [0, 1]
        assert len(ray.cancelled) == 2 and pool.taken == [] and ray.is_left
        assert pool.stop() == []

    def test_nothing_taken_is_waited_for(self, ray: Ray, cells: Cells, tmp_path: Path) -> None:
        assert self.pool(cells, tmp_path).answers(0.01) == []


@pytest.mark.usefixtures("ray")
class TestANode:
    """Oracle: the answers."""

    def order(self, cells: Cells, root: Path, out: Path, **changes: Any) -> dict[str, Any]:
        cell = cells.cells[0]
        usual = {"grid": "small", "out": str(out), "data": str(root / "glue"), "threads": 1}
        usual |= {"cell": dataclasses.asdict(cell), "key": cell.key, "learning_rate": None}
        return {**usual, **changes}

    def test_it_trains_in_a_folder_that_was_begun(
        self, cells: Cells, root: Path, tmp_path: Path
    ) -> None:
        begin(cells, tmp_path)
        assert ray_tasks.train(self.order(cells, root, tmp_path)) == {"done": True}
        assert (tmp_path / "rte/Full-BitFit/seed-0/run.json").exists()

    def test_what_it_does_not_see(self, cells: Cells, root: Path, tmp_path: Path) -> None:
        """Grid, data or model; the message has its name."""
        here = f" (on {platform.node()})"
        [said] = ray_tasks.train(self.order(cells, root, tmp_path)).values()
        assert said == (
            f"{tmp_path}/grid.json of this grid is not seen here; the folder (--out) must be one "
            f"that all machines share, at the same path{here}"
        )
        begin(cells, tmp_path)
        other = ray_tasks.train(self.order(cells, root, tmp_path, key="0"))
        assert other == {"failed": said}
        answer = ray_tasks.train(self.order(cells, root, tmp_path, data="/nowhere"))
        assert answer["failed"].startswith("DataError: no file for the train split of RTE in ")
        assert "/nowhere" in answer["failed"] and answer["failed"].endswith(here)
        cell = {**dataclasses.asdict(cells.cells[0]), "model": "/nowhere/tiny"}
        answer = ray_tasks.train(self.order(cells, root, tmp_path, cell=cell))
        assert answer["failed"].startswith("WeightsError: /nowhere/tiny is neither an existing")
        assert not (tmp_path / "rte").exists()

    def test_a_folder_in_use_is_left_alone(self, cells: Cells, root: Path, tmp_path: Path) -> None:
        """As where a node is taken for dead, and still writes."""
        begin(cells, tmp_path)
        folder = tmp_path / cells.cells[0].folder
        folder.mkdir(parents=True)
        lock = Lock(folder / "run.lock")
        lock.acquire()
        assert ray_tasks.train(self.order(cells, root, tmp_path)) == {"in_use": True}
        lock.release()

    def test_a_run_that_is_done_elsewhere_is_not_done_here(
        self, arguments: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The node's folder of that name is another one than the parent's."""

        class Elsewhere(InProcess):
            @staticmethod
            def before(cell: Cell) -> dict[str, Any]:  # type: ignore[override]
                folder = tmp_path / "out" / cell.folder
                folder.mkdir(parents=True)
                (folder / "run.json").write_text('{"status": "running"}')
                return {"done": True}

        monkeypatch.setattr(workers, "_Worker", Elsewhere)
        monkeypatch.setattr(running, "_LOOK_S", 0.01)
        assert main(arguments) == 1
        said = capsys.readouterr().out
        assert said.startswith("0 of 2 runs are done")
        assert "holds a run that is not: where it was trained that is another folder" in said


def test_a_name_that_cannot_be_of_a_cluster() -> None:
    from spafit.cli.option_types import as_address

    for address in ("auto", "local", "10.0.0.1:6379", "ray://a-b.c:10001", "[::1]:6379"):
        assert as_address(address) == address
    for address in ("head", "http://head:1", ":6379", "head:port", "head:6379/x", "auto "):
        with pytest.raises(Exception, match="not the address of a Ray cluster"):
            as_address(address)


def test_require_begun_reads_a_damaged_file(cells: Cells, tmp_path: Path) -> None:
    from spafit.experiments.grid.places import require_begun

    (tmp_path / "grid.json").write_text("{")
    with pytest.raises(ConfigError, match=r"grid\.json cannot be read"):
        require_begun(cells.cells[0], cells.cells[0].key, tmp_path)
