"""Dropout with cheap random numbers: rate, scale, independence, repetition."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from support.tiny_bert import CONFIG, L, tiny_bert

from spafit.errors import ConfigError
from spafit.kernels import Part, dropout, dropout_add_norm, packed_attention, stacked_linear
from spafit.kernels.dropout import draw_bits, keep_mask, scale_of, threshold
from spafit.kernels.packed_attention import make_bundles

CPU = torch.device("cpu")
RATES = [1e-6, 1e-4, 0.1, 0.25, 0.5, 0.75, 0.9, 0.9999, 0.999999, 1 - 1e-12]


def drawn_rate(rate: float) -> float:
    """Return the rate in steps of 1/65,536, of which one level at least is kept."""
    return min(round(rate * 65536), 65535) / 65536


def below(share: float, expected: float, draws: int) -> bool:
    """Return whether a share of so many draws is within five standard errors of ``expected``."""
    return abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / draws)


class TestBits:
    """Oracle: the uniform distribution over 65,536 numbers, by χ² tests at 1 in 100,000."""

    def test_high_and_low_bytes_are_uniform(self) -> None:
        """The sign bit is in the high byte; a draw without negative numbers would halve it."""
        torch.manual_seed(0)
        bits = draw_bits((400_003,))
        for byte in (bits.int() >> 8, bits.int() & 255):
            counts = torch.bincount((byte % 256).long(), minlength=256)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-5

    def test_each_bit_of_each_of_the_four_numbers_of_a_draw(self) -> None:
        torch.manual_seed(1)
        draws = 100_000
        words = draw_bits((draws, 4)).int()
        for place in range(16):
            ones = ((words >> place) & 1).double().sum(0)
            for number in ones.tolist():
                assert below(number / draws, 0.5, draws), place

    def test_pairs_of_a_draw_are_uniform_together(self) -> None:
        torch.manual_seed(2)
        high = (draw_bits((200_000, 4)).int() >> 12) & 15  # 16 levels
        for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (2, 3)):
            counts = torch.bincount((high[:, i] * 16 + high[:, j]).long(), minlength=256)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-5

    @pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (4,), (5, 7), (2, 0, 3)], ids=str)
    def test_any_shape(self, shape: tuple[int, ...]) -> None:
        bits = draw_bits(shape)
        assert bits.shape == shape
        assert bits.dtype == torch.int16

    def test_a_seed_repeats_them_and_no_seed_does_not(self) -> None:
        torch.manual_seed(3)
        first, second = draw_bits((1000,)), draw_bits((1000,))
        torch.manual_seed(3)
        assert torch.equal(draw_bits((1000,)), first)
        assert torch.equal(draw_bits((1000,)), second)
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("rate", RATES)
    def test_the_threshold_drops_so_many_levels(self, rate: float) -> None:
        every = torch.arange(-(2**15), 2**15).short()
        dropped = int((every < threshold(rate)).sum())
        assert dropped == round(drawn_rate(rate) * 65536)
        assert dropped < 65536

    def test_every_bit_is_fair_and_no_two_go_together(self) -> None:
        torch.manual_seed(0)
        n = 100_003  # not a multiple of 4
        bits = draw_bits((n,))
        assert bits.shape == (n,)
        signs = torch.stack([((bits.int() >> place) & 1).double() * 2 - 1 for place in range(16)])
        assert (signs.mean(1).abs() < 5 / n**0.5).all()
        together = signs @ signs.T / n - torch.eye(16).double()
        assert (together.abs() < 5 / n**0.5).all()
        neighbours = (signs[:, :-1] * signs[:, 1:]).mean(1)
        assert (neighbours.abs() < 5 / n**0.5).all()


class TestRate:
    """Oracle: the binomial distribution, and the equation of the mean."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("rate", RATES)
    def test_rate_scale_and_mean(self, rate: float, dtype: torch.dtype) -> None:
        draws, exact = 300_007, drawn_rate(rate)
        torch.manual_seed(4)
        x = torch.ones(draws, dtype=dtype)
        y = dropout(x, rate, "fused")
        assert y.dtype == dtype
        assert abs(exact - rate) <= 1 / 65536
        assert below(float((y == 0).double().mean()), exact, draws)
        scale = 1 / (1 - exact)
        # The mean is x's: what is kept is multiplied by exactly what is missing.
        assert scale_of(rate, CPU) * (1 - exact) == pytest.approx(1, rel=1e-15)
        kept = y[y != 0]
        assert torch.equal(kept, torch.full_like(kept, scale))
        if dtype != torch.bfloat16:
            deviation = math.sqrt(exact / (1 - exact) / draws)
            assert abs(float(y.double().mean()) - 1) <= 5 * deviation + 1e-6

    def test_at_zero_nothing_is_drawn(self) -> None:
        x = torch.randn(5, 3)
        before = torch.get_rng_state()
        for impl in ("auto", "fused", "reference"):
            assert dropout(x, 0.0, impl) is x
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("impl", ["fused", "reference"])
    def test_variance(self, impl: str) -> None:
        """Each element's is x² rate / (1 - rate), for the plain form as for the fused one."""
        draws, rate = 40_000, 0.3
        x = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
        torch.manual_seed(5)
        y = dropout(x.expand(draws, 3), rate, impl)
        expected = x**2 * rate / (1 - rate)
        # y² takes two values, so the relative error of the variance is below 5/√draws.
        assert ((y.var(0) / expected - 1).abs() < 5 / draws**0.5).all()

    def test_x_of_any_layout(self) -> None:
        torch.manual_seed(6)
        x = (1 + torch.rand(7, 5, dtype=torch.float64)).t().requires_grad_()
        y = dropout(x, 0.4, "fused")
        mask = (y != 0).double()
        assert (y - x * mask * scale_of(0.4, CPU)).abs().max() < 1e-12
        pull = torch.randn(7, 5, dtype=torch.float64).t()
        [dx] = torch.autograd.grad((y * pull).sum(), x)
        assert (dx - pull * mask * scale_of(0.4, CPU)).abs().max() < 1e-12
        assert dropout(torch.ones(()), 0.5, "fused").shape == ()
        assert dropout(torch.ones(0, 3), 0.5, "fused").shape == (0, 3)

    def test_a_byte_an_element_is_kept(self) -> None:
        x = torch.randn(13, 20, requires_grad=True)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
            dropout(x, 0.1, "fused")
        assert [(tensor.nbytes, tensor.numel()) for tensor in kept] == [(260, 260)]

    def test_forms(self) -> None:
        x = torch.randn(13, 20)
        assert dropout(x, 0.0) is x
        torch.manual_seed(3)
        plain = dropout(x, 0.3, "reference")
        torch.manual_seed(3)
        assert torch.equal(plain, torch.nn.functional.dropout(x, 0.3))
        with pytest.raises(ConfigError, match=r"no impl='best'"):
            dropout(x, 0.3, "best")


def linear(x: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(x.shape[-1])
    return stacked_linear(x, [Part(0 * eye, 0 * eye[0], None, eye, eye, 1.0, 0.3)])


def norm(x: torch.Tensor) -> torch.Tensor:
    one = torch.ones(x.shape[-1])
    return dropout_add_norm(x, torch.zeros_like(x), one, one, 1e-12, dropout=0.3, impl="fused")


def attend(x: torch.Tensor) -> torch.Tensor:
    return packed_attention(x.repeat(1, 3), make_bundles([len(x)], [1], CPU), 4, 0.3, "fused")


class TestRepeats:
    """Oracle: the same seed gives the same bits, in every operation that draws."""

    @pytest.mark.parametrize(
        "form",
        [linear, norm, attend, lambda x: dropout(x, 0.3)],
        ids="lora norm attention x".split(),
    )
    def test_by_seed(self, form: Callable[[torch.Tensor], torch.Tensor]) -> None:
        x = torch.rand(13, 20)
        torch.manual_seed(7)
        first, second = form(x), form(x)
        torch.manual_seed(7)
        assert torch.equal(form(x), first)
        assert torch.equal(form(x), second)
        assert not torch.equal(first, second)

    def test_a_gradient_does_not_change_the_draw(self) -> None:
        """So that a step with its graph and one without drop the same."""
        x = torch.rand(13, 20)
        for form in (linear, norm, attend):
            results = []
            for grad in (False, True):
                torch.manual_seed(8)
                results.append(form(x.clone().requires_grad_(grad)))
            assert (results[0] - results[1]).abs().max() < 1e-6


class TestIndependence:
    """Oracle: two fair masks agree in half of their entries, within five standard errors."""

    def test_no_two_masks_of_a_training_step_go_together(self) -> None:
        """Every layer's, every head's, every sequence's and every token's mask, pair by pair."""
        rate, B, T = 0.5, 16, 17
        config = dataclasses.replace(
            CONFIG, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate
        )
        model = tiny_bert(torch.float32, config=config).train()
        probabilities: list[torch.Tensor] = []
        hidden: list[torch.Tensor] = []
        attention_module = sys.modules["spafit.kernels.packed_attention"]
        dropout_module = sys.modules["spafit.kernels.dropout"]

        def watch(into: list[torch.Tensor]) -> Callable[[tuple[int, ...]], torch.Tensor]:
            def spy(shape: tuple[int, ...]) -> torch.Tensor:
                bits = draw_bits(shape)
                into.append((bits < threshold(rate)).double() * 2 - 1)
                return bits

            return spy

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_module, "draw_bits", watch(probabilities))
            patch.setattr(dropout_module, "draw_bits", watch(hidden))
            torch.manual_seed(9)
            model(torch.randint(1, 50, (B, T)))
        # (n·A, T, T) a layer and bundle: the masks of one head of one sequence in one layer.
        assert len(probabilities) == L - 1  # the last layer's first tokens draw as PyTorch does
        heads = torch.cat([each.reshape(-1, T * T) for each in probabilities])
        assert len(heads) == (L - 1) * B * 5
        self.check(heads)
        # (N, 20): the masks of one token at one place of the model.
        rows = [each for each in hidden if each.shape == (B * T, 20)]
        assert len(rows) == 1 + 2 * (L - 1)
        self.check(torch.stack([each.flatten() for each in rows]))
        self.check(torch.cat([each.view(B, T * 20) for each in rows]))
        self.check(torch.cat(rows).view(-1, 2 * 20)[:1500], places=7)

    @staticmethod
    def check(masks: torch.Tensor, places: float = 6) -> None:
        """Hold every pair within so many standard errors: there are up to 10⁶ pairs."""
        n = masks.shape[1]
        together = masks @ masks.T / n
        together.fill_diagonal_(0.0)
        assert together.abs().max() < places / n**0.5
        # Over all pairs the squares are 1/n on average.
        pairs = len(masks) * (len(masks) - 1)
        mean = float((together**2).sum() / pairs) * n
        assert abs(mean - 1) < 10 / pairs**0.5

    def test_neighbouring_calls_share_nothing(self) -> None:
        torch.manual_seed(10)
        x = torch.empty(50_001)
        masks = torch.stack([keep_mask(x, 0.5).double() * 2 - 1 for _ in range(12)])
        self.check(masks)
        for shift in (1, 2, 3, 4, 5, 8):
            assert abs(float((masks[:, shift:] * masks[:, :-shift]).mean())) < 5 / 600_000**0.5
