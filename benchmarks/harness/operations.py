"""Profile the time of a step by groups of operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

#: Group -> what the name of one of its operations contains, in lower case.
OPERATIONS = {
    "dropout, random numbers": ("dropout", "bernoulli", "random", "normal_", "uniform"),
    "attention": ("softmax", "scaled_dot_product", "bmm", "flash_attention", "fmha"),
    "matrix products": ("addmm", "mm", "linear", "gemm", "matmul", "cutlass", "xmma"),
    "LayerNorm": ("layer_norm",),
    "GELU": ("gelu",),
    "optimizer": ("_foreach_", "_fused_adam", "multi_tensor"),
}
#: Group -> what the name of an operation contains within which everything belongs to the group,
#: but for random numbers.
ENCLOSING = {"attention": ("attention",), "optimizer": ("optimizer.", "clip_grad")}
OTHER, OUTSIDE = "other operations", "outside operations"


@dataclass(frozen=True)
class Share:
    """A group's time in a step.

    Attributes
    ----------
    group : str
        A key of :data:`OPERATIONS`; "other operations", such as copies and sums; or "outside
        operations": the interpreter, and waiting.
    time_ms : float
        The time its operations took themselves, without what they called.
    percent : float
        Of the whole step.
    largest : str
        The operation with the most time in it.
    """

    group: str
    time_ms: float
    percent: float
    largest: str


def profile_step(step: Callable[[], object], device: torch.device) -> list[Share]:
    """Run a step once under the profiler, and sum its operations' own times by group.

    Parameters
    ----------
    step : callable
        It should have run before, so that nothing is prepared in it.
    device : torch.device
        On a GPU the times are those of its kernels.

    Returns
    -------
    list of Share
        The largest first.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        whole_ms = 1000 * (time.perf_counter() - began)
    times_ms: dict[str, dict[str, float]] = {}
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: its time is that of the operation that launched it
        own_us = (
            event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        )
        operations = times_ms.setdefault(group_of(event), {})
        operations[event.name] = operations.get(event.name, 0.0) + own_us / 1000
    spent_ms = sum(sum(operations.values()) for operations in times_ms.values())
    times_ms[OUTSIDE] = {"": max(0.0, whole_ms - spent_ms)}
    shares = []
    for group, operations in times_ms.items():
        time_ms = sum(operations.values())
        largest = max(operations, key=lambda name: operations[name])
        shares.append(Share(group, time_ms, 100 * time_ms / whole_ms, largest))
    return sorted(shares, key=lambda share: -share.time_ms)


def group_of(event: Any) -> str:
    """Return the group of an operation, by its name and the names of those that called it."""
    own = event.name.lower()
    for group, parts in OPERATIONS.items():
        if group == "dropout, random numbers" and any(part in own for part in parts):
            return group
    for name in _callers(event):
        for group, parts in ENCLOSING.items():
            if any(part in name for part in parts):
                return group
    for group, parts in OPERATIONS.items():
        if any(part in own for part in parts):
            return group
    return OTHER


def _callers(event: Any) -> Iterator[str]:
    """Return the names of an operation and of all its callers, in lower case."""
    while event is not None:
        yield event.name.lower()
        event = event.cpu_parent


def table(shares: list[Share]) -> str:
    """Return the shares as a Markdown table."""
    lines = ["| operations | ms | % of the step | the most of it |", "|---|---|---|---|"]
    lines += [
        f"| {share.group} | {share.time_ms:.0f} | {share.percent:.1f} | {share.largest} |"
        for share in shares
    ]
    return "\n".join(lines)
