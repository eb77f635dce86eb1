"""The techniques on one module: what each computes, trains, shares and leaves untouched."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from spafit.adaptable import LayerNorm, Linear
from spafit.adapters import IA3, BiasDelta, DirectBias, Full, LayerNormGain, LoRA, LoRALinear
from spafit.bert import SelfAttention
from spafit.config import BertConfig
from spafit.errors import PlanError
from spafit.layout import Padded
from spafit.techniques import TECHNIQUES, Technique

B, T, N_IN, N_OUT, R = 3, 7, 20, 11, 4
ALPHA = 6.0  # alpha / r = 1.5, not 1
# Of a Linear; tests/test_every_technique.py has all of them, in a model.
TECHNIQUE_EXAMPLES = [
    BiasDelta(),
    DirectBias(),
    LoRA(r=R, alpha=ALPHA),
    IA3(),
    IA3("input"),
    Full(),
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Draw standard normal numbers; the same for every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_linear(dtype: torch.dtype = torch.float64) -> Linear:
    linear = Linear(N_IN, N_OUT).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(draw(N_OUT, N_IN, seed=1))
        linear.bias.copy_(draw(N_OUT, seed=2))
    return linear


def make_layer_norm(dtype: torch.dtype = torch.float64) -> LayerNorm:
    norm = LayerNorm(N_IN, 1e-3).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * draw(N_IN, seed=3))
        norm.bias.copy_(draw(N_IN, seed=4))
    return norm


def make_lora(
    linear: Linear | None = None,
    dropout: float = 0.0,
    seed: int = 5,
    dtype: torch.dtype = torch.float64,
) -> LoRALinear:
    generator = torch.Generator().manual_seed(seed)
    return LoRALinear(linear or make_linear(dtype), R, ALPHA, dropout, generator)


def delta_of(module: Linear | LayerNorm) -> nn.Parameter:
    """Return the module's δ, which must be there."""
    assert module.bias_delta is not None
    return module.bias_delta.delta


def fill_lora(lora: LoRALinear, delta: bool = True) -> LoRALinear:
    """Move B and, where asked for, δ away from zero, as training does."""
    if delta:
        BiasDelta().attach(lora, None)
    with torch.no_grad():
        lora.lora_B.copy_(draw(N_OUT, R, seed=6))
        if lora.bias_delta is not None:
            lora.bias_delta.delta.copy_(draw(N_OUT, seed=7))
    return lora


class TestLinear:
    """Oracle: torch.nn.functional.linear."""

    def test_without_delta_it_is_the_pretrained_map(self) -> None:
        linear, x = make_linear(), draw(B, T, N_IN)
        assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
        assert list(linear.state_dict()) == ["weight", "bias"]

    def test_with_delta(self) -> None:
        """Eq. (BiasDelta): x Wᵀ + (b + δ); a fresh δ changes nothing, bit for bit."""
        linear, x = make_linear(), draw(B, T, N_IN)
        before = linear(x)
        assert BiasDelta().attach(linear, None) is linear
        assert torch.equal(linear(x), before)
        with torch.no_grad():
            delta_of(linear).copy_(draw(N_OUT, seed=7))
        expected = x @ linear.weight.T + linear.bias + delta_of(linear)
        assert (linear(x) - expected).abs().max() < 1e-12
        assert list(linear.state_dict()) == ["weight", "bias", "bias_delta.delta"]

    def test_delta_and_bias_have_the_same_gradient(self) -> None:
        linear, x, pull = make_linear(), draw(B, T, N_IN), draw(B, T, N_OUT, seed=8)
        BiasDelta().attach(linear, None)
        loss = (linear(x) * pull).sum()
        db, d_delta = torch.autograd.grad(loss, [linear.bias, delta_of(linear)])
        assert torch.equal(db, d_delta)
        assert (db - pull.sum((0, 1))).abs().max() < 1e-12


class TestLayerNorm:
    """Oracle: the equation, and torch.nn.functional.layer_norm with the bias β + δ."""

    def test_is_the_equation(self) -> None:
        norm, x = make_layer_norm(), draw(B, T, N_IN)
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).sum(-1, keepdim=True) / N_IN
        expected = norm.weight * centred / (variance + 1e-3).sqrt() + norm.bias
        assert (norm(x) - expected).abs().max() < 1e-12

    def test_with_delta(self) -> None:
        """Eq. (BiasDelta) on a LayerNorm: γ ⊙ x̂ + (β + δ)."""
        norm, x = make_layer_norm(), draw(B, T, N_IN)
        before = norm(x)
        assert BiasDelta().attach(norm, None) is norm
        assert torch.equal(norm(x), before)
        with torch.no_grad():
            delta_of(norm).copy_(draw(N_IN, seed=7))
        expected = F.layer_norm(x, (N_IN,), norm.weight, norm.bias + delta_of(norm), 1e-3)
        assert torch.equal(norm(x), expected)
        assert (norm(x) - before - delta_of(norm)).abs().max() < 1e-12
        assert list(norm.state_dict()) == ["weight", "bias", "bias_delta.delta"]

    def test_gradients_are_finite_differences(self) -> None:
        norm = make_layer_norm()
        BiasDelta().attach(norm, None)
        names = [name for name, _ in norm.named_parameters()]
        assert names == ["weight", "bias", "bias_delta.delta"]
        inputs = (draw(2, N_IN).requires_grad_(), *norm.parameters())
        assert torch.autograd.gradcheck(
            lambda x, *parameters: torch.func.functional_call(
                norm, dict(zip(names, parameters, strict=True)), (x,)
            ),
            inputs,
        )


class TestLoRALinear:
    """Oracle: y = x Wᵀ + b + δ + (alpha/r) (x Aᵀ) Bᵀ in plain torch, float64."""

    @pytest.mark.parametrize("delta", [True, False])
    def test_is_the_equation(self, delta: bool) -> None:
        """Eq. (LoRA), with and without δ."""
        lora, x = fill_lora(make_lora(), delta), draw(B, T, N_IN)
        W, b, A, B_ = lora.weight, lora.bias, lora.lora_A, lora.lora_B
        assert (A.shape, B_.shape) == ((R, N_IN), (N_OUT, R))
        assert lora.scaling == 1.5
        expected = x @ W.T + b + 6.0 / 4 * (x @ A.T) @ B_.T
        if delta:
            expected = expected + delta_of(lora)
        assert (lora(x) - expected).abs().max() < 1e-12
        assert (lora(x) - x @ W.T - b).abs().max() > 1

    def test_fresh_it_is_the_pretrained_map_bit_for_bit(self) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            linear, x = make_linear(dtype), draw(B, T, N_IN, dtype=dtype)
            before = linear(x)
            lora = make_lora(linear)
            assert torch.count_nonzero(lora.lora_B) == 0
            assert torch.count_nonzero(lora.lora_A) == R * N_IN
            assert torch.equal(lora(x), before)

    def test_keys_are_added_and_none_is_renamed(self) -> None:
        lora = fill_lora(make_lora())
        assert set(lora.state_dict()) == {"weight", "bias", "bias_delta.delta", "lora_A", "lora_B"}
        assert set(make_lora().state_dict()) == {"weight", "bias", "lora_A", "lora_B"}

    @pytest.mark.parametrize("first", ["delta first", "LoRA first"])
    def test_parameters_are_taken_over_not_copied(self, first: str) -> None:
        linear = make_linear()
        if first == "delta first":
            BiasDelta().attach(linear, None)
        lora = LoRA(r=R, alpha=ALPHA).attach(linear, None)
        assert isinstance(lora, LoRALinear)
        if first == "LoRA first":
            BiasDelta().attach(lora, None)
        assert lora.weight is linear.weight
        assert lora.bias is linear.bias
        assert lora.bias_delta is not None
        if first == "delta first":
            assert lora.bias_delta is linear.bias_delta
        x = draw(B, T, N_IN)
        fill_lora(lora, delta=False)
        expected = F.linear(x, lora.weight + 1.5 * lora.lora_B @ lora.lora_A, lora.bias)
        assert (lora(x) - expected - draw(N_OUT, seed=7)).abs().max() < 1e-12

    @pytest.mark.parametrize("delta", [True, False])
    def test_gradients_are_finite_differences(self, delta: bool) -> None:
        lora = fill_lora(make_lora(), delta)
        names = [name for name, _ in lora.named_parameters()]
        inputs = (draw(2, N_IN).requires_grad_(), *lora.parameters())
        assert torch.autograd.gradcheck(
            lambda x, *parameters: torch.func.functional_call(
                lora, dict(zip(names, parameters, strict=True)), (x,)
            ),
            inputs,
        )

    def test_at_the_start_only_lora_b_is_pulled(self) -> None:
        """B = 0 hides A from the loss; dB = s dYᵀ (x Aᵀ)."""
        lora, x, pull = make_lora(), draw(B, T, N_IN), draw(B, T, N_OUT, seed=8)
        dA, dB = torch.autograd.grad((lora(x) * pull).sum(), [lora.lora_A, lora.lora_B])
        assert torch.count_nonzero(dA) == 0
        expected = 1.5 * torch.einsum("bto,btr->or", pull, x @ lora.lora_A.T)
        assert (dB - expected).abs().max() < 1e-12

    def test_takes_the_mode_and_the_switch_of_the_module(self) -> None:
        """Adapting a model that is in eval mode must not switch LoRA's dropout on."""
        for training in (True, False):
            linear = make_linear().train(training)
            linear.adapters_on = training
            lora = make_lora(linear)
            assert lora.training == training
            assert lora.adapters_on == training

    def test_says_what_it_is(self) -> None:
        assert repr(fill_lora(make_lora())) == (
            "LoRALinear(\n  in_features=20, out_features=11, r=4, scaling=1.5\n"
            "  (bias_delta): BiasDelta(11)\n)"
        )
        assert repr(make_linear()) == "Linear(in_features=20, out_features=11)"
        assert repr(BiasDelta().attach(make_layer_norm(), None)) == (
            "LayerNorm(\n  20, eps=0.001\n  (bias_delta): BiasDelta(20)\n)"
        )


class TestBiasDelta:
    """Oracle: b + δ; the module is copied and printed as any other is."""

    def test_is_b_plus_delta(self) -> None:
        b = draw(N_OUT, seed=2)
        module = BiasDelta(b)
        assert torch.equal(module(b), b)
        with torch.no_grad():
            module.delta.copy_(draw(N_OUT, seed=7))
        assert torch.equal(module(b), b + draw(N_OUT, seed=7))
        assert list(module.state_dict()) == ["delta"]

    def test_without_a_bias_it_is_the_entry_of_a_plan(self) -> None:
        assert BiasDelta() == BiasDelta()
        assert isinstance(BiasDelta(), Technique)
        assert repr(BiasDelta()) == "BiasDelta()"

    def test_is_copied(self) -> None:
        """As pickling does, by ``__new__`` with what ``__getnewargs__`` gives."""
        lora = fill_lora(make_lora())
        twin = copy.deepcopy(lora)
        assert type(twin.bias_delta) is BiasDelta
        assert torch.equal(delta_of(twin), delta_of(lora))
        assert delta_of(twin) is not delta_of(lora)

    def test_a_parametrized_one_is_copied(self) -> None:
        class Doubled(nn.Module):
            def forward(self, tensor: torch.Tensor) -> torch.Tensor:
                return 2 * tensor

        delta = BiasDelta(torch.ones(3))
        nn.init.ones_(delta.delta)
        register_parametrization(delta, "delta", Doubled())
        assert torch.equal(copy.deepcopy(delta)(torch.ones(3)), torch.full((3,), 3.0))

    def test_a_subclass_may_take_more(self) -> None:
        class Scaled(BiasDelta):
            def __init__(self, bias: torch.Tensor, scale: float, *, sign: float) -> None:
                super().__init__(bias)
                self.scale = scale * sign

            def forward(self, b: torch.Tensor) -> torch.Tensor:
                return b + self.scale * self.delta

        scaled = Scaled(torch.ones(3), 4.0, sign=-1.0)
        nn.init.ones_(scaled.delta)
        assert torch.equal(copy.deepcopy(scaled)(torch.ones(3)), torch.full((3,), -3.0))
        with pytest.raises(TypeError, match="missing 1 required"):
            Scaled(torch.ones(3))  # type: ignore[call-arg]

    def test_a_state_dict_with_its_older_name_is_taken(self) -> None:
        """Before it was a module, δ stood under ``bias_delta`` itself."""
        lora = fill_lora(make_lora())
        older = {name.removesuffix(".delta"): value for name, value in lora.state_dict().items()}
        assert "bias_delta" in older
        fresh = fill_lora(make_lora())
        with torch.no_grad():
            delta_of(fresh).zero_()
        fresh.load_state_dict(older)
        assert torch.equal(delta_of(fresh), delta_of(lora))

    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_a_hook_on_it_is_called(self, impl: str) -> None:
        """Also in the fused form, which otherwise adds δ without calling the module."""
        lora, x, calls = fill_lora(make_lora()), draw(B, T, N_IN), []
        lora.impl = impl
        before = lora(x)
        assert lora.bias_delta is not None
        lora.bias_delta.register_forward_hook(lambda module, args, b: calls.append(b) or b + 1.0)
        assert (lora(x) - before - 1.0).abs().max() < 1e-12
        assert len(calls) == 1
        lora(x).sum().backward()
        assert (delta_of(lora).grad - B * T).abs().max() < 1e-12


class TestScaledAndGained:
    """Oracle: the equations in plain torch, and the plain operation with the merged tensors."""

    @pytest.mark.parametrize("of", ["output", "input"])
    def test_ia3(self, of: str) -> None:
        """Eq. (IA3) and Eq. (IA3 merged): l on the rows of W and on b, or on W's columns."""
        linear, x = make_linear(), draw(B, T, N_IN)
        IA3(of).attach(linear, None)
        scale = draw(N_OUT if of == "output" else N_IN, seed=7)
        with torch.no_grad():
            linear.get_parameter("ia3.l").copy_(scale)
        W, b = linear.weight, linear.bias
        expected = scale * (x @ W.T + b) if of == "output" else (scale * x) @ W.T + b
        assert (linear(x) - expected).abs().max() < 1e-12
        assert (F.linear(x, *linear.merged().values()) - expected).abs().max() < 1e-12

    def test_gain(self) -> None:
        """Eq. (LayerNormGain) and Eq. (LayerNormGain merged)."""
        norm, x = make_layer_norm(), draw(B, T, N_IN)
        LayerNormGain().attach(norm, None)
        change = draw(N_IN, seed=7)
        with torch.no_grad():
            norm.get_parameter("gain_delta.delta").copy_(change)
        normed = F.layer_norm(x, (N_IN,), eps=1e-3)
        expected = (norm.weight + change) * normed + norm.bias
        assert (norm(x) - expected).abs().max() < 1e-12
        assert torch.equal(norm.merged()["weight"], norm.weight + change)

    def test_scale_of_lora(self) -> None:
        """Eq. (s), by hand."""
        assert LoRA(r=16, alpha=8.0).scaling == 0.5
        assert LoRA(r=16, alpha=8.0, rank_stabilised=True).scaling == 2.0


class TestInitialA:
    """Oracle: uniform in ±1/√in (Kaiming with a = √5), drawn in float32 on the CPU."""

    def test_is_uniform(self) -> None:
        linear = Linear(400, 3)
        A = LoRALinear(linear, 50, 1.0, 0.0, torch.Generator().manual_seed(9)).lora_A.detach()
        bound = 1 / math.sqrt(400)
        assert A.abs().max() <= bound
        shares = torch.histc(A, bins=10, min=-bound, max=bound) / A.numel()
        # 20,000 draws: the standard deviation of a tenth's share is 0.002.
        assert (shares - 0.1).abs().max() < 0.01

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_a_seed_gives_the_same_numbers_in_every_type(self, dtype: torch.dtype) -> None:
        """They are float32's, rounded; and the generator moves on by the same stride."""
        single = make_lora(dtype=torch.float32).lora_A
        other = make_lora(dtype=dtype).lora_A
        assert other.dtype == dtype
        assert torch.equal(other, single.to(dtype))
        assert not torch.equal(make_lora(seed=6, dtype=torch.float32).lora_A, single)

    def test_on_the_meta_device_nothing_is_drawn(self) -> None:
        """So that a shape can be checked whatever it is, such as a rank of 65,536."""
        with torch.device("meta"):
            lora = LoRALinear(Linear(N_IN, N_OUT), 65_536, ALPHA)
        assert lora.lora_A.device.type == lora.lora_B.device.type == "meta"
        assert lora.lora_A.shape == (65_536, N_IN)

    def test_generator_leaves_the_global_one_alone(self) -> None:
        before = torch.get_rng_state()
        first, second = make_lora(), make_lora()
        assert torch.equal(first.lora_A, second.lora_A)
        assert torch.equal(torch.get_rng_state(), before)
        LoRALinear(make_linear(), R, ALPHA)  # without one, the global generator is used
        assert not torch.equal(torch.get_rng_state(), before)


class TestDropout:
    """Oracle: the entries of x that reach A, and those that reach W."""

    def test_only_in_training(self) -> None:
        lora, x = fill_lora(make_lora(dropout=0.5)), draw(B, T, N_IN)
        still = fill_lora(make_lora())(x)
        assert torch.equal(lora.eval()(x), still)
        lora.train()
        assert not torch.equal(lora(x), lora(x))

    def test_only_before_lora_a(self) -> None:
        """A copies x twice, B is the identity: the update is s (x', x'), x' being x dropped.

        Both copies drop together, which they would not behind A; and W sees all of x.
        """
        n, rate = 6, 0.25
        linear = Linear(n, 2 * n).double()
        with torch.no_grad():
            linear.weight.copy_(draw(2 * n, n))
            linear.bias.copy_(draw(2 * n, seed=2))
        lora = LoRALinear(linear, r=2 * n, alpha=4.0 * n, dropout=rate).train()
        with torch.no_grad():
            lora.lora_A.copy_(torch.eye(n).repeat(2, 1))
            lora.lora_B.copy_(torch.eye(2 * n))
        x = 1 + draw(300, n, seed=1).abs()
        torch.manual_seed(10)
        update = lora(x) - F.linear(x, linear.weight, linear.bias)
        kept = update[:, :n] > 1
        assert (update - (kept * 2 * x / (1 - rate)).repeat(1, 2)).abs().max() < 1e-12
        # 1,800 entries: the standard deviation of the share is 0.01.
        assert abs(float(kept.double().mean()) - (1 - rate)) < 0.05


class TestMergedWeight:
    """Oracle: F.linear with the merged matrix, and the sum rounded once."""

    def test_is_the_same_map(self) -> None:
        """Eq. (LoRA merged) and Eq. (BiasDelta merged)."""
        lora, x = fill_lora(make_lora()), draw(B, T, N_IN)
        merged = F.linear(x, lora.merged_weight(), lora.bias + delta_of(lora))
        assert (merged - lora(x)).abs().max() < 1e-12
        assert torch.equal(lora.merged_bias(), lora.bias + delta_of(lora))

    def test_is_rounded_once(self) -> None:
        lora = fill_lora(make_lora(dtype=torch.bfloat16))
        W, A, B_ = (x.detach().double() for x in (lora.weight, lora.lora_A, lora.lora_B))
        expected = (W + 1.5 * (B_ @ A)).to(torch.bfloat16)
        assert torch.equal(lora.merged_weight(), expected)

    def test_merging_twice_is_merging_once(self) -> None:
        lora = fill_lora(make_lora())
        W = lora.weight.detach().clone()
        first = lora.merged_weight()
        assert torch.equal(lora.merged_weight(), first)
        assert torch.equal(lora.weight, W)

    def test_fresh_it_is_the_pretrained_weight(self) -> None:
        lora = make_lora(dtype=torch.float16)
        assert torch.equal(lora.merged_weight(), lora.weight)


class TestSwitchedOff:
    """Oracle: the module before anything was attached, bit for bit."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("training", [True, False])
    def test_linear_layer_norm_and_lora(self, dtype: torch.dtype, training: bool) -> None:
        x = draw(B, T, N_IN, dtype=dtype)
        linear, norm = make_linear(dtype), make_layer_norm(dtype)
        mapped, normed = linear(x), norm(x)
        lora = fill_lora(make_lora(make_linear(dtype), dropout=0.5)).train(training)
        for module in (linear, norm):
            BiasDelta().attach(module, None)
            with torch.no_grad():
                delta_of(module).fill_(3.0)
        for module, before in ((linear, mapped), (norm, normed), (lora, mapped)):
            assert not torch.equal(module(x), before)
            module.adapters_on = False
            assert torch.equal(module(x), before)
            module.adapters_on = True
            assert not torch.equal(module(x), before)


class TestIsolation:
    """Oracle: with the base at zero, what moves is what the adapter moves."""

    def test_zeroed_base_leaves_the_adapter_alone(self) -> None:
        """W = b = 0, B = 1: every output is s Σ_j (x Aᵀ)_j."""
        lora, x = make_lora(), draw(B, T, N_IN)
        with torch.no_grad():
            lora.weight.zero_()
            lora.bias.zero_()
            lora.lora_B.fill_(1.0)
        expected = 1.5 * (x @ lora.lora_A.T).sum(-1, keepdim=True).expand(B, T, N_OUT)
        assert (lora(x) - expected).abs().max() < 1e-12
        assert lora(x).abs().min() > 0

    @pytest.mark.parametrize("adapted", ["query", "key", "value"])
    def test_only_the_adapted_projection_moves(self, adapted: str) -> None:
        config = BertConfig(
            vocab_size=99,
            hidden_size=N_IN,
            num_hidden_layers=6,
            num_attention_heads=5,
            intermediate_size=37,
        )
        attention = SelfAttention(config).double().eval()
        for projection in (attention.query, attention.key, attention.value):
            nn.init.zeros_(projection.weight)
        lora = LoRA(r=R, alpha=ALPHA).attach(getattr(attention, adapted), None)
        setattr(attention, adapted, lora)
        assert isinstance(lora, LoRALinear)
        nn.init.ones_(lora.lora_B)
        x = draw(B, T, N_IN)
        for name in ("query", "key", "value"):
            moved = getattr(attention, name)(x)
            assert (torch.count_nonzero(moved) > 0) == (name == adapted)
        # Values alone reach the output; without them queries and keys weigh zeros.
        assert (torch.count_nonzero(attention(x, Padded())) > 0) == (adapted == "value")


class TestLowPrecision:
    """Oracle: the same module in float64, its numbers being the rounded ones."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_error_is_that_of_the_rounding(self, dtype: torch.dtype) -> None:
        """At most one rounding of each of x Wᵀ + b + δ, x Aᵀ, its product, s times it, the sum.

        Each errs by at most half a unit in the last place of a sum of magnitudes, so that
        5 eps (|x| |W|ᵀ + |b| + |δ| + s |x| |A|ᵀ |B|ᵀ) bounds the whole.
        """
        lora, x = fill_lora(make_lora(dtype=dtype)), draw(B, T, N_IN, dtype=dtype)
        y = lora(x)
        assert y.dtype == dtype
        exact, xd = lora.double(), x.double()
        magnitude = F.linear(
            xd.abs(),
            exact.weight.abs() + 1.5 * exact.lora_B.abs() @ exact.lora_A.abs(),
            exact.bias.abs() + delta_of(exact).abs(),
        )
        assert ((y.double() - exact(xd)).abs() <= 5 * torch.finfo(dtype).eps * magnitude).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_what_is_attached_takes_the_type_of_the_module(self, dtype: torch.dtype) -> None:
        for module in (make_linear(dtype), make_layer_norm(dtype)):
            BiasDelta().attach(module, None)
            assert delta_of(module).dtype == dtype
            assert module(draw(B, T, N_IN, dtype=dtype)).dtype == dtype
        lora = make_lora(dtype=dtype)
        assert lora.lora_A.dtype == lora.lora_B.dtype == dtype


class TestTechniques:
    """Oracle: what each technique declares about itself."""

    def test_are_known_by_their_names(self) -> None:
        names = "bias-delta bias-direct layernorm-gain lora ia3 series pfeiffer parallel full"
        assert list(TECHNIQUES) == names.split()
        assert all(type(each) in TECHNIQUES.values() for each in TECHNIQUE_EXAMPLES)

    @pytest.mark.parametrize("technique", TECHNIQUE_EXAMPLES, ids=repr)
    def test_what_trains_exists_once_attached(self, technique: Technique) -> None:
        """Declared parameters exist; ``writes_pretrained`` says whether any was there before."""
        module = make_linear()
        pretrained = set(module.state_dict())
        attached = technique.attach(module, None)
        assert set(technique.trains) <= {name for name, _ in attached.named_parameters()}
        assert technique.writes_pretrained == bool(pretrained & set(technique.trains))
        assert set(attached.state_dict()) == pretrained | set(technique.trains)

    @pytest.mark.parametrize("technique", TECHNIQUE_EXAMPLES, ids=repr)
    def test_attaching_changes_no_number(self, technique: Technique) -> None:
        module, x = make_linear(), draw(B, T, N_IN)
        pretrained = {name: t.clone() for name, t in module.state_dict().items()}
        before = module(x)
        attached = technique.attach(module, torch.Generator().manual_seed(0))
        assert torch.equal(attached(x), before)
        for name, tensor in pretrained.items():
            assert torch.equal(attached.state_dict()[name], tensor)

    def test_are_values(self) -> None:
        assert LoRA(r=8, alpha=16) == LoRA(r=8, alpha=16.0, dropout=0) != LoRA(r=8, alpha=8)
        assert len({BiasDelta(), BiasDelta(), DirectBias(), Full(), LoRA(), LoRA(r=64)}) == 4
        with pytest.raises(dataclasses.FrozenInstanceError):
            LoRA().r = 3  # type: ignore[misc]

    def test_lora_defaults_are_the_papers(self) -> None:
        assert LoRA() == LoRA(r=64, alpha=128.0, dropout=0.0)

    def test_lora_carries_its_settings_to_the_module(self) -> None:
        lora = LoRA(r=R, alpha=ALPHA, dropout=0.25).attach(make_linear(), None)
        assert isinstance(lora, LoRALinear)
        assert (lora.lora_A.shape[0], lora.scaling, lora.dropout) == (R, 1.5, 0.25)

    def test_lora_on_a_layer_norm_is_refused(self) -> None:
        with pytest.raises(PlanError, match="LoRA needs a Linear; a LayerNorm has no matrix"):
            LoRA().attach(make_layer_norm(), None)

    @pytest.mark.parametrize("r", [0, -1, 2.0, True, "4", None])
    def test_bad_ranks_are_refused(self, r: int) -> None:
        with pytest.raises(PlanError, match="rank r must be a whole number") as caught:
            LoRA(r=r)
        assert repr(r) in str(caught.value)

    @pytest.mark.parametrize("alpha", [0, -2.0, math.inf, math.nan, "128", None])
    def test_bad_alphas_are_refused(self, alpha: float) -> None:
        with pytest.raises(PlanError, match="alpha must be a positive number") as caught:
            LoRA(alpha=alpha)
        assert repr(alpha) in str(caught.value)

    @pytest.mark.parametrize("dropout", [-0.1, 1.0, 2, math.nan, "0.1", None])
    def test_bad_dropouts_are_refused(self, dropout: float) -> None:
        with pytest.raises(PlanError, match="dropout must be a rate") as caught:
            LoRA(dropout=dropout)
        assert repr(dropout) in str(caught.value)
