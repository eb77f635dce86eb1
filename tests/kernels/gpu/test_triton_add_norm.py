"""Dropout, residual and LayerNorm as one Triton kernel each way."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from support.tensors import kept_for_backward
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spafit.errors import ConfigError
from spafit.kernels import add_norm, dropout_add_norm, forms

EPS = 1e-5
NAMES = ("x", "residual", "weight", "bias", "bias_delta")


def make(
    *shape: int, D: int = 20, delta: bool = True, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Draw x, residual, γ, β and δ, all asking for gradients."""
    found = {
        "x": draw(*shape, D, seed=1),
        "residual": draw(*shape, D, seed=2),
        "weight": 1 + 0.3 * draw(D, seed=3),
        "bias": draw(D, seed=4),
        "bias_delta": draw(D, seed=5),
    }
    if not delta:
        del found["bias_delta"]
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in found.items()}


def run(tensors: Tensors, rate: float = 0.0, impl: str = "triton") -> torch.Tensor:
    return dropout_add_norm(
        tensors["x"],
        tensors["residual"],
        tensors["weight"],
        tensors["bias"],
        EPS,
        bias_delta=tensors.get("bias_delta"),
        dropout=rate,
        impl=impl,
    )


def equation(tensors: Tensors, mask: torch.Tensor | None = None, rate: float = 0.0) -> torch.Tensor:
    """Write it out, mean and variance by hand."""
    x, residual, weight, bias = (tensors[name] for name in NAMES[:4])
    z = residual + (x if mask is None else x * mask / (1 - rate))
    centred = z - z.mean(-1, keepdim=True)
    x_hat = centred / ((centred**2).mean(-1, keepdim=True) + EPS).sqrt()
    y = weight * x_hat + bias
    return y + tensors["bias_delta"] if "bias_delta" in tensors else y


def exact(tensors: Tensors, mask: torch.Tensor | None = None, rate: float = 0.0) -> Tensors:
    """Return y and the gradients in float64, none of them rounded."""
    wide = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    return with_gradients(equation(wide, mask, rate), wide)


def drawn_mask(N: int, D: int, rate: float, seed: int = 3) -> torch.Tensor:
    """Return the mask that the forward kernel draws after ``manual_seed(seed)``: z is not 0."""
    from spafit.kernels.gpu.triton_add_norm import add_norm_forward, draw_seed

    torch.manual_seed(seed)
    ones, zeros = torch.ones(N, D, device=DEVICE), torch.zeros(N, D, device=DEVICE)
    _, z, _, _ = add_norm_forward(
        ones, zeros, ones[0], zeros[0], None, draw_seed(ones.device), EPS, rate, ones.dtype, True
    )
    assert torch.equal(z.unique().cpu(), torch.tensor([0.0, 1 / (1 - rate)]))
    return z != 0


@pytest.fixture(params=[512, 3], ids=lambda count: f"at most {count} programs")
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let backward take one tile a program, or several."""
    from spafit.kernels.gpu import triton_add_norm

    monkeypatch.setattr(triton_add_norm, "_PROGRAMS", request.param)
    return request.param


class TestIsTheEquation:
    """Oracle: the equation in float64; the plain form's error in float32 sets the tolerance."""

    @pytest.mark.usefixtures("programs")
    @pytest.mark.parametrize("D", [1, 20, 200, 600], ids=lambda D: f"D={D}")
    @pytest.mark.parametrize(
        ("offset", "delta"),
        [
            pytest.param(0.0, True, id="centred"),
            pytest.param(300.0, False, id="far from 0"),
            pytest.param(0.0, False, id="centred, no delta", marks=pytest.mark.full),
            pytest.param(300.0, True, id="far from 0, delta", marks=pytest.mark.full),
        ],
    )
    def test_output_and_gradients(self, delta: bool, offset: float, D: int) -> None:
        tensors = make(3, 29 if D <= 200 else 3, D=D, delta=delta)
        with torch.no_grad():
            tensors["residual"] += offset
        ours, plain = (
            with_gradients(run(tensors, impl=impl), tensors) for impl in ("triton", "reference")
        )
        assert ours["y"].dtype == torch.float32
        assert_errs_at_most_twice(ours, plain, exact(tensors))

    @pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (3, 7)], ids=str)
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        tensors = make(*shape)
        mine = with_gradients(run(tensors), tensors)
        for name, expected in exact(tensors).items():
            torch.testing.assert_close(mine[name].double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.usefixtures("programs")
    def test_what_is_not_contiguous(self) -> None:
        """A transposed x, a residual cut from wider rows, a strided γ, dy of each kind."""
        straight = make(41)
        crooked = dict(straight)
        crooked["x"] = straight["x"].detach().t().contiguous().t().requires_grad_()
        wide = torch.cat([draw(41, 7), straight["residual"].detach(), draw(41, 3)], dim=1)
        crooked["residual"] = wide[:, 7:27].requires_grad_()
        crooked["weight"] = straight["weight"].detach().repeat_interleave(2)[::2].requires_grad_()
        results = []
        for tensors in (crooked, straight):
            y = run(tensors)
            found = [y]
            dys = (torch.ones(1, 1, device=DEVICE).expand_as(y), draw(20, 41).t(), draw(41, 23))
            for dy in dys:
                dy = dy[:, :20] if tensors is crooked else dy[:, :20].contiguous()
                found += torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=True)
            results.append(found)
        assert all(map(torch.equal, *results))

    def test_runs_repeat_bit_for_bit(self) -> None:
        tensors = make(73)
        first, second = (with_gradients(run(tensors), tensors) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


class TestLowPrecision:
    """Oracle: the equation in float64; the error is at most twice the plain form's."""

    @pytest.mark.parametrize(
        ("delta", "dtype"),
        [
            (True, torch.bfloat16),
            (False, torch.float16),
            pytest.param(True, torch.float16, marks=pytest.mark.full),
            pytest.param(False, torch.bfloat16, marks=pytest.mark.full),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("how", ["pure", "autocast", "autocast, low x", "autocast, low both"])
    def test_errs_at_most_twice_as_much(self, delta: bool, how: str, dtype: torch.dtype) -> None:
        tensors = make(203, delta=delta, dtype=dtype if how == "pure" else torch.float32)
        lowered = {"autocast, low x": ["x"], "autocast, low both": ["x", "residual"]}
        for name in lowered.get(how, []):
            tensors[name] = tensors[name].detach().to(dtype).requires_grad_()
        results = []
        for impl in ("triton", "reference"):
            with torch.autocast(DEVICE, dtype, enabled=how != "pure"):
                y = run(tensors, impl=impl)
            results.append(with_gradients(y, tensors))
        ours, plain = results
        assert ours["y"].dtype == (dtype if how == "pure" else torch.float32)
        assert all(ours[name].dtype == tensor.dtype for name, tensor in tensors.items())
        assert_errs_at_most_twice(ours, plain, exact(tensors))

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
    def test_types_without_autocast(self, half: torch.dtype) -> None:
        for x_type, residual_type in itertools.product([half, torch.float32], repeat=2):
            tensors = make(5)
            for name, dtype in (("x", x_type), ("residual", residual_type)):
                tensors[name] = tensors[name].detach().to(dtype).requires_grad_()
            y = run(tensors)
            assert y.dtype == torch.promote_types(x_type, residual_type)
            gradients = with_gradients(y, tensors)
            assert all(gradients[name].dtype == tensor.dtype for name, tensor in tensors.items())

    def test_nothing_is_cast_on_the_way_to_the_kernel(self) -> None:
        tensors = make(5)
        tensors["x"] = tensors["x"].detach().bfloat16().requires_grad_()
        called: list[str] = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                called.append(func.overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        with torch.autocast(DEVICE, torch.bfloat16), Watch():
            run(tensors, 0.1)
        assert "random_" in called
        assert "_to_copy" not in called


class TestDropout:
    """Oracle: the equation with the mask that the kernel drew, and the binomial distribution."""

    @pytest.mark.usefixtures("programs")
    @pytest.mark.parametrize(
        ("N", "D", "dtype"),
        [
            (73, 20, torch.float32),
            (7, 600, torch.bfloat16),
            pytest.param(73, 20, torch.bfloat16, marks=pytest.mark.full),
            pytest.param(7, 600, torch.float32, marks=pytest.mark.full),
        ],
        ids=str,
    )
    def test_output_and_gradients(self, dtype: torch.dtype, N: int, D: int) -> None:
        rate = 0.3
        tensors = make(N, D=D)
        tensors["x"] = tensors["x"].detach().to(dtype).requires_grad_()
        mask = drawn_mask(N, D, rate)
        torch.manual_seed(3)
        mine = with_gradients(run(tensors, rate), tensors)
        assert torch.equal(mine["x"] != 0, mask)
        for name, expected in exact(tensors, mask, rate).items():
            # x's gradient is rounded once, to its type.
            tolerance = 2**-8 if name == "x" and dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(mine[name].double(), expected, rtol=tolerance, atol=1e-5)

    @pytest.mark.parametrize("rate", [0.1, pytest.param(0.5, marks=pytest.mark.full)])
    def test_rate_and_independence(self, rate: float) -> None:
        """Of an element of its neighbours in both directions, and of another seed's mask."""
        N, D = 67, 150
        mask = drawn_mask(N, D, rate).double() - (1 - rate)
        other = drawn_mask(N, D, rate, seed=4).double() - (1 - rate)
        variance = rate * (1 - rate)
        assert abs(mask.mean()) < 4 * (variance / mask.numel()) ** 0.5
        pairs = [(mask[:, k:], mask[:, :-k]) for k in (1, 2, 3, 4)]
        pairs += [(mask[1:], mask[:-1]), (mask[1:, :2], mask[:-1, -2:]), (mask, other)]
        for a, b in pairs:
            assert abs((a * b).mean()) < 4 * variance / a.numel() ** 0.5

    def test_an_elements_draw_depends_on_its_place_alone(self) -> None:
        """Not on how many rows there are, nor on how many are drawn at once: 16, or one of 600."""
        assert torch.equal(drawn_mask(33, 20, 0.3)[:20], drawn_mask(20, 20, 0.3))
        # Rows of a multiple of 4 lie in the draws without gaps.
        whole = drawn_mask(1, 600, 0.3).flatten()
        assert torch.equal(drawn_mask(30, 20, 0.3).flatten(), whole)

    def test_the_generator_decides(self) -> None:
        tensors = make(31)
        results = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            results.append(run(tensors, 0.3))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])
        assert not torch.equal(run(tensors, 0.3), run(tensors, 0.3))

    def test_checkpointing_repeats_the_draw(self) -> None:
        tensors = make(31)
        found = []
        for call in (run, lambda *given: checkpoint(run, *given, use_reentrant=False)):
            torch.manual_seed(3)
            found.append(with_gradients(call(tensors, 0.3), tensors))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    def test_backward_twice(self) -> None:
        tensors = make(7)
        y = run(tensors, 0.3)
        first = torch.autograd.grad(y.square().sum(), list(tensors.values()), retain_graph=True)
        second = torch.autograd.grad(y.square().sum(), list(tensors.values()))
        assert all(map(torch.equal, first, second))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Watched]]:
    """Watch the forward and the backward kernel."""
    from spafit.kernels.gpu import triton_add_norm

    found = {}
    for name in ("forward", "backward"):
        found[name] = Watched(getattr(triton_add_norm, f"_{name}_kernel"))
        monkeypatch.setattr(triton_add_norm, f"_{name}_kernel", found[name])
    return found


class TestOnlyWhatIsAskedFor:
    """Oracle: the list of what requires a gradient, and the arguments of the launches."""

    @pytest.mark.parametrize("rate", [0.0, 0.3])
    def test_every_subset(self, kernels: dict[str, Watched], rate: float) -> None:
        tensors = make(7)
        torch.manual_seed(3)
        whole = with_gradients(run(tensors, rate), tensors)
        for wanted in itertools.product([False, True], repeat=5):
            for watched in kernels.values():
                watched.launches.clear()
            for name, needed in zip(NAMES, wanted, strict=True):
                tensors[name].requires_grad_(needed)
            torch.manual_seed(3)
            y = run(tensors, rate)
            assert torch.equal(y, whole["y"])
            assert y.requires_grad == any(wanted)
            x, residual, weight, bias, delta = wanted
            (forward,) = kernels["forward"].launches
            assert (forward[7] is not None) == (x or residual or weight)  # z
            if not any(wanted):
                continue
            for name, gradient in with_gradients(y, tensors).items():
                assert torch.equal(gradient, whole[name]), name
            (backward,) = kernels["backward"].launches
            written = (x, residual, weight, bias or delta)
            assert tuple(each is not None for each in backward[6:10]) == written

    def test_sums_are_of_few_programs(
        self, kernels: dict[str, Watched], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where nothing is summed each tile has a program of its own."""
        from spafit.kernels.gpu import triton_add_norm

        monkeypatch.setattr(triton_add_norm, "_PROGRAMS", 3)
        tensors = make(73)
        run(tensors).sum().backward()
        run({**tensors, **{name: tensors[name].detach() for name in NAMES[2:]}}).sum().backward()
        assert kernels["backward"].grids == [(3,), (5,)]

    def test_nothing_is_kept_without_gradients(self, kernels: dict[str, Watched]) -> None:
        with torch.no_grad():
            run(make(7), 0.3)
        (forward,) = kernels["forward"].launches
        assert forward[7] is None

    @pytest.mark.parametrize("rate", [0.0, 0.1])
    def test_keeps_z_two_numbers_a_token_and_the_seed(self, rate: float) -> None:
        tensors = make(3, 7)
        with kept_for_backward(tensors.values()) as sizes:
            y = run(tensors, rate)
        assert y.shape == (3, 7, 20)
        assert sum(sizes.values()) == 21 * (4 * 20 + 8) + (8 if rate else 0)

    @pytest.mark.parametrize("rate", [0.0, 0.3])
    def test_no_gradient_lies_in_the_memory_of_another(self, rate: float) -> None:
        """Though x and the residual have the same gradient at rate 0, and b and δ always."""
        tensors = make(3, 7)
        gradients = with_gradients(run(tensors, rate), tensors)
        assert len({each.untyped_storage().data_ptr() for each in gradients.values()}) == 6


class TestChoice:
    """Oracle: what the documentation says of ``impl``."""

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match=r"found torch.float64"):
            run(make(7, dtype=torch.float64))
        with pytest.raises(ConfigError, match=r"\(7, 20\), \(20,\)"):
            run({**make(7), "residual": draw(20)})
        with pytest.raises(ConfigError, match=r"\(1,\)"):
            run({**make(7), "bias": draw(1)})
        with pytest.raises(ConfigError, match=r"rows of at most 4096, found 4097"):
            run(make(1, D=4097))
        tensors = make(7)
        with pytest.raises(ConfigError, match="differentiated twice"):
            torch.autograd.grad(run(tensors).sum(), tensors["x"], create_graph=True)

    def test_auto_is_triton_where_a_gpu_has_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def choice(D: int = 20, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> str:
            x = torch.empty(3, D, dtype=dtype, device=device)
            weight = torch.empty(D, dtype=dtype, device=device)
            chosen: list[str] = []
            with monkeypatch.context() as patch:
                patch.setattr(
                    add_norm, "choose_form", lambda *given: chosen.append(given[-1]) or "reference"
                )
                add_norm.dropout_add_norm(x, x, weight, weight, 1e-12)
            return chosen[0]

        with FakeTensorMode():
            for reason in ("", "too old"):
                monkeypatch.setattr(forms, "_why_not_on", lambda device, reason=reason: reason)
                assert choice() == ("reference" if reason else "triton")
                assert choice(dtype=torch.float64) == choice(D=5000) == "reference"
                assert choice(device="cpu") == "fused"
            monkeypatch.setattr(forms, "_why_not_on", lambda device: "")
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert choice() == "reference"


COMPILED = [(90, torch.bfloat16), (80, torch.float32)]
"""Capability and type of x."""


def compile_some(cases: Iterable[tuple[Any, ...]] = COMPILED) -> None:
    """Compile every kernel that is launched at the size of BERT-large."""
    N, D = 1000, 1024
    for capability, x_type in cases:
        with compiling_for(capability) as kernels:
            x = torch.zeros(N, D, dtype=x_type, requires_grad=True)
            residual, y_like = torch.zeros(2, N, D)
            weight, bias, delta = torch.zeros(3, D, requires_grad=True)
            for trained in (weight, weight.detach()):
                y = dropout_add_norm(x, residual, trained, bias, EPS, delta, 0.1, "triton")
                y.backward(y_like)
        names = [kernel.name for kernel in kernels]
        assert names == ["_forward_kernel", "_backward_kernel", "_backward_kernel"]
        for kernel in kernels:
            assert kernel.spilled_bytes == 0, kernel
            assert kernel.registers <= 64, kernel  # four programs a multiprocessor
            assert kernel.shared_bytes <= 24 * 1024, kernel
            assert "v4.b32" in kernel.ptx  # 16 bytes a thread and access


def compile_all() -> None:
    """Compile all of it for both cards."""
    compile_some([(card, x_type) for card in (80, 90) for _, x_type in COMPILED])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_captured_graph_draws_anew_at_each_replay():
    """Oracle: two replays differ, and each is the equation with a mask of the right rate."""
    tensors = {name: tensor.detach() for name, tensor in make(53).items()}
    run(tensors, 0.3)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(tensors, 0.3)
    found = []
    for _ in range(2):
        graph.replay()
        found.append(y.clone())
    assert not torch.equal(*found)
    assert all(each.isfinite().all() for each in found)
