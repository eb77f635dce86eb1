"""Bias and GELU as one Triton kernel each way."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.sweeps import quick
from support.triton_compiler import compiling_for
from support.triton_tensors import (
    DEVICE,
    Tensors,
    Watched,
    assert_errs_at_most_twice,
    draw,
    with_gradients,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from spafit.kernels import forms
from spafit.kernels.gpu.triton_add_norm import bias_gradients
from spafit.kernels.gpu.triton_gelu import add_bias_gelu, bias_gelu_backward

NAMES = ("h", "bias", "bias_delta")

# Of programs, δ, the parameters' type and h's: every two values together.
PAIRS = [
    (2048, True, "low", torch.bfloat16),
    (2048, False, "float32", torch.float16),
    (3, True, "float32", torch.bfloat16),
    (3, False, "low", torch.bfloat16),
    (3, True, "low", torch.float16),
]


def make(
    *shape: int, columns: int = 37, delta: bool = True, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Draw h from -9 to 9 or so, b and δ, all asking for gradients."""
    found = {
        "h": 2 * draw(*shape, columns, seed=1),
        "bias": draw(columns, seed=2),
        "bias_delta": draw(columns, seed=3),
    }
    if not delta:
        del found["bias_delta"]
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in found.items()}


class BiasGelu(torch.autograd.Function):
    """The two launches as the linear map calls them, in autograd."""

    @staticmethod
    def forward(ctx, h, bias, delta):
        ctx.save_for_backward(h, bias, delta)
        return add_bias_gelu(h, bias.contiguous(), None if delta is None else delta.contiguous())

    @staticmethod
    def backward(ctx, dy):
        h, bias, delta = ctx.saved_tensors
        needs_h, *needs = ctx.needs_input_grad
        given = bias.contiguous(), None if delta is None else delta.contiguous()
        dh, db = bias_gelu_backward(dy, h, *given, any(needs), needs_h)
        delta_dtype = None if delta is None else delta.dtype
        return dh, *bias_gradients(db, needs[0], bias.dtype, needs[1], delta_dtype)


def run(tensors: Tensors) -> torch.Tensor:
    return BiasGelu.apply(tensors["h"], tensors["bias"], tensors.get("bias_delta"))


def plain(tensors: Tensors) -> torch.Tensor:
    return F.gelu(sum(tensors.values()))


def exact(tensors: Tensors) -> Tensors:
    """Write u (1 + erf(u / √2)) / 2 out in float64, with its gradients; none is rounded."""
    wide = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    u = sum(wide.values())
    return with_gradients(0.5 * u * (1 + torch.erf(u / 2**0.5)), wide)


def rounding(tensors: Tensors) -> torch.Tensor:
    """Do as a product with its bias in h's type does: h + b + δ is rounded before GELU."""
    b = tensors["bias"]
    if "bias_delta" in tensors:
        b = b + tensors["bias_delta"]
    return F.gelu(tensors["h"] + b.to(tensors["h"].dtype))


@pytest.fixture(params=[2048, 3], ids=lambda count: f"at most {count} programs")
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a program take one tile, or several."""
    from spafit.kernels.gpu import triton_gelu

    monkeypatch.setattr(triton_gelu, "_PROGRAMS", request.param)
    return request.param


class TestIsTheEquation:
    """Oracle: the equation in float64; the plain form's error sets the tolerance."""

    @pytest.mark.usefixtures("programs")
    @pytest.mark.parametrize("columns", [1, 37, 300])
    @pytest.mark.parametrize("delta", [True, False])
    def test_float32(self, delta: bool, columns: int) -> None:
        tensors = make(3, 7, columns=columns, delta=delta)
        ours, other = (with_gradients(form(tensors), tensors) for form in (run, plain))
        assert_errs_at_most_twice(ours, other, exact(tensors))

    @pytest.mark.usefixtures("programs")
    @pytest.mark.parametrize(
        ("programs", "delta", "parameters", "dtype"),
        quick(
            itertools.product(
                [2048, 3], [True, False], ["low", "float32"], [torch.bfloat16, torch.float16]
            ),
            PAIRS,
        ),
        indirect=["programs"],
        ids=str,
    )
    def test_low_precision(self, delta: bool, parameters: str, dtype: torch.dtype) -> None:
        tensors = make(61, delta=delta, dtype=dtype)
        if parameters == "float32":
            for name in [*tensors][1:]:
                tensors[name] = draw(37, seed=7).requires_grad_()
        ours = with_gradients(run(tensors), tensors)
        plain = with_gradients(rounding(tensors), tensors)
        assert all(ours[name].dtype == tensor.dtype for name, tensor in tensors.items())
        assert ours["y"].dtype == dtype
        truth = exact(tensors)
        assert_errs_at_most_twice(ours, plain, truth)
        if parameters == "float32":  # what is summed is not rounded
            torch.testing.assert_close(ours["bias"].double(), truth["bias"], rtol=1e-5, atol=1e-5)

    def test_the_sum_is_not_rounded_before_gelu(self) -> None:
        """Where h + b takes more bits than bfloat16 has, y is still GELU's nearest bfloat16.

        Where u < -1 float32 does not tell: of 1 + erf few bits are left.
        """
        tensors = make(61, dtype=torch.bfloat16)
        for name in NAMES[1:]:
            tensors[name] = draw(37, seed=7)
        u = sum(tensor.detach().double() for tensor in tensors.values())
        nearest = F.gelu(u).bfloat16()[u > -1]
        assert torch.equal(run(tensors)[u > -1], nearest)
        assert (rounding(tensors)[u > -1] != nearest).float().mean() > 0.2

    @pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of numpy, in the interpreter
    def test_far_out(self) -> None:
        """GELU is 0 far below and h far above; its slope 0 and 1, never NaN."""
        h = torch.tensor([[-1e30, -40.0, -15.0, 15.0, 40.0, 1e30]], device=DEVICE).requires_grad_()
        zero = torch.zeros(6, device=DEVICE)
        y = run({"h": h, "bias": zero})
        (dh,) = torch.autograd.grad(y.sum(), h)
        assert torch.equal(y, h.clamp(min=0))
        assert torch.equal(dh, (h > 0).float())

    @pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (3, 7)], ids=str)
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        tensors = make(*shape)
        mine = with_gradients(run(tensors), tensors)
        for name, expected in exact(tensors).items():
            torch.testing.assert_close(mine[name].double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.usefixtures("programs")
    def test_what_is_not_contiguous(self) -> None:
        """An h transposed or cut from wider rows, a strided b, dy of each kind."""
        straight = make(41)
        wide = torch.cat([draw(41, 7), straight["h"].detach(), draw(41, 3)], dim=1)
        strided = straight["bias"].detach().repeat_interleave(2)[::2].requires_grad_()
        expected = None
        for h in (straight["h"], wide[:, 7:44], straight["h"].detach().t().contiguous().t()):
            tensors = {**straight, "h": h.detach().requires_grad_(), "bias": strided}
            y = run(tensors)
            found = [y]
            dys = (torch.ones(1, 1, device=DEVICE).expand_as(y), draw(37, 41).t(), draw(41, 40))
            for dy in dys:
                dy = dy[:, :37] if expected else dy[:, :37].contiguous()
                found += torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=True)
            expected = expected or found
            assert all(map(torch.equal, found, expected))
        torch.testing.assert_close(expected[0], plain(straight))

    @pytest.mark.usefixtures("programs")
    def test_runs_repeat_bit_for_bit(self) -> None:
        tensors = make(73)
        first, second = (with_gradients(run(tensors), tensors) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


class TestOnlyWhatIsAskedFor:
    """Oracle: the list of what requires a gradient, and the arguments of the launches."""

    def test_every_subset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from spafit.kernels.gpu import triton_gelu

        backward = Watched(triton_gelu._backward_kernel)
        monkeypatch.setattr(triton_gelu, "_backward_kernel", backward)
        tensors = make(7)
        whole = with_gradients(run(tensors), tensors)
        for wanted in itertools.product([False, True], repeat=3):
            backward.launches.clear()
            for name, needed in zip(NAMES, wanted, strict=True):
                tensors[name].requires_grad_(needed)
            y = run(tensors)
            assert torch.equal(y, whole["y"])
            assert y.requires_grad == any(wanted)
            if not any(wanted):
                continue
            for name, gradient in with_gradients(y, tensors).items():
                assert torch.equal(gradient, whole[name]), name
            (launch,) = backward.launches
            h, bias, delta = wanted
            assert tuple(each is not None for each in launch[4:6]) == (h, bias or delta)

    def test_there_are_few_programs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from spafit.kernels.gpu import triton_gelu

        monkeypatch.setattr(triton_gelu, "_PROGRAMS", 6)
        found = [Watched(triton_gelu._forward_kernel), Watched(triton_gelu._backward_kernel)]
        monkeypatch.setattr(triton_gelu, "_forward_kernel", found[0])
        monkeypatch.setattr(triton_gelu, "_backward_kernel", found[1])
        run(make(73, columns=300)).sum().backward()
        assert [each.grids for each in found] == [[(2, 3)], [(2, 3)]]

    def test_no_gradient_lies_in_the_memory_of_another(self) -> None:
        tensors = make(7)
        gradients = with_gradients(run(tensors), tensors)
        assert len({each.untyped_storage().data_ptr() for each in gradients.values()}) == 4


class TestChoice:
    """Oracle: what the documentation says of ``auto``."""

    def test_auto_is_triton_where_a_gpu_has_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def choice(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> bool:
            h = torch.empty(3, 37, dtype=dtype, device=device)
            return forms.suits_triton(h, torch.empty(37, device=device), None)

        with FakeTensorMode():
            for reason in ("", "too old"):
                monkeypatch.setattr(forms, "_why_not_on", lambda device, reason=reason: reason)
                assert choice() == (not reason)
                assert not choice(torch.float64)
                assert not choice(device="cpu")
            monkeypatch.setattr(forms, "_why_not_on", lambda device: "")
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert not choice()


COMPILED = [
    # Capability, type and rows: few of a program each, and several.
    (80, torch.bfloat16, 180),
    (90, torch.bfloat16, 1000),
    (80, torch.float32, 1000),
]


def compile_some(cases: Iterable[tuple[Any, ...]] = COMPILED) -> None:
    """Compile every kernel that is launched at the size of BERT-large."""
    columns = 4096
    for capability, dtype, N in cases:
        with compiling_for(capability) as kernels:
            bias, delta = torch.zeros(2, columns)
            for trained in (bias.requires_grad_(), bias.detach()):
                h = torch.zeros(N, columns, dtype=dtype, requires_grad=True)
                y = run({"h": h, "bias": trained, "bias_delta": delta})
                y.backward(torch.zeros_like(y))
        names = [kernel.name for kernel in kernels]
        assert names == ["_forward_kernel", "_backward_kernel", "_backward_kernel"]
        for kernel in kernels:
            assert kernel.spilled_bytes == 0, kernel
            assert kernel.registers <= 72, kernel  # seven programs a multiprocessor
            assert kernel.shared_bytes <= 16 * 1024, kernel
            assert "v4.b32" in kernel.ptx  # 16 bytes a thread and access


def compile_all() -> None:
    """Compile all of it for both cards."""
    compile_some([(card, *sizes) for card in (80, 90) for _, *sizes in COMPILED])
