"""Small grids on a tiny model, for the tests of spafit.experiments."""

from __future__ import annotations

import json
import os
import queue
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from spafit import glue
from spafit.cli import main
from spafit.errors import InUseError
from spafit.experiments.grid import running, worker, workers
from spafit.experiments.grid.cells import Cell, Cells, Shadows, expand
from spafit.experiments.grid.file import read_grid
from spafit.experiments.grid.start import _sizes
from spafit.experiments.grid.worker import Worker
from support.small_runs import N_DEV, N, make_dataset, read_log

TASKS = ("rte", "wnli")


def write_tasks(root: Path) -> Path:
    """Write RTE and WNLI in their original form, with other texts in each."""
    for seed, name in enumerate(TASKS, 1):
        task = glue.get_task(name)
        (root / task.folder).mkdir(parents=True)
        for split, n, more in (("train", N, 0), ("dev", N_DEV, 10)):
            lines = ["index\tsentence1\tsentence2\tlabel"]
            for each in make_dataset(name, n, split, seed + more).examples:
                label = task.spelling[task.labels.index(str(each.label))]
                lines.append(f"{each.index}\t{each.text_a}\t{each.text_b}\t{label}")
            path = root / task.folder / f"{split}.tsv"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def write_grid(path: Path, tiny: Path, *cells: dict[str, Any], **more: Any) -> Path:
    """Write a grid file with the settings of small runs on a tiny model, and others."""
    usual = {
        "name": "small",
        "model": str(tiny),
        "task": "rte",
        "epochs": 1,
        "batch_size": 6,
        "max_length": 16,
        "device": "cpu",
    }
    entries = {**usual, **more, "cells": list(cells)}
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def six_runs(folder: Path, root: Path, epochs: int) -> list[str]:
    """Write a grid of six runs, two of which choose a rate; return its arguments up to --out."""
    path = write_grid(
        folder / "g.json",
        root / "tiny",
        {"method": "bitfit", "choose": {"learning_rate": [1e-3, 1e-2], "seed": 100}},
        {"method": "lora-ii", "r": 2, "learning_rate": 1e-2},
        seed=[0, 1],
        epochs=epochs,
        save_every=4,
    )
    return ["grid", str(path), "--data", str(root / "glue"), "--threads", "1", "--out"]


def undisturbed_runs(grid: list[str], out: Path) -> dict[str, dict[str, Any]]:
    """Train a grid of six runs in this process; return what they come to if nothing happens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have it: with more, sums are rounded otherwise
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(workers, "_Worker", InProcess)
            patched.setattr(running, "_LOOK_S", 0.0)
            assert main([*grid, str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = runs_below(out)
    assert len(found) == 6
    return found


def cells_of(path: Path, data: Path) -> Cells:
    """Read and expand a grid file."""
    grid = read_grid(path)
    tasks = {task for block in grid.blocks for task in block.tasks}
    return expand(grid, Shadows(_sizes), {name: glue.load(name, "train", data) for name in tasks})


def runs_below(out: Path) -> dict[str, dict[str, Any]]:
    """Return what the runs of a grid came to: all that does not depend on time and place."""
    found = {}
    for path in sorted(out.rglob("run.json")):
        record, folder = json.loads(path.read_text()), path.parent
        found[str(folder.relative_to(out))] = {
            "status": record["status"],
            "history": record["result"]["history"],
            "rate": record["settings"]["learning_rate"],
            "losses": [(row["step"], row["loss"]) for row in read_log(folder, "loss")],
            "adapter": (folder / "adapter.safetensors").read_bytes(),
        }
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process runs (on Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Forked:
    """In place of ``subprocess.Popen``: a worker that is a fork of this process."""

    def __init__(self, command: list[str], *, stderr: IO[bytes], **_: Any) -> None:
        assert command[-1].endswith("from spafit.experiments.grid.worker import main; main()")
        (orders, stdin), (stdout, answers) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number, file in enumerate((orders, answers, stderr.fileno())):
                os.dup2(file, number)
            os.closerange(3, 256)  # an end of another worker's input would keep it alive
            code = 70
            try:
                sys.stdin = os.fdopen(0, closefd=False)
                code = worker.main() or 0
            except SystemExit as end:
                code = int(str(end.code))
            finally:
                os._exit(code)
        os.close(orders)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class InProcess:
    """In place of a worker process: trains at once, in this process.

    ``before`` is called with each cell; what it raises is what the run raises, and what it returns,
    if anything, is the answer.
    """

    before: Callable[[Cell], dict[str, Any] | None] = staticmethod(lambda cell: None)
    trained: list[str] = []  # noqa: RUF012 - of all workers

    def __init__(
        self, start: dict[str, Any], events: queue.Queue[Any], threads: int | None, gpu: str | None
    ) -> None:
        self.cell: int | None = None
        self.gpu = gpu
        self.is_ready, self.pid = True, 4711
        self._events = events
        self._worker = Worker(start["grid"], Path(start["out"]), Path(start["data"]))

    def order(self, order: dict[str, Any]) -> None:
        cell = Cell(**json.loads(json.dumps(order["cell"])))
        try:
            answer = type(self).before(cell)
            if answer is None:
                self._worker.train(cell, order["learning_rate"])
                self.trained.append(cell.folder)
                answer = {"done": True}
        except InUseError:
            answer = {"in_use": True}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        self._events.put((self, None if answer == {} else answer))

    def close(self) -> None:
        self._events.put((self, None))

    def end(self) -> str:
        return "was killed by signal 9"
