"""Classify a GPU's kernels by kind of work, from their names and the calling operations.

Names alone are not enough: one library computes both base products and LoRA's, and Triton's kernels
are named after their functions. So an eager step is profiled, where the operation that launched
each kernel is known; a captured step replays the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.roofline import (
    ADD_NORM,
    ATTENTION,
    BASE,
    BIASES,
    CLIPPING,
    COPIES,
    DROPOUT,
    EMBEDDINGS,
    GELU,
    LORA,
    OPTIMIZER,
)

OTHER = "other"
KINDS = (
    BASE, LORA, ATTENTION, ADD_NORM, GELU, DROPOUT, BIASES, EMBEDDINGS, OPTIMIZER, CLIPPING,
    COPIES, OTHER,
)  # fmt: skip

#: What a name contains, in lower case, of the operation, of one that called it, or of the kernel;
#: the first kind that fits is taken.
_ANYWHERE = (
    (COPIES, ("optimizer.zero_grad",)),
    (OPTIMIZER, ("optimizer.step", "_fused_adam", "fusedadam")),
    (CLIPPING, ("_foreach_norm", "vector_norm", "_foreach_mul", "_amp_", "isfinite")),
    (ATTENTION, ("attention", "attn", "softmax", "fmha", "flash")),
    (ADD_NORM, ("addnorm", "add_norm", "layer_norm", "layernorm")),
    (GELU, ("gelu",)),
    (DROPOUT, ("dropout", "bernoulli", "random")),
    (EMBEDDINGS, ("embedding",)),
)
_PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::matmul", "aten::linear",
    "mkldnn::_linear_pointwise",
)  # fmt: skip
_PRODUCT_KERNELS = ("gemm", "gemv", "cutlass", "xmma", "nvjet", "splitk")
_COPIES = (
    "copy", "memcpy", "memset", "zero_", "fill_", "aten::cat", "index", "gather", "scatter",
    "clone", "contiguous",
)  # fmt: skip
#: Of spafit's Triton kernels of the linear maps; the others contain a base product.
_LOW_RANK_KERNELS = ("narrow", "gradient")


@dataclass(frozen=True)
class Sizes:
    """What tells LoRA's products from the base ones.

    Attributes
    ----------
    ranks : frozenset of int
        r, and what several r side by side come to.
    others : frozenset of int
        Sizes that are no rank though they may equal one: tokens, D, F.
    """

    ranks: frozenset[int]
    others: frozenset[int]

    @classmethod
    def of(cls, ranks: Sequence[int], others: Sequence[int]) -> Sizes:
        """Return the sizes of up to four maps side by side."""
        several = {count * r for r in ranks for count in (1, 2, 3, 4)}
        return cls(frozenset(several), frozenset(others))

    def is_low_rank(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Return whether one of the factors has a rank among its sizes."""
        sizes = {size for shape in shapes if len(shape) == 2 for size in shape}
        return bool((sizes - self.others) & self.ranks)


@dataclass
class Busy:
    """The time of a step's kernels.

    Attributes
    ----------
    by_kind : dict of str to float
        Milliseconds of each of :data:`KINDS`.
    largest : dict of str to str
        The kernel with the most time of each.
    kernels : int
        How many ran.
    """

    by_kind: dict[str, float] = field(default_factory=dict)
    largest: dict[str, str] = field(default_factory=dict)
    kernels: int = 0

    @property
    def total_ms(self) -> float:
        """All kernels together."""
        return sum(self.by_kind.values())


def kind_of(
    callers: Sequence[str], kernel: str, shapes: Sequence[Sequence[int]], sizes: Sizes
) -> str:
    """Return the kind of a kernel.

    Parameters
    ----------
    callers : sequence of str
        The operation that launched it, what called that, and so on outwards.
    kernel : str
        Its name; empty on a CPU.
    shapes : sequence of sequence of int
        Of the operation's inputs.
    sizes : Sizes
        By which products are told apart.
    """
    names = [name.lower() for name in (*callers, kernel)]
    own, kernel = (names[0] if callers else ""), kernel.lower()
    for kind, parts in _ANYWHERE:
        if any(part in name for part in parts for name in names):
            return kind
    # aten::linear's kernel is that of an aten::mm or aten::addmm within it.
    if own in _PRODUCTS or any(part in kernel for part in _PRODUCT_KERNELS):
        return LORA if sizes.is_low_rank(shapes) else BASE
    if own.startswith("aten::sum"):
        return BIASES
    if any(part in own for part in _COPIES) or kernel.startswith(("memcpy", "memset")):
        return COPIES
    if "stackedlinear" in own.replace("_", ""):
        return LORA if any(part in kernel for part in _LOW_RANK_KERNELS) else BASE
    return OTHER


def profile_kinds(step: Callable[[], object], device: torch.device, sizes: Sizes) -> Busy:
    """Run an eager step once under the profiler, and sum its kernels' times by kind.

    On a CPU, which has no kernels, the operations' own times are used.

    Parameters
    ----------
    step : callable
        It should have run before, so that nothing is prepared in it.
    device : torch.device
        Where it runs.
    sizes : Sizes
        By which products are told apart.
    """
    events = _profiled(step, device, record_shapes=True)
    times_ms: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    count, attributed_ms = 0, 0.0

    def add(kind: str, name: str, time_ms: float) -> None:
        nonlocal count, attributed_ms
        times_ms[kind][name] = times_ms[kind].get(name, 0.0) + time_ms
        count, attributed_ms = count + 1, attributed_ms + time_ms

    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        callers, shapes = list(_callers(event)), event.input_shapes or []
        if device.type == "cuda":
            for kernel in event.kernels:
                kind = kind_of(callers, kernel.name, shapes, sizes)
                add(kind, kernel.name, kernel.duration / 1000)
        elif event.self_cpu_time_total > 0:
            kind = kind_of(callers, "", shapes, sizes)
            add(kind, event.name, event.self_cpu_time_total / 1000)
    if device.type == "cuda":  # launched outside every operation that the profiler knows
        add(OTHER, "kernels of no operation", max(0.0, busy_ms(events) - attributed_ms))
    return Busy(
        {kind: sum(times.values()) for kind, times in times_ms.items()},
        {kind: max(times, key=times.__getitem__, default="") for kind, times in times_ms.items()},
        count,
    )


def profile_busy(step: Callable[[], object], device: torch.device) -> float:
    """Run a step once under the profiler; return the milliseconds for which a GPU was busy."""
    return busy_ms(_profiled(step, device, record_shapes=False))


def busy_ms(events: Sequence[Any]) -> float:
    """Return the milliseconds covered by kernels and copies on the device, overlaps once."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    covered = 0.0
    reached = float("-inf")
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / 1000


def _profiled(step: Callable[[], object], device: torch.device, record_shapes: bool) -> list[Any]:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities, record_shapes=record_shapes, acc_events=True) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return list(profiler.events())


def _callers(event: Any) -> Iterator[str]:
    """Return the names of an operation and of all its callers."""
    while event is not None:
        yield event.name
        event = event.cpu_parent
