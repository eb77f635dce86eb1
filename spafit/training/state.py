"""Where a run stands, and the checkpoint that holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, TrainingError, WeightsError
from spafit.kernels.gpu import choices
from spafit.machine import random_states
from spafit.machine.random_states import RandomStates
from spafit.runs.checkpoint import Checkpoint, TensorFile
from spafit.training.step import TrainingStep
from spafit.weights.adapter_files import adapter_content

# What stands in state.json as it is.
_NAMES = (
    *("skips", "history", "best_step", "accumulation"),
    *("training_s", "seconds", "peak_memory_mib"),
)

_ADAPTER, _BEST, _STATE = "adapter.safetensors", "best.safetensors", "state.safetensors"


@dataclass
class TrainingState:
    """Where a run stands, beside model, optimizer and random numbers.

    Attributes
    ----------
    step : int
        Steps of the optimizer that were done, those included that were skipped.
    losses : list of float
        The loss of every step, NaN or infinite where it was that.
    skips : list of int
        Steps whose gradient was not finite: neither optimizer nor schedule moved.
    history : list of dict
        Every evaluation: step, epoch, metrics.
    best : dict of str to torch.Tensor
        What trains, on the host, as it was at the best evaluation; empty before the first.
    best_step : int or None
        Its step.
    accumulation : int
        Parts that a batch has to be computed in for memory to suffice; 1 where it always has.
    training_s, seconds : float
        Time of the steps alone, and in all.
    peak_memory_mib : float
        The most memory used, by any of the processes that the run has had.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    skips: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_step: int | None = None
    accumulation: int = 1
    training_s: float = 0.0
    seconds: float = 0.0
    peak_memory_mib: float = 0.0

    @property
    def skips_in_a_row(self) -> int:
        """How many of the last steps were skipped, one after the other."""
        count = 0
        while count < len(self.skips) and self.skips[-1 - count] == len(self.losses) - count:
            count += 1
        return count

    def add_step(self, step: int, loss: float, grad_norm: float) -> bool:
        """Note the outcome of a step; gives whether it was skipped."""
        is_skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        self.losses.append(loss)
        if is_skipped:
            self.skips.append(step)
        return is_skipped

    def updates_before(self, step: int, unknown: int = 0) -> int:
        """Count the updates before a step, the last ``unknown`` outcomes not being known.

        Those count as updates, always, so that the answer does not depend on when it is asked for.
        """
        known = step - unknown
        return step - 1 - sum(skipped < known for skipped in self.skips)


def content(
    state: TrainingState, model: BertForSequenceClassification, take_step: TrainingStep
) -> tuple[dict[str, TensorFile], dict[str, Any]]:
    """Give the files and values of a checkpoint.

    Raises
    ------
    TrainingError
        If a trained value, or a moment of the optimizer, is NaN or infinite.
    """
    tensors, step_values = take_step.state()
    sick = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if sick:
        raise TrainingError(
            f"{sick[0]} is NaN or infinite after step {state.step}, so that nothing is saved; "
            "try a lower learning rate, or clip the gradient (max_grad_norm)"
        )
    randoms = random_states.take(take_step.device)
    losses = torch.tensor(state.losses, dtype=torch.float64)
    files: dict[str, TensorFile] = {
        # As bits: a loss that is NaN is no damage.
        _STATE: ({**tensors, **randoms.tensors, "losses": losses.view(torch.int64)}, {}),
    }
    try:
        files[_ADAPTER] = adapter_content(model)
        if state.best_step not in (None, state.step):
            files[_BEST] = adapter_content(model, state.best)
    except WeightsError as error:
        raise TrainingError(f"after step {state.step} {error}; try a lower learning rate") from None
    values = {
        **{name: getattr(state, name) for name in _NAMES},
        "kernels": choices.taken(),
        "random": randoms.to_json(),
        **step_values,
    }
    return files, values


def restore(
    checkpoint: Checkpoint, model: BertForSequenceClassification, take_step: TrainingStep
) -> TrainingState:
    """Set model, optimizer and random numbers to where a checkpoint stands.

    Raises
    ------
    CheckpointError
        If what it holds does not fit.
    """
    values = checkpoint.values
    try:
        tensors = checkpoint.tensors(_STATE)
        losses = tensors.pop("losses").view(torch.float64).tolist()
        randoms = {name: tensors.pop(name) for name in list(tensors) if name.startswith("random.")}
        current = checkpoint.tensors(_ADAPTER)
        state = TrainingState(step=checkpoint.step, losses=losses)
        for name in _NAMES:
            setattr(state, name, values[name])
        _require_sense(state)
        if state.best_step is not None:
            has_best = _BEST in checkpoint.files
            state.best = checkpoint.tensors(_BEST) if has_best else dict(current)
        for found in (current, *([state.best] if state.best else [])):
            _require_fit(found, model)
        with torch.no_grad():
            for name, tensor in current.items():
                model.get_parameter(name).copy_(tensor)
        take_step.restore(tensors, values)
        choices.adopt(values["kernels"])
        states = RandomStates.from_json(randoms, values["random"])
        random_states.put(states, take_step.device)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            f"{checkpoint.path} is damaged, or of another version of spafit: "
            f"{type(error).__name__} {str(error)[:200]}"
        ) from error
    return state


def _require_sense(state: TrainingState) -> None:
    """Refuse what no run can have written, as a ValueError or TypeError."""
    steps = range(1, state.step + 1)
    evaluated = [evaluation["step"] for evaluation in state.history]
    names = {tuple(evaluation["metrics"]) for evaluation in state.history}
    for evaluation in state.history:
        scores = evaluation["metrics"].values()
        if not scores or not all(isinstance(score, float) for score in scores):
            raise ValueError("an evaluation without scores")
        if type(evaluation["epoch"]) is not int or evaluation["epoch"] < 1:
            raise ValueError("an evaluation without its epoch")
    numbers = (state.training_s, state.seconds, state.peak_memory_mib)
    if (
        len(state.losses) != state.step
        or len(names) > 1
        or evaluated != sorted(set(evaluated))
        or state.skips != sorted(set(state.skips))
        or not all(type(each) is int and each in steps for each in (*state.skips, *evaluated))
        or type(state.accumulation) is not int
        or state.accumulation < 1
        or not all(isinstance(each, float) for each in numbers)
        or (state.best_step not in evaluated if state.history else state.best_step is not None)
    ):
        raise ValueError("numbers that do not fit each other")


def _require_fit(found: dict[str, torch.Tensor], model: BertForSequenceClassification) -> None:
    assert model.adaptation is not None
    wanted = {name: model.get_parameter(name).shape for name in model.adaptation.trainable}
    wrong = [
        name
        for name in sorted(wanted.keys() | found.keys())
        if name not in found or wanted.get(name) != found[name].shape
    ]
    if wrong:
        raise ValueError(f"{wrong[0]} is missing, unexpected or of another shape")
