"""A worker of a grid: trains one cell after the other, as its parent says.

It is a process of its own, which calls :func:`main`. On standard input it gets an order a line, in
JSON, and on standard output it answers. When its input ends, because the parent wants it to stop or
has died, it stops after the current step, with a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch

from spafit.errors import InUseError, SpafitError, StoppedError, one_line
from spafit.experiments.grid.cells import Cell
from spafit.plans import Plan
from spafit.runs.record import about_model
from spafit.runs.stopping import NAMES
from spafit.strata import adapt
from spafit.tasks import glue
from spafit.tasks.task import Dataset
from spafit.text.tokenization import Tokenizer, load_tokenizer
from spafit.training.fit import fit
from spafit.weights.pretrained import load_pretrained

TRACEBACK = "traceback.txt"


class Worker:
    """Trains cells, and keeps the last tokenizer and data in memory.

    Parameters
    ----------
    grid : str
        The grid's name, for the records.
    out : Path
        The grid's folder.
    data : Path
        GLUE's root.
    """

    def __init__(self, grid: str, out: Path, data: Path) -> None:
        self.grid, self.out, self.data = grid, out, data
        self._tokenizer: tuple[tuple[str, str | None], Tokenizer] | None = None
        self._datasets: tuple[str, Dataset, Dataset] | None = None

    def answer(self, cell: Cell, learning_rate: float | None) -> dict[str, Any]:
        """Train a cell, and return what its parent is told.

        The traceback of an error that nobody foresaw is written into the run's folder.

        Raises
        ------
        SystemExit
            If a signal asked for a stop.
        """
        trace = self.out / cell.folder / TRACEBACK
        try:
            self.train(cell, learning_rate)
            trace.unlink(missing_ok=True)  # of an attempt before
        except StoppedError as stopped:
            raise SystemExit(128 + stopped.signal) from None
        except InUseError:
            return {"in_use": True}
        except Exception as error:
            failure = one_line(f"{type(error).__name__}: {error}", 400)
            if not isinstance(error, (SpafitError, OSError)):
                with contextlib.suppress(OSError):
                    trace.parent.mkdir(parents=True, exist_ok=True)
                    trace.write_text(traceback.format_exc(), encoding="utf-8")
                    failure += f" ({TRACEBACK} in its folder has the traceback)"
            return {"failed": failure}
        return {"done": True}

    def train(self, cell: Cell, learning_rate: float | None) -> None:
        """Train a cell, or resume it; its learning rate is given if it was chosen."""
        base = (cell.model, cell.revision)
        if self._tokenizer is None or self._tokenizer[0] != base:
            self._tokenizer = (base, load_tokenizer(cell.model, revision=cell.revision))
        if self._datasets is None or self._datasets[0] != cell.task:
            train, dev = (glue.load(cell.task, split, self.data) for split in ("train", "dev"))
            self._datasets = (cell.task, train, dev)
        tokenizer, (_, train, dev) = self._tokenizer[1], self._datasets
        network = load_pretrained(
            cell.model,
            num_labels=train.task.num_labels,
            revision=cell.revision,
            seed=cell.init_seed,
        )
        adapt(network, Plan.from_json(cell.plan), seed=cell.init_seed)
        config = cell.config(learning_rate, self.out / cell.folder)
        about = {
            **about_model(
                cell.model,
                revision=cell.revision,
                split_special_tokens=tokenizer.split_special_tokens,
            ),
            "data": str(self.data.resolve()),
            "max_bad_rows": 0,
            **({} if cell.init_seed == cell.seed else {"init_seed": cell.init_seed}),
            "cell": {"grid": self.grid, "purpose": cell.purpose, "settings": cell.varied},
        }
        fit(network, tokenizer, train, dev, config, about=about)


def main() -> None:
    """Take orders until there are none."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever else is printed
    warnings.simplefilter("ignore")  # the parent has shown them, reading the same files

    def say(**answer: Any) -> None:
        with contextlib.suppress(OSError):  # the parent has died, and its input ends
            answers.write(json.dumps(answer) + "\n")

    def end(number: int, _: object) -> NoReturn:
        """End at once where there is nothing to be saved: no run is in progress."""
        raise SystemExit(128 + number)

    for name in NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end)
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    start = orders.get()
    if start is None:
        return
    if start["threads"] is not None:
        torch.set_num_threads(start["threads"])
    worker = Worker(start["grid"], Path(start["out"]), Path(start["data"]))
    say(ready=True)
    while (order := orders.get()) is not None:
        say(**worker.answer(Cell(**order["cell"]), order["learning_rate"]))


def _listen(orders: queue.Queue[dict[str, Any] | None]) -> None:
    """Queue the orders; at their end stop the run that is in progress."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    orders.put(None)
    # A run that was asked to stop already has restored the default: a second signal would end it
    # without a checkpoint.
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        os.kill(os.getpid(), signal.SIGTERM)
