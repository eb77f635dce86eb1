"""Dropout, dropout + residual + LayerNorm, and packed attention: the fused forms."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from tiny_bert import CONFIG, tiny_bert
from torch import nn

from spafit.errors import ConfigError
from spafit.kernels import dropout, dropout_add_norm, packed_attention
from spafit.kernels.attention import attention_reference
from spafit.kernels.dropout import apply_mask, draw_bits, keep_mask, scale_of, threshold
from spafit.kernels.packed_attention import make_groups
from spafit.kernels.products import library, product

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CPU = torch.device("cpu")
N, D = 13, 20


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class TestRandomBits:
    """Oracle: the binomial distribution."""

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

    @pytest.mark.parametrize("rate", [1e-6, 1e-4, 0.1, 0.5, 0.9, 0.99999, 1 - 1e-12])
    def test_rate_and_scale(self, rate: float) -> None:
        n = 400_000
        torch.manual_seed(1)
        x = torch.ones(n, dtype=torch.float64)
        kept = keep_mask(x, rate)
        drawn = 1 - 1 / scale_of(rate, CPU)  # a multiple of 1/65,536
        assert abs(drawn - rate) <= 1 / 65_536
        deviation = (drawn * (1 - drawn) / n) ** 0.5
        assert abs(float((~kept).double().mean()) - drawn) <= 5 * deviation
        dropped = apply_mask(x, kept, rate)
        assert set(dropped.unique().tolist()) <= {0.0, scale_of(rate, CPU)}

    def test_the_threshold_counts_levels(self) -> None:
        every = torch.arange(-(2**15), 2**15).short()
        for rate in (0.0, 0.1, 0.25, 0.5):
            assert int((every < threshold(rate)).sum()) == round(rate * 65_536)


class TestDropout:
    """Oracle: y = x ⊙ m / (1 - rate), m read off the output."""

    def test_equation_and_gradient(self) -> None:
        x = (1 + draw(N, D).abs()).requires_grad_()
        torch.manual_seed(2)
        y = dropout(x, 0.25)
        mask = (y != 0).double()
        assert 0 < mask.mean() < 1
        assert (y - x * mask / 0.75).abs().max() < 1e-12
        [dx] = torch.autograd.grad((y * draw(N, D, seed=1)).sum(), x)
        assert (dx - draw(N, D, seed=1) * mask / 0.75).abs().max() < 1e-12
        torch.manual_seed(2)
        assert torch.equal(dropout(x, 0.25), y)
        assert not torch.equal(dropout(x, 0.25), y)

    def test_forms(self) -> None:
        x = draw(N, D)
        assert dropout(x, 0.0) is x
        torch.manual_seed(3)
        plain = dropout(x, 0.3, "reference")
        torch.manual_seed(3)
        assert torch.equal(plain, torch.nn.functional.dropout(x, 0.3))
        with pytest.raises(ConfigError, match=r"no impl='best'"):
            dropout(x, 0.3, "best")

    def test_layers_tokens_heads_and_sequences_draw_independently(self) -> None:
        """All masks of a training step side by side: each pair agrees as often as chance has it."""
        rate, masks = 0.5, []
        config = dataclasses.replace(
            CONFIG, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate
        )
        model = tiny_bert(torch.float32, config=config).train()
        kept: list[torch.Tensor] = []
        bits = draw_bits

        def spy(shape: tuple[int, ...]) -> torch.Tensor:
            drawn = bits(shape)
            kept.append((drawn < threshold(rate)).flatten())
            return drawn

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["spafit.kernels.dropout"], "draw_bits", spy)
            patch.setattr(sys.modules["spafit.kernels.packed_attention"], "draw_bits", spy)
            torch.manual_seed(4)
            model(torch.randint(1, 50, (64, 11)))
        # Embeddings, and for each layer two of (N, D) and one (n·A, T, T); the last layer's
        # attention looks from one token alone and draws as PyTorch does.
        assert len(kept) == 1 + 3 * 6 - 1
        least = min(len(each) for each in kept)
        masks = torch.stack([each[:least].double() * 2 - 1 for each in kept])
        together = masks @ masks.T / least - torch.eye(len(kept)).double()
        assert (together.abs() < 5 / least**0.5).all()
        # Heads of one sequence, and tokens of one layer: the same entries of different rows.
        heads = kept[1][: 64 * 5 * 121].view(64, 5, 121).double() * 2 - 1
        for other in range(1, 5):
            assert abs(float((heads[:, 0] * heads[:, other]).mean())) < 5 / (64 * 121) ** 0.5
        tokens = kept[2].view(-1, 20).double() * 2 - 1
        assert abs(float((tokens[:-1] * tokens[1:]).mean())) < 5 / tokens[1:].numel() ** 0.5


class TestDropoutAddNorm:
    """Oracle: the reference form, LayerNorm(Dropout(x) + residual) in PyTorch's own functions."""

    @staticmethod
    def make(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        shapes = [(3, N, D), (3, N, D), (D,), (D,), (D,)]
        tensors = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
        tensors[2] = 1 + 0.3 * tensors[2]
        return [tensor.to(dtype).requires_grad_() for tensor in tensors]

    @staticmethod
    def run(
        tensors: list[torch.Tensor], delta: bool, impl: str, rate: float = 0.0
    ) -> list[torch.Tensor]:
        x, residual, weight, bias, bias_delta = tensors
        y = dropout_add_norm(
            x, residual, weight, bias, 1e-12, bias_delta if delta else None, rate, impl
        )
        sources = tensors if delta else tensors[:4]
        pull = draw(*y.shape, seed=9).to(y.dtype)
        return [y, *torch.autograd.grad((y * pull).sum(), sources)]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("delta", [True, False])
    def test_is_the_equation(self, delta: bool, dtype: torch.dtype) -> None:
        tensors = self.make(dtype)
        for ours, expected in zip(
            self.run(tensors, delta, "fused"), self.run(tensors, delta, "reference"), strict=True
        ):
            scale = max(1.0, float(expected.detach().abs().max()))
            assert ours.dtype == dtype
            assert (ours - expected).abs().max() <= TOLERANCE[dtype] * scale

    def test_dropout_falls_on_x_alone(self) -> None:
        """The mask is read off dx; the equation is then written out with it."""
        tensors = self.make()
        torch.manual_seed(5)
        y, dx, dresidual, *_ = self.run(tensors, True, "fused", 0.25)
        x, residual, weight, bias, bias_delta = tensors
        mask = (dx != 0).double()
        assert abs(float(mask.mean()) - 0.75) < 0.1
        z = x * mask / 0.75 + residual
        expected = nn.functional.layer_norm(z, (D,), weight, bias + bias_delta, 1e-12)
        assert (y - expected).abs().max() < 1e-12
        assert (dx - dresidual * mask / 0.75).abs().max() < 1e-12

    @pytest.mark.parametrize("wanted", range(5))
    def test_only_what_is_asked_for(self, wanted: int) -> None:
        tensors = [tensor.detach() for tensor in self.make()]
        tensors[wanted].requires_grad_()
        y = dropout_add_norm(*tensors[:4], 1e-12, tensors[4], 0.0, "fused")
        y.square().sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == [i == wanted for i in range(5)]

    def test_b_and_delta_do_not_share_their_gradient(self) -> None:
        tensors = self.make()
        dropout_add_norm(*tensors[:4], 1e-12, tensors[4]).sum().backward()
        before = tensors[3].grad.clone()
        tensors[4].grad.mul_(2)
        assert torch.equal(tensors[3].grad, before)

    @pytest.mark.parametrize("how", ["autocast", "pure"])
    def test_bf16_errs_at_most_twice_as_much(self, how: str) -> None:
        tensors = self.make(torch.float32 if how == "autocast" else torch.bfloat16)
        if how == "autocast":
            tensors[0] = tensors[0].detach().bfloat16().requires_grad_()
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        truth = self.run(exact, True, "reference")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            plain = self.run(tensors, True, "reference")
            fused = self.run(tensors, True, "fused")
        for ours, theirs, true in zip(fused, plain, truth, strict=True):
            assert ours.dtype == theirs.dtype
            error, allowed = ((t.double() - true).norm() for t in (ours, theirs))
            assert error <= 2 * allowed + 1e-6 * true.norm()

    def test_keeps_less_than_the_plain_form(self) -> None:
        def kept(impl: str) -> int:
            sizes: dict[int, int] = {}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            tensors = self.make(torch.float32)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = dropout_add_norm(*tensors[:4], 1e-12, None, 0.1, impl)
            assert y.requires_grad
            return sum(sizes.values())

        rows = 3 * N
        assert kept("fused") == rows * (4 * D + D + 2 * 4) + 2 * 4 * D
        assert kept("fused") <= kept("reference")

    def test_refusals(self) -> None:
        tensors = self.make()
        with pytest.raises(ConfigError, match=r"no impl='best'"):
            dropout_add_norm(*tensors[:4], 1e-12, impl="best")
        y = dropout_add_norm(*tensors[:4], 1e-12)
        with pytest.raises(ConfigError, match="differentiated twice"):
            torch.autograd.grad(y.sum(), tensors[0], create_graph=True)


class TestPackedAttention:
    """Oracle: ``attention_reference`` on each sequence by itself."""

    A, LENGTHS = 5, (4, 4, 7, 1, 6)
    Dh = 3

    def make(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return (1.5 * draw(sum(self.LENGTHS) + 2, 3 * self.A * self.Dh)).to(dtype).requires_grad_()

    def by_sequence(self, QKV: torch.Tensor) -> torch.Tensor:
        outputs = []
        for rows in QKV[: sum(self.LENGTHS)].split(self.LENGTHS):
            Q, K, V = rows.view(len(rows), 3, self.A, self.Dh).permute(1, 2, 0, 3)[:, None]
            outputs.append(attention_reference(Q, K, V)[0].transpose(0, 1).flatten(1))
        return torch.cat([*outputs, QKV.new_zeros(2, self.A * self.Dh)])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("counts", [(5,), (1,) * 5, (2, 3)], ids=str)
    @pytest.mark.parametrize("impl", ["auto", "fused", "sdpa", "reference"])
    def test_is_the_equation(self, impl: str, counts: tuple[int, ...], dtype: torch.dtype) -> None:
        QKV = self.make(dtype)
        pull = draw(len(QKV), self.A * self.Dh, seed=2).to(dtype)
        groups = make_groups(self.LENGTHS, counts, CPU)
        forms = (packed_attention(QKV, groups, self.A, impl=impl), self.by_sequence(QKV))
        results = [(y, torch.autograd.grad((y * pull).sum(), QKV)[0]) for y in forms]
        for ours, expected in zip(*results, strict=True):
            assert (ours - expected).abs().max() <= TOLERANCE[dtype]
        with torch.no_grad():
            assert torch.equal(packed_attention(QKV, groups, self.A, impl=impl), results[0][0])

    @pytest.mark.parametrize("counts", [(5,), (2, 3)], ids=str)
    def test_dropout(self, counts: tuple[int, ...]) -> None:
        """The masks are caught as they are drawn, and the equation is written out with them."""
        QKV, rate = self.make(), 0.25
        groups = make_groups(self.LENGTHS, counts, CPU)
        drawn: list[torch.Tensor] = []

        def spy(shape: tuple[int, ...]) -> torch.Tensor:
            drawn.append(draw_bits(shape))
            return drawn[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["spafit.kernels.packed_attention"], "draw_bits", spy)
            torch.manual_seed(6)
            ours = packed_attention(QKV, groups, self.A, rate, "fused")
        outputs, sequence, row = [], 0, 0
        for group, bits in zip(groups, drawn, strict=True):
            masks = (bits >= threshold(rate)).double()
            masks = masks.view(group.count, self.A, group.longest, group.longest)
            for mask in masks:
                T = self.LENGTHS[sequence]
                rows = QKV[row : row + T].view(T, 3, self.A, self.Dh)
                Q, K, V = rows.permute(1, 2, 0, 3)
                P = torch.softmax(Q @ K.transpose(1, 2) / self.Dh**0.5, -1)
                P = P * mask[:, :T, :T] / (1 - rate)
                outputs.append((P @ V).transpose(0, 1).flatten(1))
                sequence, row = sequence + 1, row + T
        expected = torch.cat([*outputs, QKV.new_zeros(2, self.A * self.Dh)])
        assert (ours - expected).abs().max() < 1e-12
        pull = draw(len(QKV), self.A * self.Dh, seed=2)
        first = torch.autograd.grad((ours * pull).sum(), QKV, retain_graph=True)[0]
        true = torch.autograd.grad((expected * pull).sum(), QKV)[0]
        assert (first - true).abs().max() < 1e-12
        assert torch.equal(first, torch.autograd.grad((ours * pull).sum(), QKV)[0])

    def test_refusals(self) -> None:
        QKV, groups = self.make(), make_groups(self.LENGTHS, (5,), CPU)
        with pytest.raises(ConfigError, match=r"no impl='flash'"):
            packed_attention(QKV, groups, self.A, impl="flash")
        with pytest.raises(ConfigError, match=r"float32 and float64.*sdpa"):
            packed_attention(QKV.bfloat16(), groups, self.A, impl="fused")
        assert packed_attention(QKV.bfloat16(), groups, self.A).dtype == torch.bfloat16
        y = packed_attention(QKV, groups, self.A)
        with pytest.raises(ConfigError, match="differentiated twice"):
            torch.autograd.grad(y.sum(), QKV, create_graph=True)


class TestProducts:
    """Oracle: the product in float64; each library in a process that asks for it."""

    SIZES = (300, 170, 130)  # large enough for oneDNN

    def test_is_the_product(self) -> None:
        n, k, m = self.SIZES
        x, W, b = (draw(*s, dtype=torch.float32) for s in ((n, k), (m, k), (m,)))
        exact = x.double() @ W.double().T + b.double()
        assert (product(x, W, b) - exact).abs().max() < 1e-4
        assert (product(x, W.t().contiguous().t(), b) - exact).abs().max() < 1e-4

    @pytest.mark.parametrize("asked", ["mkl", "onednn"])
    def test_the_environment_chooses(self, asked: str) -> None:
        code = (
            "import torch; from spafit.kernels.products import library, product;"
            "torch.manual_seed(0);"
            "x, W = torch.randn(300, 170), torch.randn(130, 170);"
            "print(library(), float((product(x, W, None) - x.double() @ W.double().T).abs().max()))"
        )
        environment = {**os.environ, "SPAFIT_PRODUCTS": asked}
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        name, error = ran.stdout.split()
        assert name == asked
        assert float(error) < 1e-4

    def test_an_unknown_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SPAFIT_PRODUCTS", "blis")
        library.cache_clear()
        try:
            with pytest.raises(ConfigError, match=r'must be "mkl" or "onednn", found \'blis\''):
                library()
        finally:
            monkeypatch.undo()
            library.cache_clear()
