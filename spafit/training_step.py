"""One step of the optimizer: forward, backward, loss scaling, clipping, AdamW.

With g = Σ over the batch of ∂loss/∂θ, divided by the number of examples: g is clipped to a norm,
and AdamW moves θ. A batch may come in several parts, whose gradients add up; g is the same.

Nothing in a step waits for the device: loss and gradient norm stay there, and where they are not
finite the optimizer leaves everything as it was, by a flag on the device. :mod:`spafit.captured`
records the same step as CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from spafit.bert import BertForSequenceClassification
from spafit.inference import autocast, tf32_products
from spafit.layout import PackedBatch
from spafit.optimisation import loss_function, set_learning_rate


class MicroBatch(NamedTuple):
    """What one forward and backward pass is given, on the model's device."""

    batch: PackedBatch
    """B examples."""
    targets: torch.Tensor
    """Class numbers or scores, (B,)."""
    prefix: torch.Tensor | None = None
    """Kept hidden states after group 1, (N, D)."""


class StepResult(NamedTuple):
    """What came of a step, on the device."""

    loss: torch.Tensor
    """The mean loss of the batch before the step, ()."""
    grad_norm: torch.Tensor
    """The norm of the gradient before it was clipped, (); not finite where the step was skipped."""


#: Gives the logits (B, C) of a packed batch, from its kept prefix where there is one.
Forward = Callable[[PackedBatch, torch.Tensor | None], torch.Tensor]


class TrainingStep:
    """Callable: the parts of a batch and a learning rate -> a step, and what came of it.

    Parameters
    ----------
    model : BertForSequenceClassification
        In training mode, on its device.
    optimizer : torch.optim.Optimizer
        Of what trains (:func:`spafit.optimisation.make_optimizer`).
    arithmetic : {"float32", "tf32", "bf16", "fp16"}
        That of the forward pass; fp16 scales the loss.
    max_grad_norm : float
        0 does not clip.
    forward : callable, optional
        Another form of ``model.forward_packed``, such as a compiled one.
    """

    def __init__(
        self,
        model: BertForSequenceClassification,
        optimizer: torch.optim.Optimizer,
        *,
        arithmetic: str = "float32",
        max_grad_norm: float = 1.0,
        forward: Forward | None = None,
    ) -> None:
        self.model, self.optimizer, self.arithmetic = model, optimizer, arithmetic
        self.device = model.classifier.weight.device
        self.forward: Forward = model.forward_packed if forward is None else forward
        self.trained = [each for each in model.parameters() if each.requires_grad]
        self.max_grad_norm = max_grad_norm or math.inf
        # fp16's smallest gradients vanish unless the loss is scaled up; else this does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=arithmetic == "fp16")

    def __call__(self, parts: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """Take a step on a batch given in one or more parts."""
        set_learning_rate(self.optimizer, learning_rate)
        n = sum(len(part.targets) for part in parts)
        losses = [self.accumulate(part, n) for part in parts]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return StepResult(loss, self.update())

    def accumulate(self, part: MicroBatch, n: int) -> torch.Tensor:
        """Add a part's gradient, and give its share () of the mean loss of all n examples."""
        with tf32_products(self.arithmetic == "tf32"):
            with autocast(self.arithmetic, self.device):
                logits = self.forward(part.batch, part.prefix)
            loss = loss_function(logits, part.targets) / n
            torch.autograd.backward(self.scaler.scale(loss))
        return loss.detach()

    def update(self) -> torch.Tensor:
        """Clip the gradient, move what trains, forget the gradient; give its norm ()."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        if not self.scaler.is_enabled() and self.optimizer.defaults.get("fused"):
            # As the scaler does: the fused optimizer looks at this flag on the device.
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.forget_gradients()
        return norm

    def forget_gradients(self) -> None:
        """Set all gradients to None, so that their memory serves the next forward pass."""
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Give back what the step keeps on the device."""
