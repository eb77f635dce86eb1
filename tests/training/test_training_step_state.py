"""Saving and restoring a training step's state, and its state after running out of memory.

The captured step is that of tests/support/captured.py, whose recorder stands in for CUDA graphs.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.captured import Recorder, captured, eager, make_feed
from support.small_runs import SmallRun, trained
from support.sweeps import quick

from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, TrainingError
from spafit.machine.memory import is_out_of_memory
from spafit.training import step as training_step
from spafit.training.batches import Fed
from spafit.training.captured_step import CapturedStep
from spafit.training.optimisation import loss_function
from spafit.training.step import NoMemoryError, TrainingStep
from spafit.weights.adapter_files import name_in_files

KINDS = ["eager", "captured"]


def make(kind: str, model: BertForSequenceClassification, precision: str) -> TrainingStep:
    model.train()
    if kind == "captured":
        return captured(model, Recorder(), precision=precision)
    return eager(model, precision)


def take(step: TrainingStep, steps: list[Fed]) -> list[tuple[float, float]]:
    """Take steps; the learning rate is one that float32 has exactly, as it lies on a device."""
    results = [step(fed.micro_batches, 2.0**-7) for fed in steps]
    return [(float(each.loss), float(each.grad_norm)) for each in results]


def everything(step: TrainingStep) -> dict[str, Any]:
    """Copy all that a step changes."""
    tensors, values = step.state()
    return {
        "trained": trained(step.model),
        "tensors": {name: tensor.clone() for name, tensor in tensors.items()},
        "values": copy.deepcopy(values),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    found = [] if one["values"] == other["values"] else ["values"]
    for kind in ("trained", "tensors"):
        assert one[kind].keys() == other[kind].keys()
        found += [name for name in one[kind] if not torch.equal(one[kind][name], other[kind][name])]
    return found


class TestStateAndRestore:
    """Oracle: the step that went on in the same process.

    Dropout is on, and the generator's state is handed over, as a run does.
    """

    @pytest.mark.parametrize(
        ("before", "after", "precision", "method"),
        quick(
            itertools.product(KINDS, KINDS, ["float32", "fp16"], ["spafit", "full"]),
            [
                ("eager", "eager", "float32", "full"),
                ("eager", "eager", "fp16", "spafit"),
                ("eager", "captured", "fp16", "full"),
                ("captured", "eager", "fp16", "spafit"),
                ("captured", "captured", "float32", "spafit"),
                ("captured", "captured", "fp16", "full"),
            ],
        ),
    )
    def test_goes_on_bit_for_bit(
        self, small: SmallRun, before: str, after: str, precision: str, method: str
    ) -> None:
        """Also by a step of the other kind: a run may be taken up on another machine.

        By default every two of the four choices in every combination, somewhere.
        """
        steps = list(make_feed(small, accumulation=2).batches())[:13]
        ours, theirs = small.model(method), small.model(method)
        first = make(before, ours, precision)
        torch.manual_seed(0)
        take(first, steps[:7])
        tensors, values = first.state()
        # As a checkpoint has them: on the disk, and as JSON.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        values = json.loads(json.dumps(values))
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        generator = torch.get_rng_state()
        expected = take(first, steps[7:])
        kept = copy.deepcopy(tensors)

        second = make(after, theirs, precision)
        second.restore(tensors, values)
        torch.set_rng_state(generator)
        assert take(second, steps[7:]) == expected
        assert not differences(everything(first), everything(second))
        # What was read stays as it was: the optimizer has copies.
        assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_it_the_rest_differs(self, small: SmallRun, kind: str) -> None:
        """Otherwise the test above would see nothing."""
        steps = list(make_feed(small, epochs=2).batches())
        models = [small.model(dropout=False) for _ in range(2)]
        first, second = (make(kind, model, "float32") for model in models)
        take(first, steps[:7])
        models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
        assert take(first, steps[7:]) != take(second, steps[7:])

    @pytest.mark.parametrize("kind", KINDS)
    def test_names_and_shapes(self, small: SmallRun, kind: str) -> None:
        step = make(kind, small.model(), "float32")
        assert step.state() == ({}, {"scaler": {}})  # before the first step
        take(step, list(make_feed(small).batches(17)))
        tensors, values = step.state()
        expected = {
            f"optimizer.{key}.{name_in_files(name)}": torch.Size()
            if key == "step"
            else tensor.shape
            for name, tensor in trained(step.model).items()
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
        assert {name: tensor.shape for name, tensor in tensors.items()} == expected
        assert {float(tensors[name]) for name in tensors if ".step." in name} == {3.0}
        assert values == {"scaler": {}}

    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_done_is_nothing_restored(self, small: SmallRun, kind: str) -> None:
        steps = list(make_feed(small).batches())[:4]
        results = []
        for restored in (False, True):
            step = make(kind, small.model(), "float32")
            if restored:
                step.restore({}, {"scaler": {}})
            torch.manual_seed(0)
            results.append(take(step, steps))
        assert results[0] == results[1]

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_scale_of_the_loss(self, small: SmallRun, kind: str) -> None:
        """Halved by an infinite gradient, and on its way to be doubled again."""
        steps = list(make_feed(small).batches())
        step = make(kind, small.model(), "fp16")
        handle = step.trained[0].register_hook(lambda gradient: gradient + math.inf)
        take(step, steps[:1])
        handle.remove()
        take(step, steps[1:4])
        tensors, values = step.state()
        assert values["scaler"]["scale"] == 2.0**15
        assert values["scaler"]["_growth_tracker"] == 3
        assert {float(tensors[name]) for name in tensors if ".step." in name} == {3.0}  # not 4
        again = make(kind, small.model(), "fp16")
        again.restore(tensors, json.loads(json.dumps(values)))
        assert again.scaler.state_dict() == values["scaler"]
        assert again.scaler.get_scale() == 2.0**15

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("optimizer.exp_avg.bert.embeddings.word_embeddings.weight", None),  # frozen
            ("optimizer.exp_avg.classifier.weights", (2, 20)),
            ("optimizer.exp_avg.", (2,)),
            ("optimizer.exp_avg.classifier.bias", (3,)),
            ("optimizer.exp_avg.classifier.weight", (20, 2)),
            ("optimizer.exp_avg_sq.classifier.bias", (2, 1)),
        ],
    )
    def test_what_fits_nothing_is_refused(
        self, small: SmallRun, kind: str, name: str, shape: tuple[int, ...] | None
    ) -> None:
        model = small.model()
        if shape is None:
            shape = tuple(model.get_parameter(name.partition(".exp_avg.")[2]).shape)
        step = make(kind, model, "float32")
        with pytest.raises(CheckpointError, match=r"^optimizer\.exp_avg.* matches no tr"):
            step.restore({name: torch.zeros(shape)}, {"scaler": {}})


def out_of_memory_of_the_host() -> RuntimeError:
    """Ask the host's allocator for a petabyte."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    return caught.value


ENDS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"),
    "host": out_of_memory_of_the_host,
    "python": lambda: MemoryError("no room"),
}
OTHERS = {
    "RuntimeError": lambda: RuntimeError("CUDA error: device-side assert triggered"),
    "ValueError": lambda: ValueError("memory"),
    "KeyboardInterrupt": KeyboardInterrupt,
}


@pytest.mark.parametrize("name", [*ENDS, *OTHERS])
def test_which_errors_say_that_memory_is_at_its_end(name: str) -> None:
    """Oracle: the lists above; the host's is its allocator's own."""
    assert is_out_of_memory({**ENDS, **OTHERS}[name]()) == (name in ENDS)


def failing_at(call: int, error: BaseException) -> Callable[..., torch.Tensor]:
    """Return a loss function whose n-th call raises an error."""
    calls = iter(range(1, 1000))

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if next(calls) == call:
            raise error
        return loss_function(logits, targets)

    return loss


class TestMemoryAtItsEnd:
    """Oracle: a twin that never tried the step; and what stood there before it.

    The error comes from the loss of the third part of four, so that gradients of two are there.
    """

    @pytest.mark.parametrize(
        ("kind", "precision", "done", "end"),
        quick(
            (
                (kind, precision, done, end)
                for kind, precision in itertools.product(KINDS, ["float32", "fp16"])
                for done, end in ((0, "host"), (1, "python"), (8, "gpu"))
            ),
            [
                ("eager", "float32", 0, "host"),
                ("eager", "fp16", 1, "python"),
                ("eager", "float32", 8, "gpu"),
                ("captured", "fp16", 0, "host"),
                ("captured", "float32", 1, "python"),
                ("captured", "fp16", 8, "gpu"),
            ],
        ),
    )
    def test_as_if_the_step_had_not_begun(
        self,
        small: SmallRun,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        precision: str,
        done: int,
        end: str,
    ) -> None:
        """The first step of a captured one is eager; in the ninth the parts are replays."""
        steps = list(make_feed(small, accumulation=4).batches())[: done + 6]
        ours, theirs = (make(kind, small.model(), precision) for _ in range(2))
        for step in (ours, theirs):
            torch.manual_seed(0)
            take(step, steps[:done])
        before, generator = everything(ours), torch.get_rng_state()
        gradients = [parameter.grad for parameter in ours.trained]
        if isinstance(ours, CapturedStep) and done == 8:
            assert ours.graphs > 1
        with monkeypatch.context() as patch:
            patch.setattr(training_step, "loss_function", failing_at(3, ENDS[end]()))
            with pytest.raises(NoMemoryError) as caught:
                ours(steps[done].micro_batches, 2.0**-7)
        assert isinstance(caught.value, TrainingError)
        assert "\n" not in str(caught.value)
        assert str(caught.value) in str(ENDS[end]())
        assert any(p.grad is not None and p.grad.any() for p in ours.trained)
        ours.recover()
        for parameter, gradient in zip(ours.trained, gradients, strict=True):
            if kind == "eager":
                assert parameter.grad is None
            else:  # all 0, and where the graphs to come add to them
                assert parameter.grad is gradient
                assert not parameter.grad.any()
        if isinstance(ours, CapturedStep):
            assert ours.graphs == 0
        assert not differences(before, everything(ours))

        torch.set_rng_state(generator)
        found = take(ours, steps[done:])
        torch.set_rng_state(generator)
        assert found == take(theirs, steps[done:])
        assert not differences(everything(ours), everything(theirs))
        if isinstance(ours, CapturedStep):
            assert ours.graphs > 0  # it is captured again

    @pytest.mark.parametrize(
        ("name", "kind", "done"),
        quick(
            itertools.product(OTHERS, KINDS, (0, 8)),
            [
                ("RuntimeError", "eager", 0),
                ("RuntimeError", "captured", 8),
                ("ValueError", "captured", 0),
                ("KeyboardInterrupt", "eager", 8),
            ],
        ),
    )
    def test_other_errors_pass_through(
        self,
        small: SmallRun,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        kind: str,
        done: int,
    ) -> None:
        steps = list(make_feed(small, accumulation=4).batches())[:9]
        step, error = make(kind, small.model(), "float32"), OTHERS[name]()
        take(step, steps[:done])
        before = everything(step)
        monkeypatch.setattr(training_step, "loss_function", failing_at(3, error))
        with pytest.raises(type(error)) as caught:
            step(steps[done].micro_batches, 2.0**-7)
        assert caught.value is error
        assert not differences(before, everything(step))

    def test_while_a_batch_is_recorded_it_is_one_to_be_halved(self, small: SmallRun) -> None:
        """A graph needs memory of its own: parts of half the size may have it, and are recorded."""
        said: list[str] = []
        recorder, failures = Recorder(), iter([torch.OutOfMemoryError("CUDA out of memory.\nmore")])

        def record(
            function: Callable[[], torch.Tensor],
        ) -> tuple[torch.Tensor, Callable[[], object]]:
            for error in failures:
                raise error
            return recorder(function)

        steps = list(make_feed(small, accumulation=4).batches())[:9]
        ours, theirs = captured(small.model(), record, said.append), eager(small.model())
        results: list[list[tuple[float, float]]] = [[], []]
        raised = 0
        for number, step in enumerate((ours, theirs)):
            step.model.train()
            torch.manual_seed(0)
            for fed in steps:
                state = torch.get_rng_state()
                try:
                    results[number] += take(step, [fed])
                except NoMemoryError:
                    raised += 1
                    step.recover()
                    torch.set_rng_state(state)
                    results[number] += take(step, [fed])
        assert results[0] == results[1]
        assert raised == 1
        assert said == []
        assert ours.graphs > 0

    def test_while_the_update_is_recorded_the_eager_one_goes_on(self, small: SmallRun) -> None:
        said: list[str] = []
        recorder, calls = Recorder(), []

        def record(
            function: Callable[[], torch.Tensor],
        ) -> tuple[torch.Tensor, Callable[[], object]]:
            calls.append(function)
            if "update" in getattr(function, "__qualname__", ""):
                raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
            return recorder(function)

        steps = list(make_feed(small, accumulation=4).batches())[:8]
        ours, theirs = captured(small.model(), record, said.append), eager(small.model())
        results = []
        for step in (ours, theirs):
            step.model.train()
            torch.manual_seed(0)
            results.append(take(step, steps))
        assert results[0] == results[1]
        assert len(said) == 1
        assert "OutOfMemoryError: CUDA out of memory." in said[0]


class TestAnInfiniteLoss:
    """Oracle: what trains, before the step; the gradient is finite all the same."""

    @pytest.mark.parametrize("precision", ["float32", "fp16"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_moves_nothing(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
    ) -> None:
        step = make(kind, small.model(), precision)
        steps = list(make_feed(small, accumulation=1).batches())[:8]
        take(step, steps[:6])  # captured by now
        before = trained(step.model)
        monkeypatch.setattr(
            training_step, "loss_function", lambda *given: loss_function(*given) + math.inf
        )
        if kind == "captured":  # the stand-in calls what it recorded
            assert isinstance(step, CapturedStep)
        ((loss, norm),) = take(step, steps[6:7])
        assert loss == math.inf
        assert not math.isfinite(norm)
        after = trained(step.model)
        assert all(torch.equal(before[name], after[name]) for name in before)
