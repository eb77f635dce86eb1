"""Training linear maps in their Triton form: the gradients asked for, dropout, the same bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.linear_maps import (
    DEVICE,
    FIELDS,
    IN,
    Launches,
    N,
    assert_errs_at_most_twice_as_much,
    draw,
    in_float64,
    make_parts,
    results,
    tensors_of,
    with_masks,
)
from torch.utils.checkpoint import checkpoint

from spafit.kernels import Part, products, stacked_linear
from spafit.kernels.gpu import triton_linear, triton_low_rank
from spafit.kernels.gpu.triton_common import draw_seed


class TestOnlyWhatIsAskedFor:
    """Oracle: the reference's gradients, and a list of the kernels that each gradient takes."""

    @pytest.mark.parametrize(
        "wanted",
        [
            # None, one alone, all but one, all; and the rest.
            pytest.param(each, marks=pytest.mark.full if 1 < sum(each) < 5 else (), id=str(each))
            for each in itertools.product([False, True], repeat=6)
        ],
    )
    def test_every_subset(self, monkeypatch: pytest.MonkeyPatch, wanted: tuple[bool, ...]) -> None:
        x, parts = draw(5, 7, seed=1), make_parts([3, 3], width=7, out=6)
        sources = {"x": x, **tensors_of(parts)}
        flags = dict(zip(("x", *FIELDS), wanted, strict=True))
        for name, tensor in sources.items():
            tensor.requires_grad_(flags[name.split()[-1]])
        y = stacked_linear(x, parts, impl="triton")
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            return
        asked = [tensor for tensor in sources.values() if tensor.requires_grad]
        pull = draw(*y.shape, seed=7)
        made = []
        product = triton_linear.product

        def counted(a: torch.Tensor, *rest: Any) -> torch.Tensor:
            made.append(a.shape)
            return product(a, *rest)

        for module in (triton_linear, products):
            monkeypatch.setattr(module, "product", counted)
        launches = Launches(monkeypatch, "_narrow", "_forward", "_dx", "_gradients")
        y.backward(pull)
        counts = {name: len(grids) for name, grids in launches.grids.items()}
        lora = flags["lora_A"] or flags["lora_B"]
        assert counts == {
            "_narrow": int(flags["x"] or flags["lora_A"]),  # float32 makes V before
            "_forward": 0,
            "_dx": int(flags["x"]),
            "_gradients": int(lora),
        }
        for grid in launches.grids["_gradients"]:
            assert grid == (2 * (flags["lora_A"] + flags["lora_B"]), 1)  # a tile a part
        assert len(made) == 2 * flags["weight"]
        plain = stacked_linear(x, parts, impl="reference")
        expected = torch.autograd.grad(plain, asked, pull)
        for tensor, gradient in zip(asked, expected, strict=True):
            scale = float(gradient.abs().max())
            assert float((tensor.grad - gradient).abs().max()) <= 1e-5 * scale
        assert all(t.grad is None for t in sources.values() if not t.requires_grad)

    def test_gradients_of_b_and_its_delta_share_no_memory(self) -> None:
        x, parts = draw(5, 7, seed=1), make_parts([3], width=7, out=6)
        y = stacked_linear(x, parts, impl="triton")
        db, ddelta = torch.autograd.grad(y.sum(), [parts[0].bias, parts[0].bias_delta])
        assert db.data_ptr() != ddelta.data_ptr()


class TestDropout:
    """Oracle: the equation with the masks, which U shows where x is one and A the identity."""

    RATE = 0.3

    def masks(self, seed: int, n: int, width: int, count: int = 3) -> torch.Tensor:
        """Return the masks (count, n, width) that a seed of PyTorch's draws."""
        eye = torch.eye(width, device=DEVICE)
        zeros = torch.zeros(4, width, device=DEVICE)
        part = Part(zeros, zeros[:, 0], None, eye, zeros, 1.0, self.RATE)
        torch.manual_seed(seed)
        x = torch.ones(n, width, device=DEVICE)
        U = triton_low_rank.make_U(x, [part] * count, draw_seed(x.device))
        U = U.view(n, count, width).transpose(0, 1)
        scale = 1 / (1 - self.RATE)
        assert bool(((U == 0) | ((U - scale).abs() < 1e-6)).all())
        return U > 0

    @pytest.mark.parametrize(
        "dtype",
        [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)],
        ids=str,
    )
    def test_outputs_and_gradients(self, dtype: torch.dtype) -> None:
        count = 2 if dtype == torch.float32 else 3
        masks = self.masks(5, N, IN, count)
        x = draw(N, IN, seed=1, dtype=dtype).requires_grad_()
        parts = make_parts([9] * count, dtype, dropout=self.RATE)
        torch.manual_seed(5)
        ours = results(x, parts)
        exact = with_masks(x.detach().double().requires_grad_(), in_float64(parts), masks)
        assert_errs_at_most_twice_as_much(ours, with_masks(x, parts, masks), exact)

    def test_more_ranks_than_a_tile_takes(self) -> None:
        masks = self.masks(5, 9, IN, 1)
        x = draw(9, IN, seed=1).requires_grad_()
        parts = make_parts([150], dropout=self.RATE)
        torch.manual_seed(5)
        ours = results(x, parts)
        exact = with_masks(x.detach().double().requires_grad_(), in_float64(parts), masks)
        assert_errs_at_most_twice_as_much(ours, with_masks(x, parts, masks), exact)

    def test_rate_and_independence(self) -> None:
        """Five standard deviations of the mean of as many draws."""
        n, width = 128, 60
        masks = self.masks(6, n, width).double()
        centred = (masks - (1 - self.RATE)) / (self.RATE * (1 - self.RATE)) ** 0.5
        bound = 5 / (n * width) ** 0.5
        for mask in centred:
            assert abs(float(mask.mean())) < bound
            assert abs(float((mask[1:] * mask[:-1]).mean())) < bound
            assert abs(float((mask[:, 1:] * mask[:, :-1]).mean())) < bound
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert abs(float((centred[i] * centred[j]).mean())) < bound
        other = self.masks(7, n, width, 1).double()
        again = (other - (1 - self.RATE)) / (self.RATE * (1 - self.RATE)) ** 0.5
        assert abs(float((centred[0] * again).mean())) < bound

    def test_a_generators_state_gives_its_bits(self) -> None:
        x = draw(5, IN, seed=1).requires_grad_()
        parts = make_parts([5] * 2, dropout=self.RATE)
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(results(x, parts))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        assert not torch.equal(found[0]["y"], found[2]["y"])

    def test_checkpointing_repeats_the_draw(self) -> None:
        found = []
        for recompute in (False, True):
            x = draw(5, IN, seed=1).requires_grad_()
            parts = make_parts([5] * 2, dropout=self.RATE)

            def apply(x: torch.Tensor, parts: list[Part] = parts) -> torch.Tensor:
                return stacked_linear(x, parts, impl="triton")

            torch.manual_seed(7)
            y = checkpoint(apply, x, use_reentrant=False) if recompute else apply(x)
            gradients = torch.autograd.grad(
                y, [x, *tensors_of(parts).values()], draw(*y.shape, seed=7)
            )
            found.append([y, *gradients])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class TestBits:
    """Oracle: the operation itself, called again."""

    def test_a_run_repeats_and_recording_changes_nothing(self) -> None:
        for n, gelu, parts in (
            (N, True, make_parts([6], torch.bfloat16)),
            (5, False, make_parts([6] * 2)),
        ):
            x = draw(n, IN, seed=1, dtype=parts[0].weight.dtype).requires_grad_()
            first, second = results(x, parts, gelu=gelu), results(x, parts, gelu=gelu)
            assert all(torch.equal(first[name], second[name]) for name in first)
            with torch.no_grad():
                still = stacked_linear(x, parts, gelu=gelu, impl="triton")
            assert torch.equal(still, first["y"])

    def test_backward_twice(self) -> None:
        x, parts = draw(N, IN, seed=1).requires_grad_(), make_parts([6])
        y = stacked_linear(x, parts, gelu=True, impl="triton")
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad(y.sum(), x)[0])
