"""The training step as CUDA graphs: recorded once for each shape, then replayed by one call.

At batch size 16 a GPU computes an operation of a layer faster than the host launches it, so an
eager step is mostly waiting. A CUDA graph is a recorded sequence of launches that always uses the
memory it was recorded with. So batches get one of a few fixed shapes
(:class:`spafit.layout.Bucket`), and each shape has its own input tensors, into which a batch is
copied before the replay.

A step consists of two kinds of graphs: one for each shape with forward and backward, which adds to
gradients at fixed addresses, and one with the rest (unscaling, clipping, AdamW, zeroing the
gradients). So gradient accumulation needs no further graphs.

The first batch of a shape is an eager step, which also serves as warm-up; the second is recorded
and replayed. Both use PyTorch's random generator: a replay advances it as the eager step does, so
the losses are those of the eager step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch

from spafit.bert import BertForSequenceClassification
from spafit.errors import TrainingError
from spafit.kernels.gpu.cuda_graphs import record
from spafit.layout import PackedBatch
from spafit.machine.memory import is_out_of_memory
from spafit.training.step import Loss, MicroBatch, TrainingStep

#: Records a function's work on the device without executing it; returns the function's result,
#: which each replay overwrites, and the replay.
Capture = Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, Callable[[], object]]]

#: The key of a graph of forward and backward: see :func:`_shape`.
Shape = tuple[object, ...]


class _Recorded(NamedTuple):
    """A graph of forward and backward, and its input and output tensors."""

    given: MicroBatch
    loss: torch.Tensor
    replay: Callable[[], object]

    def __call__(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Replay the graph on another batch of the same shape."""
        torch._foreach_copy_(_tensors(self.given), _tensors(micro_batch), non_blocking=True)
        self.replay()
        return self.loss.clone()  # the next replay writes there


class CapturedStep(TrainingStep):
    """A :class:`~spafit.training.step.TrainingStep` that is replayed from CUDA graphs.

    Its batches must have fixed shapes (``Encodings.packed(rows, bucketed=True)``), and its
    optimizer must have the learning rate on the device (``make_optimizer(..., capturable=True)``).

    Parameters
    ----------
    model, optimizer, precision, max_grad_norm, loss
        As for :class:`~spafit.training.step.TrainingStep`.
    on_failure : callable of str, optional
        Called with a one-line reason if recording fails; from then on every step is eager. Without
        it a TrainingError is raised.
    capture : callable, optional
        Records a function instead of :class:`CudaCapture`, for tests without a GPU.

    Attributes
    ----------
    graphs : int
        The number of shapes that have been recorded.
    """

    def __init__(
        self,
        model: BertForSequenceClassification,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "float32",
        max_grad_norm: float = 1.0,
        loss: Loss | None = None,
        on_failure: Callable[[str], object] | None = None,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(
            model, optimizer, precision=precision, max_grad_norm=max_grad_norm, loss=loss
        )
        self._capture = CudaCapture(self.device) if capture is None else capture
        self._on_failure = on_failure
        self._is_captured = True
        self._seen: set[Shape] = set()
        self._recorded: dict[Shape, _Recorded] = {}
        self._updated = False
        self._update: tuple[torch.Tensor, Callable[[], object]] | None = None
        for parameter in self.trained:  # where all graphs add their gradients
            parameter.grad = torch.zeros_like(parameter)

    @property
    def graphs(self) -> int:
        """The number of shapes that have been recorded."""
        return len(self._recorded)

    def accumulate(self, micro_batch: MicroBatch, n: int) -> torch.Tensor:
        """Add a micro-batch's gradient; return its share () of the mean loss of all n examples."""
        shape = _shape(micro_batch, n)
        recorded = self._recorded.get(shape)
        if recorded is not None:
            return recorded(micro_batch)
        if shape not in self._seen or not self._is_captured:
            self._seen.add(shape)
            return super().accumulate(micro_batch, n)
        assert isinstance(micro_batch.batch, PackedBatch)
        given = MicroBatch(
            micro_batch.batch.mapped(torch.clone),
            micro_batch.targets.clone(),
            None if micro_batch.prefix is None else micro_batch.prefix.clone(),
        )
        found = self._try(lambda: super(CapturedStep, self).accumulate(given, n), halved=True)
        if found is None:
            return super().accumulate(micro_batch, n)
        recorded = self._recorded[shape] = _Recorded(given, *found)
        return recorded(micro_batch)

    def update(self) -> torch.Tensor:
        """Clip the gradient, update the parameters, zero the gradient; return its norm ()."""
        if self._update is None and self._updated and self._is_captured:
            self._update = self._try(super().update)
        self._updated = True
        if self._update is None:
            return super().update()
        norm, replay = self._update
        replay()
        return norm.clone()

    def train_only(self, names: Collection[str]) -> None:
        """Train those of the parameters alone; the graphs are recorded anew."""
        self.recover()
        super().train_only(names)
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def forget_gradients(self) -> None:
        """Set all gradients to 0 in place, because the graphs add to this memory."""
        self.optimizer.zero_grad(set_to_none=False)

    def recover(self) -> None:
        """Free memory after a NoMemoryError: release the graphs, to be recorded again later."""
        self._recorded.clear()
        self._seen.clear()
        self._update, self._updated = None, False
        # This tensor is in the graphs' memory pool, which cannot be freed while it exists.
        vars(self.optimizer).pop("found_inf", None)
        if isinstance(self._capture, CudaCapture):
            self._capture = CudaCapture(self.device)
        super().recover()

    def close(self) -> None:
        """Release the graphs and the gradients."""
        self._recorded.clear()
        self._update = None
        self.optimizer.zero_grad(set_to_none=True)

    def _try(
        self, function: Callable[[], torch.Tensor], *, halved: bool = False
    ) -> tuple[torch.Tensor, Callable[[], object]] | None:
        """Record a function; if that fails, report it and return None.

        With ``halved`` an out-of-memory error is raised instead: smaller micro-batches may fit.
        """
        scaler = self.scaler.state_dict()
        try:
            return self._capture(function)
        except Exception as error:  # whatever cannot be recorded, an eager step can do
            # Earlier graphs refer to a generator and loss scale that are no longer used.
            self._recorded.clear()
            self._update = None
            if scaler:  # the update was not executed, so reset the scaler
                fresh = torch.amp.GradScaler(self.device.type)
                fresh.load_state_dict(scaler)
                fresh.scale(torch.zeros((), device=self.device))  # creates the loaded state
                self.scaler = fresh
            if halved and is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if self._on_failure is None:
                raise TrainingError(
                    f"the step cannot be captured as a CUDA graph ({reason}); use step='eager', or "
                    "'auto'"
                ) from error
            self._is_captured = False
            self._on_failure(f"steps are eager: they cannot be captured as CUDA graphs ({reason})")
            return None


class CudaCapture:
    """Callable: records a function's work on a GPU as a CUDA graph.

    All graphs share one memory pool, because only one of them runs at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(
        self, function: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, Callable[[], object]]:
        """Return the function's result, which each replay overwrites, and the replay."""
        result, graph = record(function, self.device, self.pool)
        return result, graph.replay


def why_not_captured(device: torch.device, recomputes: bool) -> str:
    """Return why steps cannot be captured as CUDA graphs; empty if they can."""
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, the device is {device}"
    if recomputes:
        return "recomputed layers reset the random generator in backward, which a graph cannot"
    return ""


def _shape(micro_batch: MicroBatch, n: int) -> Shape:
    """Return everything that a graph depends on except values."""
    batch = micro_batch.batch
    bucket = batch.layout.bucket if isinstance(batch, PackedBatch) else None
    if bucket is None:
        raise TrainingError("a captured step needs batches of fixed shape (bucketed=True)")
    prefix = None if micro_batch.prefix is None else micro_batch.prefix.dtype
    return (*bucket, len(micro_batch.targets), n, prefix)


def _tensors(micro_batch: MicroBatch) -> list[torch.Tensor]:
    assert isinstance(micro_batch.batch, PackedBatch)
    prefix = [] if micro_batch.prefix is None else [micro_batch.prefix]
    return [*micro_batch.batch.tensors(), micro_batch.targets, *prefix]
