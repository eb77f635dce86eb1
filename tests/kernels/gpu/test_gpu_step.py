"""The captured step on a CUDA device: the eager step's numbers, without waiting for the device.

Run by hand: ``pytest -m gpu``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.small_runs import SmallRun, read_log, trained

import spafit
from spafit.kernels.forms import why_no_triton
from spafit.kernels.gpu import choices
from spafit.machine import kernel_choices
from spafit.machine.precision import autocast
from spafit.training.batches import Fed, Feed
from spafit.training.captured_step import CapturedStep
from spafit.training.make_step import compiled_forward
from spafit.training.optimisation import make_optimizer
from spafit.training.step import TrainingStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def own_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure anew, into a file of the test's own."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    choices.forget()
    yield
    choices.forget()


def make_feed(small: SmallRun, accumulation: int = 1, epochs: int = 3) -> Feed:
    encodings = small.tokenizer.encode(small.train.texts_a, small.train.texts_b, max_length=53)
    targets = torch.arange(len(encodings)) % 2
    return Feed(
        encodings,
        targets,
        CUDA,
        batch_size=6,
        accumulation=accumulation,
        epochs=epochs,
        seed=5,
        bucketed=True,
    )


def make_step(
    small: SmallRun, kind: str, precision: str, *, dropout: bool = True, impl: str = "auto"
) -> TrainingStep:
    model = small.model(dropout=dropout).to(CUDA)
    spafit.set_impl(model, impl)
    model.train()
    captured = kind == "captured"
    # In both a tensor of float32, so that the learning rate is rounded alike.
    optimizer = make_optimizer(model, learning_rate=1e-2, weight_decay=0.01, capturable=True)
    settings = {"precision": precision, "max_grad_norm": 1.0}
    if captured:
        return CapturedStep(model, optimizer, **settings)  # type: ignore[arg-type]
    return TrainingStep(model, optimizer, **settings)  # type: ignore[arg-type]


def run(step: TrainingStep, steps: list[Fed], seed: int = 0) -> list[float]:
    torch.cuda.manual_seed(seed)
    losses = [step(fed.micro_batches, 1e-2 / (1 + number)).loss for number, fed in enumerate(steps)]
    return [float(loss) for loss in losses]


def precisions() -> list[str]:
    has_bf16 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return ["float32", "fp16", *(["bf16"] if has_bf16 else [])]


class TestIsTheEagerStep:
    """Oracle: the eager step on the same batches, from the same state of the generator."""

    @pytest.mark.parametrize("accumulation", [1, 3])
    @pytest.mark.parametrize("dropout", [False, True])
    @pytest.mark.parametrize("precision", precisions())
    def test_losses(
        self, small: SmallRun, precision: str, dropout: bool, accumulation: int
    ) -> None:
        steps = list(make_feed(small, accumulation).batches())
        ours = make_step(small, "captured", precision, dropout=dropout)
        theirs = make_step(small, "eager", precision, dropout=dropout)
        run(theirs, steps[:1])  # the choices of forms are made
        theirs = make_step(small, "eager", precision, dropout=dropout)
        found, expected = run(ours, steps), run(theirs, steps)
        assert isinstance(ours, CapturedStep)
        assert ours.graphs >= 1
        tolerance = {"float32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}[precision]
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < tolerance
        assert all(math.isfinite(loss) for loss in found)

    @pytest.mark.parametrize("impl", ["auto", "triton"])
    def test_the_same_seed_gives_the_same_run(self, small: SmallRun, impl: str) -> None:
        if impl == "triton" and why_no_triton(CUDA):
            pytest.skip("this card has no Triton")
        steps = list(make_feed(small).batches())
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            first, again, other = (
                run(make_step(small, "captured", "float32", impl=impl), steps, seed)
                for seed in (0, 0, 1)
            )
        finally:
            torch.use_deterministic_algorithms(False)
        assert first == again
        assert first != other

    def test_every_replay_draws_anew(self, small: SmallRun) -> None:
        step = make_step(small, "captured", "float32")
        fed = next(make_feed(small).batches())
        losses = [float(step(fed.micro_batches, 0.0).loss) for _ in range(6)]
        assert len(set(losses)) == 6

    def test_from_a_kept_prefix(self, small: SmallRun) -> None:
        steps = list(make_feed(small).batches())
        results = []
        for kind in ("captured", "eager"):
            step = make_step(small, kind, "float32", dropout=False)
            step.model.bert.freeze_dropout()
            losses = []
            for fed in steps:
                with autocast("float32", CUDA):
                    parts = [
                        part._replace(prefix=step.model.bert.prefix(part.batch))
                        for part in fed.micro_batches
                    ]
                losses.append(float(step(parts, 1e-2).loss))
            results.append(losses)
        assert max(abs(a - b) for a, b in zip(*results, strict=True)) < 1e-4

    def test_a_sick_gradient_moves_nothing(self, small: SmallRun) -> None:
        step = make_step(small, "captured", "float32")
        steps = list(make_feed(small).batches())
        run(step, steps)
        pooler = step.model.bert.pooler
        assert pooler is not None
        before = trained(step.model)
        with torch.no_grad():
            bias = pooler.dense.bias.clone()
            pooler.dense.bias.fill_(math.nan)
        assert math.isnan(float(step(steps[0].micro_batches, 1e-2).grad_norm))
        after = trained(step.model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        with torch.no_grad():
            pooler.dense.bias.copy_(bias)
        assert math.isfinite(float(step(steps[0].micro_batches, 1e-2).loss))


class TestNothingWaits:
    """Oracle: CUDA's own check, which makes every wait for the device an error."""

    @pytest.mark.parametrize("kind", ["eager", "captured"])
    @pytest.mark.parametrize("precision", precisions())
    def test_a_step(self, small: SmallRun, kind: str, precision: str) -> None:
        step = make_step(small, kind, precision)
        steps = list(make_feed(small, epochs=4).batches())
        run(step, steps)  # all shapes are known, and recorded
        run(step, steps)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for fed in itertools.islice(make_feed(small, epochs=2).batches(), 6):
                step(fed.micro_batches, 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


class TestRun:
    """Oracle: the run with eager steps, and what a run must leave behind."""

    @pytest.mark.parametrize("cache", ["off", "memory"])
    def test_captured_and_eager(self, small: SmallRun, tmp_path: Path, cache: str) -> None:
        settings = {
            "device": "cuda",
            "precision": "float32",
            "cache_prefix": cache,
            "dropout_in_group_1": cache == "off",
            "accumulation": 2,
        }
        ours, theirs = (small.model(dropout=False) for _ in range(2))
        result = small.fit(ours, step="captured", out=tmp_path / "run", **settings)
        expected = small.fit(theirs, step="eager", **settings)
        worst = max(abs(a - b) for a, b in zip(result.losses, expected.losses, strict=True))
        assert worst < 1e-3
        assert read_log(tmp_path / "run", "note") == []  # of steps that could not be captured
        rows = read_log(tmp_path / "run", "loss")
        assert [row["step"] for row in rows] == list(range(1, len(result.losses) + 1))
        assert [row["loss"] for row in rows] == list(result.losses)

    def test_half_weights_are_the_pretrained_ones_afterwards(self, small: SmallRun) -> None:
        model = small.model()
        result = small.fit(model, device="cuda")
        assert len(result.losses) == 20
        for name, tensor in small.model().named_parameters():
            if name not in trained(model):
                found = model.get_parameter(name)
                assert found.device.type == "cuda"
                assert torch.equal(found.cpu(), tensor), name

    @pytest.mark.parametrize("precision", ["float32", "tf32"])
    def test_compiled(self, small: SmallRun, precision: str) -> None:
        if precision == "tf32" and torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("this card has no tf32")
        steps = [fed for fed in make_feed(small).batches() if len(fed.drawn) == 6]
        eager = make_step(small, "eager", precision, dropout=False)
        compiled = make_step(small, "eager", precision, dropout=False)
        compiled.forward = compiled_forward(compiled.model)
        found, expected = run(compiled, steps), run(eager, steps)
        tolerance = 1e-3 if precision == "float32" else 2e-2
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < tolerance

    def test_another_card(self, small: SmallRun) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two CUDA devices")
        model = small.model()
        result = small.fit(model, device="cuda:1")
        assert result.losses[-1] < result.losses[0]
        assert model.classifier.weight.device == torch.device("cuda", 1)


class TestARecordingThatFails:
    """Oracle: an eager step with dropout, which draws from what was being captured."""

    @pytest.mark.parametrize("waits", [False, True])
    def test_eager_steps_go_on(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch, waits: bool
    ) -> None:
        said: list[str] = []
        model = small.model().to(CUDA)
        model.train()
        optimizer = make_optimizer(model, learning_rate=1e-2, weight_decay=0.01, capturable=True)
        step = CapturedStep(model, optimizer, on_failure=said.append)
        feed = list(make_feed(small).batches())
        forward = step.forward

        def failing(*given: object) -> torch.Tensor:
            logits = forward(*given)  # type: ignore[arg-type]
            if torch.cuda.is_current_stream_capturing():
                if not waits:
                    raise RuntimeError("as planned")
                logits.sum().item()  # which CUDA does not permit, and ends the recording
            return logits

        monkeypatch.setattr(step, "forward", failing)
        state = torch.cuda.current_stream()
        losses = run(step, feed)
        assert len(said) == 1
        assert torch.cuda.current_stream() == state
        assert all(math.isfinite(loss) for loss in losses)
        assert torch.rand(3, device=CUDA).isfinite().all()


def test_choices_are_measured_and_remembered(small: SmallRun) -> None:
    """Oracle: the file, and the forms that this card has."""
    small.fit(device="cuda")
    made = choices.made()
    assert made["packed_attention"]
    assert set(made["packed_attention"].values()) <= {"triton", "flash", "efficient", "sdpa"}
    if not why_no_triton(CUDA):
        assert set(made["linear map"].values()) <= {"triton", "fused"}
    assert kernel_choices.remembered(CUDA).keys() == made.keys()
    for shapes in kernel_choices.remembered(CUDA).values():
        for entry in shapes.values():
            assert entry.get("refused", {}) == {}, entry
