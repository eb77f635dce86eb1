"""Make a run's batches in order, and prefetch them to the device.

Examples are tokenized once, before the first step. Batches are made from lists on the host, so all
lengths are known there without synchronizing with the device. For a GPU a thread prepares the next
batches in pinned memory while the current one is computed. A CPU would do both itself, and makes a
batch when it is due.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from spafit.layout import PackedBatch
from spafit.machine.precision import autocast
from spafit.text.tokenization import Batch, Encodings
from spafit.training.optimisation import epoch_order
from spafit.training.prefix.kept import KeptPrefix
from spafit.training.step import MicroBatch

Item = TypeVar("Item")
Made = TypeVar("Made")

#: The rows of a batch -> those of this process, and how many the one with most has.
Divide = Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], int]]

_AHEAD = 2
"""Number of batches to prefetch."""


class Fed(NamedTuple):
    """The input of one optimizer step.

    Attributes
    ----------
    epoch : int
        From 1.
    drawn : numpy.ndarray of int64
        The rows of its examples, in the shuffled order.
    micro_batches : list of MicroBatch
        The examples in one or more micro-batches, on the device.
    """

    epoch: int
    drawn: NDArray[np.int64]
    micro_batches: list[MicroBatch]


class _OnHost(NamedTuple):
    """A micro-batch on the host."""

    rows: list[int]
    batch: PackedBatch | Batch
    targets: torch.Tensor
    prefix: torch.Tensor | None


class Feed:
    """The batches of all epochs of a run.

    The order of an epoch is a function of (seed, epoch) alone; its last batch may be smaller.

    Parameters
    ----------
    encodings : Encodings
        The examples.
    targets : torch.Tensor, (n,)
        Their class numbers or scores.
    device : torch.device
        The device for the batches.
    batch_size, accumulation, epochs, seed : int
        As in :class:`~spafit.training.settings.TrainConfig`.
    precision : str
        The precision for computing a kept prefix that is missing.
    bucketed : bool
        Whether batches get one of a few fixed shapes, as a captured step needs.
    padded : bool
        Whether batches are padded, with their examples in the shuffled order, for the reference
        form; otherwise, and always with a kept prefix, they are packed and sorted by length.

    Attributes
    ----------
    accumulation : int
        The current number of micro-batches per batch; :meth:`halve` may increase it.
    prefix : KeptPrefix or None
        The kept hidden states after group 1; to be set before the first batch.
    divide : callable or None
        Divides the rows of a batch among the processes that train together; returns those of this
        one, and how many the one with most has.
    """

    def __init__(
        self,
        encodings: Encodings,
        targets: torch.Tensor,
        device: torch.device,
        *,
        batch_size: int,
        accumulation: int,
        epochs: int,
        seed: int,
        precision: str = "float32",
        bucketed: bool = False,
        padded: bool = False,
    ) -> None:
        self.encodings, self.targets, self.device = encodings, targets, device
        self.batch_size, self.accumulation = batch_size, accumulation
        self.epochs, self.seed = epochs, seed
        self.precision, self.bucketed, self.padded = precision, bucketed, padded
        self.prefix: KeptPrefix | None = None
        self.divide: Divide | None = None

    @property
    def steps_an_epoch(self) -> int:
        """Number of optimizer steps in one epoch."""
        return math.ceil(len(self.encodings) / self.batch_size)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in the run."""
        return self.steps_an_epoch * self.epochs

    def batches(self, done: int = 0) -> Generator[Fed, None, None]:
        """Yield the batches of all steps after the first ``done`` ones."""
        ahead = _AHEAD if self.device.type == "cuda" else 0
        for epoch, drawn, made in made_ahead(self._orders(done), self._make, ahead):
            if len(made) < self._micro_batches_of(len(self._divided(drawn)[0])):  # halved since
                made = self._make((epoch, drawn))[2]
            yield Fed(epoch, drawn, [self._send(each) for each in made])

    def halve(self, fed: Fed) -> Fed | None:
        """Halve the size of the micro-batches of this batch and all later ones.

        Return None if they are single examples already.
        """
        most = self._divided(fed.drawn)[1]
        micro_batches = self._micro_batches_of(most)
        if micro_batches == most:
            return None
        self.accumulation = min(2 * micro_batches, most)
        made = self._make((fed.epoch, fed.drawn))[2]
        return fed._replace(micro_batches=[self._send(each) for each in made])

    def _orders(self, done: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (epoch, row numbers) of every step after the first ``done`` ones."""
        n = len(self.encodings)
        begun, within = divmod(done, self.steps_an_epoch)
        for epoch in range(begun + 1, self.epochs + 1):
            order = epoch_order(n, self.seed, epoch)
            for start in range(within * self.batch_size, n, self.batch_size):
                yield epoch, order[start : start + self.batch_size]
            within = 0

    def _divided(self, drawn: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        return (drawn, len(drawn)) if self.divide is None else self.divide(drawn)

    def _micro_batches_of(self, examples: int) -> int:
        return min(self.accumulation, examples)

    def _make(
        self, step: tuple[int, NDArray[np.int64]]
    ) -> tuple[int, NDArray[np.int64], list[_OnHost]]:
        """Make a step's micro-batches on the host."""
        epoch, drawn = step
        made: list[_OnHost] = []
        mine = self._divided(drawn)[0]
        if not len(mine):
            return epoch, drawn, made
        for some in np.array_split(mine, self._micro_batches_of(len(mine))):
            batch: PackedBatch | Batch
            kept = None
            rows = some.tolist()
            if not self.padded or (self.prefix is not None and not self.prefix.cache.per_example):
                rows = self.encodings.by_length(rows)  # else as drawn: the head's masks are, too
            if self.padded and self.prefix is None:
                batch = self.encodings.batch(rows)
            else:
                batch = self.encodings.packed(rows, self.bucketed)
                kept = None if self.prefix is None else self.prefix.read(rows, batch.layout)
            targets = self.targets[rows]
            if self.device.type == "cuda":
                batch, targets = batch.pinned(), targets.pin_memory()
                kept = None if kept is None else kept.pin_memory()
            made.append(_OnHost(rows, batch, targets, kept))
        return epoch, drawn, made

    def _send(self, made: _OnHost) -> MicroBatch:
        """Copy a micro-batch and its kept prefix to the device asynchronously."""
        batch = made.batch.to(self.device)
        targets = made.targets.to(self.device, non_blocking=True)
        if self.prefix is None or not isinstance(batch, PackedBatch):
            return MicroBatch(batch, targets)
        if made.prefix is not None:
            return MicroBatch(batch, targets, made.prefix.to(self.device, non_blocking=True))
        with autocast(self.precision, self.device):
            return MicroBatch(batch, targets, self.prefix(made.rows, batch))


def made_ahead(items: Iterable[Item], make: Callable[[Item], Made], ahead: int) -> Iterator[Made]:
    """Yield ``make(item)`` of each item in order, prefetched by a thread.

    Parameters
    ----------
    items : iterable
        The items; the caller's thread iterates over them.
    make : callable
        Called in the thread; its error is raised in place of its result.
    ahead : int
        How many results to prefetch; 0 uses no thread.
    """
    if ahead == 0:
        yield from map(make, items)
        return
    waiting: deque[Future[Made]] = deque()
    maker = ThreadPoolExecutor(1, thread_name_prefix="spafit-feed")
    try:
        for item in items:
            waiting.append(maker.submit(make, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also if the caller stops early
        maker.shutdown(cancel_futures=True)
