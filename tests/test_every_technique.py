"""Every technique in a model: its equation, its forms, its switch, its file, its numbers.

Oracles: the equations in plain torch; the reference form on padded batches; the base, bit for bit;
counts by hand. Bottleneck adapters are also held against the library ``adapters``
(test_adapters_oracle.py), the others against PEFT.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from support.tiny_bert import D, L, batches, logits, some_steps, tiny_bert
from torch import nn

import spafit
from spafit.adaptable import Adaptable, Dropout, LayerNorm, Linear, SublayerEnd
from spafit.adapters import (
    ACTIVATIONS,
    IA3,
    BiasDelta,
    BottleneckAdapter,
    DirectBias,
    Full,
    IA3Scale,
    LayerNormGain,
    LoRA,
    LoRALinear,
    ParallelAdapter,
    PfeifferAdapter,
    SeriesAdapter,
)
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import PlanError
from spafit.plans import ATTENTION_OUTPUT, MODULES, OUTPUT, PLACES, Plan, Stratum
from spafit.techniques import TECHNIQUES, Technique

NORMS = tuple(module for module in MODULES if module.endswith("LayerNorm"))
LINEARS = tuple(module for module in MODULES if module not in NORMS)
ENDS = (ATTENTION_OUTPUT, OUTPUT)

# A technique, and where it stands in layers 2 to 5.
EXAMPLES: list[tuple[Technique, tuple[str, ...]]] = [
    (BiasDelta(), MODULES),
    (DirectBias(), MODULES),
    (LayerNormGain(), NORMS),
    (LoRA(r=3, alpha=5.0), LINEARS),
    (LoRA(r=3, alpha=5.0, rank_stabilised=True), LINEARS),
    (IA3(), LINEARS),
    (IA3(of="input"), LINEARS),
    (SeriesAdapter(bottleneck=7), ENDS),
    (SeriesAdapter(bottleneck="D/3", activation="gelu", scaling=0.5), ENDS),
    (PfeifferAdapter(bottleneck="D/4"), ENDS),
    (ParallelAdapter(bottleneck=7), ENDS),
    (ParallelAdapter(bottleneck=7, activation="swish"), (OUTPUT,)),
    (Full(), MODULES),
]
EACH = pytest.mark.parametrize(("technique", "places"), EXAMPLES, ids=lambda each: repr(each)[:50])
WITHOUT_FULL = pytest.mark.parametrize(
    ("technique", "places"), EXAMPLES[:-1], ids=lambda each: repr(each)[:50]
)


def make_plan(techniques: Sequence[Technique], places: Sequence[str], layers: int = L) -> Plan:
    train = dict.fromkeys(places, tuple(techniques))
    return Plan("one", layers, [Stratum("still", 0, 1), Stratum("rest", 2, layers - 1, train)])


def adapted(
    techniques: Sequence[Technique], places: Sequence[str]
) -> BertForSequenceClassification:
    model = tiny_bert()
    spafit.adapt(model, make_plan(techniques, places), seed=5)
    return model


def shaken(model: BertForSequenceClassification, by: float = 0.2) -> BertForSequenceClassification:
    """Move all that trains, as training would."""
    generator = torch.Generator().manual_seed(7)
    assert model.adaptation is not None
    with torch.no_grad():
        for name in model.adaptation.trainable:
            parameter = model.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(by * noise)
    return model


def loss_and_gradients(
    model: BertForSequenceClassification, impl: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    spafit.set_impl(model, impl)
    [(inputs, labels)] = batches(1, seed=4)
    loss = F.cross_entropy(model(**inputs), labels)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return loss.detach(), dict(zip(trained, gradients, strict=True))


def test_all_are_here() -> None:
    assert {type(technique) for technique, _ in EXAMPLES} == set(TECHNIQUES.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [SeriesAdapter, PfeifferAdapter, ParallelAdapter])
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_the_equations_of_the_adapters(
    kind: type[BottleneckAdapter], activation: str, impl: str
) -> None:
    """LN(H' + X) with the σ of the field, in plain torch.

    It is Eq. (bottleneck), whose z is by Eq. (SeriesAdapter), Eq. (PfeifferAdapter) or
    Eq. (ParallelAdapter).
    """
    generator = torch.Generator().manual_seed(3)
    end = SublayerEnd()
    end.dropout, end.LayerNorm = Dropout(0.0), LayerNorm(D, 1e-3)
    end.double()
    kind(bottleneck=7, activation=activation, scaling=1.5).attach(end, generator)
    spafit.set_impl(end, impl)
    with torch.no_grad():
        for parameter in end.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    p = dict(end.named_parameters())
    down, bias, up, bias_up = (
        p[f"adapters.{kind.name}.{each}"]
        for each in ("down.weight", "down.bias", "up.weight", "up.bias")
    )
    H, X = (torch.randn(3, 7, D, generator=generator, dtype=torch.float64) for _ in range(2))

    def LN(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
        return p["LayerNorm.weight"] * x + p["LayerNorm.bias"]

    z = {SeriesAdapter: H, PfeifferAdapter: LN(H + X), ParallelAdapter: X}[kind] @ down.T + bias
    sigma = {
        "relu": z * (z > 0),
        "gelu": z * (1 + torch.erf(z / 2**0.5)) / 2,
        "swish": z / (1 + torch.exp(-z)),
    }[activation]
    expected = LN(H + 1.5 * (sigma @ up.T + bias_up) + X)
    assert (end.add_norm(H, X) - expected).abs().max() < 1e-12
    end.adapters_on = False
    assert (end.add_norm(H, X) - LN(H + X)).abs().max() < 1e-12


@EACH
class TestForms:
    def test_fused_and_packed_is_plain_and_padded(
        self, technique: Technique, places: tuple[str, ...]
    ) -> None:
        model = shaken(adapted([technique], places))
        plain, expected = loss_and_gradients(model, "reference")
        for impl in ("fused", "auto"):
            loss, gradients = loss_and_gradients(model, impl)
            assert (loss - plain).abs() < 1e-12
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                assert (gradient - expected[name]).abs().max() < 1e-12, name

    def test_in_bf16(self, technique: Technique, places: tuple[str, ...]) -> None:
        """Under autocast the fused form errs at most twice as much as the plain one.

        The error is that of the whole gradient, against float32, as a share of its norm.
        """
        model = shaken(adapted([technique], places), 0.02).float()
        _, exact = loss_and_gradients(model, "reference")
        errors = {}
        for impl in ("reference", "auto"):
            with torch.autocast("cpu", torch.bfloat16):
                _, found = loss_and_gradients(model, impl)
            apart = [(found[name] - exact[name]).norm() for name in exact]
            errors[impl] = (
                torch.stack(apart).norm()
                / torch.stack([gradient.norm() for gradient in exact.values()]).norm()
            )
        assert 0 < errors["auto"] <= 2 * errors["reference"] < 0.2

    def test_gradcheck(self, technique: Technique, places: tuple[str, ...]) -> None:
        """Of all that trains in the reference and in the fused form, by finite differences."""
        model = shaken(adapted([technique], places[-2:]))
        [(inputs, labels)] = batches(1, B=2, T=5, seed=4)
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}

        def loss(*values: torch.Tensor) -> torch.Tensor:
            given = dict(zip(trained, values, strict=True))
            found = torch.func.functional_call(model, given, kwargs=inputs)
            return F.cross_entropy(found, labels)

        for impl in ("reference", "fused"):
            spafit.set_impl(model, impl)
            values = tuple(each.detach().requires_grad_() for each in trained.values())
            assert torch.autograd.gradcheck(loss, values, fast_mode=True)

    def test_at_the_start_it_is_the_base_bit_for_bit(
        self, technique: Technique, places: tuple[str, ...]
    ) -> None:
        for impl in ("reference", "auto"):
            base, model = tiny_bert(), adapted([technique], places)
            for each in (base, model):
                spafit.set_impl(each, impl)
            if isinstance(technique, IA3):  # its maps are products of their own, in another order
                assert (logits(model) - logits(base)).abs().max() < 1e-12
            else:
                assert torch.equal(logits(model), logits(base))

    def test_saved_and_loaded_on_a_fresh_base(
        self, technique: Technique, places: tuple[str, ...], tmp_path: Path
    ) -> None:
        model = adapted([technique], places)
        some_steps(model, 2)
        spafit.save_adapter(model, tmp_path / "adapter.safetensors")
        fresh = tiny_bert()
        adaptation = spafit.load_adapter(fresh, tmp_path / "adapter.safetensors")
        assert adaptation.plan == make_plan([technique], places)
        assert torch.equal(logits(fresh), logits(model))

    def test_merged_or_refused(self, technique: Technique, places: tuple[str, ...]) -> None:
        """What has a merged form gives the same logits in a plain model; else it is named."""
        model = shaken(adapted([technique], places))
        if isinstance(technique, BottleneckAdapter):
            with pytest.raises(PlanError, match=rf"no merged form: the adapter {technique.name} "):
                spafit.merged_state_dict(model)
            return
        base = tiny_bert()
        base.load_state_dict(spafit.merged_state_dict(model))
        assert (logits(base) - logits(model)).abs().max() < 1e-12


@pytest.mark.parametrize("of", ["output", "input"])
def test_ia3_under_autocast_is_in_half(of: str) -> None:
    """So that queries and keys are in one type, whichever of them are scaled."""
    model = adapted([IA3(of=of)], ["attention.self.key"]).float()
    key = model.bert.encoder.layer[2].attention.self.key
    with torch.autocast("cpu", torch.bfloat16):
        assert key(torch.ones(3, D)).dtype == torch.bfloat16


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(("technique", "places"), EXAMPLES[:-1:2])
def test_what_is_added_is_in_the_mode_of_the_model(
    technique: Technique, places: tuple[str, ...], is_training: bool
) -> None:
    model = tiny_bert().train(is_training)
    spafit.adapt(model, make_plan([technique], places))
    assert {module.training for module in model.modules()} == {is_training}


@WITHOUT_FULL
def test_disabled_bit_for_bit_after_training(technique: Technique, places: tuple[str, ...]) -> None:
    model = adapted([technique], places)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    some_steps(model)
    trained = logits(model)
    with spafit.adapters_disabled(model):
        assert torch.equal(logits(model), logits(tiny_bert()))
    assert torch.equal(logits(model), trained)
    assert not torch.equal(trained, logits(tiny_bert()))
    assert model.adaptation is not None
    for name, tensor in model.state_dict().items():
        moved = name in model.adaptation.trainable
        assert torch.equal(tensor, before[name]) != moved, name


# Pairs that cannot stand on one module, whatever their settings; all others of a kind can.
FORBIDDEN = [
    {BiasDelta().name, "bias-direct"},
    *({"full", each} for each in ("bias-delta", "bias-direct", "layernorm-gain", "lora", "ia3")),
    {"series", "pfeiffer"},
]
ONE_EACH = {technique.name: technique for technique, _ in reversed(EXAMPLES)}
PAIRS = [
    (place, *pair)
    for place, pair in itertools.product(
        ("layer.attention.self.key", "layer.output.LayerNorm", "layer.output"),
        itertools.combinations(ONE_EACH, 2),
    )
    if all(
        place in next(where for technique, where in EXAMPLES if technique.name == name)
        for name in pair
    )
]


@pytest.mark.parametrize(("place", "one", "other"), PAIRS)
def test_two_on_one_module(place: str, one: str, other: str, tmp_path: Path) -> None:
    """Together they are both: trained, switched off, saved, and in every form the same."""
    pair = [ONE_EACH[one], ONE_EACH[other]]
    if {one, other} in FORBIDDEN:
        with pytest.raises(PlanError, match=r"cannot be attached to the same module|train the sa"):
            make_plan(pair, [place])
        return
    model = adapted(pair, [place])
    apart = (logits(model) - logits(tiny_bert())).abs().max()
    assert apart < 1e-12 if "ia3" in (one, other) else apart == 0
    some_steps(model, 2)
    plain, expected = loss_and_gradients(model, "reference")
    assert all(bool(gradient.any()) for gradient in expected.values()), "one of them has no effect"
    loss, gradients = loss_and_gradients(model, "auto")
    assert (loss - plain).abs() < 1e-12
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() < 1e-12, name
    spafit.save_adapter(model, tmp_path / "pair.safetensors")
    fresh = tiny_bert()
    spafit.load_adapter(fresh, tmp_path / "pair.safetensors")
    assert torch.equal(logits(fresh), logits(model))
    with spafit.adapters_disabled(model):
        assert torch.equal(logits(model), logits(tiny_bert()))
    if place != OUTPUT:
        merged = tiny_bert()
        merged.load_state_dict(spafit.merged_state_dict(model))
        assert (logits(merged) - logits(model)).abs().max() < 1e-12


def test_every_place_is_tried() -> None:
    assert {place for _, places in EXAMPLES for place in places} == set(PLACES)
    assert len(PAIRS) > 15


LARGE = BertConfig()  # bert-large-cased: L 24, D 1024, F 4096; three labels
HEAD = 3 * 1024 + 3
BY_HAND = {
    # two adapters a layer, each D m + m and m D + D
    "houlsby": 24 * 2 * (1024 * 64 + 64 + 64 * 1024 + 1024),  # 6,343,680
    "pfeiffer": 24 * (1024 * 64 + 64 + 64 * 1024 + 1024),  # 3,171,840
    "parallel": 24 * 2 * (1024 * 64 + 64 + 64 * 1024 + 1024),
    "ia3": 24 * (1024 + 1024 + 4096),  # keys, values, hidden units: 147,456
}
ONE_TECHNIQUE = [
    # technique, place, numbers in one layer
    (BiasDelta(), "query", 1024),
    (BiasDelta(), "intermediate.dense", 4096),
    (DirectBias(), "layer.output.LayerNorm", 1024),
    (LayerNormGain(), "layer.output.LayerNorm", 1024),
    (LoRA(), "value", 64 * (1024 + 1024)),
    (LoRA(r=8, rank_stabilised=True), "layer.output.dense", 8 * (4096 + 1024)),
    (IA3(), "intermediate.dense", 4096),
    (IA3(of="input"), "intermediate.dense", 1024),
    (SeriesAdapter(bottleneck=100), "attention.output", 100 * 1024 + 100 + 1024 * 100 + 1024),
    (PfeifferAdapter(bottleneck="D/3"), "layer.output", 2 * 1024 * 341 + 341 + 1024),
    (ParallelAdapter(bottleneck="D/2000"), "layer.output", 2 * 1024 * 1 + 1 + 1024),
    (Full(), "key", 1024 * 1024 + 1024),
]


class TestCounts:
    """For BERT-large, on the meta device. Oracle: arithmetic."""

    def large(self, plan: Plan | str) -> spafit.Summary:
        with torch.device("meta"):
            model = BertForSequenceClassification(LARGE, num_labels=3)
        return spafit.adapt(model, plan)

    @pytest.mark.parametrize("method", BY_HAND)
    def test_of_methods(self, method: str) -> None:
        assert self.large(method).trainable == BY_HAND[method] + HEAD

    def test_of_techniques(self) -> None:
        """All in one plan, one a layer: each stratum counts its own."""
        strata = [
            Stratum(f"layer {number}", number, number, {place: [technique]})
            for number, (technique, place, _) in enumerate(ONE_TECHNIQUE)
        ]
        rest = Stratum("rest", len(strata), 23)
        summary = self.large(Plan("one each", 24, [*strata, rest]))
        counted = [group.trainable for group in summary.groups[1 : len(strata) + 1]]
        assert counted == [count for _, _, count in ONE_TECHNIQUE]
        assert summary.pretrained == 333_582_339
        assert {type(technique) for technique, _, _ in ONE_TECHNIQUE} == set(TECHNIQUES.values())


class Doubled(Linear):
    """y = 2 (x Wᵀ + b): adds no parameter."""

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)
        self.take_over(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if self.adapters_on else 1)


class Called(Linear):
    """The same where it is called."""

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)
        self.take_over(linear)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().__call__(x)
        return y * 2


class SquaredLoRALinear(LoRALinear):
    """LoRA with another equation over the same A and B."""

    def affine(self, x: torch.Tensor) -> torch.Tensor:
        return super().affine(x).pow(2) if self.adapters_on else super().affine(x)


class HalfMergedLoRALinear(SquaredLoRALinear):
    """The same, which says how its bias is merged alone."""

    def merged_bias(self) -> torch.Tensor:
        return super().merged_bias()


class TripledDelta(BiasDelta):
    """b + 3 δ."""

    def forward(self, b: torch.Tensor) -> torch.Tensor:
        return b + 3 * self.delta


class BentDelta(nn.Module):
    """b + tanh(δ), of no class of spafit."""

    def __init__(self, b: torch.Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(b))

    def forward(self, b: torch.Tensor) -> torch.Tensor:
        return b + torch.tanh(self.delta)


class ExponentialScale(IA3Scale):
    """exp(l - 1) ⊙ (x Wᵀ + b)."""

    def forward(self, x: torch.Tensor, affine: Any) -> torch.Tensor:
        y: torch.Tensor = torch.exp(self.l - 1) * affine(x)
        return y


class Halved(nn.Module):
    """An adapter without a parameter."""

    def forward(self, H: torch.Tensor, X: torch.Tensor, norm: object) -> torch.Tensor:
        return H / 2


def squared(linear: Linear) -> Linear:
    return SquaredLoRALinear(linear, 2, 3.0)


def half_merged(linear: Linear) -> Linear:
    return HalfMergedLoRALinear(linear, 2, 3.0)


def with_forward(linear: Linear) -> Linear:
    plain = linear.forward
    linear.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    return linear


def with_affine(linear: Linear) -> Linear:
    plain = linear.affine
    linear.affine = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    linear.ia3 = IA3Scale(linear, "output")  # so that affine is called
    return linear


def with_hook(linear: Linear) -> Linear:
    linear.register_forward_hook(lambda module, given, y: 2 * y)
    return linear


def tripled(linear: Linear) -> Linear:
    linear.bias_delta = TripledDelta(linear.bias)
    return linear


def bent(linear: Linear) -> Linear:
    linear.bias_delta = BentDelta(linear.bias)
    return linear


def hooked_delta(linear: Linear) -> Linear:
    BiasDelta().attach(linear, None)
    assert linear.bias_delta is not None
    linear.bias_delta.register_forward_hook(lambda module, given, b: 2 * b)
    return linear


def exponential(linear: Linear) -> Linear:
    linear.ia3 = ExponentialScale(linear, "output")
    return linear


LORA = ("lora_A", "lora_B")
DELTA = ("bias_delta.delta",)
OF_ITS_OWN = "computes something of its own, and has no merged"
MADE_UP: list[tuple[Any, tuple[str, ...], str]] = [
    # what is attached to value, what it trains, why it is not merged
    (Doubled, (), f"Doubled {OF_ITS_OWN}"),
    (Called, (), f"Called {OF_ITS_OWN}"),
    (squared, LORA, f"SquaredLoRALinear {OF_ITS_OWN}"),
    (half_merged, LORA, f"SquaredLoRALinear {OF_ITS_OWN}"),
    (with_forward, (), "its forward was replaced"),
    (with_affine, ("ia3.l",), "its affine was replaced"),
    (with_hook, (), "Linear has a hook"),
    (tripled, DELTA, "TripledDelta need not be a sum"),
    (bent, DELTA, "BentDelta need not be a sum"),
    (hooked_delta, DELTA, "BiasDelta has a hook"),
    (exponential, ("ia3.l",), f"ExponentialScale {OF_ITS_OWN}"),
]


@pytest.fixture
def known() -> Iterator[None]:
    before = dict(TECHNIQUES)
    yield
    TECHNIQUES.clear()
    TECHNIQUES.update(before)


@pytest.mark.usefixtures("known")
class TestAMadeUpTechniqueIsNeverMergedAway:
    """Merging knows nothing of these; each changes the logits, and is refused by name."""

    @pytest.mark.parametrize(
        ("attached", "declared", "reason"), MADE_UP, ids=[each[0].__name__ for each in MADE_UP]
    )
    def test_on_a_linear(self, attached: Any, declared: tuple[str, ...], reason: str) -> None:
        @spafit.register
        @dataclass(frozen=True)
        class MadeUp(Technique):
            name: ClassVar[str] = "made-up"
            short: ClassVar[str] = "made up"
            trains: ClassVar[tuple[str, ...]] = declared
            attaches_to: ClassVar[tuple[type[Adaptable], ...]] = (Linear,)

            def attach(self, module: Adaptable, generator: torch.Generator) -> Adaptable:
                made: Adaptable = attached(module)
                return made

        model = shaken(adapted([MadeUp()], ["value"]))
        with pytest.raises(PlanError, match=f"has no merged form: {reason}"):
            spafit.merged_state_dict(model)

    def test_in_the_end_of_a_sub_layer(self) -> None:
        model = adapted([BiasDelta()], ["query"])
        end = model.bert.encoder.layer[2].output
        assert isinstance(end, SublayerEnd)
        spafit.merged_state_dict(model)
        plain = end.add_norm
        end.add_norm = lambda H, X: plain(H, X) / 2  # type: ignore[method-assign]
        with pytest.raises(PlanError, match=r"layer\.2\.output has no .* add_norm was replaced"):
            spafit.merged_state_dict(model)
        del end.add_norm
        end.add_adapter("own", Halved())
        with pytest.raises(PlanError, match=r"layer\.2\.output has no .* the adapter own stands"):
            spafit.merged_state_dict(model)
        end.adapters = None
        end.dropout = nn.Tanh()  # type: ignore[assignment]
        with pytest.raises(PlanError, match=r"layer\.2\.output has no .* its dropout is a Tanh"):
            spafit.merged_state_dict(model)


@pytest.mark.parametrize("name", ["a.b", "keys", "forward"])
def test_names_that_no_adapter_can_have(name: str) -> None:
    with pytest.raises(PlanError, match="an adapter cannot be called"):
        SublayerEnd().add_adapter(name, Halved())


def test_a_bottleneck_that_would_fill_memory_is_refused() -> None:
    with pytest.raises(PlanError, match="series: bottleneck must be"):
        SeriesAdapter(bottleneck="D/0.00000001")
    with pytest.raises(
        PlanError, match=r"bottleneck D/0\.001 is .* units for D = 128; the largest"
    ):
        Stratum("all", 0, 0, {OUTPUT: [SeriesAdapter(bottleneck="D/0.001")]})


@pytest.mark.parametrize("method", ["houlsby", "IA3", "linear probe", "linear-probing"])
def test_settings_that_change_nothing_in_a_method_are_refused(method: str) -> None:
    assert spafit.plan(method, 4).num_layers == 4
    settings: list[dict[str, Any]] = [{"r": 4}, {"bias": "direct"}, {"numbering": "text"}]
    for setting in settings:
        with pytest.raises(PlanError, match=f"{method} has no {next(iter(setting))}; leave"):
            spafit.plan(method, 4, **setting)
    with pytest.raises(PlanError, match=f"{method} has no r and alpha; leave that out"):
        spafit.plan(method, 4, r=4, alpha=8)


@pytest.mark.parametrize(
    "bottleneck", [0, -3, 1.5, True, None, "16", "D", "D/0", "D/-2", "F/4", 1e9]
)
def test_bad_bottlenecks_are_refused(bottleneck: object) -> None:
    with pytest.raises(PlanError, match="series: bottleneck must be a whole number"):
        SeriesAdapter(bottleneck=bottleneck)  # type: ignore[arg-type]


def test_other_bad_settings_are_refused() -> None:
    with pytest.raises(PlanError, match="parallel: activation must be one of relu, gelu, swish"):
        ParallelAdapter(activation="silu")
    with pytest.raises(PlanError, match="pfeiffer: scaling must be a positive number, found 0"):
        PfeifferAdapter(scaling=0)
    with pytest.raises(PlanError, match=r'is of the "output" or the "input", found \'both\''):
        IA3(of="both")
    with pytest.raises(PlanError, match="rank_stabilised must be true or false, found 1"):
        LoRA(rank_stabilised=1)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"lora: b_rate, a factor .* found -1"):
        LoRA(b_rate=-1)
    with pytest.raises(PlanError, match=r"Series needs the end of a sub-layer .*, found a Linear"):
        Stratum("one", 0, 0, {"query": [SeriesAdapter()]})
    with pytest.raises(PlanError, match=r"LoRA needs a Linear, found the end of a sub-layer"):
        Stratum("one", 0, 0, {"layer.output": [LoRA()]})


def test_print_as_they_are_written() -> None:
    assert repr(LoRA()) == "LoRA(r=64, alpha=128.0, dropout=0.0)"
    assert repr(LoRA(3, 5, b_rate=4, rate=2)) == (
        "LoRA(r=3, alpha=5.0, dropout=0.0, rate=2, b_rate=4)"
    )
    assert repr(BiasDelta()) == "BiasDelta()"
    assert repr(BiasDelta(weight_decay=0.1)) == "BiasDelta(weight_decay=0.1)"


def test_dropout_stands_before_an_adapter() -> None:
    """As in the code of Houlsby et al.: the adapter reads what dropout left."""
    model = adapted([SeriesAdapter(bottleneck=7)], [OUTPUT])
    end = model.bert.encoder.layer[3].output
    assert isinstance(end, SublayerEnd)
    seen: list[torch.Tensor] = []
    end.adapters["series"].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    end.dropout.p = 0.5
    end.train()
    end.add_norm(torch.ones(5, D, dtype=torch.float64), torch.ones(5, D, dtype=torch.float64))
    assert sorted(set(seen[0].flatten().tolist())) == [0.0, 2.0]
