"""One training step: forward, backward, loss scaling, gradient clipping, AdamW.

With g = Σ over the batch of ∂loss/∂θ, divided by the number of examples: g is clipped to a norm,
and AdamW updates θ. A batch may be split into micro-batches, whose gradients add up to the same g.

Nothing in a step synchronizes with the device: loss and gradient norm stay there, and if they are
not finite, a flag on the device makes the optimizer skip the update.
:mod:`spafit.training.captured_step` records the same step as CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, TrainingError
from spafit.layout import PackedBatch
from spafit.machine.memory import is_out_of_memory, shortage
from spafit.machine.precision import autocast, tf32_products
from spafit.text.tokenization import Batch
from spafit.training.optimisation import loss_function, set_learning_rate, trained_parameters
from spafit.weights.adapter_files import name_in_files

# AdamW's state for a parameter.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class MicroBatch(NamedTuple):
    """The input of one forward and backward pass, on the model's device."""

    batch: PackedBatch | Batch
    """B examples, packed, or padded for the reference form of the model."""
    targets: torch.Tensor
    """Class numbers or scores, (B,)."""
    prefix: torch.Tensor | None = None
    """The kept output of group 1 for a packed batch, (N, D) or (B, D)."""


class StepResult(NamedTuple):
    """The result of a step, on the device."""

    loss: torch.Tensor
    """The mean loss of the batch before the step, ()."""
    grad_norm: torch.Tensor
    """The norm of the gradient before clipping, (); not finite if the step was skipped."""


class NoMemoryError(TrainingError):
    """A batch was too large for memory; nothing was updated, and smaller micro-batches may fit."""


#: Returns the logits (B, C) of a packed batch, from its kept prefix if there is one.
Forward = Callable[[PackedBatch, torch.Tensor | None], torch.Tensor]

#: Returns the loss () of logits (B, C) and targets (B,), summed over the examples.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TrainingStep:
    """Callable: the micro-batches of a batch and a learning rate -> the step's result.

    Parameters
    ----------
    model : BertForSequenceClassification
        In training mode, on its device.
    optimizer : torch.optim.Optimizer
        From :func:`spafit.training.optimisation.make_optimizer`.
    precision : {"float32", "tf32", "bf16", "fp16"}
        Precision of the forward pass; fp16 scales the loss.
    max_grad_norm : float
        The norm to which the gradient is clipped; 0 does not clip.
    forward : callable, optional
        Another form of ``model.forward_packed``, such as a compiled one.
    loss : callable, optional
        Another loss than :func:`~spafit.training.optimisation.loss_function`.

    Attributes
    ----------
    parameters : dict of str to nn.Parameter
        All that the run trains, by name.
    trained : list of nn.Parameter
        Those of them that train at the moment.
    spoil : torch.Tensor, ()
        0, or NaN if the loss is not finite.
    """

    def __init__(
        self,
        model: BertForSequenceClassification,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "float32",
        max_grad_norm: float = 1.0,
        forward: Forward | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.loss = loss
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.device = model.classifier.weight.device
        self.forward: Forward = model.forward_packed if forward is None else forward
        self.parameters = trained_parameters(model)
        self.trained = list(self.parameters.values())
        self.max_grad_norm = max_grad_norm or math.inf
        # 0, or NaN if the loss is not finite; added to the gradient to make it NaN too.
        self.spoil = torch.zeros((), dtype=self.trained[0].dtype, device=self.device)
        # fp16's smallest gradients underflow unless the loss is scaled; disabled otherwise.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def __call__(self, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """Take a step on a batch given in one or more micro-batches.

        Raises
        ------
        NoMemoryError
            If forward or backward ran out of memory.
        TrainingError
            If the update ran out of memory; the first one allocates the moments.
        """
        self.set_learning_rate(learning_rate)
        return self.descend(self.gradient(micro_batches))

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next update."""
        set_learning_rate(self.optimizer, learning_rate)

    def gradient(self, micro_batches: Sequence[MicroBatch], n: int | None = None) -> torch.Tensor:
        """Compute the gradient of the mean loss of n examples; return the loss ().

        Without ``n`` they are those of the micro-batches; with it these are some of them, and give
        their share of gradient and loss.

        Raises
        ------
        NoMemoryError
            If forward or backward ran out of memory.
        """
        if n is None:
            n = sum(len(each.targets) for each in micro_batches)
        try:
            losses = [self.accumulate(each, n) for each in micro_batches]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise NoMemoryError(shortage(error)) from error
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def descend(self, loss: torch.Tensor) -> StepResult:
        """Update the parameters by the gradient, unless that or the loss () is not finite.

        Raises
        ------
        TrainingError
            If it ran out of memory; the first update allocates the moments.
        """
        self.spoil.copy_(loss - loss)
        try:
            return StepResult(loss, self.update())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"not enough memory for the optimizer's moments ({shortage(error)}), which take "
                "twice the trained parameters; use a plan that trains less"
            ) from error

    def train_only(self, names: Collection[str]) -> None:
        """Train those of :attr:`parameters` alone, and freeze the others, until the next call."""
        if self.forward != self.model.forward_packed:  # compiled: it is limited how often
            torch.compiler.reset()
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
            if name not in names:
                parameter.grad = None
        self.trained = [each for name, each in self.parameters.items() if name in names]

    def accumulate(self, micro_batch: MicroBatch, n: int) -> torch.Tensor:
        """Add a micro-batch's gradient; return its share () of the mean loss of all n examples."""
        with tf32_products(self.precision == "tf32"):
            with autocast(self.precision, self.device):
                if isinstance(micro_batch.batch, PackedBatch):
                    logits = self.forward(micro_batch.batch, micro_batch.prefix)
                else:
                    logits = self.model(*micro_batch.batch)
            loss = (self.loss or loss_function)(logits, micro_batch.targets) / n
            torch.autograd.backward(self.scaler.scale(loss))
        return loss.detach()

    def update(self) -> torch.Tensor:
        """Clip the gradient, update the parameters, drop the gradient; return its norm ()."""
        if self.trained[0].grad is not None:  # an infinite loss may have a finite gradient
            self.trained[0].grad.add_(self.spoil)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        if not self.scaler.is_enabled() and self.optimizer.defaults.get("fused"):
            # As the scaler does: the fused optimizer reads this flag on the device.
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.forget_gradients()
        return norm

    def forget_gradients(self) -> None:
        """Set all gradients to None, so that the next forward pass can use their memory."""
        self.optimizer.zero_grad(set_to_none=True)

    def recover(self) -> None:
        """Free memory after a NoMemoryError: drop the partial gradient."""
        self.forget_gradients()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the state of a step besides the model: tensors by name, and other values.

        The tensors are AdamW's, ``optimizer.KEY.PARAMETER``, with parameters named as in files
        (:data:`spafit.weights.adapter_files.NAMES_IN_FILES`); the other value is the loss scale.
        """
        tensors = {
            f"optimizer.{key}.{name_in_files(name)}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return tensors, {"scaler": self.scaler.state_dict()}

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned; only before the first step.

        Raises
        ------
        CheckpointError
            If a tensor does not match a trained parameter and its shape, or is missing, or the
            loss scale is invalid.
        """
        parameters = {name_in_files(name): each for name, each in self.parameters.items()}
        for full_name, tensor in tensors.items():
            optimizer, _, rest = full_name.partition(".")
            key, _, name = rest.partition(".")
            parameter = parameters.get(name)
            shape = torch.Size() if key == "step" else getattr(parameter, "shape", None)
            is_ours = optimizer == "optimizer" and key in _MOMENTS and tensor.is_floating_point()
            if parameter is None or tensor.shape != shape or not is_ours:
                raise CheckpointError(
                    f"{full_name} {tuple(tensor.shape)} matches no trained parameter"
                )
            # The step count is on the host, unless a fused or captured update reads it.
            on_device = tensor.dim() or self.optimizer.defaults.get("fused")
            place = parameter.device if on_device else torch.device("cpu")
            self.optimizer.state[parameter][key] = tensor.to(place, copy=True)
        assert self.model.adaptation is not None
        moments: dict[object, set[frozenset[str]]] = {}  # of what begins to train together
        for name, parameter in self.parameters.items():
            of_these = moments.setdefault(self.model.adaptation.trained[name].thaw, set())
            of_these.add(frozenset(self.optimizer.state.get(parameter, ())))
        for found in moments.values():
            if len(found) > 1 or not found <= {frozenset(), frozenset(_MOMENTS)}:
                raise CheckpointError("the optimizer's moments of some parameters are missing")
        if self.scaler.is_enabled():
            scaler = values.get("scaler")
            expected = self.scaler.state_dict()
            if not (
                isinstance(scaler, dict)
                and scaler.keys() == expected.keys()
                and all(type(scaler[key]) is type(value) for key, value in expected.items())
            ):
                raise CheckpointError(f"the scale of the loss is {scaler!r:.200}")
            self.scaler.load_state_dict(dict(scaler))
            self.scaler.scale(torch.zeros((), device=self.device))  # creates the loaded state

    def close(self) -> None:
        """Release what the step holds on the device."""
