"""Linear maps with low-rank updates, alone and stacked: the fused form against the written one."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import pytest
import torch
from support.tensors import LOW_PRECISION, assert_near, laid_out_if
from torch import nn
from torch.utils.checkpoint import checkpoint

from spafit.errors import ConfigError
from spafit.kernels import Part, lora_linear, stacked_linear

# The module, which the function of the same name hides as an attribute of the package.
KERNEL = sys.modules["spafit.kernels.lora_linear"]
N, N_IN = 13, 11
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
FIELDS = ("weight", "bias", "bias_delta", "lora_A", "lora_B")

# name -> (out, r, delta) of each part; r 0 has no LoRA. alpha / r is 1.7.
STACKS = {
    "one": [(6, 3, True)],
    "one without delta": [(6, 3, False)],
    "bias only": [(6, 0, True)],
    "frozen": [(6, 0, False)],
    "r above out": [(2, 5, True)],
    "all three": [(5, 3, True), (5, 3, False), (5, 2, True)],
    "first and last": [(5, 3, False), (5, 0, True), (5, 4, True)],
    "second": [(5, 0, False), (4, 3, True), (6, 0, False)],
    "none": [(5, 0, True), (4, 0, False), (6, 0, True)],
}


def make_parts(
    stack: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0, grad: bool = True
) -> list[Part]:
    """Draw the parts of a stack, all of them asking for gradients."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> nn.Parameter:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return nn.Parameter(values.to(dtype), requires_grad=grad)

    parts = []
    for out, r, delta in STACKS[stack]:
        parts.append(
            Part(
                draw(out, N_IN),
                draw(out),
                draw(out) if delta else None,
                draw(r, N_IN) if r else None,
                draw(out, r) if r else None,
                1.7,
                dropout if r else 0.0,
            )
        )
    return parts


def tensors_of(parts: Sequence[Part]) -> dict[str, torch.Tensor]:
    found = {}
    for i, part in enumerate(parts):
        for field in FIELDS:
            if getattr(part, field) is not None:
                found[f"{i} {field}"] = getattr(part, field)
    return found


def make_x(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*(shape or (N,)), N_IN, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def noise_like(y: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def both(
    x: torch.Tensor, parts: Sequence[Part], gelu: bool = False
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Return output and gradients of the fused form and of the reference."""
    sources = {"x": x, **tensors_of(parts)}
    results = []
    for impl in ("fused", "reference"):
        y = stacked_linear(x, parts, gelu=gelu, impl=impl)
        gradients = torch.autograd.grad((y * noise_like(y)).sum(), list(sources.values()))
        results.append((y, dict(zip(sources, gradients, strict=True))))
    return results


def assert_same(pair: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> None:
    (ours, my_gradients), (expected, true_gradients) = pair
    assert_near(ours, expected, TOLERANCE, "output")
    for name, gradient in true_gradients.items():
        assert_near(my_gradients[name], gradient, TOLERANCE, name)


class TestIsTheEquation:
    """Oracle: the reference form, held against one merged product in test_kernels.py."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
    @pytest.mark.parametrize("stack", STACKS)
    def test_outputs_and_gradients(self, stack: str, gelu: bool, dtype: torch.dtype) -> None:
        assert_same(both(make_x(dtype=dtype), make_parts(stack, dtype), gelu))

    def test_a_gradient_that_is_not_contiguous(self) -> None:
        x, parts = make_x(), make_parts("all three")
        results = []
        for impl in ("fused", "reference"):
            y = stacked_linear(x, parts, impl=impl)
            pull = torch.ones(1, 1, dtype=y.dtype).expand_as(y)  # strides 0
            results.append(torch.autograd.grad(y, x, pull)[0])
        assert_near(*results, TOLERANCE)

    def test_auto_is_fused_and_others_are_refused(self) -> None:
        x, parts = make_x(), make_parts("one")
        assert torch.equal(stacked_linear(x, parts), stacked_linear(x, parts, impl="fused"))
        assert "StackedLinear" in str(stacked_linear(x, parts).grad_fn.next_functions)
        with pytest.raises(ConfigError, match=r"no impl='cublas'"):
            stacked_linear(x, parts, impl="cublas")

    @pytest.mark.parametrize("stack", STACKS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_without_a_gradient_it_gives_the_same_bits(
        self, stack: str, dtype: torch.dtype
    ) -> None:
        """So that a model whose adapters are off is the pre-trained one, bit for bit."""
        x, parts = make_x(64, dtype=dtype), make_parts(stack, dtype)
        for gelu in (False, True):
            with torch.no_grad():
                still = stacked_linear(x, parts, gelu=gelu)
            assert torch.equal(stacked_linear(x, parts, gelu=gelu), still)


class TestOnlyWhatIsAskedFor:
    """Oracle: the reference form's gradients, and the list of what requires one."""

    @pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=6)), ids=str)
    def test_every_subset(self, wanted: tuple[bool, ...]) -> None:
        x, parts = make_x(), make_parts("first and last")
        names = ("x", *FIELDS)
        for name, requires in zip(names, wanted, strict=True):
            if name == "x":
                x.requires_grad_(requires)
            else:
                for part in parts:
                    if getattr(part, name) is not None:
                        getattr(part, name).requires_grad_(requires)
        y = stacked_linear(x, parts, impl="fused")
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            return
        (y * noise_like(y)).sum().backward()
        mine = {name: t.grad for name, t in {"x": x, **tensors_of(parts)}.items()}
        for tensor in (x, *tensors_of(parts).values()):
            tensor.grad = None
        y = stacked_linear(x, parts, impl="reference")
        (y * noise_like(y)).sum().backward()
        for name, tensor in {"x": x, **tensors_of(parts)}.items():
            assert (mine[name] is None) == (tensor.grad is None), name
            if tensor.grad is not None:
                assert_near(mine[name], tensor.grad, TOLERANCE, name)

    def test_backward_twice(self) -> None:
        x, parts = make_x(), make_parts("all three")
        y = stacked_linear(x, parts, gelu=True)
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)
        second = torch.autograd.grad(y.sum(), x)
        assert torch.equal(first[0], second[0])


class TestDropout:
    """Oracle: the equation with the mask that is seen in the output."""

    def test_falls_on_the_input_of_a_alone_and_repeats_in_backward(self) -> None:
        """A and B the identity: y - xWᵀ - b is s drop(x), and dx through it is s m / (1 - p)."""
        n, rate, s = 400, 0.25, 3.0
        x = (1.0 + torch.rand(n, N_IN, dtype=torch.float64)).requires_grad_()
        eye = torch.eye(N_IN, dtype=torch.float64).requires_grad_()
        W = torch.zeros(N_IN, N_IN, dtype=torch.float64)
        b = torch.zeros(N_IN, dtype=torch.float64)
        torch.manual_seed(5)
        y = lora_linear(x, W, b, eye, eye, s, dropout=rate, impl="fused")
        mask = y > 0.5
        scale = 1 / (1 - rate)
        assert (y - mask * s * x * scale).abs().max() < 1e-12
        dx, dA = torch.autograd.grad(y.sum(), (x, eye))
        assert (dx - mask * s * scale).abs().max() < 1e-12
        # Both uses of the identity: dA = Vᵀ x' and dB = s dYᵀ U.
        expected = s * (x * mask * scale).sum(0)
        assert (dA - 2 * expected.expand(N_IN, -1)).abs().max() < 1e-9
        assert abs(float(mask.double().mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / 4400) ** 0.5

    def test_query_key_and_value_are_dropped_independently(self) -> None:
        n = 2000
        eye, zero = torch.eye(N_IN).double(), torch.zeros(N_IN).double()
        part = Part(torch.zeros(N_IN, N_IN).double(), zero, None, eye, eye, 1.0, 0.5)
        torch.manual_seed(6)
        y = stacked_linear(torch.ones(n, N_IN).double(), [part] * 3)
        masks = (y.view(n, 3, N_IN) > 0).double() - 0.5
        for i, j in ((0, 1), (0, 2), (1, 2)):
            correlation = float((masks[:, i] * masks[:, j]).mean() / 0.25)
            assert abs(correlation) < 5 / (n * N_IN) ** 0.5

    def test_checkpointing_repeats_the_draw(self) -> None:
        results = []
        for recompute in (False, True):
            x, parts = make_x(), make_parts("all three", dropout=0.4)
            torch.manual_seed(7)
            if recompute:
                y = checkpoint(
                    lambda x, parts=parts: stacked_linear(x, parts), x, use_reentrant=False
                )
            else:
                y = stacked_linear(x, parts)
            gradients = torch.autograd.grad(
                (y * noise_like(y)).sum(), list(tensors_of(parts).values())
            )
            results.append((y, *gradients))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestLowPrecision:
    """Oracle: the reference in float64; the error is at most twice the plain form's."""

    @pytest.mark.parametrize(("how", "dtype"), LOW_PRECISION, ids=str)
    @pytest.mark.parametrize("stack", ["one", "all three", "first and last", "none"])
    def test_errs_at_most_twice_as_much(self, stack: str, how: str, dtype: torch.dtype) -> None:
        rows = 203
        own = dtype if how == "pure" else torch.float32
        parts, x = make_parts(stack, own), make_x(rows, dtype=own)
        exact_x = x.detach().double().requires_grad_()
        exact = [
            Part(
                *(None if t is None else t.detach().double().requires_grad_() for t in p[:5]), p[5]
            )
            for p in parts
        ]

        def run(x: torch.Tensor, parts: list[Part], impl: str, low: bool) -> list[torch.Tensor]:
            with torch.autocast("cpu", dtype=dtype, enabled=low and how != "pure"):
                y = stacked_linear(x, parts, gelu=True, impl=impl)
            sources = [x, *tensors_of(parts).values()]
            return [y, *torch.autograd.grad((y.double() * noise_like(y.double())).sum(), sources)]

        truth = run(exact_x, exact, "reference", False)
        plain = run(x, parts, "reference", True)
        with laid_out_if(how, [part.weight for part in parts]):
            fused = run(x, parts, "fused", True)
        for name, ours, theirs, true in zip(
            ["y", "x", *tensors_of(parts)], fused, plain, truth, strict=True
        ):
            assert ours.dtype == theirs.dtype, name
            error, allowed = ((t.double() - true).norm() for t in (ours, theirs))
            assert error <= 2 * allowed + 1e-6 * true.norm(), (name, error, allowed)
