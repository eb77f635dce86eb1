"""The captured step, with a recorder instead of CUDA graphs that calls what it recorded.

Properties of real CUDA graphs (recording computes nothing, a replay draws new random numbers) are
tested in tests/kernels/gpu/test_gpu_step.py.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from support.captured import Recorder, captured, eager, make_feed
from support.small_runs import METHODS, SmallRun, trained

import spafit.training.captured_step
import spafit.training.settings
from spafit.errors import ConfigError, TrainingError
from spafit.layout import Bucket, Packed, PackedBatch
from spafit.plans import Plan
from spafit.training.batches import Feed
from spafit.training.captured_step import CapturedStep, why_not_captured
from spafit.training.make_step import Readings, compiled_forward, make_step
from spafit.training.optimisation import make_optimizer
from spafit.training.step import StepResult, TrainingStep
from weights_tools.tiny import make_tiny

CPU = torch.device("cpu")


def run(step: TrainingStep, feed: Feed, seed: int = 0) -> list[tuple[float, float]]:
    """Train on all of a feed; give the losses and gradient norms.

    The learning rates are powers of two, which float32, in which it lies on a device, has exactly.
    """
    torch.manual_seed(seed)
    step.model.train()
    results = [
        step(fed.micro_batches, 2.0 ** -(7 + number % 3))
        for number, fed in enumerate(feed.batches())
    ]
    return [(float(each.loss), float(each.grad_norm)) for each in results]


class TestIsTheEagerStep:
    """Oracle: the eager step on the same batches, from the same generator state."""

    @pytest.mark.parametrize("accumulation", [1, 4])
    @pytest.mark.parametrize("method", ["spafit", "full"])
    def test_bit_for_bit_with_dropout(
        self, small: SmallRun, method: str, accumulation: int
    ) -> None:
        ours, theirs, recorder = small.model(method), small.model(method), Recorder()
        step = captured(ours, recorder)
        feed = {"accumulation": accumulation, "epochs": 2}
        results = run(step, make_feed(small, **feed))
        expected = run(eager(theirs), make_feed(small, **feed))
        assert results == expected
        first, second = trained(ours), trained(theirs)
        assert all(torch.equal(first[name], second[name]) for name in first)
        # Not all of it was eager: every shape beyond its first batch, and every second update.
        steps = len(results)
        parts = sum(len(fed.micro_batches) for fed in make_feed(small, **feed).batches())
        shapes = {
            (len(part.targets), part.batch.layout.bucket, len(fed.drawn))
            for fed in make_feed(small, **feed).batches()
            for part in fed.micro_batches
        }
        assert step.graphs <= len(shapes)
        assert len(recorder.replays) == (parts - len(shapes)) + (steps - 1)

    def test_dropout_draws_anew_at_every_replay(self, small: SmallRun) -> None:
        model = small.model()
        step = captured(model, Recorder())
        model.train()
        fed = next(make_feed(small).batches())
        losses = {float(step(fed.micro_batches, 0.0).loss) for _ in range(6)}
        assert len(losses) == 6

    def test_from_a_kept_prefix(self, small: SmallRun) -> None:
        def with_prefix(step: TrainingStep) -> list[float]:
            step.model.train()
            step.model.bert.freeze_dropout()
            torch.manual_seed(1)
            losses = []
            for _ in range(2):
                for fed in make_feed(small, epochs=1).batches():
                    parts = [
                        part._replace(prefix=step.model.bert.prefix(part.batch))
                        for part in fed.micro_batches
                    ]
                    losses.append(float(step(parts, 2.0**-7).loss))
            return losses

        assert with_prefix(captured(small.model(), Recorder())) == with_prefix(eager(small.model()))

    def test_a_sick_gradient_moves_nothing(self, small: SmallRun) -> None:
        model = small.model()
        step = captured(model, Recorder())
        model.train()
        feed = list(make_feed(small).batches())
        for fed in feed[:3]:
            step(fed.micro_batches, 1e-2)
        before = copy.deepcopy(trained(model))
        with torch.no_grad():
            kept = model.bert.pooler.dense.bias.clone()  # type: ignore[union-attr]
            model.bert.pooler.dense.bias.fill_(math.nan)  # type: ignore[union-attr]
        result = step(feed[1].micro_batches, 1e-2)
        assert math.isnan(float(result.loss))
        assert math.isnan(float(result.grad_norm))
        after = trained(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        with torch.no_grad():
            model.bert.pooler.dense.bias.copy_(kept)  # type: ignore[union-attr]
        assert math.isfinite(float(step(feed[1].micro_batches, 1e-2).grad_norm))

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_in_half_and_clipped_elsewhere(self, small: SmallRun, precision: str) -> None:
        settings = {"precision": precision, "max_grad_norm": 0.25}
        results = run(captured(small.model(), Recorder(), **settings), make_feed(small, epochs=2))
        assert results == run(eager(small.model(), **settings), make_feed(small, epochs=2))

    def test_every_kind_of_batch_has_a_graph_of_its_own(self, small: SmallRun) -> None:
        """Longer sequences at the same rows, and prefixes of either type; in turns."""

        def results(step: TrainingStep) -> list[float]:
            step.model.train()
            step.model.bert.freeze_dropout()
            plain = next(make_feed(small).batches()).micro_batches[0]
            layout = plain.batch.layout
            longer = Packed(layout.lengths, bucket=Bucket(layout.rows, 2 * layout.longest))
            prefix = step.model.bert.prefix(plain.batch)
            kinds = [
                plain,
                plain._replace(batch=plain.batch._replace(layout=longer)),
                plain._replace(prefix=prefix),
                plain._replace(prefix=prefix.bfloat16()),
            ]
            torch.manual_seed(2)
            return [float(step([kind], 2.0**-7).loss) for _ in range(3) for kind in kinds]

        step = captured(small.model(), Recorder(), precision="bf16")
        assert results(step) == results(eager(small.model(), precision="bf16"))
        assert step.graphs == 4

    def test_the_callers_batches_stay_as_they_are(self, small: SmallRun) -> None:
        step = captured(small.model(), Recorder())
        step.model.bert.freeze_dropout()
        parts = [
            part._replace(prefix=step.model.bert.prefix(part.batch))
            for fed in make_feed(small).batches()
            for part in fed.micro_batches
        ]
        before = copy.deepcopy(parts)
        for part in parts * 2:
            step([part], 2.0**-7)
        for part, as_it_was in zip(parts, before, strict=True):
            pairs = zip(
                (*part.batch.tensors(), part.targets, part.prefix),
                (*as_it_was.batch.tensors(), as_it_was.targets, as_it_was.prefix),
                strict=True,
            )
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs)  # type: ignore[arg-type]

    def test_gradients_and_learning_rates_stay_where_they_are(self, small: SmallRun) -> None:
        """The graphs of all shapes, and that of the update, work on the same memory."""
        step = captured(small.model(), Recorder())
        gradients = [parameter.grad for parameter in step.trained]
        assert all(gradient is not None and not gradient.any() for gradient in gradients)
        rates = [group["lr"] for group in step.optimizer.param_groups]
        run(step, make_feed(small, epochs=2))
        after = [parameter.grad for parameter in step.trained]
        assert all(ours is theirs for ours, theirs in zip(gradients, after, strict=True))
        found = [group["lr"] for group in step.optimizer.param_groups]
        assert all(ours is theirs for ours, theirs in zip(rates, found, strict=True))


class TestEagerStep:
    """Oracle: the same steps in float32; PyTorch scales the loss of fp16 on a CPU too."""

    def test_fp16(self, small: SmallRun) -> None:
        ours, theirs = (
            eager(small.model(dropout=False), precision) for precision in ("fp16", "float32")
        )
        found, expected = (run(step, make_feed(small, epochs=2)) for step in (ours, theirs))
        assert ours.scaler.get_scale() == 2.0**16
        assert max(abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True)) < 1e-2
        assert max(abs(a[1] / b[1] - 1) for a, b in zip(found, expected, strict=True)) < 5e-2

    @pytest.mark.parametrize("precision", ["float32", "fp16"])
    def test_an_infinite_gradient_moves_nothing(self, small: SmallRun, precision: str) -> None:
        step = eager(small.model(), precision)
        before = copy.deepcopy(trained(step.model))
        fed = next(make_feed(small).batches())
        handle = step.trained[0].register_hook(lambda gradient: gradient + math.inf)
        assert math.isinf(float(step(fed.micro_batches, 1e-2).grad_norm))
        after = trained(step.model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert step.scaler.get_scale() == (2.0**15 if precision == "fp16" else 1.0)
        handle.remove()
        assert math.isfinite(float(step(fed.micro_batches, 1e-2).grad_norm))
        after = trained(step.model)
        assert not any(torch.equal(before[name], after[name]) for name in before)

    def test_nothing_is_kept(self, small: SmallRun) -> None:
        step = eager(small.model())
        result = step(next(make_feed(small).batches()).micro_batches, 1e-2)
        assert not result.loss.requires_grad
        assert all(parameter.grad is None for parameter in step.trained)

    def test_tf32_in_backward_too(self, small: SmallRun) -> None:
        seen = []
        step = eager(small.model(), "tf32")
        for parameter in step.trained:
            parameter.register_hook(
                lambda _: seen.append(torch.backends.cuda.matmul.fp32_precision)
            )
        step(next(make_feed(small).batches()).micro_batches, 1e-2)
        assert seen == ["tf32"] * len(step.trained)
        assert torch.get_float32_matmul_precision() == "highest"


class TestFallback:
    """Oracle: the eager step; the reason is told once."""

    @pytest.mark.parametrize("fails_at", [1, 2, 3])
    def test_an_eager_step_takes_over(self, small: SmallRun, fails_at: int) -> None:
        said: list[str] = []
        recorder = Recorder(fails_at)
        step = captured(small.model(), recorder, said.append)
        feeds = [make_feed(small, epochs=2) for _ in range(2)]
        assert run(step, feeds[0]) == run(eager(small.model()), feeds[1])
        assert len(said) == 1
        assert "RuntimeError: operation not permitted when stream is capturing" in said[0]
        assert "\n" not in said[0]
        assert recorder.recordings == fails_at
        # Earlier graphs are released: they scale the loss by a scaler that is no longer used.
        assert step.graphs == 0
        assert not any(result() is not None for result in recorder.results)

    def test_what_is_asked_for_is_not_replaced(self, small: SmallRun) -> None:
        step = captured(small.model(), Recorder(1))
        with pytest.raises(TrainingError, match=r"cannot be captured.*step='eager'"):
            run(step, make_feed(small))

    def test_batches_of_any_shape_are_refused(self, small: SmallRun) -> None:
        with pytest.raises(TrainingError, match="fixed shape"):
            run(captured(small.model(), Recorder()), make_feed(small, bucketed=False))

    def test_reasons(self, small: SmallRun) -> None:
        assert "GPU" in why_not_captured(CPU, recomputes=False)
        assert "recomputed layers" in why_not_captured(torch.device("cuda"), recomputes=True)
        assert why_not_captured(torch.device("cuda"), recomputes=False) == ""
        with pytest.raises(ConfigError, match='step="captured" is not available: CUDA graphs need'):
            small.fit(step="captured")
        with pytest.raises(ConfigError, match='step="compiled" cannot be combined with recompute'):
            small.fit(step="compiled", recompute=(3,))

    def test_what_was_kept_is_given_back(self, small: SmallRun) -> None:
        model, recorder = small.model(), Recorder()
        step = captured(model, recorder)
        run(step, make_feed(small, epochs=2))
        assert step.graphs > 0
        step.close()
        assert step.graphs == 0
        assert all(parameter.grad is None for parameter in model.parameters())
        assert len(recorder.results) > 1
        assert not any(result() is not None for result in recorder.results)

    def test_the_loss_scale_goes_on(self, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
        """A recording of the update that fails has unscaled nothing, but its scaler says so."""
        said: list[str] = []

        def fail(*_: object) -> None:
            raise RuntimeError("no room")

        def record(
            function: Callable[[], torch.Tensor],
        ) -> tuple[torch.Tensor, Callable[[], object]]:
            before = [parameter.grad.clone() for parameter in ours.trained]  # type: ignore[union-attr]
            with monkeypatch.context() as patch:
                patch.setattr(ours.optimizer, "step", fail)
                try:
                    function()
                finally:  # for a graph computes nothing while it is recorded
                    for parameter, gradient in zip(ours.trained, before, strict=True):
                        parameter.grad.copy_(gradient)  # type: ignore[union-attr]
            raise AssertionError("the update was not recorded")

        def results(step: TrainingStep) -> list[float]:
            torch.manual_seed(0)
            step.model.train()
            fed = list(make_feed(small).batches())
            handle = step.trained[0].register_hook(lambda gradient: gradient + math.inf)
            step(fed[0].micro_batches, 2.0**-7)  # which halves the scale
            handle.remove()
            # The next one is of another shape, so that the update alone is recorded.
            after = [step(each.micro_batches, 2.0**-7) for each in (fed[4], *fed[:4])]
            assert step.scaler.get_scale() == 2.0**15
            return [float(each.grad_norm) for each in after]

        ours = captured(small.model(), record, said.append, precision="fp16")
        assert results(ours) == results(eager(small.model(), "fp16"))
        assert len(said) == 1
        assert "RuntimeError: no room" in said[0]


class TestRun:
    """Oracle: the same run with eager steps, dropout off: rounding alone may differ.

    In float64, but where hidden states are kept, which are float32. The captured step's learning
    rate is float32 in both.
    """

    @pytest.mark.parametrize("cache", ["off", "memory"])
    def test_a_captured_run(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch, cache: str
    ) -> None:
        settings = {"cache_prefix": cache, "dropout_in_group_1": cache == "off", "accumulation": 2}
        dtype = torch.float64 if cache == "off" else torch.float32
        ours, theirs = (small.model(dtype=dtype, dropout=False) for _ in range(2))
        expected = small.fit(theirs, **settings)
        recorder = Recorder(dtype=dtype)
        monkeypatch.setattr(spafit.training.settings, "why_not_captured", lambda *_, **__: "")
        monkeypatch.setattr(spafit.training.captured_step, "CudaCapture", lambda _: recorder)
        result = small.fit(ours, **settings)
        assert len(recorder.replays) > len(result.losses)
        worst = max(abs(a - b) for a, b in zip(result.losses, expected.losses, strict=True))
        assert worst < (1e-6 if cache == "off" else 1e-4)
        assert result.metrics == expected.metrics

    @pytest.mark.parametrize("kind", ["eager", "captured", "compiled"])
    def test_settings_reach_the_step(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setattr(spafit.training.captured_step, "CudaCapture", lambda _: Recorder(1))
        config = small.settings(
            step=kind, precision="bf16", max_grad_norm=0.25, weight_decay=0.2, decay_biases=True
        )
        model, said = small.model(), []
        step = make_step(model, config, said.append)
        assert type(step) is (CapturedStep if kind == "captured" else TrainingStep)
        assert (step.precision, step.max_grad_norm) == ("bf16", 0.25)
        groups = step.optimizer.param_groups
        assert {group["weight_decay"] for group in groups} == {0.2}
        assert {isinstance(group["lr"], torch.Tensor) for group in groups} == {kind == "captured"}
        assert all(float(group["lr"]) == pytest.approx(config.learning_rate) for group in groups)
        assert (step.forward == model.forward_packed) == (kind != "compiled")
        if kind == "captured":
            fed = next(make_feed(small).batches())
            for _ in range(2):
                step(fed.micro_batches, 1e-2)
            assert len(said) == 1


class TestBucket:
    """Oracle: the rule of its docstring; and the same batch in its own shape."""

    @pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 500, 1000, 1023, 1024, 5000])
    def test_rule(self, tokens: int) -> None:
        lengths = [tokens // 2, tokens - tokens // 2] if tokens > 1 else [1]
        bucket = Bucket.of(lengths)
        step = max(64, 2 ** (tokens.bit_length() - 4))
        assert bucket.rows % step == 0
        assert 1 <= bucket.rows - tokens <= step
        assert bucket.rows - tokens <= max(64, tokens / 8)
        assert bucket.longest >= max(64, *lengths, bucket.rows - tokens)
        assert bucket.longest & (bucket.longest - 1) == 0

    def test_few_shapes(self) -> None:
        buckets = {Bucket.of([length] * 16) for length in range(4, 129)}
        assert len(buckets) <= 40

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="do not fit"):
            Packed([60, 4], bucket=Bucket(64, 64))
        with pytest.raises(ConfigError, match="do not fit"):
            Packed([60, 70], bucket=Bucket(192, 64))
        with pytest.raises(ConfigError, match="do not fit"):  # the filler is a sequence too
            Packed([60, 4], bucket=Bucket(192, 64))

    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_same_logits_and_gradients(self, small: SmallRun, impl: str) -> None:
        model = small.model(dtype=torch.float64, dropout=False)
        spafit.set_impl(model, impl)
        results = []
        for bucketed in (False, True):
            fed = next(make_feed(small, bucketed=bucketed).batches())
            logits = model.forward_packed(fed.micro_batches[0].batch)
            torch.autograd.backward(logits.square().sum())
            gradients = [each.grad for each in model.parameters() if each.requires_grad]
            results.append([logits, *gradients])
            model.zero_grad(set_to_none=True)
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() < 1e-12

    def test_shapes_depend_on_the_bucket_alone(self) -> None:
        bucket = Bucket(192, 128)
        shapes = [
            [tensor.shape for tensor in Packed(lengths, bucket=bucket).tensors()]
            for lengths in ([100, 50], [64, 64], [128, 1])
        ]
        assert shapes[0] == shapes[1] == shapes[2]
        assert len(shapes[0]) == 5

    @pytest.mark.parametrize("count", [511, 512, 513, 1024, 4096])
    def test_many_short_ones_fit(self, count: int) -> None:
        """The filler may be longer than any of them."""
        bucket = Bucket.of([4] * count)
        layout = Packed([4] * count, bucket=bucket)
        assert layout.filler <= bucket.longest

    @pytest.mark.parametrize(("longest", "bucket"), [(1, 64), (64, 64), (65, 128), (128, 128)])
    def test_longest(self, longest: int, bucket: int) -> None:
        assert Bucket.of([longest, 1]).longest == bucket

    def test_spans_cover_all_rows(self) -> None:
        spans = Packed([100, 30], bucket=Bucket(192, 128)).spans
        assert spans.boundaries.tolist() == [0, 100, 130, 192]
        assert (spans.tokens, spans.longest) == (192, 128)

    def test_every_tensor_is_changed(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """None is made anew at its first use, which a graph would not see."""
        changed: list[torch.Tensor] = []

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            changed.append(tensor.clone())
            return changed[-1]

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
        batch = next(make_feed(small).batches()).micro_batches[0].batch
        tensors = batch.pinned().tensors()
        assert all(ours is theirs for ours, theirs in zip(tensors, changed, strict=True))
        pairs = zip(tensors, batch.tensors(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
        assert [torch.equal(a, b) for a, b in zip(tensors, batch[:3], strict=False)] == [True] * 3


def test_results_are_read_in_order() -> None:
    readings: Readings[int] = Readings(CPU)
    for number in range(3):
        readings.add(number, StepResult(torch.tensor(0.5 * number), torch.tensor(2.0)))
    assert list(readings.ready()) == [(0, 0.0, 2.0), (1, 0.5, 2.0), (2, 1.0, 2.0)]
    assert list(readings.ready(wait=True)) == []


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallRun, Plan]:
    """Return a model of two layers, and groups 2 and 3 of the plan of four for them."""
    groups = METHODS["spafit"].strata[1:]
    strata = [
        dataclasses.replace(group, first=layer, last=layer) for layer, group in enumerate(groups)
    ]
    folder = make_tiny(tmp_path_factory.mktemp("two layers") / "tiny", num_hidden_layers=2)
    return SmallRun(folder), Plan("groups 2 and 3", 2, strata)


class TestCompiled:
    """Oracle: the eager step on the same batches; dropout off, for a compiler draws in its own way.

    ``fullgraph`` makes any break of the graph an error. The backend that generates no code takes
    seconds for each layer: one layer of each group that trains, by default.
    """

    def test_whole_and_the_same(self, two_layers: tuple[SmallRun, Plan]) -> None:
        self._same(*two_layers, batch_size=9)

    @pytest.mark.full
    def test_four_layers(self, small: SmallRun) -> None:
        self._same(small, METHODS["spafit"], batch_size=6)

    def test_once_for_any_number_of_rows(self, two_layers: tuple[SmallRun, Plan]) -> None:
        """Many more than torch.compile would compile anew for before it gives up, which is 8."""
        small, plan = two_layers
        model, graphs = small.model(plan, dropout=False).eval(), []

        def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
            graphs.append(graph)
            return graph.forward

        forward, rows = compiled_forward(model, backend), set()
        for words in range(1, 50, 4):
            texts = [" ".join(["cat"] * words)] * 24
            batch = small.tokenizer.encode(texts, None, max_length=53).packed(range(24), True)
            rows.add(len(batch.input_ids))
            assert (forward(batch) - model.forward_packed(batch)).abs().max() < 1e-6
        assert len(rows) > 8
        assert len(graphs) == 1

    def _same(self, small: SmallRun, plan: Plan, batch_size: int) -> None:
        ours, theirs = (small.model(plan, dropout=False) for _ in range(2))
        optimizer = make_optimizer(ours, learning_rate=1e-2, weight_decay=0.01)
        forward = compiled_forward(ours, backend="aot_eager")
        compiled = TrainingStep(ours, optimizer, forward=forward)
        batches = make_feed(small, batch_size=batch_size).batches()
        feed = [fed for fed in batches if len(fed.drawn) == batch_size]
        assert len({fed.micro_batches[0].batch.layout.bucket for fed in feed[:8]}) > 1
        for step, model in ((compiled, ours), (eager(theirs), theirs)):
            model.train()
            losses = [float(step(fed.micro_batches, 2.0**-8).loss) for fed in feed[:8]]
            if step is compiled:
                first = losses
        assert max(abs(a - b) for a, b in zip(first, losses, strict=True)) < 1e-5

    def test_what_is_compiled(self, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[dict[str, object]] = []

        def compile_nothing(
            function: Callable[..., torch.Tensor], **how: object
        ) -> Callable[..., torch.Tensor]:
            def compiled(batch: PackedBatch, prefix: torch.Tensor | None) -> torch.Tensor:
                assert {"bundles", "whole", "spans", "first_rows"} <= vars(batch.layout).keys()
                return function(batch, prefix)

            asked.append(how)
            return compiled

        monkeypatch.setattr(torch, "compile", compile_nothing)
        model = small.model(dropout=False)
        forward = compiled_forward(model)
        assert asked == [{"fullgraph": True, "dynamic": True, "backend": "inductor"}]
        batch = next(make_feed(small).batches()).micro_batches[0].batch
        plain = forward(batch)
        assert torch.equal(plain, model.forward_packed(batch))
        prefix = 1.5 * model.bert.prefix(batch)
        logits = forward(batch, prefix)
        assert torch.equal(logits, model.forward_packed(batch, prefix))
        assert not torch.equal(logits, plain)

    @pytest.mark.slow
    def test_a_compiled_run(self, small: SmallRun) -> None:
        ours, theirs = (small.model(dropout=False) for _ in range(2))
        result, expected = small.fit(ours, step="compiled"), small.fit(theirs)
        worst = max(abs(a - b) for a, b in zip(result.losses, expected.losses, strict=True))
        assert worst < 1e-4
        assert result.metrics == expected.metrics
