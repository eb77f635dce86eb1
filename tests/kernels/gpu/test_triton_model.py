"""The whole model in Triton's forms, on the CPU by Triton's interpreter: a step, a few steps.

The kernels have tests of their own; this one tests that the model gives them the right inputs.
"""

from __future__ import annotations

import pytest
import torch
from support.captured import make_feed
from support.small_runs import SmallRun, trained
from torch import nn

import spafit
from spafit.kernels import forms
from spafit.machine.precision import autocast
from spafit.training.optimisation import make_optimizer
from spafit.training.step import MicroBatch, TrainingStep

pytestmark = pytest.mark.skipif(
    bool(forms.why_no_triton(torch.device("cpu"))), reason="runs in Triton's interpreter"
)


def first_part(small: SmallRun, *, bucketed: bool, examples: int = 2) -> MicroBatch:
    """Return a few examples, with rows that belong to none where they are in a bucket."""
    feed = make_feed(small, bucketed=bucketed, accumulation=6 // examples)
    return next(feed.batches()).micro_batches[0]


def logits_and_gradients(
    model: nn.Module, part: MicroBatch, impl: str, precision: str = "float32"
) -> list[torch.Tensor]:
    spafit.set_impl(model, impl)
    with autocast(precision, torch.device("cpu")):
        logits = model.forward_packed(part.batch)  # type: ignore[operator]
    torch.autograd.backward(nn.functional.cross_entropy(logits.float(), part.targets))
    found = [logits.detach()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            found.append(parameter.grad)
    model.zero_grad(set_to_none=True)
    return found


def random_update(model: nn.Module) -> None:
    """B and the deltas start at zero, where a mistake in them would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "bias_delta.delta")):
                parameter.normal_(0, 0.05, generator=generator)


class TestModel:
    """Oracle: the plain forms on the same packed batch, dropout off."""

    @pytest.mark.parametrize("bucketed", [False, True])
    def test_float32(self, small: SmallRun, bucketed: bool) -> None:
        model = small.model(dropout=False)
        random_update(model)
        part = first_part(small, bucketed=bucketed)
        expected = logits_and_gradients(model, part, "reference")
        found = logits_and_gradients(model, part, "triton")
        assert len(found) == len(expected) > 20
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-7

    def test_bf16(self, small: SmallRun) -> None:
        """The error against float32 is at most twice that of the plain forms in bf16.

        Of the logits, and of the whole gradient: single parts of it are 0 (that of the keys' bias).
        """
        model = small.model(dropout=False)
        random_update(model)
        part = first_part(small, bucketed=True)
        exact = logits_and_gradients(model, part, "reference")
        plain = logits_and_gradients(model, part, "reference", "bf16")
        found = logits_and_gradients(model, part, "triton", "bf16")

        def errors(rounded: list[torch.Tensor]) -> list[float]:
            away = [(a.double() - b).norm() for a, b in zip(rounded, exact, strict=True)]
            return [float(away[0]), float(torch.stack(away[1:]).norm())]

        for ours, theirs in zip(errors(found), errors(plain), strict=True):
            assert 0 < ours <= 2 * theirs


class TestTraining:
    """Oracle: the same run again, dropout on; and the pre-trained tensors, which must stay."""

    def step(self, small: SmallRun, seed: int) -> tuple[float, nn.Module]:
        model = small.model()
        spafit.set_impl(model, "triton")
        model.train()
        step = TrainingStep(model, make_optimizer(model, learning_rate=1e-2, weight_decay=0.01))
        torch.manual_seed(seed)
        part = first_part(small, bucketed=False, examples=1)
        return float(step([part], 1e-2).loss), model

    def test_repeats_and_leaves_the_base_alone(self, small: SmallRun) -> None:
        (loss, model), (again, other) = self.step(small, 0), self.step(small, 0)
        assert loss == again
        moved = []
        for name, before in small.model().named_parameters():
            after = model.get_parameter(name)
            assert torch.equal(after, other.get_parameter(name)), name
            if not torch.equal(after, before):
                moved.append(name)
        assert moved and set(moved) <= set(trained(model))  # type: ignore[arg-type]
