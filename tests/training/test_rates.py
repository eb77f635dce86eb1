"""Learning rates, weight decays and dropout of strata and techniques, in training.

Oracles: factors by hand; ``plain.fit``, which makes a group of each parameter; torch's AdamW with
groups made by hand; the uninterrupted run, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.captured import Recorder, captured, eager, make_feed
from support.interruptions import differences, everything, interrupted
from support.small_runs import LEARNING_RATE, SmallRun, read_log, trained
from support.tiny_bert import L, batches, tiny_bert

import spafit
from spafit.adapters import BiasDelta, Full, LoRA, SeriesAdapter
from spafit.errors import CheckpointError, ConfigError, PlanError
from spafit.plans import Plan, Stratum
from spafit.training import plain
from spafit.training.optimisation import learning_rate_factor, make_optimizer, set_learning_rate
from spafit.training.step import TrainingStep


def make_plan(**changes: Any) -> Plan:
    """Give a plan of 4 layers with all settings at once."""
    bias = BiasDelta(rate=0.5, weight_decay=0.3)
    strata = [
        Stratum("still", 0, 0),
        Stratum("biases", 1, 2, {"query": [bias], "layer.output.LayerNorm": [bias]}, rate=3.0),
        Stratum(
            "last",
            3,
            3,
            {
                "value": [LoRA(3, 5.0, b_rate=4.0, weight_decay=0.0), BiasDelta()],
                "layer.output": [SeriesAdapter(bottleneck=5, rate=2.0)],
            },
            rate=0.25,
            weight_decay=0.2,
            dropout=0.3,
        ),
    ]
    return dataclasses.replace(Plan("rates", 4, strata, rate_decay=0.9), **changes)


def layer(number: int, name: str) -> str:
    return f"bert.encoder.layer.{number}.{name}"


def test_factors_and_decays_by_hand(small: SmallRun) -> None:
    model = small.model(make_plan())
    assert model.adaptation is not None
    trained = model.adaptation.trained
    assert tuple(trained) == model.adaptation.trainable
    expected = {
        layer(1, "attention.self.query.bias_delta.delta"): (3 * 0.5 * 0.9**2, 0.3),
        layer(2, "output.LayerNorm.bias_delta.delta"): (3 * 0.5 * 0.9, 0.3),
        layer(3, "attention.self.value.lora_A"): (0.25, 0.0),
        layer(3, "attention.self.value.lora_B"): (0.25 * 4, 0.0),
        layer(3, "attention.self.value.bias_delta.delta"): (0.25, 0.2),
        layer(3, "output.adapters.series.down.weight"): (0.25 * 2, 0.2),
        layer(3, "output.adapters.series.up.bias"): (0.25 * 2, 0.2),
        "classifier.weight": (1.0, None),
        "classifier.bias": (1.0, None),
    }
    for name, (rate, decay) in expected.items():
        assert trained[name].rate == pytest.approx(rate, rel=1e-12), name
        assert trained[name].weight_decay == decay, name


def test_layer_wise_decay_of_a_whole_model() -> None:
    """Each layer below the last learns at 0.8 of the one above, the embeddings below all."""
    model = tiny_bert()
    everything = dict.fromkeys(("query", "layer.output.dense"), (Full(),))
    strata = [Stratum("all", 0, L - 1, everything)]
    spafit.adapt(model, Plan("all", L, strata, embeddings="full", pooler="full", rate_decay=0.8))
    assert model.adaptation is not None
    for name, how in model.adaptation.trained.items():
        steps = 0
        if name.startswith("bert.embeddings"):
            steps = L
        elif name.startswith("bert.encoder"):
            steps = L - 1 - int(name.split(".")[3])
        assert how.rate == pytest.approx(0.8**steps, rel=1e-12), name


def test_nothing_set_is_two_groups(small: SmallRun) -> None:
    """As ever: matrices decay, vectors do not, and both learn at the rate itself."""
    groups = spafit.parameter_groups(small.model(), 3e-4, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"], g["rate"]) for g in groups] == [
        (3e-4, 0.1, 1.0),
        (3e-4, 0.0, 1.0),
    ]
    matrices, vectors = (group["params"] for group in groups)
    assert all(each.dim() > 1 for each in matrices)
    assert all(each.dim() == 1 for each in vectors)
    both = spafit.parameter_groups(small.model(), 3e-4, weight_decay=0.1, decay_biases=True)
    assert [group["weight_decay"] for group in both] == [0.1, 0.1]


@pytest.mark.parametrize("capturable", [False, True])
def test_each_group_follows_the_schedule(small: SmallRun, capturable: bool) -> None:
    model = small.model(make_plan())
    optimizer = make_optimizer(model, learning_rate=1.0, weight_decay=0.1, capturable=capturable)
    places = [group["lr"] for group in optimizer.param_groups]
    assert [float(each) for each in places] == pytest.approx(
        [group["rate"] for group in optimizer.param_groups], rel=1e-6
    )
    set_learning_rate(optimizer, 0.5)
    assert model.adaptation is not None
    found = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    for name, how in model.adaptation.trained.items():
        assert found[id(model.get_parameter(name))] == pytest.approx(0.5 * how.rate, rel=1e-6)
    if capturable:  # a graph reads these tensors
        assert all(a is g["lr"] for a, g in zip(places, optimizer.param_groups, strict=True))


def take_steps(step: TrainingStep, feed: Any) -> list[float]:
    """Train at rates that float32, in which a captured step has them, holds exactly."""
    torch.manual_seed(0)
    step.model.train()
    rates = (2.0 ** -(7 + number % 3) for number in range(1000))
    return [float(step(fed.micro_batches, next(rates)).loss) for fed in feed]


class TestSteps:
    """Oracle: the eager step."""

    @pytest.mark.parametrize("precision", ["float32", "fp16"])
    def test_captured_bit_for_bit(self, small: SmallRun, precision: str) -> None:
        ours, theirs = (small.model(make_plan(rate_decay=0.5)) for _ in range(2))
        step = captured(ours, Recorder(), precision=precision)
        losses = take_steps(step, make_feed(small, epochs=2).batches())
        other = eager(theirs, precision=precision)
        assert losses == take_steps(other, make_feed(small, epochs=2).batches())
        expected = trained(theirs)
        assert all(torch.equal(value, expected[name]) for name, value in trained(ours).items())
        assert step.graphs
        assert len(step.optimizer.param_groups) > 4


class TestRuns:
    def test_twice_the_factor_is_twice_the_rate(self, small: SmallRun) -> None:
        """With the head frozen, whose factor is always 1."""
        found = []
        for factor, learning_rate in ((2.0, 1e-3), (1.0, 2e-3), (1.0, 1e-3)):
            train = {"query": [LoRA(3, 5.0), BiasDelta()]}
            model = small.model(Plan("one", 4, [Stratum("all", 0, 3, train, rate=factor)]))
            model.classifier.requires_grad_(False)
            result = small.fit(model, learning_rate=learning_rate, epochs=1, warmup=0.3)
            found.append((result.losses, trained(model)))
        (ours, first), (twice, second), (once, _) = found
        assert ours == twice != once
        assert all(torch.equal(value, second[name]) for name, value in first.items())

    def test_the_rate_that_is_logged_is_the_run_s(self, small: SmallRun, tmp_path: Path) -> None:
        small.fit(small.model(make_plan()), out=tmp_path, epochs=1)
        found = [row["learning_rate"] for row in read_log(tmp_path, "loss")]
        factors = (learning_rate_factor(step, 5, 0.0) for step in range(5))
        assert found == [LEARNING_RATE * factor for factor in factors]

    def test_layer_wise_decay_against_groups_made_by_hand(self) -> None:
        """20 steps of torch's AdamW and its own schedule, in float64: losses and weights."""
        train = dict.fromkeys(("query", "layer.output.dense", "layer.output.LayerNorm"), (Full(),))
        ours, theirs = tiny_bert(), tiny_bert()
        whole = {"embeddings": "full", "pooler": "full"}
        low = Stratum("low", 0, 1, train, rate=3.0)
        high = Stratum("high", 2, L - 1, train, weight_decay=0.2)
        spafit.adapt(ours, Plan("ours", L, [low, high], **whole, rate_decay=0.8))
        spafit.adapt(theirs, Plan("theirs", L, [Stratum("all", 0, L - 1, train)], **whole))
        groups = []
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                rate, decay = 1.0, 0.1 if parameter.dim() > 1 else 0.0  # the pooler and the head
                if "embeddings" in name:
                    rate = 0.8**L
                elif "encoder" in name:
                    number = int(name.split(".")[3])
                    rate = 0.8 ** (L - 1 - number) * (3.0 if number < 2 else 1.0)
                    decay = decay if number < 2 else 0.2
                groups.append({"params": [parameter], "lr": 1e-2 * rate, "weight_decay": decay})
        optimizers = [make_optimizer(ours, learning_rate=1e-2, weight_decay=0.1)]
        optimizers.append(torch.optim.AdamW(groups))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizers[1], lambda step: (20 - step) / 20)
        for step, (inputs, labels) in enumerate(batches(20)):
            set_learning_rate(optimizers[0], 1e-2 * learning_rate_factor(step, 20, 0.0))
            losses = []
            for model, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(**inputs), labels)
                torch.autograd.backward(loss)
                optimizer.step()
                losses.append(loss.item())
            schedule.step()
            assert abs(losses[0] - losses[1]) < 1e-9
        for name, value in trained(ours).items():
            assert (value - theirs.get_parameter(name)).abs().max() < 1e-9, name

    def test_fit_is_plain_bit_for_bit(self, small: SmallRun) -> None:
        """In the reference form, dropout of the stratum included."""
        settings = {"epochs": 2, "warmup": 0.3, "weight_decay": 0.1, "decay_biases": True}
        ours, theirs = small.model(make_plan()), small.model(make_plan())
        for model in (ours, theirs):
            spafit.set_impl(model, "reference")
        result = small.fit(ours, **settings)
        config = small.settings(**settings)
        losses, _ = plain.fit(theirs, small.tokenizer, small.train, small.dev, config)
        assert list(result.losses) == losses
        expected = trained(theirs)
        assert all(torch.equal(value, expected[name]) for name, value in trained(ours).items())
        usual = small.fit(small.model(make_plan(rate_decay=1.0)), **settings)
        assert usual.losses != result.losses

    def test_groups_made_by_hand(self) -> None:
        """AdamW on the tiny BERT in float64: every parameter with its own rate and decay."""
        strata = [Stratum("still", 0, L - 2), make_plan().strata[-1]]
        strata[1] = dataclasses.replace(strata[1], first=L - 1, last=L - 1, dropout=None)
        ours, theirs = tiny_bert(), tiny_bert()
        spafit.adapt(ours, Plan("rates", L, strata))
        bare = {"value": [LoRA(3, 5.0), BiasDelta()], "layer.output": [SeriesAdapter(bottleneck=5)]}
        plain_strata = [strata[0], Stratum("last", L - 1, L - 1, bare)]
        spafit.adapt(theirs, Plan("plain", L, plain_strata))
        groups = []
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                rate, decay = 0.25, 0.2
                if "lora" in name:
                    rate, decay = (1.0 if name.endswith("B") else 0.25), 0.0
                elif "series" in name:
                    rate = 0.5
                elif "classifier" in name:
                    rate, decay = 1.0, 0.1 if name.endswith("weight") else 0.0
                groups.append({"params": [parameter], "lr": 1e-2 * rate, "weight_decay": decay})
        optimizers = [
            torch.optim.AdamW(spafit.parameter_groups(ours, 1e-2, weight_decay=0.1)),
            torch.optim.AdamW(groups),
        ]
        for inputs, labels in batches(6):
            for model, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(**inputs), labels)
                torch.autograd.backward(loss)
                optimizer.step()
        for name, value in trained(ours).items():
            assert (value - theirs.get_parameter(name)).abs().max() < 1e-12, name

    def test_resumed_bit_for_bit(self, small: SmallRun, tmp_path: Path) -> None:
        settings = {"epochs": 2, "warmup": 0.1, "save_every": 3}
        small.fit(small.model(make_plan()), out=tmp_path / "whole", **settings)
        interrupted(small, tmp_path / "parts", [2, 7], lambda: small.model(make_plan()), **settings)
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))

    def test_other_rates_are_another_run(self, small: SmallRun, tmp_path: Path) -> None:
        small.fit(small.model(make_plan()), out=tmp_path, epochs=1)
        with pytest.raises(CheckpointError, match="plan"):
            small.fit(small.model(make_plan(rate_decay=0.8)), out=tmp_path, epochs=1)


def test_dropout_of_a_stratum(small: SmallRun) -> None:
    model = small.model(make_plan())
    before = small.model(Plan("none", 4, [Stratum("still", 0, 3)]))
    for number in range(4):
        ours, theirs = (each.bert.encoder.layer[number] for each in (model, before))
        rates = [
            ours.attention.self.dropout,
            ours.attention.output.dropout.p,
            ours.output.dropout.p,
        ]
        usual = theirs.attention.self.dropout
        assert rates == ([0.3] * 3 if number == 3 else [usual] * 3)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_of_a_stratum_with_the_adapters_disabled(small: SmallRun, training: bool) -> None:
    """It drops in training mode as ever; in evaluation mode it changes nothing."""
    batch, found = small.tokenizer(["a cat sees"], ["the dog"]), []
    for rate in (0.9, None):
        stratum = Stratum("all", 0, 3, {"query": [BiasDelta()]}, dropout=rate)
        model = small.model(Plan("dropping", 4, [stratum])).train(training)
        torch.manual_seed(1)
        with spafit.adapters_disabled(model), torch.no_grad():
            found.append(model(*batch))
    assert torch.equal(*found) is not training


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "x", None, True])
def test_absurd_arguments_of_parameter_groups(small: SmallRun, value: Any) -> None:
    model = small.model()
    with pytest.raises(ConfigError, match="learning_rate must be a number from 0, found"):
        spafit.parameter_groups(model, value)
    with pytest.raises(ConfigError, match="weight_decay must be a number from 0, found"):
        spafit.parameter_groups(model, 1e-3, value)


def test_plans_with_rates_are_equal_after_a_round_trip_and_leave_defaults_out() -> None:
    made = make_plan()
    text = made.to_json()
    assert Plan.from_json(text) == made
    assert text.count("rate_decay") == 1
    assert '"thaw"' not in text
    usual = spafit.plan("SPAFIT-1-2-II", 4).to_json()
    assert "rate" not in usual.replace("strata", "")
    assert Plan.from_json(usual) == spafit.plan("SPAFIT-1-2-II", 4)


def test_another_trainer_is_told_of_rates(small: SmallRun) -> None:
    with pytest.warns(
        UserWarning, match=r"made of spafit\.parameter_groups\(model, learning_rate\)"
    ):
        spafit.interop.for_trainer(small.model(make_plan()))


@pytest.mark.parametrize("changes", [{"thaw": 1}, {"freeze": "50%"}])
def test_another_trainer_does_not_thaw(small: SmallRun, changes: dict[str, Any]) -> None:
    strata = [Stratum("all", 0, 3, {"query": [BiasDelta()]}, **changes)]
    with pytest.raises(PlanError, match=r"all thaws or freezes during training, which spafit\.fit"):
        spafit.interop.for_trainer(small.model(Plan("timed", 4, strata)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Stratum("s", 0, 0, rate=0), "s: rate, a factor .* must be a positive number"),
        (lambda: Stratum("s", 0, 0, rate="2"), "s: rate"),
        (lambda: Stratum("s", 0, 0, weight_decay=-1), "s: weight_decay must be a number from 0"),
        (lambda: Stratum("s", 0, 0, dropout=1.0), r"s: dropout must be a rate in \[0, 1\)"),
        (lambda: Stratum("s", 0, 0, thaw="10"), "s: thaw must be a number of epochs from 0"),
        (lambda: Stratum("s", 0, 0, freeze=-1), "s: freeze must be a number of epochs from 0"),
        (lambda: Stratum("s", 0, 0, thaw=float("nan")), "s: thaw must be"),
        (lambda: Stratum("s", 0, 0, {"query": [LoRA(rate=-1)]}), "s, layer.*query: lora: rate"),
        (lambda: Stratum("s", 0, 0, {"query": [BiasDelta(weight_decay="x")]}), "weight_decay"),
        (lambda: make_plan(rate_decay=1.5), "rates: rate_decay, .* at most 1, found 1.5"),
        (lambda: make_plan(rate_decay=0), "rates: rate_decay"),
        (lambda: make_plan(rate_decay=1e-9), "leaves the first of 4 layers no rate at all"),
    ],
)
def test_absurd_settings_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        make()
