"""Make the training step for a run's settings, and read its results without blocking the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

from spafit.bert import BertForSequenceClassification
from spafit.layout import PackedBatch
from spafit.training.captured_step import CapturedStep
from spafit.training.optimisation import make_optimizer
from spafit.training.settings import TrainConfig
from spafit.training.step import Forward, Loss, StepResult, TrainingStep

About = TypeVar("About")


def make_step(
    model: BertForSequenceClassification,
    config: TrainConfig,
    say: Callable[[str], object],
    loss: Loss | None = None,
) -> TrainingStep:
    """Make the training step of a run.

    Parameters
    ----------
    model : BertForSequenceClassification
        Adapted, on its device.
    config : TrainConfig
        Complete (:func:`spafit.training.settings.complete`).
    say : callable of str
        Called with one line if steps turn out not to be capturable.
    loss : callable, optional
        Another loss than :func:`~spafit.training.optimisation.loss_function`.
    """
    assert config.learning_rate is not None
    optimizer = make_optimizer(
        model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        decay_biases=config.decay_biases,
        capturable=config.step == "captured",
    )
    if config.step == "captured":
        return CapturedStep(
            model,
            optimizer,
            precision=config.precision,
            max_grad_norm=config.max_grad_norm,
            loss=loss,
            on_failure=say,
        )
    return TrainingStep(
        model,
        optimizer,
        precision=config.precision,
        max_grad_norm=config.max_grad_norm,
        forward=compiled_forward(model) if config.step == "compiled" else None,
        loss=loss,
    )


def compiled_forward(
    model: BertForSequenceClassification, backend: str | Callable[..., Any] = "inductor"
) -> Forward:
    """Return ``model.forward_packed`` compiled by torch.compile as one graph.

    Parameters
    ----------
    model : BertForSequenceClassification
        Adapted, on its device.
    backend : str or callable
        The backend of torch.compile.

    Returns
    -------
    callable
        It is compiled at its first call, and again for another number of examples, or where another
        order of products takes less; otherwise the numbers of rows and tokens may change.
    """
    compiled = torch.compile(model.forward_packed, fullgraph=True, dynamic=True, backend=backend)

    def forward(batch: PackedBatch, prefix: torch.Tensor | None = None) -> torch.Tensor:
        batch.layout.prepare()  # what it creates at its first use cannot be compiled
        logits: torch.Tensor = compiled(batch, prefix)
        return logits

    return forward


class Readings(Generic[About]):
    """Copies the results of steps to the host: on a GPU one step late, so that it never blocks.

    Parameters
    ----------
    device : torch.device
        The device of the steps.

    Attributes
    ----------
    behind : int
        How many of the last steps' results are unknown when the next step begins.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.behind = 1 if device.type == "cuda" else 0
        self._waiting: deque[tuple[About, torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, about: About, result: StepResult) -> None:
        """Start copying a step's result to the host."""
        numbers = torch.stack([each.detach().double() for each in result])
        event = None
        if self.behind:
            numbers = numbers.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        self._waiting.append((about, numbers, event))

    def ready(self, wait: bool = False) -> Iterator[tuple[About, float, float]]:
        """Yield (about, loss, gradient norm) of each finished step, in order.

        On a GPU the last step's are included only with ``wait``.
        """
        while len(self._waiting) > (0 if wait else self.behind):
            about, numbers, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            loss, grad_norm = numbers.tolist()
            yield about, loss, grad_norm
