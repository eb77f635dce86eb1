"""Runs of many processes, forked by :class:`support.tortured_runs.Zygote`, and what befalls them.

Each gets the variables that torchrun would give it. What is done in one of them, or in all, stands
in :data:`TAMPERINGS`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.tortured_runs import Trainer, Zygote


def ranks(count: int) -> list[dict[str, str]]:
    """Return the variables of torchrun for each of some processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def train(
    zygote: Zygote,
    arguments: list[str],
    count: int,
    apart: dict[int, dict[str, Any]] | None = None,
    **tampering: Any,
) -> list[Trainer]:
    """Fork the processes of a run; ``apart`` is what is done in one of them, by its number."""
    alone: list[dict[str, str] | None] = [None]
    return [
        zygote.train(
            arguments,
            **({} if place is None else {"place": place}),
            **tampering,
            **(apart or {}).get(rank, {}),
        )
        for rank, place in enumerate(ranks(count) if count > 1 else alone)
    ]


def ended(trainers: list[Trainer]) -> list[int]:
    """Wait for all, and return their exit codes."""
    return [each.wait() for each in trainers]


# ---- What is done to a process -------------------------------------------------------------------


def _exactly(_: object) -> None:
    """Train in float64."""
    import torch

    import spafit.cli.training

    load = spafit.cli.training.load_pretrained
    spafit.cli.training.load_pretrained = lambda *given, **named: load(
        *given, **named, dtype=torch.float64
    )


def _without_dropout(_: object) -> None:
    """Train without dropout, whatever the model's configuration says."""
    from torch import nn

    import spafit.cli.training
    from spafit.adapters import LoRALinear
    from spafit.bert import SelfAttention

    fit = spafit.cli.training.fit

    def fitting(model: Any, *given: Any, **named: Any) -> Any:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, (SelfAttention, LoRALinear)):
                module.dropout = 0.0
        return fit(model, *given, **named)

    spafit.cli.training.fit = fitting


def _at_call(value: dict[str, Any]) -> None:
    """Have the n-th gradient of this process fail: for memory, with NaN, an error, by SIGKILL.

    Or never end.
    """
    from spafit.errors import DataError
    from spafit.training.step import TrainingStep

    gradient, calls = TrainingStep.gradient, iter(range(1, 10**6))

    def computing(self: Any, *given: Any) -> Any:
        accumulate = self.accumulate
        if next(calls) in value["calls"]:
            if value["what"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if value["what"] == "hang":
                time.sleep(600)
            if value["what"] == "bug":
                raise KeyError("a bug")
            if value["what"] == "data":
                raise DataError("a fault of the data")
            if value["what"] == "memory":

                def refuse(*_: object) -> None:
                    raise MemoryError("none left")

                self.accumulate = refuse
            else:
                self.accumulate = lambda *each: accumulate(*each) * math.nan
        try:
            return gradient(self, *given)
        finally:
            self.accumulate = accumulate

    TrainingStep.gradient = computing  # type: ignore[method-assign]


def _stop_in_evaluation(value: int) -> None:
    """Ask this process to stop in its n-th batch of dev."""
    from spafit.training.processes import together

    predict, calls = together.predict_logits, iter(range(1, 10**6))

    def predicting(*given: Any, **named: Any) -> Any:
        if next(calls) == value:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(*given, **named)

    together.predict_logits = predicting  # type: ignore[assignment]


def _dev_batches(value: int) -> None:
    from spafit.training.processes import together

    together._BATCH = value


def _interval(value: float) -> None:
    from spafit.training import saving

    saving.INTERVAL_S = value


def _failing_saves(_: object) -> None:
    from spafit.errors import CheckpointError
    from spafit.runs.checkpoint import Checkpoints

    def refuse(*_: object) -> None:
        raise CheckpointError("the disk is full")

    Checkpoints.save = refuse  # type: ignore[assignment, method-assign]


def _patience(value: float) -> None:
    from datetime import timedelta

    from spafit.training.processes import group

    group.TIMEOUT = timedelta(seconds=value)


def _own_group(_: object) -> None:
    """Have the caller make the process group."""
    import torch.distributed as dist

    dist.init_process_group("gloo")


def _count(value: str) -> None:
    """Write what is sent and computed to a file, a line each."""
    import torch
    import torch.distributed as dist

    from spafit.training.processes import together
    from spafit.training.step import TrainingStep

    reduce, gradient = dist.all_reduce, TrainingStep.gradient
    predict = together.predict_logits
    out = os.open(value, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(**what: Any) -> None:
        os.write(out, json.dumps(what).encode() + b"\n")

    def reducing(tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
        if tensor.is_floating_point():
            note(sent=tensor.numel())
        return reduce(tensor, *given, **named)

    def computing(self: Any, micro_batches: Any, *given: Any) -> Any:
        tokens = [int(each.batch.layout.tokens) for each in micro_batches]
        note(rows=sum(len(each.targets) for each in micro_batches), tokens=sum(tokens))
        return gradient(self, micro_batches, *given)

    def predicting(*given: Any, rows: list[int], **named: Any) -> Any:
        note(dev=list(rows))
        return predict(*given, rows=rows, **named)

    dist.all_reduce = reducing
    TrainingStep.gradient = computing  # type: ignore[method-assign]
    together.predict_logits = predicting  # type: ignore[assignment]


def _own_loop(value: dict[str, Any]) -> None:
    """Train by a loop of one's own with DistributedDataParallel, instead of the command."""
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    import spafit

    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    model = spafit.load_pretrained(value["model"], num_labels=2, dtype=torch.float64)
    spafit.adapt(model, "SPAFIT-0-1-II", seed=0)
    model.eval()  # without dropout, whose masks would differ
    if count > 1:
        dist.init_process_group("gloo")
    network: Any = spafit.interop.for_trainer(model) if value["wrapped"] else model
    sent: list[int] = []  # numbers, of each step
    if count > 1:
        network = DistributedDataParallel(network)

        # Its types would have to be no strings.
        def reduce(_, bucket):  # type: ignore[no-untyped-def]
            sent[-1] += bucket.buffer().numel()
            return allreduce_hook(dist.group.WORLD, bucket)

        network.register_comm_hook(None, reduce)
    optimizer = torch.optim.AdamW(spafit.parameter_groups(model, 1e-2))
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(5, 20, (6, 7), generator=draw)[rank::count]
        labels = torch.randint(0, 2, (6,), generator=draw)[rank::count]
        sent.append(0)
        if value["wrapped"]:
            network(ids, labels=labels).loss.backward()
        else:
            torch.nn.functional.cross_entropy(network(ids), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        spafit.save_adapter(model, Path(value["out"]))
        Path(value["out"]).with_suffix(".json").write_text(json.dumps(sent))
    if count > 1:
        dist.destroy_process_group()
    os._exit(0)


TAMPERINGS: dict[str, Callable[[Any], None]] = {
    "place": os.environ.update,
    "exactly": _exactly,
    "without_dropout": _without_dropout,
    "at_call": _at_call,
    "stop_in_evaluation": _stop_in_evaluation,
    "dev_batches": _dev_batches,
    "patience": _patience,
    "own_group": _own_group,
    "interval": _interval,
    "failing_saves": _failing_saves,
    "count": _count,
    "own_loop": _own_loop,
}
