"""Train one run by many processes, each of which computes a share of every batch.

The batch of ``batch_size`` examples is the same as in one process. Each process computes the
gradient of its share of the summed loss, divided by the number of examples in the whole batch; what
trains is then updated by the sum, in each process alike, so that all hold the same values at every
step. What is sent for a step is one tensor: the gradients of what trains, and the loss. There is
no ``DistributedDataParallel`` around the model: it would send the same, but hooks every parameter's
gradient, which a step that is replayed as a CUDA graph does not call.

Everything is decided alike: by what all processes know (step, scores, plan), or by agreement (a
signal to one of them, want of memory in one, the time to save). The first process alone writes and
prints.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, ConfigError
from spafit.kernels.gpu import choices
from spafit.machine import random_states
from spafit.runs.checkpoint import Checkpoint, TensorFile
from spafit.runs.folder import RunFolder
from spafit.runs.identity import require_same_in_all
from spafit.runs.stopping import StopRequests
from spafit.tasks.task import Dataset
from spafit.text.tokenization import Encodings
from spafit.training.batches import Fed, Feed
from spafit.training.inference import AbandonedError, predict_logits
from spafit.training.prefix.kept import KeptPrefix
from spafit.training.processes.group import Group
from spafit.training.saving import Saver
from spafit.training.settings import TrainConfig
from spafit.training.state import STATE, TrainingState
from spafit.training.step import NoMemoryError, StepResult, TrainingStep

_TENSORS = ".safetensors"

_BATCH = 64
"""Examples of dev at a time, as in one process."""


class Together:
    """What the processes of a run do together.

    Parameters
    ----------
    group : Group
        The processes.

    Attributes
    ----------
    stop : SharedStop
        Whether one of them was asked to stop, and all have agreed on it.
    has_folder : bool
        Whether the first one writes a run folder.
    is_time_here : callable
        Whether the saver of this process finds a checkpoint due by the clock.
    is_time : bool
        Whether all have agreed on that.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.stop = SharedStop()
        self.has_folder = False
        self.is_time = False
        self.is_time_here: Callable[[], bool] = lambda: False

    # ---- Before the first step -------------------------------------------------------------------

    def settings(self, config: TrainConfig) -> TrainConfig:
        """Return the settings for this process: its device, and who writes and prints.

        Raises
        ------
        ConfigError
            If the device is of one process alone.
        """
        self.agree()
        begun = json.loads(self.group.send(json.dumps(config.dropout_in_group_1).encode()))
        self.has_folder = config.out is not None
        config = dataclasses.replace(
            config, device=self._device(config.device), dropout_in_group_1=begun
        )
        if not self.group.is_first:
            config = dataclasses.replace(config, out=None, quiet=True)
        return config

    def require_same(self, record: dict[str, Any], config: TrainConfig) -> None:
        """Refuse what cannot be trained together: too small a batch, or runs that differ.

        Raises
        ------
        ConfigError
            The message names what differs.
        """
        assert config.batch_size is not None
        if config.batch_size < self.group.count:
            raise ConfigError(
                f"a batch of {config.batch_size} (batch_size) cannot be divided among "
                f"{self.group.count} processes; start at most {config.batch_size} "
                "(--nproc-per-node)"
            )
        device = torch.device(config.device).type
        here: dict[str, Any] = json.loads(json.dumps({**record, "device": device}))
        self.agree()
        first = json.loads(self.group.send(json.dumps(here).encode()))
        if first["device"] != device:
            raise ConfigError(
                f"process {self.group.rank} has the device {device}, and process 0 "
                f"{first['device']}; name one for all (--device cpu)"
            )
        require_same_in_all(self.group.rank, first, here)
        self.agree()
        if device == "cuda":
            self.group.use_gpus()

    def draw_apart(self, device: torch.device, step: int = 0) -> None:
        """Have each process but the first draw masks of its own, by the seed that was set."""
        if not self.group.is_first:
            numbers = [torch.default_generator.initial_seed(), self.group.rank, step]
            seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
            random_states.seed_all(int(seed) >> 1, device)

    def divide(self, feed: Feed) -> None:
        """Have a feed make this process's share of each batch."""
        lengths, rank, count = feed.encodings.lengths, self.group.rank, self.group.count

        def divided(drawn: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
            shares = shared_out([lengths[row] for row in drawn], count)
            return drawn[shares[rank]], max(map(len, shares))

        feed.divide = divided

    def sent(self, checkpoint: Checkpoint | None, device: torch.device) -> Checkpoint | None:
        """Return the first process's checkpoint, with the random states of this process.

        With as many processes as when it was saved these are its own; otherwise the first goes on
        with those of the first, and the others begin new ones.

        Raises
        ------
        CheckpointError
            If it is damaged.
        """
        if not self.agree(checkpoint is not None)[0]:
            return None
        files: dict[str, dict[str, torch.Tensor]] = {}
        about: dict[str, Any] = {}
        if checkpoint is not None:
            files = {
                name: checkpoint.tensors(name)
                for name in checkpoint.files
                if name.endswith(_TENSORS)
            }
            about = {
                "path": str(checkpoint.path),
                "step": checkpoint.step,
                "values": checkpoint.values,
                "tensors": [
                    [file, name, str(tensor.dtype).partition(".")[2], list(tensor.shape)]
                    for file, tensors in files.items()
                    for name, tensor in tensors.items()
                ],
            }
        self.agree()
        about = json.loads(self.group.send(json.dumps(about).encode()))
        for file, name, dtype, shape in about["tensors"]:
            tensors = files.setdefault(file, {})
            if name not in tensors:
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            tensors[name] = self.group.send_tensor(tensors[name])
        if checkpoint is not None:
            return checkpoint
        others = about["values"].get("processes", [])
        if not isinstance(others, list) or not all(isinstance(each, dict) for each in others):
            raise CheckpointError(f"{about['path']} is damaged: processes is {others!r:.80}")
        mine = _of_process(self.group.rank)
        if len(others) + 1 == self.group.count and mine in files:
            own = others[self.group.rank - 1]
            about["values"] |= {name: own.get(name) for name in ("random", "kernels")}
            randoms = files[mine]
        else:
            self.draw_apart(device, about["step"])
            states = random_states.take(device)
            about["values"]["random"] = states.to_json()
            randoms = states.tensors
        state = files[STATE].items()
        kept = {name: tensor for name, tensor in state if not name.startswith("random.")}
        files[STATE] = {**kept, **randoms}
        path, values = Path(about["path"]), about["values"]
        return _Sent(path, about["step"], values, tuple(files), held=files)

    def _device(self, name: str) -> str:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            return name
        if name != "cuda":
            raise ConfigError(
                f"the device {name!r} is for one process; many train on cpu, or on cuda, where "
                "each gets the GPU of its LOCAL_RANK"
            )
        gpus, number = torch.cuda.device_count(), self.group.local_rank
        if number is None:
            raise ConfigError("LOCAL_RANK is not set, which numbers the GPUs; use torchrun")
        if number >= gpus:
            raise ConfigError(
                f"process {self.group.rank} is number {number} on its machine, which has {gpus} "
                f"GPUs; give as many processes (--nproc-per-node), or --device cpu"
            )
        return f"cuda:{number}"

    # ---- In training -----------------------------------------------------------------------------

    def agree(self, *numbers: int) -> list[int]:
        """Agree on up to four numbers (:meth:`Group.agree`), on a stop, and on the time to save."""
        stop, is_time, *others = self.group.agree(self.stop.noted, self.is_time_here(), *numbers)
        self.stop.agree(stop)
        self.is_time = bool(is_time)
        return others

    def step(self, take_step: TrainingStep, fed: Fed, learning_rate: float) -> StepResult:
        """Take a step on the batch that this process has a share of.

        Raises
        ------
        NoMemoryError
            If forward or backward ran out of memory in one of the processes.
        """
        take_step.set_learning_rate(learning_rate)
        trained, shortage = take_step.trained, ""
        loss = torch.zeros_like(take_step.spoil)
        if fed.micro_batches:
            try:
                loss = take_step.gradient(fed.micro_batches, len(fed.drawn))
            except NoMemoryError as error:
                shortage = str(error)
        else:
            take_step.scaler.scale(loss)  # which is made at its first use
        # Made before the agreement, after which nothing may fail in one process alone.
        pieces = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
        flat = torch.cat([*(each.reshape(-1) for each in pieces), loss.reshape(1)])
        del pieces
        # In a process without a share nothing has a gradient; elsewhere what the loss depends on.
        has_gradient = torch.tensor([int(each.grad is not None) for each in trained])
        unused = int(has_gradient.numel() - has_gradient.sum()) if fed.micro_batches else 0
        wants_memory, some_unused = self.agree(bool(shortage), unused)[:2]
        if wants_memory:
            raise NoMemoryError(shortage or "in another process")
        self.group.add_up(flat)
        is_used = self.group.largest(has_gradient).tolist() if some_unused else [1] * len(trained)
        sums = torch.split(flat[:-1], [each.numel() for each in trained])
        for parameter, total, used in zip(trained, sums, is_used, strict=True):
            if used and parameter.grad is None:
                parameter.grad = total.view_as(parameter).clone()
            elif used:
                assert parameter.grad is not None
                parameter.grad.copy_(total.view_as(parameter))  # in place: graphs add to it
        return take_step.descend(flat[-1].clone())

    def predict_logits(
        self,
        model: BertForSequenceClassification,
        encodings: Encodings,
        *,
        precision: str,
        prefix: KeptPrefix | None,
        abandoned: Callable[[], bool],
    ) -> NDArray[np.float32]:
        """Return the logits (n, C) of all examples in their order; each process computes some.

        Batches of similar lengths take turns among the processes, which agree before each whether
        to go on.

        Raises
        ------
        AbandonedError
            If a stop was asked for meanwhile.
        """
        n, count = len(encodings), self.group.count
        order, size = encodings.by_length(range(n)), min(_BATCH, math.ceil(n / count))
        batches = [order[start : start + size] for start in range(0, n, size)]
        logits = torch.zeros(n, model.num_labels)
        for first in range(0, len(batches), count):
            self.agree()
            if abandoned():
                raise AbandonedError
            for rows in batches[first : first + count][self.group.rank :][:1]:
                found = predict_logits(
                    model, encodings, rows=rows, precision=precision, prefix=prefix
                )
                logits[rows] = torch.from_numpy(found)
        self.agree()
        return self.group.add_up(logits).numpy()  # each row is 0 in all processes but one

    def most(self, mib: float) -> float:
        """Return the largest memory of a process."""
        return self.agree(math.ceil(mib * 2**20))[0] / 2**20


class SharedStop(StopRequests):
    """Catch signals in each process; what counts is what all have agreed on.

    Later signals are only noted: torchrun sends its own to every process when one has ended, and
    kills what does not end in 30 seconds.

    Attributes
    ----------
    noted : int
        The first signal of this process; 0 before.
    received : signal.Signals or None
        The signal that all have agreed on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted = 0

    def agree(self, number: int) -> None:
        """Take in what all have agreed on."""
        if number and self.received is None:
            self.received = Signals(number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.agree(self.noted)
        super().__exit__(kind, error, traceback)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.noted = self.noted or number


class SharedSaver(Saver):
    """Save the run in the first process, with the random states of all; the others wait."""

    def __init__(
        self,
        together: Together,
        run: RunFolder | None,
        take_step: TrainingStep,
        dev: Dataset,
        save_every: int | None,
        saved: TrainingState,
        say: Callable[[str], object],
    ) -> None:
        self.together = together
        together.is_time_here = self._is_time_here
        self._others: list[dict[str, Any]] = []
        super().__init__(run, take_step, dev, save_every, saved, say)  # type: ignore[arg-type]

    @property
    def resuming(self) -> str:
        """How to resume the run, for messages."""
        return super().resuming if self._writes else "the same command resumes the run from there"

    def save(self, state: TrainingState, *, last: bool = False) -> None:
        """Save the state of a run (:meth:`Saver.save`)."""
        super().save(state, last=last)
        self.together.is_time = False  # the interval begins anew, also after a failure

    def _is_time_here(self) -> bool:
        """Return whether the interval has passed in the process that saves."""
        return self._writes and super()._is_time()

    @property
    def _writes(self) -> bool:
        return self.together.group.is_first

    def _is_time(self) -> bool:
        return self.together.is_time

    def _save(self, state: TrainingState) -> None:
        group, failure = self.together.group, ""
        states = random_states.take(self.take_step.device)
        mine = {
            "random": states.to_json(),
            "kernels": choices.taken(),
            "tensors": {name: tensor.tolist() for name, tensor in states.tensors.items()},
        }
        self.together.agree()
        self._others = [json.loads(each) for each in group.gather(json.dumps(mine).encode())[1:]]
        if self._writes:
            try:
                super()._save(state)
            except CheckpointError as error:
                failure = str(error)
        if self.together.agree(bool(failure))[0]:
            raise CheckpointError(group.send(failure.encode()).decode())

    def _content(self, state: TrainingState) -> tuple[dict[str, TensorFile], dict[str, Any]]:
        files, values = super()._content(state)
        values["processes"] = [
            {"random": each["random"], "kernels": each["kernels"]} for each in self._others
        ]
        for rank, each in enumerate(self._others, start=1):
            tensors = {
                name: torch.tensor(state, dtype=torch.uint8)
                for name, state in each["tensors"].items()
            }
            files[_of_process(rank)] = (tensors, {})
        return files, values

    def _rescue(self, state: TrainingState) -> str:
        return super()._rescue(state) if self._writes else "process 0 says what is saved"


@dataclass(frozen=True)
class _Sent(Checkpoint):
    """A checkpoint that another process has read."""

    held: dict[str, dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one of its files."""
        return dict(self.held[name])


def shared_out(lengths: list[int], count: int) -> list[list[int]]:
    """Share examples out so that the tokens are as equal as the longest allow.

    The longest first, each goes to the process with the fewest tokens so far.

    Parameters
    ----------
    lengths : list of int
        The tokens of each example.
    count : int
        The number of processes.

    Returns
    -------
    list of list of int
        The numbers of each process's examples, in their order.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for number in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        rank = tokens.index(min(tokens))
        shares[rank].append(number)
        tokens[rank] += lengths[number]
    return [sorted(share) for share in shares]


def _of_process(rank: int) -> str:
    return f"process-{rank}{_TENSORS}"
