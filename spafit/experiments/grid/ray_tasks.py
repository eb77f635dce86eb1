"""Train the cells of a grid as tasks of a Ray cluster, which may be many machines.

Ray decides which node trains a cell and when, and starts it again elsewhere if its process or its
node dies; it then goes on from its last checkpoint. The grid's folder, the data and the folders of
models lie where every node sees them at the same path.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import platform
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spafit.errors import ConfigError, one_line
from spafit.experiments.grid.cells import Cell
from spafit.experiments.grid.places import require_begun
from spafit.experiments.grid.worker import Worker
from spafit.runs.record import is_in_use, name_of_model


class RayTasks:
    """A pool that is a Ray cluster (:class:`~spafit.experiments.grid.running.Pool`).

    Parameters
    ----------
    address : str
        Of the cluster, as ``ray.init`` takes it.
    grid : str
        The grid's name, for the records.
    out : Path
        The grid's folder.
    data : Path
        GLUE's root.
    cpus : int
        The CPUs that a cell asks for, and its threads. One whose device is a GPU asks for one.
    say : callable
        Shows a line.

    Attributes
    ----------
    running : list of int
        The cells that were being trained when :meth:`answers` returned: their folders were locked.

    Raises
    ------
    ConfigError
        If Ray is not installed, or there is no cluster at the address.
    """

    def __init__(
        self,
        address: str,
        grid: str,
        out: Path,
        data: Path,
        cpus: int,
        say: Callable[[str], None],
    ) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError("--ray needs Ray: pip install '.[ray]'") from None
        try:
            _reach(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # of many classes
            reason = one_line(" ".join(str(error).split()), 300)
            raise ConfigError(f"no Ray cluster can be used at {address}: {reason}") from None
        self._ray, self._cpus, self._say = ray, cpus, say
        # A node has a working folder of its own.
        self._out = out.resolve()
        self._order = {"grid": grid, "out": str(self._out), "data": str(data.resolve())}
        self._functions: dict[int, Any] = {}
        self._tasks: dict[Any, int] = {}
        self._folders: dict[int, Path] = {}
        self.running: list[int] = []

    @property
    def taken(self) -> list[int]:
        """The cells that are trained, or wait for a node."""
        return list(self._tasks.values())

    @property
    def at_once(self) -> int:
        """How many are trained."""
        return max(1, len(self.running))

    def has_room(self) -> bool:
        """Return True: Ray has the queue."""
        return True

    def train(self, number: int, cell: Cell, learning_rate: float | None) -> None:
        """Submit a cell."""
        device = cell.settings["device"].partition(":")[0]  # which GPU, Ray decides
        # What "auto" is has been decided: a run that another node resumes is the same run.
        fixed = {"device": device, "precision": cell.settings["precision"]}
        there = dataclasses.replace(
            cell, model=name_of_model(cell.model), training={**cell.training, **fixed}
        )
        order = {
            **self._order,
            "cell": dataclasses.asdict(there),
            "key": cell.key,
            "learning_rate": learning_rate,
            "threads": self._cpus,
        }
        task = self._function(int(device == "cuda")).options(name=cell.title).remote(order)
        self._tasks[task] = number
        self._folders[number] = self._out / cell.folder

    def _function(self, gpus: int) -> Any:
        """Return the function that Ray trains cells by, with what each of them asks for."""
        if gpus not in self._functions:
            asked = {"CPU": self._cpus, "GPU": gpus}
            every = [each["Resources"] for each in self._ray.nodes() if each["Alive"]]
            if not any(all(has.get(k, 0) >= n for k, n in asked.items()) for has in every):
                wanted = f"{self._cpus} CPUs" + " and a GPU" * gpus
                self._say(f"no node of the Ray cluster has {wanted}; runs wait until one joins it")
            self._functions[gpus] = self._ray.remote(num_cpus=self._cpus, num_gpus=gpus)(train)
        return self._functions[gpus]

    def answers(self, seconds: float) -> list[tuple[int, dict[str, Any]]]:
        """Wait until a task has ended, for so long at most."""
        if not self._tasks:
            time.sleep(seconds)
            return []
        ended, _ = self._ray.wait(list(self._tasks), timeout=seconds)
        found = [(self._tasks.pop(task), self._answer(task)) for task in ended]
        # Once: asking takes each lock for a moment, on storage that may be far away.
        self.running = [number for number in self.taken if is_in_use(self._folders[number])]
        return found

    def _answer(self, task: Any) -> dict[str, Any]:
        try:
            return dict(self._ray.get(task))
        except self._ray.exceptions.RayError as error:
            reason = one_line(" ".join(str(error).split()), 500)
            return {"failed": f"{type(error).__name__}: {reason}"}

    def stop(self) -> list[tuple[int, dict[str, Any]]]:
        """Cancel all tasks, wait until those that train have saved, and leave the cluster."""
        found = []
        for task in self._tasks:
            self._ray.cancel(task)
        while self._tasks:
            found += self.answers(1.0)
        self._ray.shutdown()
        return found


def _reach(address: str) -> None:
    """Connect to the host and port of an address once; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def train(order: dict[str, Any]) -> dict[str, Any]:
    """Train a cell on a node, and return the answer."""
    warnings.simplefilter("ignore")  # the parent has shown them, reading the same files
    torch.set_num_threads(order["threads"])
    cell, out = Cell(**order["cell"]), Path(order["out"])
    try:
        require_begun(cell, order["key"], out)
        answer = _worker(order["grid"], out, Path(order["data"])).answer(
            cell, order["learning_rate"]
        )
    except ConfigError as error:
        answer = {"failed": str(error)}
    if "failed" in answer:
        answer["failed"] += f" (on {platform.node()})"
    return answer


@functools.lru_cache(maxsize=1)
def _worker(grid: str, out: Path, data: Path) -> Worker:
    """Return the worker of this process, which Ray has train one cell after the other."""
    return Worker(grid, out, data)
