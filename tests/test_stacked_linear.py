"""Linear maps with low-rank updates, alone and stacked: the fused form against the written one."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from spafit.errors import ConfigError
from spafit.kernels import Part, lora_linear, stacked_linear
from spafit.kernels.lora_linear import stacked_linear_reference
from spafit.kernels.stacking import are_together, lay_together, stacked

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
    """Give output and gradients of the fused form and of the reference."""
    sources = {"x": x, **tensors_of(parts)}
    results = []
    for impl in ("fused", "reference"):
        y = stacked_linear(x, parts, gelu=gelu, impl=impl)
        gradients = torch.autograd.grad((y * noise_like(y)).sum(), list(sources.values()))
        results.append((y, dict(zip(sources, gradients, strict=True))))
    return results


def assert_near(ours: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    assert ours.shape == expected.shape, what
    assert ours.dtype == expected.dtype, what
    if expected.numel():
        scale = max(1.0, float(expected.detach().abs().max()))
        worst = float((ours.detach() - expected.detach()).abs().max())
        assert worst <= TOLERANCE[expected.dtype] * scale, (what, worst, scale)


def assert_same(pair: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> None:
    (ours, my_gradients), (expected, true_gradients) = pair
    assert_near(ours, expected, "output")
    for name, gradient in true_gradients.items():
        assert_near(my_gradients[name], gradient, name)


class TestIsTheEquation:
    """Oracle: the reference form, which tests/test_kernels.py holds against one merged product."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
    @pytest.mark.parametrize("stack", STACKS)
    def test_outputs_and_gradients(self, stack: str, gelu: bool, dtype: torch.dtype) -> None:
        assert_same(both(make_x(dtype=dtype), make_parts(stack, dtype), gelu))

    @pytest.mark.parametrize("forward", [True, False], ids=["merged", "additive"])
    @pytest.mark.parametrize("backward", [True, False], ids=["merged back", "additive back"])
    @pytest.mark.parametrize("stack", ["one", "all three", "first and last", "second"])
    def test_each_order_of_products(
        self, monkeypatch: pytest.MonkeyPatch, stack: str, forward: bool, backward: bool
    ) -> None:
        monkeypatch.setattr(KERNEL, "merges_forward", lambda *_: forward)
        monkeypatch.setattr(KERNEL, "merges_backward", lambda *_: backward)
        for gelu in (False, True):
            assert_same(both(make_x(), make_parts(stack), gelu))
        with torch.no_grad():
            x, parts = make_x(), make_parts(stack)
            assert_near(
                stacked_linear(x, parts, gelu=True), stacked_linear_reference(x, parts, gelu=True)
            )

    @pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (2, 1, 3), (0, 4)], ids=str)
    def test_leading_dimensions(self, shape: tuple[int, ...]) -> None:
        assert_same(both(make_x(*shape), make_parts("all three")))

    def test_a_single_vector(self) -> None:
        x = make_x(1)[0]
        y = stacked_linear(x, make_parts("all three"))
        assert_near(y, stacked_linear_reference(x, make_parts("all three")))

    def test_x_need_not_be_contiguous(self) -> None:
        for x in (make_x(N_IN)[:, :N_IN].t(), make_x(3, 4).transpose(0, 1), make_x(7)[::2]):
            x = x.detach().requires_grad_()
            assert not x.is_contiguous()
            assert_same(both(x, make_parts("first and last")))

    def test_a_gradient_that_is_not_contiguous(self) -> None:
        x, parts = make_x(), make_parts("all three")
        results = []
        for impl in ("fused", "reference"):
            y = stacked_linear(x, parts, impl=impl)
            pull = torch.ones(1, 1, dtype=y.dtype).expand_as(y)  # strides 0
            results.append(torch.autograd.grad(y, x, pull)[0])
        assert_near(*results)

    @pytest.mark.parametrize("r", [1, 2, 16, 64, 256])
    def test_ranks(self, r: int) -> None:
        generator = torch.Generator().manual_seed(1)
        A, B = (torch.randn(*s, generator=generator).double() for s in ((r, N_IN), (6, r)))
        part = make_parts("one")[0]._replace(
            lora_A=A.requires_grad_(), lora_B=B.requires_grad_(), scaling=2 / r
        )
        assert_same(both(make_x(), [part]))

    def test_gradients_are_finite_differences(self) -> None:
        x = make_x(3)
        for stack in ("one", "first and last"):
            parts = make_parts(stack)
            tensors = tensors_of(parts)

            def apply(x: torch.Tensor, *_: Any, parts: list[Part] = parts) -> torch.Tensor:
                return stacked_linear(x, parts, gelu=True, impl="fused")

            assert torch.autograd.gradcheck(apply, (x, *tensors.values()))

    def test_auto_is_fused_and_others_are_refused(self) -> None:
        x, parts = make_x(), make_parts("one")
        assert torch.equal(stacked_linear(x, parts), stacked_linear(x, parts, impl="fused"))
        assert "StackedLinear" in str(stacked_linear(x, parts).grad_fn.next_functions)
        with pytest.raises(ConfigError, match=r"no impl='triton'"):
            stacked_linear(x, parts, impl="triton")

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

    def test_a_second_derivative_is_refused_with_the_mend(self) -> None:
        x, parts = make_x(), make_parts("one")
        y = stacked_linear(x, parts)
        with pytest.raises(ConfigError, match=r"differentiated twice.*impl='reference'"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
        y = stacked_linear(x, parts, impl="reference").square().sum()
        [dx] = torch.autograd.grad(y, x, create_graph=True)
        torch.autograd.grad(dx.sum(), x)


class TestOnlyWhatIsAskedFor:
    """Oracle: the reference form's gradients, and the list of what requires one."""

    @pytest.mark.parametrize("wanted", itertools.product([False, True], repeat=6), ids=str)
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
                assert_near(mine[name], tensor.grad, name)

    def test_no_dx_no_product_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import spafit.kernels.products as products

        shapes = []

        def counted(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
            shapes.append((tuple(x.shape), tuple(W.shape)))
            return products.product(x, W, b)

        monkeypatch.setattr(KERNEL, "product", counted)
        for needs_x, expected in ((True, 2), (False, 1)):
            x, parts = make_x(), make_parts("bias only")
            parts[0].weight.requires_grad_(False)
            x.requires_grad_(needs_x)
            shapes.clear()
            stacked_linear(x, parts).sum().backward()
            assert len(shapes) == expected

    @pytest.mark.parametrize(
        ("stack", "keeps"), [("bias only", 0), ("none", 0), ("one", N * N_IN), ("second", N * N_IN)]
    )
    def test_what_is_kept(self, monkeypatch: pytest.MonkeyPatch, stack: str, keeps: int) -> None:
        """Keeps x where a matrix learns, U (N, R) where forward made it, no more of N rows."""
        monkeypatch.setattr(KERNEL, "merges_forward", lambda *_: False)
        parts = make_parts(stack)
        for part in parts:
            part.weight.requires_grad_(False)
        R = sum(part.lora_A.shape[0] for part in parts if part.lora_A is not None)
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stacked_linear(make_x(), parts)
        rows = [tensor for tensor in kept if tensor.shape[0] == N]
        assert sum(tensor.numel() for tensor in rows) == keeps + N * R

    def test_gradients_of_b_and_delta_do_not_share_memory(self) -> None:
        x, parts = make_x(), make_parts("one")
        stacked_linear(x, parts).sum().backward()
        before = parts[0].bias.grad.clone()
        parts[0].bias_delta.grad.mul_(2)
        assert torch.equal(parts[0].bias.grad, before)

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

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("how", ["autocast", "pure"])
    @pytest.mark.parametrize("stack", ["one", "all three", "first and last"])
    def test_errs_at_most_twice_as_much(self, stack: str, how: str, dtype: torch.dtype) -> None:
        rows = 203
        parts = make_parts(stack, torch.float32 if how == "autocast" else dtype)
        x = make_x(rows, dtype=torch.float32 if how == "autocast" else dtype)
        exact_x = x.detach().double().requires_grad_()
        exact = [
            Part(
                *(None if t is None else t.detach().double().requires_grad_() for t in p[:5]), p[5]
            )
            for p in parts
        ]

        def run(x: torch.Tensor, parts: list[Part], impl: str, low: bool) -> list[torch.Tensor]:
            with torch.autocast("cpu", dtype=dtype, enabled=low and how == "autocast"):
                y = stacked_linear(x, parts, gelu=True, impl=impl)
            sources = [x, *tensors_of(parts).values()]
            return [y, *torch.autograd.grad((y.double() * noise_like(y.double())).sum(), sources)]

        truth = run(exact_x, exact, "reference", False)
        plain = run(x, parts, "reference", True)
        fused = run(x, parts, "fused", True)
        for name, ours, theirs, true in zip(
            ["y", "x", *tensors_of(parts)], fused, plain, truth, strict=True
        ):
            assert ours.dtype == theirs.dtype, name
            error, allowed = ((t.double() - true).norm() for t in (ours, theirs))
            assert error <= 2 * allowed + 1e-6 * true.norm(), (name, error, allowed)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_is_never_merged(self, dtype: torch.dtype) -> None:
        parts = make_parts("one", dtype)
        many = make_x(100_000, dtype=dtype)
        assert not KERNEL.merges_forward(many, parts)
        assert not KERNEL.merges_backward(many, parts)
        assert KERNEL.merges_forward(many.float(), parts)
        assert KERNEL.merges_backward(many.float(), parts)

    def test_lora_gradients_are_float32_and_not_rounded_to_bf16(self) -> None:
        """Ones: dB = s dYᵀ U is a whole number beyond bf16's 8 bits, and exact in float32."""
        rows = 771
        A, B = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = lora_linear(torch.ones(rows, 1), torch.zeros(1, 1), torch.zeros(1), A, B, 1.0)
        y.sum().backward()
        assert A.grad.dtype == B.grad.dtype == torch.float32
        assert A.grad.item() == B.grad.item() == rows


class TestCompiled:
    """Oracle: eager mode, and PyTorch's own checks of an operator."""

    @pytest.mark.parametrize("stack", ["one", "bias only", "all three", "first and last"])
    @pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
    def test_opcheck(self, stack: str, gelu: bool) -> None:
        parts = make_parts(stack, torch.float32)
        nothing = torch.empty(0)
        columns = [
            [nothing if tensor is None else tensor for tensor in column]
            for column in zip(*(part[:5] for part in parts), strict=True)
        ]
        scalings = [part.scaling for part in parts]
        torch.library.opcheck(
            torch.ops.spafit.stacked_linear,
            (make_x(dtype=torch.float32), *columns, scalings, 0.0, gelu, nothing),
        )

    @pytest.mark.parametrize("stack", ["one", "all three"])
    def test_no_graph_break(self, stack: str) -> None:
        x, parts = make_x(dtype=torch.float32), make_parts(stack, torch.float32)
        compiled = torch.compile(
            lambda x: stacked_linear(x, parts, gelu=True), fullgraph=True, backend="aot_eager"
        )
        sources = [x, *tensors_of(parts).values()]
        results = []
        for form in (compiled, lambda x: stacked_linear(x, parts, gelu=True)):
            y = form(x)
            results.append([y, *torch.autograd.grad((y * noise_like(y)).sum(), sources)])
        for ours, expected in zip(*results, strict=True):
            assert_near(ours, expected)


class TestStacking:
    """Oracle: torch.cat, and the addresses of the memory."""

    def make(self, requires_grad: bool = True) -> list[nn.Parameter]:
        sizes = (4, 2, 3)
        return [nn.Parameter(torch.randn(rows, 5), requires_grad=requires_grad) for rows in sizes]

    def test_laying_together_changes_no_value_and_stacking_copies_nothing(self) -> None:
        parameters = self.make()
        before = [parameter.detach().clone() for parameter in parameters]
        assert not are_together(parameters)
        assert torch.equal(stacked(parameters), torch.cat(before))
        lay_together(parameters)
        assert are_together(parameters)
        for parameter, values in zip(parameters, before, strict=True):
            assert torch.equal(parameter, values)
            assert parameter.requires_grad
            assert parameter.is_leaf
        whole = stacked(parameters)
        assert whole.data_ptr() == parameters[0].data_ptr()
        assert torch.equal(whole, torch.cat(before))
        address = parameters[0].data_ptr()
        lay_together(parameters)
        assert parameters[0].data_ptr() == address

    def test_a_step_on_one_moves_the_whole(self) -> None:
        parameters = self.make()
        lay_together(parameters)
        with torch.no_grad():
            parameters[1].add_(1.0)
        assert torch.equal(stacked(parameters), torch.cat([p.detach() for p in parameters]))

    def test_order_and_gaps_are_seen(self) -> None:
        first, second, third = parameters = self.make()
        lay_together(parameters)
        for mixed in ([second, first], [first, third], [third, first, second]):
            assert not are_together(mixed)
            assert torch.equal(stacked(mixed), torch.cat([p.detach() for p in mixed]))

    def test_made_in_inference_mode_it_can_still_be_trained(self) -> None:
        parameters = self.make()
        with torch.inference_mode():
            lay_together(parameters)
        F.linear(torch.ones(5), parameters[0]).sum().backward()
        with torch.no_grad():
            parameters[0].add_(1.0)

    def test_what_cannot_lie_together_is_left(self) -> None:
        for parameters in (
            [],
            self.make()[:1],
            [nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(2, 5).double())],
            [nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(2, 4))],
            [nn.Parameter(torch.ones(2, 5, device="meta"))] * 2,
        ):
            lay_together(parameters)
