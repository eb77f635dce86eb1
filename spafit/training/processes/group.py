"""How the processes of a run talk: they agree, add up, gather, send, and fail together.

Before every exchange of data all of them agree on a few small numbers (:meth:`Group.agree`), and
between the two nothing can fail. So a process with an error always finds the others at their next
agreement, where it says so, and all end with that error. Numbers on the host go by gloo, which does
not wait for a GPU; gradients on GPUs go by NCCL.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from signal import Signals
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from spafit import errors
from spafit.errors import ConfigError, SpafitError, StoppedError, TrainingError, one_line
from spafit.machine.launched import Launched, launched

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others, as while process 0 saves, until it gives up."""

AGREED = 6
"""How many numbers are agreed on at once."""

_current: Group | None = None
_depth = 0


class Group:
    """The processes of a run.

    Attributes
    ----------
    rank : int
        The number of this process, from 0; the first one alone writes and prints.
    count : int
        How many processes there are.
    local_rank : int or None
        The number of this process on its machine, if torchrun started it.
    is_lost : bool
        Whether another process has gone, so that nothing can be exchanged any more.
    """

    def __init__(self, place: Launched | None) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.local_rank = None if place is None else place.local_rank
        self._world = dist.group.WORLD
        self._host = self._world
        if dist.get_backend() != "gloo":  # the caller's
            self._host = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._gpus: Any = None
        self.is_lost = False
        self._has_failed = False  # all know that one of them has failed

    @property
    def is_current(self) -> bool:
        """Whether the caller has not left this process group meanwhile."""
        return dist.is_initialized() and dist.group.WORLD is self._world

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def agree(self, *numbers: int) -> list[int]:
        """Return the largest of each number that the processes give, the same in all of them.

        Parameters
        ----------
        *numbers : int
            Up to ``AGREED`` numbers from 0; what is left out is 0.

        Raises
        ------
        SpafitError
            That of a process that has failed meanwhile.
        TrainingError
            If another process has ended without a word.
        """
        failed, *agreed = self._largest(False, numbers)
        if failed:
            raise self._failure(b"")
        return agreed

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the largest of each entry of a tensor on the host; agree first."""
        self._exchange(dist.all_reduce, tensor, op=dist.ReduceOp.MAX, group=self._host)
        return tensor

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by the sum over the processes, on its device; agree first."""
        group = self._host if tensor.device.type == "cpu" else self._on_gpus()
        self._exchange(dist.all_reduce, tensor, group=group)
        return tensor

    def gather(self, mine: bytes) -> list[bytes]:
        """Return what each process gives, in their order; agree first."""
        size = torch.tensor([len(mine)])
        sizes = [torch.empty_like(size) for _ in range(self.count)]
        self._exchange(dist.all_gather, sizes, size, group=self._host)
        most = int(torch.cat(sizes).max())
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(mine)] = _as_tensor(mine)
        every = [torch.empty_like(padded) for _ in range(self.count)]
        if most:
            self._exchange(dist.all_gather, every, padded, group=self._host)
        return [_as_bytes(each[: int(length)]) for each, length in zip(every, sizes, strict=True)]

    def send(self, data: bytes) -> bytes:
        """Return what the first process gives; agree first."""
        size = torch.tensor([len(data)])
        self._exchange(dist.broadcast, size, src=0, group=self._host)
        tensor = _as_tensor(data) if self.is_first else torch.empty(int(size), dtype=torch.uint8)
        return _as_bytes(self.send_tensor(tensor))

    def send_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor on the host by that of the first process; agree first."""
        if tensor.numel():
            self._exchange(dist.broadcast, tensor, src=0, group=self._host)
        return tensor

    def use_gpus(self) -> None:
        """Have tensors on GPUs go by NCCL; all processes at once."""
        if self._gpus is None:
            backend = "nccl" if dist.is_nccl_available() else "gloo"
            self._gpus = dist.new_group(backend=backend, timeout=TIMEOUT)

    def fail(self, error: Exception) -> None:
        """Tell the others of an error, unless they know it or cannot be reached."""
        if self.is_lost or self._has_failed:
            return
        self._largest(True, ())
        what: dict[str, object] = {"kind": type(error).__name__, "text": str(error)}
        if isinstance(error, StoppedError):
            what["signal"] = int(error.signal)
        self._failure(json.dumps(what).encode())
        if isinstance(error, SpafitError):
            error.is_told_elsewhere = not self.is_first

    def renew(self) -> None:
        """Forget an error that all have raised, so that another run can follow."""
        self._has_failed = False

    def _largest(self, failed: bool, numbers: tuple[int, ...]) -> list[int]:
        given = [int(failed), *map(int, numbers), *[0] * (AGREED - len(numbers))]
        return [int(each) for each in self.largest(torch.tensor(given))]

    def _failure(self, mine: bytes) -> SpafitError:
        """Exchange what has failed, and return the error of the first process that has one."""
        told = self.gather(mine)
        self._has_failed = True
        rank = next(rank for rank, each in enumerate(told) if each)
        what = json.loads(told[rank])
        kind, text = getattr(errors, what["kind"], None), what["text"]
        if kind is StoppedError:
            failure: SpafitError = StoppedError(text, Signals(what["signal"]))
        elif isinstance(kind, type) and issubclass(kind, SpafitError):
            failure = kind(f"process {rank} of {self.count}: {text}")
        else:
            text = f"{what['kind']}: {one_line(text)}"
            failure = TrainingError(f"process {rank} of {self.count}: {text}")
        failure.is_told_elsewhere = not self.is_first
        return failure

    def _on_gpus(self) -> Any:
        assert self._gpus is not None
        return self._gpus

    def _exchange(self, function: Callable[..., Any], *tensors: Any, **how: Any) -> None:
        try:
            function(*tensors, **how)
        except RuntimeError as error:
            self.is_lost = True
            reason = one_line(str(error).partition("\n")[0], 120)
            raise TrainingError(
                f"another process of this run has ended or cannot be reached ({reason}); the same "
                "command resumes the run from its last checkpoint"
            ) from error


@contextmanager
def processes() -> Iterator[Group | None]:
    """Give the processes that train one run together; None where this one is alone.

    They are those that torchrun has started, or those of the caller's own process group if one is
    initialised (``torch.distributed.init_process_group``). An error in the block of one process is
    raised in all, and none leaves the outermost block before all have come to its end.

    Raises
    ------
    ConfigError
        If the processes cannot connect to each other.
    """
    global _current, _depth
    if _depth == 0:
        _current = _joined(_current)
    group = _current
    if group is None:
        yield None
        return
    _depth += 1
    try:
        yield group
    except Exception as error:
        if _depth == 1:
            with suppress(SpafitError):  # this one matters more
                group.fail(error)
        raise
    except BaseException:  # such as Ctrl-C, which may have come within an exchange
        group.is_lost = True
        raise
    else:
        if _depth == 1:
            group.agree()  # wait for the others to come to their end
    finally:
        _depth -= 1
        if _depth == 0:
            group.renew()


def _joined(before: Group | None) -> Group | None:
    """Return the group of this process; it is made once."""
    if before is not None and before.is_current:
        return before
    place = launched()
    if not dist.is_available():
        if place is not None:
            raise ConfigError("this build of torch has no torch.distributed: train in one process")
        return None
    if not dist.is_initialized():
        if place is None:
            return None
        try:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            reason = one_line(str(error).partition("\n")[0])
            raise ConfigError(
                f"the processes cannot connect to each other: {reason}; start them by torchrun, "
                "with the same --rdzv-endpoint on every machine"
            ) from None
        atexit.register(_leave)
    return Group(place) if dist.get_world_size() > 1 else None


def _leave() -> None:
    if dist.is_initialized() and (_current is None or not _current.is_lost):
        dist.destroy_process_group()


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy().tobytes())
