"""The Triton form of linear maps with LoRA, in the interpreter where there is no GPU.

What the interpreter cannot show: tf32, which rounds float32 products on a GPU where PyTorch's
setting allows it, and speed. That the kernels compile for GPUs is shown by compiling them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support.linear_maps import (
    DEVICE,
    HALF,
    IN,
    OUT,
    Launches,
    N,
    assert_errs_at_most_twice_as_much,
    draw,
    in_float64,
    make_parts,
    results,
)
from support.triton_compiler import compiling_for

from spafit.errors import ConfigError
from spafit.kernels import Part, forms, stacked_linear
from spafit.kernels.gpu import triton_linear
from spafit.kernels.parts import Kept

# Of rank, number of maps and type: each rank with both numbers or two types of different width. A
# rank of 80 takes two tiles, the second of them not full.
PAIRS = [
    (4, 1, torch.bfloat16),
    (4, 3, torch.float32),
    (16, 3, torch.bfloat16),
    (60, 1, torch.float32),
    (60, 3, torch.float16),
    (80, 1, torch.float32),
    (80, 3, torch.bfloat16),
    (256, 1, torch.bfloat16),
]


class TestIsTheEquation:
    """Oracle: the reference in float64; the error is at most twice the plain form's."""

    @staticmethod
    def hold(x: torch.Tensor, parts: list[Part], gelu: bool = False) -> None:
        exact = x.detach().double().requires_grad_()
        assert_errs_at_most_twice_as_much(
            results(x, parts, "triton", gelu),
            results(x, parts, "reference", gelu),
            results(exact, in_float64(parts), "reference", gelu),
        )

    @pytest.mark.parametrize(
        ("r", "count", "dtype"),
        [
            pytest.param(*case, marks=() if case in PAIRS else pytest.mark.full, id=str(case))
            for case in itertools.product([4, 16, 60, 80, 256], [1, 3], [torch.float32, *HALF])
        ],
    )
    def test_outputs_and_gradients(self, r: int, count: int, dtype: torch.dtype) -> None:
        deltas = (True, False, True) if r < 50 else (False, False, False)
        x = draw(N, IN, seed=1, dtype=dtype).requires_grad_()
        self.hold(x, make_parts([r] * count, dtype, deltas))

    @pytest.mark.parametrize("given", [False, True], ids=["beside", "given"])
    @pytest.mark.parametrize("rate", [0.0, 0.3])
    def test_u_and_v_beside_the_product_or_before_it(
        self, monkeypatch: pytest.MonkeyPatch, given: bool, rate: float
    ) -> None:
        """With dropout U is always made before, for its mask is costly to draw."""
        if given:
            monkeypatch.setattr(triton_linear, "_LAUNCH", 0)
        launches = Launches(monkeypatch, "_narrow", "_forward", "_dx", "_gradients")
        n = 5 if rate else N
        x = draw(n, IN, seed=1, dtype=torch.bfloat16).requires_grad_()
        parts = make_parts([20] * 2, torch.bfloat16, dropout=rate)
        torch.manual_seed(3)
        ours = results(x, parts)
        counts = {name: len(grids) for name, grids in launches.grids.items()}
        narrow = 2 * given if not rate else 1 + given
        assert counts == {"_narrow": narrow, "_forward": 1, "_dx": 1, "_gradients": 1}
        monkeypatch.undo()
        if rate:
            torch.manual_seed(3)
            theirs = results(x, parts)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            return
        exact = results(x.detach().double().requires_grad_(), in_float64(parts), "reference")
        assert_errs_at_most_twice_as_much(ours, results(x, parts, "reference"), exact)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rows_are_summed_in_several_parts(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        n, count = (203, 2) if dtype == torch.float32 else (530, 1)
        x = draw(n, 11, seed=1, dtype=dtype).requires_grad_()
        launches = Launches(monkeypatch, "_gradients")
        self.hold(x, make_parts([5] * count, dtype, width=11, out=13))
        (grid,) = launches.grids["_gradients"]
        assert grid[1] > 1

    def test_large_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The tiles that a model's sizes get; here they are barely filled."""
        monkeypatch.setattr(triton_linear, "PROGRAMS", 1)
        self.hold(
            draw(130, 67, seed=1, dtype=torch.bfloat16).requires_grad_(),
            make_parts([20] * 2, torch.bfloat16, width=67, out=131),
        )

    def test_gelu(self) -> None:
        x = draw(N, IN, seed=1).requires_grad_()
        self.hold(x, make_parts([8]), gelu=True)

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_under_autocast_float32_tensors_are_cast_on_loading(self, dtype: torch.dtype) -> None:
        x, parts = draw(N, IN, seed=1).requires_grad_(), make_parts([16] * 2)
        found = []
        for impl in ("triton", "reference"):
            with torch.autocast(DEVICE, dtype=dtype):
                found.append(results(x, parts, impl))
        assert found[0]["y"].dtype == dtype
        exact = results(x.detach().double().requires_grad_(), in_float64(parts), "reference")
        assert_errs_at_most_twice_as_much(*found, exact)

    def test_frozen_weights_in_half_precision_under_float32_lora(self) -> None:
        x = draw(N, IN, seed=1, dtype=torch.bfloat16).requires_grad_()
        parts = [
            part._replace(
                weight=part.weight.detach().bfloat16().requires_grad_(),
                bias=part.bias.detach().bfloat16().requires_grad_(),
            )
            for part in make_parts([16] * 2)
        ]
        ours, theirs = results(x, parts), results(x, parts, "fused")
        exact = results(x.detach().double().requires_grad_(), in_float64(parts), "reference")
        assert_errs_at_most_twice_as_much(ours, theirs, exact)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_fused_form_agrees(self, dtype: torch.dtype) -> None:
        x = draw(N, IN, seed=1, dtype=dtype).requires_grad_()
        parts = make_parts([9] * 2, dtype)
        ours, theirs = results(x, parts), results(x, parts, "fused")
        for name, tensor in theirs.items():
            tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * float(tensor.abs().max())
            assert float((ours[name] - tensor).abs().max()) <= tolerance, name


class TestStacks:
    """Oracle: the same parts applied one by one, and the fused form for those without LoRA."""

    def test_parts_that_differ_are_launched_one_by_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = draw(N, IN, seed=1).requires_grad_()
        for ranks, expected in [((4, 0, 4), 2), ((4, 9, 4), 3), ((0, 0, 0), 0), ((6, 6, 6), 1)]:
            parts = make_parts(ranks)
            with monkeypatch.context() as patch:
                launches = Launches(patch, "_forward")
                y = stacked_linear(x, parts, impl="triton").detach()
            assert len(launches.grids["_forward"]) == expected
            plain = stacked_linear(x, parts, impl="reference").detach()
            assert float((y - plain).abs().max()) < 1e-5 * float(plain.abs().max())
            for i, part in enumerate(parts):
                if part.lora_A is None:
                    alone = stacked_linear(x, [part], impl="fused")
                    mine = y[:, i * OUT : (i + 1) * OUT]
                    assert torch.allclose(mine, alone, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("change", ["scaling", "dropout", "type of A", "type of delta"])
    def test_two_parts_of_one_shape_that_differ_otherwise(
        self, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        one, two = make_parts([4, 4], deltas=(True, True))
        changed = {
            "scaling": {"scaling": 0.3},
            "dropout": {"dropout": 0.4},
            "type of A": {"lora_A": two.A.detach().half()},
            "type of delta": {"bias_delta": two.bias.detach().half()},
        }[change]
        parts, x = [one, two._replace(**changed)], draw(N, IN, seed=1)
        launches = Launches(monkeypatch, "_forward")
        with torch.no_grad():
            torch.manual_seed(5)
            y = stacked_linear(x, parts, impl="triton")
            assert len(launches.grids["_forward"]) == 2
            torch.manual_seed(5)
            alone = [stacked_linear(x, [part], impl="triton") for part in parts]
        assert torch.equal(y, torch.cat(alone, -1))

    def test_a_stack_gives_the_bits_of_its_parts(self) -> None:
        x = draw(N, IN, seed=1, dtype=torch.bfloat16)
        parts = make_parts([5] * 3, torch.bfloat16)
        with torch.no_grad():
            y = stacked_linear(x, parts, impl="triton")
            alone = [stacked_linear(x, [part], impl="triton") for part in parts]
        assert torch.equal(y, torch.cat(alone, -1))


class TestInputs:
    """Oracle: the reference form in float32."""

    @pytest.mark.parametrize(
        "shape", [(), (1,), (0,), (2, 3), (0, 4), (2, 1, 5)], ids=str
    )  # fmt: skip
    @pytest.mark.parametrize("count", [1, 2])
    def test_shapes(self, shape: tuple[int, ...], count: int) -> None:
        x = draw(*shape, 7, seed=1).requires_grad_()
        parts = make_parts([3] * count, width=7, out=6)
        ours, plain = results(x, parts), results(x, parts, "reference")
        for name, tensor in plain.items():
            assert ours[name].shape == tensor.shape, name
            assert torch.allclose(ours[name], tensor, rtol=1e-5, atol=1e-5), name

    def test_tensors_that_are_not_contiguous(self) -> None:
        x = draw(7, 9, seed=1).t().requires_grad_()  # (9, 7)
        parts = make_parts([3], width=7, out=6)
        turned = [
            Part(*(None if t is None else t.t().contiguous().t() for t in p[:5]), *p[5:])
            for p in parts
        ]
        found = []
        for impl in ("triton", "reference"):
            y = stacked_linear(x, turned, impl=impl)
            pull = torch.ones(1, 1, device=DEVICE).expand_as(y)  # strides 0
            found.append([y, *torch.autograd.grad(y, [x, parts[0].A, parts[0].B], pull)])
        for mine, theirs in zip(*found, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_nothing_beyond_the_tensors_is_read(self, dtype: torch.dtype) -> None:
        """All of them lie amid values that are not numbers, which a product would spread."""

        def amid(tensor: torch.Tensor) -> torch.Tensor:
            room = tensor.new_full((tensor.numel() + 4096,), torch.nan)
            middle = room[2048:-2048].view(tensor.shape)
            return middle.copy_(tensor)

        with torch.no_grad():
            x = amid(draw(N, IN, seed=1, dtype=dtype))
            given = make_parts([20], dtype)[0]
            part = Part(*(amid(tensor) for tensor in given[:5]), 1.7, 0.2)
            y, kept = triton_linear.forward(x, [part], False, True)
            kept = Kept(amid(kept.U), seed=kept.seed)
            dY = amid(draw(N, OUT, seed=2, dtype=dtype))
            needs = [[False], [True], [True], [True], [True]]
            dx, gradients = triton_linear.backward(dY, x, [part], kept, True, needs)
        for tensor in (y, dx, *(field[0] for field in gradients[1:])):
            assert bool(torch.isfinite(tensor).all())


class TestRefusals:
    """Oracle: the errors that the documentation names."""

    def test_float64(self) -> None:
        narrow, wide = torch.float32, torch.float64
        for of_x, of_parts in ((wide, wide), (wide, narrow), (narrow, wide)):
            x, parts = draw(N, IN, seed=1, dtype=of_x), make_parts([4], of_parts)
            with pytest.raises(ConfigError, match=r"impl='triton'.*float64"):
                stacked_linear(x, parts, impl="triton")

    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forms, "why_no_triton", lambda device, dtype: "it is Sunday")
        x = draw(N, IN, seed=1)
        for ranks in ([4], [0]):
            with pytest.raises(ConfigError, match="it is Sunday"):
                stacked_linear(x, make_parts(ranks), impl="triton")

    def test_a_second_derivative(self) -> None:
        x = draw(5, 7, seed=1).requires_grad_()
        y = stacked_linear(x, make_parts([3], width=7, out=6), impl="triton")
        with pytest.raises(ConfigError, match="differentiated twice"):
            torch.autograd.grad(y.sum(), x, create_graph=True)

    def test_torch_compile_takes_the_fused_operator(self) -> None:
        """With dropout that is one operation a part."""
        x, parts = draw(5, 7, seed=1), make_parts([3, 3], width=7, out=6, dropout=0.4)

        @torch.compile(backend="aot_eager", fullgraph=True)
        def apply(x: torch.Tensor) -> torch.Tensor:
            return stacked_linear(x, parts, impl="triton")

        found = []
        for form in (apply, lambda x: stacked_linear(x, parts, impl="fused")):
            torch.manual_seed(3)
            found.append(form(x))
        assert torch.equal(*found)


COMPILED = [
    # Capability, rows, rate of dropout and type of the LoRA matrices.
    (90, 180, 0.0, torch.float32),
    (80, 8192, 0.0, torch.float32),
    (90, 8192, 0.1, torch.bfloat16),
]


def compile_some(cases: Iterable[tuple[Any, ...]] = COMPILED) -> None:
    """Compile what a model's sizes launch; called in a process without the interpreter."""

    def launch(n: int, rate: float, lora: torch.dtype) -> None:
        half = {"dtype": torch.bfloat16}
        W, b = torch.empty(1024, 1024, **half), torch.empty(1024, **half)
        A, B = torch.empty(64, 1024, dtype=lora), torch.empty(1024, 64, dtype=lora)
        parts = [Part(W, b, b, A, B, 2.0, rate)] * 3
        x, dY = torch.empty(n, 1024, **half), torch.empty(n, 3072, **half)
        _, kept = triton_linear.forward(x, parts, False, True)
        needs = [[False] * 3, [False] * 3, [True] * 3, [True] * 3, [True] * 3]
        triton_linear.backward(dY, x, parts, kept, True, needs)

    found = set()
    for capability, *sizes in cases:
        with compiling_for(capability) as kernels:
            launch(*sizes)
        found |= {kernel.name for kernel in kernels}
        for kernel in kernels:
            assert kernel.spilled_bytes == 0, kernel
            assert kernel.shared_bytes <= (99 if capability == 80 else 227) * 1024, kernel
            assert "wgmma" in kernel.ptx or "mma.sync" in kernel.ptx, kernel.name
    assert found == {"_narrow", "_forward", "_dx", "_gradients"}


def compile_all() -> None:
    """Compile all of it for both cards."""
    compile_some([(card, *sizes) for card in (80, 90) for _, *sizes in COMPILED])
