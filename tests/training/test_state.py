"""Reading a checkpoint: damage raises a CheckpointError; a bug raises its own exception."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interruptions import stopped_after
from support.small_runs import SmallRun

from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, StoppedError
from spafit.machine import random_states
from spafit.runs.checkpoint import Checkpoint, Checkpoints
from spafit.training import state as training_state
from spafit.training.optimisation import make_optimizer
from spafit.training.state import TrainingState, restore
from spafit.training.step import TrainingStep

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Train 7 steps, with evaluations after 3 and 6, and give the checkpoint."""
    out = tmp_path_factory.mktemp("run")
    with stopped_after(7), pytest.raises(StoppedError):
        small.fit(out=out, eval_every=3)
    return Checkpoints(out / "checkpoints").read(7)


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    """Give the generators back as they were."""
    before = random_states.take(torch.device("cpu"))
    yield
    random_states.put(before, torch.device("cpu"))


def restored(
    model: BertForSequenceClassification, checkpoint: Checkpoint, precision: str = "float32"
) -> tuple[TrainingState, TrainingStep]:
    optimizer = make_optimizer(model, learning_rate=1e-3, weight_decay=0.01)
    step = TrainingStep(model, optimizer, precision=precision)
    return restore(checkpoint, model, step), step


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the path of every value inside one, of long lists the first, the last and one more."""
    if isinstance(value, dict):
        inner: Any = value.items()
    elif isinstance(value, list):
        chosen = range(len(value)) if len(value) < 10 else (0, len(value) // 2, len(value) - 1)
        inner = [(number, value[number]) for number in chosen]
    else:
        return
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


HOSTILE = (
    *(None, True, False, 0, -1, 1, 3, 7, 8, 2**40, 2**70, 0.5, -1.0, float("nan"), float("inf")),
    *("", "x", "MT19937", [], [1], [[1]], [None], {}, {"step": 1}, [{}], [{"metrics": {}}]),
)


class TestValues:
    """Oracle: whether the state that comes out is one that a run can have written."""

    def test_every_place_with_every_hostile_value(
        self, small: SmallRun, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = {"record", "log_bytes"}  # which the run folder reads
        values = {key: value for key, value in checkpoint.values.items() if key not in names}
        tensors = {
            name: checkpoint.tensors(name) for name in checkpoint.files if "json" not in name
        }
        monkeypatch.setattr(Checkpoint, "tensors", lambda self, name: dict(tensors[name]))
        model = small.model()
        refused = taken = 0
        for path in places(values):
            for hostile in HOSTILE:
                changed = copy.deepcopy(values)
                at(changed, path[:-1])[path[-1]] = hostile
                if same_json(changed, values):
                    continue
                try:
                    state, _ = restored(model, dataclasses.replace(checkpoint, values=changed))
                except CheckpointError as error:
                    assert "is damaged, or of another version" in str(error)
                    assert "\n" not in str(error)
                    refused += 1
                else:
                    taken += 1
                    check_sense(state)
        assert refused > 500
        assert 0 < taken < 150  # another score, word of a generator, or number of seconds

    @pytest.mark.parametrize("name", ["skips", "history", "best_step", "kernels", "random"])
    def test_every_one_is_needed(self, small: SmallRun, checkpoint: Checkpoint, name: str) -> None:
        values = {key: value for key, value in checkpoint.values.items() if key != name}
        with pytest.raises(CheckpointError, match=name.replace("random", "generators")):
            restored(small.model(), dataclasses.replace(checkpoint, values=values))

    @pytest.mark.parametrize(
        "scaler",
        [None, {}, 7, {"scale": 2.0}, {"scale": "2", "growth_factor": 2.0, "backoff_factor": 0.5}],
    )
    def test_the_scale_of_the_loss(
        self, small: SmallRun, checkpoint: Checkpoint, scaler: object
    ) -> None:
        values = {**checkpoint.values, "scaler": scaler}
        with pytest.raises(CheckpointError, match="scale of the loss"):
            restored(small.model(), dataclasses.replace(checkpoint, values=values), "fp16")


def same_json(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)


def check_sense(state: TrainingState) -> None:
    assert state.step == len(state.losses) == 7
    evaluated = [each["step"] for each in state.history]
    assert evaluated == [step for step in range(1, 8) if step in evaluated]
    assert state.best_step in (evaluated or [None])
    assert all(type(each) is int and 1 <= each <= 7 for each in state.skips)
    assert state.accumulation >= 1
    assert min(state.seconds, state.training_s, state.peak_memory_mib) >= 0


CLASSIFIER = "optimizer.exp_avg.classifier.weight"
DAMAGED: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "no losses": ("state", lambda tensors: tensors.pop("losses")),
    "fewer losses": ("state", lambda tensors: tensors.update(losses=tensors["losses"][1:])),
    "losses of floats": ("state", lambda tensors: tensors.update(losses=torch.ones(7))),
    "losses in a matrix": ("state", lambda tensors: tensors.update(losses=tensors["losses"][None])),
    "no random state": ("state", lambda tensors: tensors.pop("random.cpu")),
    "a short random state": (
        "state",
        lambda tensors: tensors.update({"random.cpu": tensors["random.cpu"][:-1]}),
    ),
    "a random state of zeros": (
        "state",
        lambda tensors: tensors.update({"random.cpu": torch.zeros(5056, dtype=torch.uint8)}),
    ),
    "a random state of floats": (
        "state",
        lambda tensors: tensors.update({"random.cpu": torch.ones(5056)}),
    ),
    "a random state of the GPU": (
        "state",
        lambda tensors: tensors.update({"random.cuda": torch.ones(3, dtype=torch.uint8)}),
    ),
    "a random state of something": (
        "state",
        lambda tensors: tensors.update({"random.": tensors["random.cpu"]}),
    ),
    "no moment": ("state", lambda tensors: tensors.pop(CLASSIFIER)),
    "a moment of whole numbers": (
        "state",
        lambda tensors: tensors.update({CLASSIFIER: tensors[CLASSIFIER].long()}),
    ),
    "a moment of another shape": (
        "state",
        lambda tensors: tensors.update({CLASSIFIER: tensors[CLASSIFIER].T}),
    ),
    "a moment of nothing": (
        "state",
        lambda tensors: tensors.update({"optimizer.exp_avg.x": torch.ones(3)}),
    ),
    "a moment of another optimizer": (
        "state",
        lambda tensors: tensors.update(
            {CLASSIFIER.replace("exp_avg", "momentum"): tensors[CLASSIFIER]}
        ),
    ),
    "a tensor without dots": ("state", lambda tensors: tensors.update(x=torch.ones(3))),
    "no head": ("adapter", lambda tensors: tensors.pop("classifier.bias")),
    "another head": (
        "adapter",
        lambda tensors: tensors.update({"classifier.bias": torch.ones(3)}),
    ),
    "more than what trains": (
        "best",
        lambda tensors: tensors.update({"bert.pooler.dense.bias": torch.ones(20)}),
    ),
    "a head of whole numbers": (
        "best",
        lambda tensors: tensors.update({"classifier.bias": torch.ones(2, dtype=torch.int64)}),
    ),
}


class TestTensors:
    """Oracle: the list above; the model and the generators before."""

    @pytest.mark.parametrize("name", DAMAGED)
    def test_what_no_run_can_have_written(
        self,
        small: SmallRun,
        checkpoint: Checkpoint,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        stem, damage = DAMAGED[name]
        read = Checkpoint.tensors

        def tensors(self: Checkpoint, file: str) -> Tensors:
            found = read(self, file)
            if file == f"{stem}.safetensors":
                damage(found)
            return found

        monkeypatch.setattr(Checkpoint, "tensors", tensors)
        model = small.model()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        generator = torch.get_rng_state()
        step = TrainingStep(model, make_optimizer(model, learning_rate=1e-3, weight_decay=0.01))
        with pytest.raises(CheckpointError) as error:
            restore(checkpoint, model, step)
        assert str(error.value).startswith(f"{checkpoint.path} is damaged, or of another version")
        assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), generator)


class TestBugs:
    """Oracle: the very error that was raised."""

    @pytest.mark.parametrize(
        "error", [AttributeError("x"), TypeError("x"), KeyError("x"), RuntimeError("x")], ids=repr
    )
    @pytest.mark.parametrize("place", ["optimizer", "random", "check"])
    def test_a_bug_is_not_called_damage(
        self,
        small: SmallRun,
        checkpoint: Checkpoint,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
        place: str,
    ) -> None:
        def raising(*_: Any) -> None:
            raise error

        if place == "optimizer":
            monkeypatch.setattr(TrainingStep, "restore", raising)
        elif place == "random":
            monkeypatch.setattr(random_states, "put", raising)
        else:
            monkeypatch.setattr(training_state, "_check_values", raising)
        with pytest.raises(type(error)) as caught:
            restored(small.model(), checkpoint)
        assert caught.value is error


def test_a_sound_checkpoint_is_taken_up(
    small: SmallRun, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Otherwise the tests above would see nothing."""
    state, step = restored(small.model(), checkpoint)
    check_sense(state)
    assert state.history == checkpoint.values["history"]
    assert len(step.state()[0]) == 3 * len(step.trained)
