"""Small training steps: eager ones, and ones captured by a recorder in place of CUDA graphs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification
from spafit.training.batches import Feed
from spafit.training.captured_step import Capture, CapturedStep
from spafit.training.optimisation import make_optimizer
from spafit.training.step import TrainingStep
from support.small_runs import SmallRun

CPU = torch.device("cpu")


@dataclass
class Recorder:
    """Records a function as a CUDA graph does: its replay calls it and writes to the same result.

    ``fails_at`` is the number of the recording that fails, from 1.
    """

    fails_at: float = math.inf
    dtype: torch.dtype = torch.float32
    recordings: int = 0
    replays: list[int] = field(default_factory=list)
    results: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def __call__(
        self, function: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, Callable[[], object]]:
        self.recordings += 1
        number = self.recordings
        if number >= self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        result = torch.full((), math.nan, dtype=self.dtype)
        self.results.append(weakref.ref(result))

        def replay() -> None:
            self.replays.append(number)
            result.copy_(function())

        return result, replay


def make_feed(
    small: SmallRun,
    *,
    bucketed: bool = True,
    accumulation: int = 1,
    epochs: int = 4,
    batch_size: int = 6,
) -> Feed:
    encodings = small.tokenizer.encode(small.train.texts_a, small.train.texts_b, max_length=53)
    targets = torch.arange(len(encodings)) % 2
    return Feed(
        encodings,
        targets,
        CPU,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=epochs,
        seed=5,
        bucketed=bucketed,
    )


def eager(
    model: BertForSequenceClassification, precision: str = "float32", max_grad_norm: float = 1.0
) -> TrainingStep:
    optimizer = make_optimizer(model, learning_rate=1e-2, weight_decay=0.01)
    return TrainingStep(model, optimizer, precision=precision, max_grad_norm=max_grad_norm)


def captured(
    model: BertForSequenceClassification,
    recorder: Capture,
    on_failure: Callable[[str], object] | None = None,
    **settings: Any,
) -> CapturedStep:
    optimizer = make_optimizer(model, learning_rate=1e-2, weight_decay=0.01, capturable=True)
    return CapturedStep(model, optimizer, on_failure=on_failure, capture=recorder, **settings)
