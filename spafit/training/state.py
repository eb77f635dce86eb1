"""The state of a run, and the checkpoint that holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, TrainingError, WeightsError
from spafit.kernels.gpu import choices
from spafit.machine import random_states
from spafit.machine.random_states import RandomStates
from spafit.runs.checkpoint import Checkpoint, TensorFile
from spafit.tasks.task import Label
from spafit.training.step import TrainingStep
from spafit.weights.adapter_files import adapter_content, name_in_files, names_in_model

# The fields that are stored in state.json as they are, with their types.
_KINDS: dict[str, tuple[type, ...]] = {
    "skips": (list,),
    "history": (list,),
    "best_step": (int, NoneType),
    "accumulation": (int,),
    "training_s": (float,),
    "seconds": (float,),
    "peak_memory_mib": (float,),
}

_ADAPTER, _BEST = "adapter.safetensors", "best.safetensors"

STATE = "state.safetensors"
"""The file of a checkpoint that holds optimizer, losses and random states."""


@dataclass
class TrainingState:
    """The state of a run, apart from model, optimizer and random numbers.

    Attributes
    ----------
    step : int
        Optimizer steps done, skipped ones included.
    losses : list of float
        The loss of every step; it may be NaN or infinite.
    skips : list of int
        Steps whose loss or gradient was not finite: optimizer and schedule did not move.
    history : list of dict
        All evaluations: step, epoch, metrics.
    best : dict of str to torch.Tensor
        Values of all parameters that the plan declares at the best evaluation, on the host; empty
        before the first evaluation.
    best_step : int or None
        The step of the best evaluation.
    answers : list of str or float
        What the best evaluation predicted for each example of dev. Empty before the first
        evaluation, and in checkpoints of older versions.
    accumulation : int
        Micro-batches that a batch is split into so that memory suffices; 1 if it is not split.
    training_s, seconds : float
        Time of the training steps, and of the whole run.
    peak_memory_mib : float
        The most memory used by any process of the run.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    skips: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_step: int | None = None
    answers: list[Label] = field(default_factory=list)
    accumulation: int = 1
    training_s: float = 0.0
    seconds: float = 0.0
    peak_memory_mib: float = 0.0

    def gives_up(self, evaluations: int | None) -> bool:
        """Return whether so many evaluations in a row have not been better than the best."""
        if evaluations is None or self.best_step is None:
            return False
        since = [each for each in self.history if each["step"] > self.best_step]
        return len(since) >= evaluations

    @property
    def skips_in_a_row(self) -> int:
        """The number of latest steps that were skipped in a row."""
        count = 0
        while count < len(self.skips) and self.skips[-1 - count] == len(self.losses) - count:
            count += 1
        return count

    def add_step(self, step: int, loss: float, grad_norm: float) -> bool:
        """Record the outcome of a step; return whether it was skipped."""
        is_skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        self.losses.append(loss)
        if is_skipped:
            self.skips.append(step)
        return is_skipped

    def updates_before(self, step: int, unknown: int = 0) -> int:
        """Count the updates before a step.

        The outcomes of the last ``unknown`` steps are not known yet. These steps always count as
        updates, so that the result does not depend on when this is called.
        """
        known = step - unknown
        return step - 1 - sum(skipped < known for skipped in self.skips)


def content(
    state: TrainingState, model: BertForSequenceClassification, take_step: TrainingStep
) -> tuple[dict[str, TensorFile], dict[str, Any]]:
    """Return the files and values of a checkpoint.

    Raises
    ------
    TrainingError
        If a trained value, or a moment of the optimizer, is NaN or infinite.
    """
    tensors, step_values = take_step.state()
    sick = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if sick:
        raise TrainingError(
            f"{sick[0]} is NaN or infinite after step {state.step}, so nothing is saved; "
            "try a lower learning rate, or clip the gradient (max_grad_norm)"
        )
    randoms = random_states.take(take_step.device)
    losses = torch.tensor(state.losses, dtype=torch.float64)
    files: dict[str, TensorFile] = {
        # As integers: a loss may be NaN, which our safetensors files must not contain.
        STATE: ({**tensors, **randoms.tensors, "losses": losses.view(torch.int64)}, {}),
    }
    try:
        files[_ADAPTER] = adapter_content(model)
        if state.best_step not in (None, state.step):
            files[_BEST] = adapter_content(model, state.best)
    except WeightsError as error:
        raise TrainingError(f"after step {state.step} {error}; try a lower learning rate") from None
    values = {
        **{name: getattr(state, name) for name in _KINDS},
        "answers": state.answers,
        "kernels": choices.taken(),
        "random": randoms.to_json(),
        **step_values,
    }
    return files, values


def restore(
    checkpoint: Checkpoint, model: BertForSequenceClassification, take_step: TrainingStep
) -> TrainingState:
    """Set model, optimizer and random numbers to the state of a checkpoint.

    Raises
    ------
    CheckpointError
        If its content does not fit; model and random generators are then unchanged.
    """
    values, tensors = checkpoint.values, checkpoint.tensors(STATE)
    current = checkpoint.tensors(_ADAPTER)
    best = checkpoint.tensors(_BEST) if _BEST in checkpoint.files else dict(current)
    try:
        _check_values(values, checkpoint.step)
        _check_losses(tensors.get("losses"), checkpoint.step)
        for found in (current, best):
            _check_trained(found, model)
        losses = tensors.pop("losses").view(torch.float64).tolist()
        randoms = {name: tensors.pop(name) for name in list(tensors) if name.startswith("random.")}
        states = RandomStates.from_json(randoms, values.get("random"))
        take_step.restore(tensors, values)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.path} is damaged, or of another version of spafit: {error}"
        ) from None
    # Everything has been checked: an exception from here on is a bug, and is not converted.
    state = TrainingState(
        step=checkpoint.step,
        losses=losses,
        answers=values.get("answers", []),
        **{name: values[name] for name in _KINDS},
    )
    if state.best_step is not None:
        state.best = names_in_model(model, best)
    with torch.no_grad():
        for name, tensor in names_in_model(model, current).items():
            model.get_parameter(name).copy_(tensor)
    choices.adopt(values["kernels"])
    random_states.put(states, take_step.device)
    return state


def _check_values(values: dict[str, Any], step: int) -> None:
    """Raise a CheckpointError if no run can have written this ``state.json``."""
    for name, kinds in _KINDS.items():
        if name not in values:
            raise CheckpointError(f"state.json lacks {name}")
        if type(values[name]) not in kinds:
            raise CheckpointError(f"{name} is {values[name]!r:.80}")
    for name in ("training_s", "seconds", "peak_memory_mib"):
        if not 0 <= values[name] < math.inf:
            raise CheckpointError(f"{name} is {values[name]}")
    if values["accumulation"] < 1:
        raise CheckpointError(f"accumulation is {values['accumulation']}")
    for evaluation in values["history"]:
        _check_evaluation(evaluation)
    history = values["history"]
    if len({tuple(evaluation["metrics"]) for evaluation in history}) > 1:
        raise CheckpointError("its evaluations have different metrics")
    evaluated = [evaluation["step"] for evaluation in history]
    for name, steps in (("skips", values["skips"]), ("the steps of history", evaluated)):
        if not all(type(each) is int and 1 <= each <= step for each in steps):
            raise CheckpointError(f"{name} are not steps up to {step}: {steps!r:.80}")
        if steps != sorted(set(steps)):
            raise CheckpointError(f"{name} are not in order: {steps!r:.80}")
    if values["best_step"] not in (evaluated or [None]):
        raise CheckpointError(f"best_step is {values['best_step']!r:.80}, which was not evaluated")
    answers = values.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(each, str | float) for each in answers):
        raise CheckpointError(f"answers is {answers!r:.80}, not a list of labels or scores")
    kernels = values.get("kernels")
    if not isinstance(kernels, list) or not all(_is_choice(entry) for entry in kernels):
        raise CheckpointError(f"kernels is {kernels!r:.80}, not a list of choices")


def _check_evaluation(evaluation: object) -> None:
    if not isinstance(evaluation, dict) or evaluation.keys() != {"step", "epoch", "metrics"}:
        raise CheckpointError(f"history holds {evaluation!r:.80}, not an evaluation")
    epoch, scores = evaluation["epoch"], evaluation["metrics"]
    if type(epoch) is not int or epoch < 1:
        raise CheckpointError(f"history holds an evaluation of epoch {epoch!r:.80}")
    if not isinstance(scores, dict) or not scores:
        raise CheckpointError("history holds an evaluation without scores")
    if not all(isinstance(score, float) for score in scores.values()):
        raise CheckpointError(f"history holds scores that are not numbers: {scores!r:.80}")


def _is_choice(entry: object) -> bool:
    """Return whether an entry is [device, operation, shape, form]."""
    return (
        isinstance(entry, list) and len(entry) == 4 and all(isinstance(each, str) for each in entry)
    )


def _check_losses(losses: torch.Tensor | None, step: int) -> None:
    if losses is None or losses.dtype != torch.int64 or losses.shape != (step,):
        raise CheckpointError(f"{STATE} does not hold the losses of {step} steps")


def _check_trained(found: dict[str, torch.Tensor], model: BertForSequenceClassification) -> None:
    """Raise a CheckpointError if the tensors are not those that the plan declares."""
    assert model.adaptation is not None
    wanted = {
        name_in_files(name): model.get_parameter(name).shape for name in model.adaptation.trainable
    }
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or found[name].shape != wanted.get(name):
            raise CheckpointError(f"{name} is missing, unexpected or of another shape")
        if not found[name].is_floating_point():
            raise CheckpointError(f"{name} is of type {found[name].dtype}")
