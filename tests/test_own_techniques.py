"""Techniques of a user's own, defined in this file and registered by one call each.

Oracle: the equation of each technique in plain torch; the base and the trained model, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from support.small_runs import SmallRun, trained
from torch import nn

import spafit
from spafit.adaptable import Adaptable, LayerNorm, Linear
from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError, WeightsError
from spafit.plans import Plan, Stratum
from spafit.techniques import TECHNIQUES, Technique
from spafit.training import plain


class GainedLayerNorm(LayerNorm):
    """y = (γ + δγ) ⊙ x̂ + β."""

    merges = (*LayerNorm.merges, "gain")

    def __init__(self, norm: LayerNorm) -> None:
        nn.Module.__init__(self)
        self.take_over(norm)
        self.gain = nn.Parameter(torch.zeros_like(norm.weight))  # δγ

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gamma = self.weight + self.gain if self.adapters_on else self.weight
        return nn.functional.layer_norm(x, gamma.shape, gamma, self.b(), self.eps)

    def merged(self) -> dict[str, torch.Tensor]:
        return {**super().merged(), "weight": (self.weight + self.gain).detach()}


@dataclass(frozen=True)
class Gain(Technique):
    """Train δγ in γ + δγ."""

    name: ClassVar[str] = "gain"
    short: ClassVar[str] = "gain"
    trains: ClassVar[tuple[str, ...]] = ("gain",)
    attaches_to = (LayerNorm,)

    def attach(self, module: Adaptable, generator: torch.Generator) -> Adaptable:
        assert isinstance(module, LayerNorm)
        return GainedLayerNorm(module)


class ScaledLinear(Linear):
    """y = l ⊙ (x Wᵀ + b), (IA)³ of Liu et al. (2022)."""

    def __init__(self, linear: Linear, start: float) -> None:
        nn.Module.__init__(self)
        self.take_over(linear)
        self.scale = nn.Parameter(torch.full_like(linear.bias, start))  # l

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * self.scale if self.adapters_on else y


class MergingScaledLinear(ScaledLinear):
    """The same, which says how it is merged."""

    merges = (*ScaledLinear.merges, "scale")

    def merged(self) -> dict[str, torch.Tensor]:
        plain, scale = super().merged(), self.scale.detach()
        return {"weight": scale[:, None] * plain["weight"], "bias": scale * plain["bias"]}


@dataclass(frozen=True)
class IA3(Technique):
    """Train a scale of a Linear's output."""

    start: float = 1.0

    name: ClassVar[str] = "own-ia3"
    short: ClassVar[str] = "(IA)³"
    trains: ClassVar[tuple[str, ...]] = ("scale",)
    attaches_to = (Linear,)
    leaves: ClassVar[type[ScaledLinear]] = MergingScaledLinear

    def combines_with(self, other: Technique) -> bool:
        return not isinstance(other, spafit.LoRA)

    def attach(self, module: Adaptable, generator: torch.Generator) -> Adaptable:
        assert isinstance(module, Linear)
        return self.leaves(module, self.start)


@dataclass(frozen=True)
class Unmerged(IA3):
    """The same without a merged form."""

    name: ClassVar[str] = "unmerged"
    leaves: ClassVar[type[ScaledLinear]] = ScaledLinear


class OnceScaledLinear(Linear):
    """y = s (x Wᵀ + b) with one number s for all places."""

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)
        self.take_over(linear)
        self.s = nn.Parameter(self.weight.new_ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * self.s if self.adapters_on else y


@dataclass(frozen=True)
class OneScale(Technique):
    """Train a single number; where it is meant for is a setting of several values."""

    places: tuple[int, ...] = ()

    name: ClassVar[str] = "one-scale"
    short: ClassVar[str] = "s"
    trains: ClassVar[tuple[str, ...]] = ("s",)
    attaches_to = (Linear,)

    def attach(self, module: Adaptable, generator: torch.Generator) -> Adaptable:
        assert isinstance(module, Linear)
        return OnceScaledLinear(module)


class DeafLinear(Linear):
    """y = x Wᵀ + b + g: whatever else is attached, it does not hear of it."""

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)
        self.take_over(linear)
        self.g = nn.Parameter(torch.zeros_like(linear.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return y + self.g if self.adapters_on else y


@dataclass(frozen=True)
class Deaf(Technique):
    """Train g."""

    name: ClassVar[str] = "deaf"
    short: ClassVar[str] = "deaf"
    trains: ClassVar[tuple[str, ...]] = ("g",)
    attaches_to = (Linear,)

    def attach(self, module: Adaptable, generator: torch.Generator) -> Adaptable:
        assert isinstance(module, Linear)
        return DeafLinear(module)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(TECHNIQUES)
    for technique in (Gain, IA3, Unmerged, OneScale, Deaf):
        assert spafit.register(technique) is technique
    yield
    TECHNIQUES.clear()
    TECHNIQUES.update(before)


@pytest.mark.parametrize(
    ("module", "train", "in_vain"),
    [
        (
            "layer.output.LayerNorm",
            [Gain(), spafit.LayerNormGain()],
            "layernorm-gain would train gain_delta.delta",
        ),
        ("query", [Deaf(), spafit.BiasDelta()], "bias-delta would train bias_delta.delta"),
        ("query", [Deaf(), spafit.adapters.IA3()], "ia3 would train ia3.l"),
    ],
)
def test_what_a_module_leaves_out_is_refused(
    module: str, train: list[Technique], in_vain: str
) -> None:
    """GainedLayerNorm takes γ alone, and DeafLinear W and b; also where no gradient is on."""
    with torch.no_grad(), pytest.raises(PlanError, match=f"{in_vain} in vain: "):
        Stratum("s", 0, 0, {module: train})


def make_plan(num_layers: int, *more: Technique) -> Plan:
    train = {
        "layer.output.LayerNorm": [Gain(), spafit.BiasDelta()],
        "key": [IA3(), spafit.BiasDelta()],
        "intermediate.dense": [IA3(start=1.25)],
        "query": [spafit.LoRA(r=3, alpha=4)],
        **({"value": list(more)} if more else {}),
    }
    strata = [Stratum("still", 0, 1), Stratum("own", 2, num_layers - 1, train)]
    return Plan("own", num_layers, strata)


def base(small: SmallRun) -> BertForSequenceClassification:
    return spafit.load_pretrained(small.folder, num_labels=2, dtype=torch.float64).eval()


def logits(model: BertForSequenceClassification, small: SmallRun) -> torch.Tensor:
    batch = small.tokenizer.encode(["the cat sees", "old dog"], max_length=16).batch([0, 1])
    with torch.no_grad():
        return model.eval()(*batch)


def moved(model: BertForSequenceClassification) -> BertForSequenceClassification:
    """Move all that trains, as training would."""
    generator = torch.Generator().manual_seed(7)
    assert model.adaptation is not None
    with torch.no_grad():
        for name in model.adaptation.trainable:
            parameter = model.get_parameter(name)
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_the_equations() -> None:
    """Written out in float64, with and without δ; switched off they are the module before."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 20, generator=generator, dtype=torch.float64)
    linear, norm = Linear(20, 11).double(), LayerNorm(20, 1e-3).double()
    nn.init.normal_(linear.weight, generator=generator)
    mapped, normed = linear(x), norm(x)
    scaled = IA3().attach(spafit.BiasDelta().attach(linear, None), generator)
    gained = Gain().attach(norm, generator)
    assert torch.equal(scaled(x), mapped)
    assert torch.equal(gained(x), normed)
    with torch.no_grad():
        for parameter in (scaled.scale, scaled.bias_delta.delta, gained.gain):
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    expected = scaled.scale * (x @ linear.weight.T + linear.bias + scaled.bias_delta.delta)
    assert (scaled(x) - expected).abs().max() < 1e-12
    assert (gained(x) - (normed - norm.bias) * (1 + gained.gain) - norm.bias).abs().max() < 1e-12
    scaled.adapters_on = gained.adapters_on = False
    assert torch.equal(scaled(x), mapped)
    assert torch.equal(gained(x), normed)


def test_in_a_plan_and_in_a_plan_file(small: SmallRun, tmp_path: Path) -> None:
    made = make_plan(4)
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.strata[1].train["layer.intermediate.dense"] == (IA3(1.25),)
    file = tmp_path / "own.json"
    file.write_text(made.to_json(), encoding="utf-8")
    assert spafit.plan(file, 4) == made
    assert not made.writes_pretrained


def test_counted_and_drawn(small: SmallRun) -> None:
    model = base(small)
    pretrained = sum(each.numel() for each in model.parameters())
    plan = make_plan(model.config.num_hidden_layers)
    summary = spafit.adapt(model, plan)
    D, F = model.config.hidden_size, model.config.intermediate_size
    layers = model.config.num_hidden_layers - 2
    head = sum(each.numel() for each in model.classifier.parameters())
    assert summary.trainable == layers * (2 * D + 2 * D + F + 2 * 3 * D) + head
    assert summary.pretrained == pretrained
    for words in ("LoRA r=3 (query)", "bias + (IA)³ (key)", "bias + gain (LayerNorm)"):
        assert words in str(summary)
    assert spafit.summarise(model) == summary


def test_trained_saved_and_loaded_on_a_fresh_base(small: SmallRun, tmp_path: Path) -> None:
    model = small.model(make_plan(4))
    before, fingerprint = trained(model), spafit.fingerprint(model)
    small.fit(model, out=tmp_path, epochs=2)
    after = trained(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert spafit.fingerprint(model) == fingerprint
    fresh = spafit.load_pretrained(small.folder, num_labels=2)
    spafit.load_adapter(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(fresh, small), logits(model, small))


def test_a_single_number_trains(small: SmallRun) -> None:
    """In ``fit`` as in its definition, bit for bit in the reference form."""
    plan = make_plan(4, OneScale())
    ours, theirs = small.model(plan), small.model(plan)
    for model in (ours, theirs):
        spafit.set_impl(model, "reference")
    small.fit(ours, epochs=1)
    plain.fit(theirs, small.tokenizer, small.train, small.dev, small.settings(epochs=1))
    for number in (2, 3):
        name = f"bert.encoder.layer.{number}.attention.self.value.s"
        assert ours.get_parameter(name).item() != 1.0
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name))


def test_a_setting_of_several_values(small: SmallRun) -> None:
    """A tuple is a list in JSON, and a tuple again in the plan that is read."""
    made = make_plan(4, OneScale(places=(3, 1)))
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.strata[1].train["layer.attention.self.value"] == (OneScale((3, 1)),)
    with pytest.raises(PlanError, match=r"one-scale can be changed.*let it be a tuple"):
        make_plan(4, OneScale(places=[3, 1]))  # type: ignore[arg-type]


def test_an_adapter_needs_its_technique_registered(small: SmallRun, tmp_path: Path) -> None:
    model = base(small)
    spafit.adapt(model, make_plan(4))
    spafit.save_adapter(model, tmp_path / "own.safetensors")
    del TECHNIQUES["own-ia3"]
    with pytest.raises(WeightsError, match=r'^the plan in .*"own-ia3" is no .* registered first'):
        spafit.load_adapter(base(small), tmp_path / "own.safetensors")


def test_disabled_bit_for_bit(small: SmallRun) -> None:
    model = base(small)
    before = logits(model, small)
    spafit.adapt(model, make_plan(4, Unmerged()))
    learned = logits(moved(model), small)
    assert not torch.equal(learned, before)
    with spafit.adapters_disabled(model):
        assert torch.equal(logits(model, small), before)
    assert torch.equal(logits(model, small), learned)


class TestMerged:
    """Oracle: the adapted model's logits, from a model that knows of no technique."""

    def test_is_the_same_model(self, small: SmallRun) -> None:
        model = base(small)
        names = list(model.state_dict())
        spafit.adapt(model, make_plan(4))
        merged = spafit.merged_state_dict(moved(model))
        assert list(merged) == names
        fresh = base(small)
        fresh.load_state_dict(merged)
        assert (logits(fresh, small) - logits(model, small)).abs().max() < 1e-12

    def test_without_a_merged_form_it_is_refused_by_name(self, small: SmallRun) -> None:
        model = base(small)
        spafit.adapt(model, make_plan(4, Unmerged()))
        with pytest.raises(PlanError, match=r"layer\.2\.attention\.self\.value\.scale has no merg"):
            spafit.merged_state_dict(model)

    @pytest.mark.parametrize("place", ["bert.encoder.layer.1.output.dense", "bert.pooler", ""])
    def test_what_is_added_by_hand_is_never_dropped(self, small: SmallRun, place: str) -> None:
        model = base(small)
        spafit.adapt(model, make_plan(4))
        model.get_submodule(place).register_parameter("own", nn.Parameter(torch.ones(2)))
        with pytest.raises(PlanError, match=r"own has no merged form"):
            spafit.merged_state_dict(model)


class TestRefused:
    """Oracle: what is wrong, named where the plan is made or the technique registered."""

    @pytest.mark.parametrize(
        ("train", "reason"),
        [
            ({"query": [Gain()]}, "gain needs a LayerNorm, found a Linear"),
            ({"layer.output.LayerNorm": [IA3()]}, r"needs a Linear, found a LayerNorm"),
            (
                {"query": [IA3(), spafit.LoRA()]},
                "own-ia3 and lora cannot be attached to the same module",
            ),
            (
                {"query": [spafit.Full(), IA3()]},
                "full and own-ia3 cannot be attached to the same module",
            ),
        ],
    )
    def test_on_one_module(self, train: dict[str, list[Technique]], reason: str) -> None:
        with pytest.raises(PlanError, match=reason):
            Stratum("own", 0, 1, train)

    def test_what_is_added_and_not_said_to_train(self) -> None:
        @spafit.register
        @dataclass(frozen=True)
        class Silent(IA3):
            name: ClassVar[str] = "silent"
            trains: ClassVar[tuple[str, ...]] = ()

        with pytest.raises(PlanError, match="silent adds scale, which its trains does not name"):
            Stratum("own", 0, 1, {"query": [Silent()]})

    def test_what_is_said_to_train_and_not_added(self) -> None:
        @spafit.register
        @dataclass(frozen=True)
        class Absent(IA3):
            name: ClassVar[str] = "absent"
            trains: ClassVar[tuple[str, ...]] = ("scale", "shift")

        with pytest.raises(PlanError, match=r"absent trains shift, but the module .* no such par"):
            Stratum("own", 0, 1, {"query": [Absent()]})

    def test_what_would_drop_another(self) -> None:
        @spafit.register
        @dataclass(frozen=True)
        class Late(IA3):
            name: ClassVar[str] = "late"
            order: ClassVar[int] = 2

            def combines_with(self, other: Technique) -> bool:
                return True

        with pytest.raises(
            PlanError, match=r"late cannot be attached.* has lost lora_A and lora_B"
        ):
            Stratum("own", 0, 1, {"query": [Late(), spafit.LoRA()]})

    def test_two_that_add_the_same_name(self) -> None:
        with pytest.raises(PlanError, match="own-ia3 and unmerged train the same scale"):
            Stratum("own", 0, 1, {"query": [IA3(), Unmerged()]})

    def test_two_that_train_the_same_tensor(self) -> None:
        @spafit.register
        @dataclass(frozen=True)
        class Again(spafit.DirectBias):
            name: ClassVar[str] = "again"

        with pytest.raises(PlanError, match="again and bias-direct train the same bias"):
            Stratum("own", 0, 1, {"query": [Again(), spafit.DirectBias()]})

    def test_names_clash(self) -> None:
        with pytest.raises(PlanError, match="there is a technique own-ia3 already, IA3"):
            spafit.register(dataclasses.make_dataclass("Other", [], bases=(IA3,), frozen=True))

    def test_defined_again_in_the_same_place(self) -> None:
        """As by a cell of a notebook that runs twice: plans use the newer one."""

        def cell() -> type[Technique]:
            @spafit.register
            @dataclass(frozen=True)
            class Cell(Gain):
                name: ClassVar[str] = "cell"

            return Cell

        cell()
        again = cell()
        plan = Plan("own", 1, [Stratum("own", 0, 0, {"layer.output.LayerNorm": [again()]})])
        read = Plan.from_json(plan.to_json())
        ((technique,),) = read.strata[0].train.values()
        assert type(technique) is again

    @pytest.mark.parametrize("thing", [int, "lora", Gain()], ids=str)
    def test_what_is_no_technique(self, thing: object) -> None:
        with pytest.raises(PlanError, match=r"is no subclass of spafit\.Technique"):
            spafit.register(thing)

    def test_a_class_that_is_no_dataclass(self) -> None:
        class Bare(Technique):
            name = "bare"

        with pytest.raises(PlanError, match="Bare must be a dataclass"):
            spafit.register(Bare)
