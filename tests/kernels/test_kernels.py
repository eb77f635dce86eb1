"""The operations of spafit/kernels, each form compared with the equation that defines it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from spafit.errors import ConfigError
from spafit.kernels import attention, lora_linear, reference

B, A, T, Dh = 3, 5, 7, 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

MASKS = {
    "all": None,
    "padded": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6]),
    "gaps": torch.tensor([[0, 1, 1, 0, 1, 0, 1], [0] * 6 + [1], [1, 0, 1, 0, 1, 0, 1]]),
}


def keep_of(mask: str) -> torch.Tensor | None:
    """(B, T) of 0 and 1 -> (B, 1, 1, T) of bool, as the model makes it."""
    chosen = MASKS[mask]
    return None if chosen is None else chosen.bool()[:, None, None, :]


Tensors = tuple[torch.Tensor, ...]
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_heads(dtype: torch.dtype = torch.float64, tokens: int = T) -> Heads:
    """Return Q, K, V (B, A, T, Dh), cut from (B, T, A * Dh) as the model cuts them."""
    generator = torch.Generator().manual_seed(0)

    def one() -> torch.Tensor:
        x = 1.5 * torch.randn(B, tokens, A * Dh, generator=generator, dtype=torch.float64)
        return x.to(dtype).view(B, tokens, A, Dh).transpose(1, 2).requires_grad_()

    return one(), one(), one()


def with_gradients(output: torch.Tensor, sources: Sequence[torch.Tensor]) -> Tensors:
    """Return the output and the gradients of Σ output ⊙ noise with respect to ``sources``."""
    noise = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(output.dtype)
    return (output, *torch.autograd.grad((output * noise).sum(), sources))


class TestAttentionReference:
    """Oracle: Eq. (4) one query at a time, over the list of the tokens that are kept."""

    @pytest.mark.parametrize("mask", MASKS)
    def test_is_equation_4(self, mask: str) -> None:
        Q, K, V = (x.detach() for x in make_heads())
        keep = keep_of(mask)
        H1 = reference.attention(Q, K, V, keep)
        assert H1.shape == (B, A, T, Dh)
        for b in range(B):
            kept = [t for t in range(T) if keep is None or keep[b, 0, 0, t]]
            for a in range(A):
                for t in range(T):
                    score = [math.exp(float(Q[b, a, t] @ K[b, a, s]) / 2.0) for s in kept]  # √4
                    mean = sum(w * V[b, a, s] for w, s in zip(score, kept, strict=True)) / sum(
                        score
                    )
                    assert (H1[b, a, t] - mean).abs().max() < 1e-12

    def test_dropout_falls_on_the_probabilities(self) -> None:
        """With V the identity, H1 is the dropped probabilities: each 0 or P / (1 - rate)."""
        Q, K, _ = (x.detach() for x in make_heads())
        V = torch.eye(T, dtype=torch.float64).expand(B, A, T, T)
        P = reference.attention(Q, K, V)
        torch.manual_seed(2)
        dropped = reference.attention(Q, K, V, dropout=0.25)
        kept = dropped > 0
        assert (dropped - kept * P / 0.75).abs().max() < 1e-12
        # 735 probabilities: the standard deviation of the share is 0.016.
        assert abs(float(kept.double().mean()) - 0.75) < 0.08


class TestAttention:
    """Oracle: ``reference.attention``, the definition; outputs and gradients."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("impl", ["auto", "sdpa"])
    @pytest.mark.parametrize("mask", MASKS)
    def test_equals_its_definition(self, mask: str, impl: str, dtype: torch.dtype) -> None:
        QKV = make_heads(dtype)
        fused = with_gradients(attention(*QKV, keep_of(mask), impl=impl), QKV)
        plain = with_gradients(attention(*QKV, keep_of(mask), impl="reference"), QKV)
        for ours, expected in zip(fused, plain, strict=True):
            assert ours.dtype == dtype
            assert (ours - expected).abs().max() <= TOLERANCE[dtype]

    @pytest.mark.parametrize("tokens", [1, 2, 512])
    def test_lengths(self, tokens: int) -> None:
        QKV = make_heads(tokens=tokens)
        keep = torch.ones(B, 1, 1, tokens, dtype=torch.bool)
        keep[1, ..., tokens // 2 + 1 :] = False
        fused = with_gradients(attention(*QKV, keep), QKV)
        plain = with_gradients(reference.attention(*QKV, keep), QKV)
        for ours, expected in zip(fused, plain, strict=True):
            assert (ours - expected).abs().max() <= 1e-12

    def test_padding_is_neither_read_nor_pulled(self) -> None:
        """Other keys and values at padded tokens: the same H1 bit for bit, and no gradient."""
        Q, K, V = make_heads()
        keep = keep_of("padded")
        assert keep is not None
        padding = ~keep.transpose(-1, -2)  # (B, 1, T, 1)
        H1, _, dK, dV = with_gradients(attention(Q, K, V, keep), [Q, K, V])
        changed = attention(Q, K + 100.0 * padding, V - 100.0 * padding, keep)
        assert torch.equal(H1, changed)
        assert torch.count_nonzero(dK * padding) == torch.count_nonzero(dV * padding) == 0

    def test_bfloat16_errs_at_most_twice_as_much_as_the_plain_form(self) -> None:
        """The yardstick is the definition in float64 of the same rounded inputs."""
        low = make_heads(torch.bfloat16)
        Q, K, V = (x.detach().double().requires_grad_() for x in low)
        keep = keep_of("padded")
        truth = with_gradients(reference.attention(Q, K, V, keep), [Q, K, V])
        plain = with_gradients(reference.attention(*low, keep), low)
        fused = with_gradients(attention(*low, keep), low)
        for ours, theirs, true in zip(fused, plain, truth, strict=True):
            assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max()

    @pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
    def test_dropout_keeps_the_mean_and_spreads_as_it_should(self, impl: str) -> None:
        """Over 4,000 draws: mean H1, variance rate / (1 - rate) Σ P² V² (independent entries)."""
        rate, draws = 0.25, 4000
        Q, K, V = (x[:1, :1].detach() for x in make_heads())
        P = reference.attention(Q, K, torch.eye(T, dtype=torch.float64)[None, None])
        mean, variance = P @ V, rate / (1 - rate) * (P**2 @ V**2)
        torch.manual_seed(3)
        Q, K, V = (x.expand(draws, 1, T, Dh).contiguous() for x in (Q, K, V))
        H1 = attention(Q, K, V, dropout=rate, impl=impl)
        standard_error = (variance / draws).sqrt()
        assert ((H1.mean(0) - mean).abs() < 5 * standard_error).all()
        # The relative error of a variance from n draws is about √(2/n) = 2 %, more in wide tails.
        assert ((H1.var(0) / variance - 1).abs() < 0.2).all()

    @pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
    def test_no_dropout_unless_asked(self, impl: str) -> None:
        QKV = make_heads()
        before = torch.get_rng_state()
        first, second = attention(*QKV, impl=impl), attention(*QKV, impl=impl)
        assert torch.equal(first, second)
        assert torch.equal(torch.get_rng_state(), before)

    def test_unknown_form_is_refused_by_name(self) -> None:
        with pytest.raises(ConfigError, match=r'no impl=\'flash\'.*"auto", "reference"'):
            attention(*make_heads(), impl="flash")


N_IN, N_OUT, R = 11, 6, 3


def make_lora(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return x (B, T, in), W, b, A, B and δ, all random, all asking for gradients."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(B, T, N_IN), (N_OUT, N_IN), (N_OUT,), (R, N_IN), (N_OUT, R), (N_OUT,)]
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


class TestLoRALinear:
    """Oracle: y = x Wᵀ + b + δ + s·(x Aᵀ) Bᵀ as one product with the merged matrix."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("delta", [True, False])
    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_is_the_equation(self, impl: str, delta: bool, dtype: torch.dtype) -> None:
        x, W, b, lora_A, lora_B, d = make_lora(dtype)
        s = 128 / 5  # alpha / r, not 1
        bias_delta = d if delta else None
        ours = lora_linear(x, W, b, lora_A, lora_B, s, bias_delta=bias_delta, impl=impl)
        merged = torch.einsum("...i,oi->...o", x, W + s * lora_B @ lora_A)
        expected = merged + b + d if delta else merged + b
        sources = [x, W, b, lora_A, lora_B] + [d] * delta
        for mine, true in zip(
            with_gradients(ours, sources), with_gradients(expected, sources), strict=True
        ):
            scale = max(1.0, float(true.detach().abs().max()))
            assert mine.dtype == dtype
            assert (mine - true).abs().max() <= TOLERANCE[dtype] * scale

    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_gradients_are_finite_differences(self, impl: str) -> None:
        x, W, b, lora_A, lora_B, d = make_lora()
        inputs = (x[0, :2], W, b, lora_A, lora_B, d)
        assert torch.autograd.gradcheck(
            lambda x, W, b, lora_A, lora_B, d: lora_linear(
                x, W, b, lora_A, lora_B, 1.7, bias_delta=d, impl=impl
            ),
            inputs,
        )

    def test_any_number_of_leading_dimensions(self) -> None:
        x, W, b, lora_A, lora_B, d = make_lora()
        whole = lora_linear(x, W, b, lora_A, lora_B, 1.7, bias_delta=d)
        packed = lora_linear(x.flatten(0, 1), W, b, lora_A, lora_B, 1.7, bias_delta=d)
        one = lora_linear(x[2, 4], W, b, lora_A, lora_B, 1.7, bias_delta=d)
        assert (whole.flatten(0, 1) - packed).abs().max() <= 1e-12
        assert (whole[2, 4] - one).abs().max() <= 1e-12

    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_dropout_falls_on_the_input_of_lora_a_alone(self, impl: str) -> None:
        """A copies x twice, B is the identity: the update is s (x', x'), x' being x dropped.

        Both copies drop together, which they would not behind A; and W sees all of x.
        """
        n, rate, s = 5, 0.25, 3.0
        x = 1.0 + torch.rand(400, n, dtype=torch.float64)
        W, b = torch.rand(2 * n, n).double(), torch.rand(2 * n).double()
        A, B = torch.eye(n).double().repeat(2, 1), torch.eye(2 * n).double()
        torch.manual_seed(5)
        y = lora_linear(x, W, b, A, B, s, dropout=rate, impl=impl)
        update = y - F.linear(x, W, b)
        kept = update[:, :n] > 0.5
        expected = (kept * s * x / (1 - rate)).repeat(1, 2)
        assert (update - expected).abs().max() < 1e-12
        # 2,000 entries: the standard deviation of the share is 0.01.
        assert abs(float(kept.double().mean()) - (1 - rate)) < 0.05

    def test_without_dropout_no_random_number_is_drawn(self) -> None:
        x, W, b, lora_A, lora_B, d = make_lora()
        before = torch.get_rng_state()
        first = lora_linear(x, W, b, lora_A, lora_B, 1.7, bias_delta=d)
        assert torch.equal(first, reference.lora_linear(x, W, b, lora_A, lora_B, 1.7, d))
        assert torch.equal(torch.get_rng_state(), before)

    def test_unknown_form_is_refused_by_name(self) -> None:
        x, W, b, lora_A, lora_B, _ = make_lora()
        with pytest.raises(ConfigError, match=r"no impl='merged'.*\"auto\""):
            lora_linear(x, W, b, lora_A, lora_B, 1.7, impl="merged")
