"""Fused linear maps with low-rank updates, at random: numbers, gradients, memory, compilation."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import LOW_PRECISION, assert_near, kept_for_backward, laid_out_if
from torch import library as torch_library
from torch.utils.checkpoint import checkpoint

from spafit.errors import ConfigError
from spafit.kernels import Part, lora_linear, products, stacked_linear
from spafit.kernels.stacking import are_together

# The module, which the function of the same name hides as an attribute of the package.
KERNEL = sys.modules["spafit.kernels.lora_linear"]
PARTS = sys.modules["spafit.kernels.parts"]
FIELDS = ("weight", "bias", "bias_delta", "lora_A", "lora_B")
N, N_IN, OUTS = 13, 11, (6, 4, 7)
ORDERS = list(itertools.product([False, True], repeat=2))

Form = Callable[[torch.Tensor, list[Part]], torch.Tensor]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def lay(matrices: list[torch.Tensor], lying: str) -> list[torch.Tensor]:
    """Return matrices as pieces of one tall one, in their order or backwards."""
    if not matrices:
        return matrices
    ordered = matrices if lying == "together" else matrices[::-1]
    pieces = torch.split(torch.cat(ordered), [len(matrix) for matrix in ordered])
    return list(pieces if lying == "together" else pieces[::-1])


def make_parts(
    ranks: Sequence[int],
    deltas: Sequence[bool] = (True, False, True),
    scalings: Sequence[float] = (1.7, 0.3, 2.5),
    dropouts: Sequence[float] = (0.0, 0.0, 0.0),
    dtype: torch.dtype = torch.float64,
    lying: str = "apart",
) -> list[Part]:
    """Draw a part for each rank, 0 being none; all tensors ask for gradients.

    All W and all A lie in memory apart, together as the model lays them, or together but backwards.
    """
    count = len(ranks)
    outs = OUTS[:count]
    weights = [draw(out, N_IN, seed=10 + i, dtype=dtype) for i, out in enumerate(outs)]
    As = [draw(r, N_IN, seed=40 + i, dtype=dtype) if r else None for i, r in enumerate(ranks)]
    if lying != "apart":
        weights = lay(weights, lying)
        pieces = iter(lay([A for A in As if A is not None], lying))
        As = [None if A is None else next(pieces) for A in As]
    parts = []
    for i, r in enumerate(ranks):
        tensors = (
            weights[i],
            draw(outs[i], seed=20 + i, dtype=dtype),
            draw(outs[i], seed=30 + i, dtype=dtype) if deltas[i] else None,
            As[i],
            draw(outs[i], r, seed=50 + i, dtype=dtype) if r else None,
        )
        # detach, for a piece of a whole is a view of it and could not be trained
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        parts.append(Part(*leaves, scalings[i] / max(1, r), dropouts[i] if r else 0.0))
    return parts


def sources_of(x: torch.Tensor, parts: Sequence[Part]) -> dict[str, torch.Tensor]:
    """Name x and every tensor of the parts."""
    found = {"x": x}
    for i, part in enumerate(parts):
        for field in FIELDS:
            if getattr(part, field) is not None:
                found[f"{i} {field}"] = getattr(part, field)
    return found


def equation(
    x: torch.Tensor, parts: Sequence[Part], masks: dict[int, torch.Tensor], gelu: bool = False
) -> torch.Tensor:
    """Write it out in float64: each map by its merged matrix, or by masks where there is one."""
    x = x.double()
    outputs = []
    for i, part in enumerate(parts):
        y = torch.einsum("...i,oi->...o", x, part.weight.double()) + part.bias.double()
        if part.bias_delta is not None:
            y = y + part.bias_delta.double()
        if part.lora_A is not None and part.lora_B is not None:
            kept = x * masks[i] / (1 - part.dropout) if i in masks else x
            update = part.scaling * (part.lora_B.double() @ part.lora_A.double())
            y = y + torch.einsum("...i,oi->...o", kept, update)
        outputs.append(y)
    y = torch.cat(outputs, -1)
    return 0.5 * y * (1 + torch.erf(y / 2**0.5)) if gelu else y


def backwards(y: torch.Tensor, sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Return the gradients of Σ y ⊙ noise that ``backward`` leaves, None where it leaves none."""
    for tensor in sources.values():
        tensor.grad = None
    noise = draw(*y.shape, seed=7).to(y.dtype)
    (y * noise).sum().backward()
    found = {name: tensor.grad for name, tensor in sources.items()}
    for tensor in sources.values():
        tensor.grad = None
    return found


class Orders:
    """Forces the order of products, forward and backward."""

    def __init__(self, forward: bool, backward: bool) -> None:
        self.patch = pytest.MonkeyPatch()
        self.orders = forward, backward

    def __enter__(self) -> None:
        for name, merges in zip(("merges_forward", "merges_backward"), self.orders, strict=True):
            # Merging is for stacks without dropout that have an update at all, and for nothing
            # else.
            self.patch.setattr(
                KERNEL,
                name,
                lambda x, parts, merges=merges: (
                    merges and not parts[0].dropout and any(p.lora_A is not None for p in parts)
                ),
            )

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


class TestAnyStack:
    """Oracle: the equation in float64, each map written out by its merged matrix."""

    @settings(max_examples=250, deadline=None)
    @given(st.data())
    def test_values_and_exactly_the_gradients_asked_for(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, 3), "parts")
        ranks = data.draw(
            st.lists(st.sampled_from([0, 0, 1, 2, 3, 9, 256]), min_size=count, max_size=count),
            "ranks",
        )
        flags = st.lists(st.booleans(), min_size=count, max_size=count)
        parts = make_parts(
            ranks,
            data.draw(flags, "deltas"),
            lying=data.draw(st.sampled_from(["apart", "together", "backwards"])),
        )
        shape = data.draw(st.sampled_from([(), (0,), (1,), (13,), (2, 3), (0, 4), (2, 1, 5)]))
        x = draw(*shape, N_IN, seed=1)
        if len(shape) and data.draw(st.booleans(), "transposed"):
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        x = x.detach().requires_grad_()
        sources = sources_of(x, parts)
        for name, tensor in sources.items():
            tensor.requires_grad_(data.draw(st.booleans(), name))
        gelu = data.draw(st.booleans(), "gelu")
        with Orders(*data.draw(st.sampled_from(ORDERS), "merged")):
            y = stacked_linear(x, parts, gelu=gelu, impl="fused")
            expected = equation(x, parts, {}, gelu)
            assert_near(y, expected, 1e-12, "y")
            assert y.requires_grad == any(t.requires_grad for t in sources.values())
            if not y.requires_grad:
                return
            true, mine = backwards(expected, sources), backwards(y, sources)
        for name, gradient in true.items():
            assert (mine[name] is None) == (not sources[name].requires_grad), name
            if gradient is not None:
                assert_near(mine[name], gradient, 1e-12, name)

    @pytest.mark.parametrize("r", [1, 16, 64, 256])
    @pytest.mark.parametrize("orders", ORDERS, ids=str)
    def test_float32_errs_at_most_twice_as_much_as_the_plain_form(
        self, orders: tuple[bool, bool], r: int
    ) -> None:
        """At sizes like a model's: where r is far above in and out, no form errs by much."""
        n, n_in, out = 203, 240, 160
        x, W, b, delta, A, B = (
            draw(*shape, seed=i, dtype=torch.float32).requires_grad_()
            for i, shape in enumerate([(n, n_in), (out, n_in), (out,), (out,), (r, n_in), (out, r)])
        )
        parts = [Part(W, b, delta, A, B, 1.7 / r)]
        sources = sources_of(x, parts)
        exact = equation(x, parts, {}, gelu=True)
        true = {"y": exact, **backwards(exact, sources)}
        found = []
        for impl in ("fused", "reference"):
            with Orders(*orders):
                y = stacked_linear(x, parts, gelu=True, impl=impl)
                found.append({"y": y, **backwards(y, sources)})
        for name, gradient in true.items():
            error, allowed = (float((each[name] - gradient).detach().norm()) for each in found)
            assert error <= 2 * allowed, (name, error, allowed)

    def test_weights_that_lie_together_are_not_copied(self) -> None:
        addresses = []
        whole = PARTS.stacked

        def spy(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            found: torch.Tensor = whole(tensors)
            addresses.append((found.data_ptr() == tensors[0].data_ptr(), are_together(tensors)))
            return found

        for lying in ("together", "apart", "backwards"):
            together = lying == "together"
            parts = make_parts([3, 2, 5], lying=lying)
            addresses.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PARTS, "stacked", spy)
                with Orders(False, False):
                    x = draw(N, N_IN, seed=1).requires_grad_()
                    stacked_linear(x, parts).sum().backward()
            assert addresses == [(together, together)] * 4  # W and A, forward and backward


class TestOrders:
    """Oracle: multiplications counted by hand."""

    @pytest.mark.parametrize("ranks", [(3,), (3, 0, 5), (8, 8, 8)], ids=str)
    def test_the_cheaper_order_is_taken(self, ranks: tuple[int, ...]) -> None:
        parts = make_parts(ranks)
        outs = OUTS[: len(ranks)]
        R, rows = sum(ranks), sum(outs)
        BA = sum(out * r for out, r in zip(outs, ranks, strict=True))
        writing = N_IN * (BA + 16 * rows)  # W' = W + s·BA
        for n in (1, 5, 20, 50, 100, 200, 400, 1000, 100_000):
            x, dY = torch.empty(n, N_IN), torch.empty(n, rows)
            assert KERNEL.merges_forward(x, parts) == (writing < n * (R * N_IN + BA))
            assert KERNEL.merges_backward(dY, parts) == (writing < n * R * N_IN)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_never_in_half_precision(self, dtype: torch.dtype) -> None:
        many = torch.empty(1_000_000, N_IN, dtype=dtype)
        assert not KERNEL.merges_forward(many, make_parts([3]))
        assert not KERNEL.merges_backward(many, make_parts([3]))

    def test_never_with_dropout_nor_without_an_update(self) -> None:
        many = torch.empty(1_000_000, N_IN)
        for parts in (make_parts([3], dropouts=[0.1]), make_parts([0]), make_parts([0, 0, 0])):
            assert not KERNEL.merges_forward(many, parts)
            assert not KERNEL.merges_backward(many, parts)

    @pytest.mark.parametrize(
        ("wanted", "shapes"),
        [
            ({"x"}, ["dx"]),
            ({"bias", "bias_delta"}, []),
            ({"weight"}, ["dW"]),
            ({"lora_A"}, ["dA"]),
            ({"lora_B"}, ["dB"]),
            ({"lora_A", "lora_B", "bias_delta"}, ["dB", "dA"]),
            ({"x", "weight", "lora_A", "lora_B"}, ["dW", "dB", "dA", "dx"]),
        ],
        ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
    )
    @pytest.mark.parametrize("merged", [False, True])
    def test_no_product_that_is_not_asked_for(
        self, monkeypatch: pytest.MonkeyPatch, wanted: set[str], shapes: list[str], merged: bool
    ) -> None:
        r, out = 3, OUTS[0]
        kinds = {
            (N, out, N_IN): "dx",  # rows, inner, columns of a product
            (out, N, N_IN): "dW",
            (r, N, N_IN): "dA",
            (out, N, r): "dB",
            (N, N_IN, r): "U",
        }
        parts = make_parts([r])
        x = draw(N, N_IN, seed=1)
        for name, tensor in sources_of(x, parts).items():
            tensor.requires_grad_(name.split()[-1] in wanted)
        calls: list[str] = []
        product, up = KERNEL.product, KERNEL._up

        def counted(a: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
            calls.append(kinds[(a.shape[0], a.shape[1], W.shape[0])])
            result: torch.Tensor = product(a, W, b)
            return result

        def up_counted(dY: torch.Tensor, parts: list[Part]) -> torch.Tensor:
            calls.append("V")
            result: torch.Tensor = up(dY, parts)
            return result

        with Orders(merged, merged):
            y = stacked_linear(x, parts)
            for module in (KERNEL, products):
                monkeypatch.setattr(module, "product", counted)
            monkeypatch.setattr(KERNEL, "_up", up_counted)
            y.sum().backward()
        expected = list(shapes)
        if merged and "lora_B" in wanted:
            expected.append("U")
        if "lora_A" in wanted or ("x" in wanted and not merged):
            expected.append("V")
        assert sorted(calls) == sorted(expected)

    def test_in_a_stack_only_the_matrix_that_trains_gets_a_product(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parts = make_parts([0, 0, 0])
        x = draw(N, N_IN, seed=1)
        for name, tensor in sources_of(x, parts).items():
            tensor.requires_grad_(name == "1 weight")
        y = stacked_linear(x, parts)
        calls: list[tuple[int, ...]] = []
        product = KERNEL.product

        def counted(a: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
            calls.append((*a.shape, W.shape[0]))
            result: torch.Tensor = product(a, W, b)
            return result

        for module in (KERNEL, products):
            monkeypatch.setattr(module, "product", counted)
        y.sum().backward()
        assert calls == [(OUTS[1], N, N_IN)]


class TestKept:
    """Oracle: bytes of the tensors that autograd is given, the parts' own not counted."""

    @staticmethod
    def kept(x: torch.Tensor, parts: list[Part], gelu: bool = False) -> int:
        own = [tensor for tensor in sources_of(x, parts).values() if tensor is not x]
        with kept_for_backward(own) as sizes:
            stacked_linear(x, parts, gelu=gelu)
        return sum(sizes.values())

    # ranks, what trains beside x, GELU, dropout -> float32 numbers a row, additive and merged
    ROWS = (
        ([0], (), False, 0.0, 0, 0),
        ([0], ("bias_delta",), False, 0.0, 0, 0),
        ([0], ("bias", "bias_delta"), True, 0.0, 6, 6),
        ([0, 0, 0], ("bias_delta",), False, 0.0, 0, 0),
        ([0], ("weight",), False, 0.0, 11, 11),
        ([3], ("lora_A", "lora_B"), False, 0.0, 11 + 3, 11),
        ([3, 0, 5], ("lora_A", "lora_B", "bias_delta"), False, 0.0, 11 + 8, 11),
        ([3], ("lora_A", "lora_B"), True, 0.0, 11 + 3 + 6, 11 + 6),
        ([3], ("lora_A", "lora_B"), False, 0.5, 11 + 3 + 11 / 4, None),
        ([3], ("bias_delta",), False, 0.0, 3, 0),
    )

    @pytest.mark.parametrize(("ranks", "trained", "gelu", "rate", "additive", "merged"), ROWS)
    def test_is_x_and_u_at_most(
        self,
        ranks: list[int],
        trained: tuple[str, ...],
        gelu: bool,
        rate: float,
        additive: float,
        merged: float | None,
    ) -> None:
        parts = make_parts(ranks, dropouts=[rate] * 3, dtype=torch.float32)
        x = draw(N, N_IN, seed=1, dtype=torch.float32)
        for name, tensor in sources_of(x, parts).items():
            tensor.requires_grad_(name == "x" or name.split()[-1] in trained)
        with Orders(False, False):
            assert self.kept(x, parts, gelu) == 4 * N * additive
        if merged is not None:
            with Orders(True, True):
                assert self.kept(x, parts, gelu) == 4 * N * merged

    def test_without_a_gradient_nothing(self) -> None:
        parts = make_parts([3, 0, 2])
        x = draw(N, N_IN, seed=1)
        with torch.no_grad():
            assert self.kept(x, parts) == 0
        for tensor in sources_of(x, parts).values():
            tensor.requires_grad_(False)
        assert self.kept(x, parts) == 0

    @pytest.mark.parametrize("gelu", [False, True])
    @pytest.mark.parametrize("rows", [1, N])
    def test_no_gradient_lies_in_the_memory_of_another(self, rows: int, gelu: bool) -> None:
        """An in-place step on any one changes none of the others, nor what was given."""
        parts = make_parts([3, 0, 2], [True, True, True])
        x = draw(rows, N_IN, seed=1).requires_grad_()
        sources = sources_of(x, parts)
        for orders in ORDERS:
            with Orders(*orders):
                y = stacked_linear(x, parts, gelu=gelu)
                dY = draw(*y.shape, seed=2)
                gradients = torch.autograd.grad(y, list(sources.values()), dY)
            watched = [dY, y.detach(), *(t.detach() for t in sources.values()), *gradients]
            for i, gradient in enumerate(gradients):
                before = [tensor.clone() for tensor in watched]
                gradient.fill_(float(i) + 0.5)
                changed = [not torch.equal(a, b) for a, b in zip(before, watched, strict=True)]
                assert changed.count(True) == 1


class TestDropout:
    """Oracle: the equation with the masks, caught as they are drawn."""

    @pytest.mark.parametrize(
        ("ranks", "dropouts"),
        [((3,), (0.25,)), ((3, 2, 5), (0.25, 0.0, 0.4)), ((0, 2, 5), (0.0, 0.25, 0.25))],
        ids=str,
    )
    @pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
    def test_every_subset_of_gradients(
        self, ranks: tuple[int, ...], dropouts: tuple[float, ...], wanted: tuple[bool, ...]
    ) -> None:
        """Wanted are x, all A, all B, and all δ."""
        if not any(wanted):
            return
        parts = make_parts(ranks, dropouts=[*dropouts, 0.0, 0.0])
        x = draw(N, N_IN, seed=1)
        asked = dict(zip(("x", "lora_A", "lora_B", "bias_delta"), wanted, strict=True))
        sources = sources_of(x, parts)
        for name, tensor in sources.items():
            tensor.requires_grad_(asked.get(name.split()[-1], False))
        caught: list[torch.Tensor] = []
        keep_mask = KERNEL.keep_mask

        def spy(x: torch.Tensor, rate: float) -> torch.Tensor:
            caught.append(keep_mask(x, rate))
            return caught[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KERNEL, "keep_mask", spy)
            torch.manual_seed(3)
            y = stacked_linear(x, parts, gelu=True)
            mine = backwards(y, sources) if y.requires_grad else {}
        dropped = [i for i, part in enumerate(parts) if part.dropout]
        assert len(caught) == len(dropped)
        masks = {i: mask.double() for i, mask in zip(dropped, caught, strict=True)}
        # The rate is drawn in steps of 1/65,536, and the scale is that of the drawn one.
        exact = [p._replace(dropout=round(p.dropout * 65536) / 65536) for p in parts]
        expected = equation(x, exact, masks, gelu=True)
        assert_near(y, expected, 1e-12, "y")
        if not y.requires_grad:
            return
        for name, gradient in backwards(expected, sources).items():
            assert (mine[name] is None) == (gradient is None), name
            if gradient is not None:
                assert_near(mine[name], gradient, 1e-12, name)

    @pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
    @pytest.mark.parametrize("needs_x", [False, True])
    def test_checkpointing_repeats_the_draw(self, needs_x: bool, amp: bool) -> None:
        """Also where x needs no gradient, as above a frozen prefix."""
        results = []
        for recompute in (False, True):
            parts = make_parts([3, 0, 5], dropouts=[0.4, 0.0, 0.2], dtype=torch.float32)
            x = draw(N, N_IN, seed=1, dtype=torch.float32).requires_grad_(needs_x)

            def form(x: torch.Tensor, parts: list[Part] = parts) -> torch.Tensor:
                return stacked_linear(x, parts, gelu=True)

            torch.manual_seed(7)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                y = checkpoint(form, x, use_reentrant=False) if recompute else form(x)
            state = torch.get_rng_state()
            found = backwards(y, sources_of(x, parts))
            assert torch.equal(torch.get_rng_state(), state)
            results.append([y, *(g for g in found.values() if g is not None)])
        assert len(results[0]) == 13 + needs_x
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize(("how", "dtype"), LOW_PRECISION, ids=str)
    def test_low_precision_errs_at_most_twice_as_much(self, how: str, dtype: torch.dtype) -> None:
        """The plain form is written out with the same mask, in the same low precision."""
        own = dtype if how == "pure" else torch.float32
        parts = make_parts([3], dropouts=[0.25], dtype=own)
        x = draw(203, N_IN, seed=1, dtype=own).requires_grad_()
        sources = sources_of(x, parts)
        torch.manual_seed(3)
        with laid_out_if(how, [parts[0].weight]):
            with torch.autocast("cpu", dtype, enabled=how != "pure"):
                fused = stacked_linear(x, parts)
            mine = {"y": fused, **backwards(fused, sources)}
        torch.manual_seed(3)
        mask = KERNEL.keep_mask(x, 0.25)
        with torch.autocast("cpu", dtype, enabled=how != "pure"):
            W, b, delta, A, B, s, _ = parts[0]
            plain = F.linear(x, W, b + delta) + s * F.linear(F.linear(x * mask / 0.75, A), B)
        exact = equation(x, parts, {0: mask.double()})
        true = {"y": exact, **backwards(exact, sources)}
        theirs = {"y": plain, **backwards(plain, sources)}
        for name, gradient in true.items():
            assert mine[name].dtype == theirs[name].dtype, name
            error, allowed = ((f[name] - gradient).detach().norm() for f in (mine, theirs))
            assert error <= 2 * allowed + 1e-6 * gradient.detach().norm(), (name, error, allowed)


class TestSumsOverRows:
    """Oracle: whole numbers, exact in bf16 one by one, whose sums are not.

    Sums of bf16 in bf16 end at 256; in float32 they are right, and those of matrices are then
    rounded once: to 772.
    """

    ROWS = 771  # 3·257: odd, and above 256, where bf16 has lost the ones

    def run(self, inside: bool) -> dict[str, torch.Tensor | None]:
        W, A, B = torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, 1)
        A[0, 1], B[1, 0] = 1.0, 1.0
        part = Part(W, torch.zeros(2), torch.zeros(2), A, B, 1.0)
        x = torch.ones(self.ROWS, 3)
        sources = sources_of(x, [part])
        for name, tensor in sources.items():
            tensor.requires_grad_(name != "x")
        with torch.autocast("cpu", torch.bfloat16):
            y = stacked_linear(x, [part])
            assert y.dtype == torch.bfloat16
            if inside:
                y.sum().backward()
        if not inside:
            y.sum().backward()
        return {name: tensor.grad for name, tensor in sources.items()}

    def check(self, inside: bool) -> None:
        found = self.run(inside)
        assert found.pop("x") is None
        for name, gradient in found.items():
            assert gradient is not None
            assert gradient.dtype == torch.float32, name
            expected = torch.full_like(gradient, self.ROWS)
            if gradient.dim() == 2 and products.bf16_products():
                expected = expected.bfloat16().float()
            assert torch.equal(gradient, expected), (name, gradient)

    def test_under_autocast(self) -> None:
        self.check(inside=False)

    def test_with_backward_under_autocast_too(self) -> None:
        self.check(inside=True)

    def test_a_delta_beside_a_bias_in_half_precision(self) -> None:
        W, b = torch.zeros(2, 3), torch.zeros(2, dtype=torch.bfloat16)
        delta = torch.zeros(2, requires_grad=True)
        stacked_linear(torch.ones(self.ROWS, 3), [Part(W, b, delta)]).sum().backward()
        assert delta.grad.tolist() == [self.ROWS] * 2

    @pytest.mark.parametrize("orders", ORDERS, ids=str)
    def test_frozen_matrices_in_half_precision(self, orders: tuple[bool, bool]) -> None:
        """With x, b, δ, A and B in float32 nothing is rounded but W, which the oracle shares."""
        parts = [
            part._replace(weight=part.weight.detach().bfloat16())
            for part in make_parts([3, 0, 2], dtype=torch.float32)
        ]
        x = draw(N, N_IN, seed=1, dtype=torch.float32).requires_grad_()
        sources = {n: t for n, t in sources_of(x, parts).items() if t.requires_grad}
        with Orders(*orders):
            y = stacked_linear(x, parts)
            mine = backwards(y, sources)
        expected = equation(x, parts, {})
        assert y.dtype == torch.float32
        assert_near(y.double(), expected, 1e-5, "y")
        for name, gradient in backwards(expected, sources).items():
            assert_near(mine[name], gradient, 1e-5, name)

    def test_autocast_leaves_float64_alone(self) -> None:
        x, parts = draw(N, N_IN, seed=1), make_parts([3])
        with torch.autocast("cpu", torch.bfloat16):
            expected = stacked_linear(x, parts, impl="reference")
            assert expected.dtype == torch.float64
            assert_near(stacked_linear(x, parts), expected, 1e-12, "y")


class TestSecondDerivative:
    """Oracle: the plain form, which can be differentiated twice."""

    def test_is_refused_with_the_mend(self) -> None:
        x, parts = draw(N, N_IN, seed=1).requires_grad_(), make_parts([3, 0, 2])
        y = stacked_linear(x, parts, gelu=True)
        with pytest.raises(ConfigError, match=r"twice \(create_graph=True\); use impl='reference'"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
        # The refusal spoils nothing: the same graph still gives its first derivative.
        y = stacked_linear(x, parts, gelu=True)
        torch.autograd.grad(y.sum(), x)

    def test_the_mend_works(self) -> None:
        x = draw(2, N_IN, seed=1).requires_grad_()
        W, b, delta, A, B, s, _ = make_parts([3])[0]

        def plain(*tensors: torch.Tensor) -> torch.Tensor:
            x, A, B = tensors
            return lora_linear(x, W, b, A, B, s, bias_delta=delta, impl="reference")

        assert torch.autograd.gradgradcheck(plain, (x, A, B))

    @pytest.mark.parametrize("orders", ORDERS, ids=str)
    @pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
    def test_the_first_one_is_finite_differences(
        self, orders: tuple[bool, bool], gelu: bool
    ) -> None:
        parts = make_parts([2, 0, 3])
        x = draw(3, N_IN, seed=1).requires_grad_()

        def form(*_: Any) -> torch.Tensor:
            return stacked_linear(x, parts, gelu=gelu, impl="fused")

        with Orders(*orders):
            assert torch.autograd.gradcheck(form, tuple(sources_of(x, parts).values()))


def columns(parts: Sequence[Part]) -> list[list[torch.Tensor]]:
    """Return W, b, δ, A and B as the operator takes them: empty where there is none."""
    nothing = torch.empty(0)
    return [
        [nothing if tensor is None else tensor for tensor in column]
        for column in zip(*(part[:5] for part in parts), strict=True)
    ]


class TestOperator:
    """Oracle: PyTorch's own checks of an operator."""

    @pytest.mark.parametrize(
        ("ranks", "rate", "x"),
        [
            pytest.param(*ranks, x, marks=() if x in default else pytest.mark.full)
            for ranks, default in (
                (((3,), 0.0), ["many"]),
                (((3,), 0.3), ["none", "many", "transposed"]),
                (((0,), 0.0), ["rows"]),
                (((3, 0, 2), 0.0), ["rows", "none", "transposed"]),
            )
            for x in ("rows", "none", "many", "transposed")
        ],
        ids=str,
    )
    def test_opcheck(self, ranks: tuple[int, ...], rate: float, x: str) -> None:
        parts = make_parts(ranks, dtype=torch.float32)
        n = {"none": 0, "many": 503}.get(x, N)  # many are merged
        rows = draw(N_IN, n, seed=1, dtype=torch.float32).t()
        rows = rows if x == "transposed" else rows.contiguous()
        scalings = [part.scaling for part in parts]
        arguments = (rows.requires_grad_(), *columns(parts), scalings, rate, True, torch.empty(0))
        torch_library.opcheck(torch.ops.spafit.stacked_linear, arguments)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_opcheck_of_backward(self, transposed: bool) -> None:
        parts = make_parts([3, 0, 2], dtype=torch.float32)
        rows = [[t.detach() for t in column] for column in columns(parts)]
        x = draw(N_IN, N, seed=1, dtype=torch.float32).t()
        x = x if transposed else x.contiguous()
        dY = draw(N, sum(OUTS), seed=2, dtype=torch.float32)
        nothing = torch.empty(0)
        needs = [bool(t.numel()) for row in rows for t in row]
        scalings = [part.scaling for part in parts]
        torch_library.opcheck(
            torch.ops.spafit.stacked_linear_backward,
            (dY, x, *rows, scalings, 0.0, nothing, nothing.bool(), nothing, True, needs),
        )


class TestCompiled:
    """Oracle: eager mode, with the same seed where there is dropout."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> None:
        torch._dynamo.reset()

    @staticmethod
    def compiled(form: Form, **options: Any) -> Form:
        made: Form = torch.compile(form, fullgraph=True, backend="aot_eager", **options)
        return made

    def hold(self, form: Form, make: Callable[[], tuple[torch.Tensor, list[Part]]]) -> None:
        results = []
        for each in (self.compiled(form), form):
            x, parts = make()
            torch.manual_seed(3)
            y = each(x, parts)
            results.append({"y": y, **backwards(y, sources_of(x, parts))})
        for name, expected in results[1].items():
            assert (results[0][name] is None) == (expected is None), name
            if expected is not None:
                assert results[0][name].dtype == expected.dtype, name
                assert_near(results[0][name], expected, 1e-6, name)

    @pytest.mark.parametrize(
        ("ranks", "rates", "trained", "amp", "needs_x"),
        [
            pytest.param(*case, amp, needs_x, marks=() if i in default else pytest.mark.full)
            for case, default in (
                (((3, 0, 2), (0.0, 0.0, 0.0), FIELDS), (0, 3)),
                (((3, 0, 2), (0.25, 0.0, 0.4), ("lora_A", "lora_B", "bias_delta")), (1, 2)),
                (((0,), (0.0,), ("bias_delta",)), (0, 3)),
            )
            for i, (amp, needs_x) in enumerate(itertools.product([False, True], repeat=2))
        ],
        ids=str,
    )
    def test_forward_and_backward(
        self,
        ranks: tuple[int, ...],
        rates: tuple[float, ...],
        trained: tuple[str, ...],
        amp: bool,
        needs_x: bool,
    ) -> None:
        def make() -> tuple[torch.Tensor, list[Part]]:
            parts = make_parts(ranks, dropouts=rates, dtype=torch.float32)
            x = draw(2, N, N_IN, seed=1, dtype=torch.float32)
            for name, tensor in sources_of(x, parts).items():
                tensor.requires_grad_(needs_x if name == "x" else name.split()[-1] in trained)
            return x, parts

        def form(x: torch.Tensor, parts: list[Part]) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                return stacked_linear(x, parts, gelu=True)

        self.hold(form, make)

    def test_any_number_of_rows(self) -> None:
        parts = make_parts([3, 0, 2])

        def form(x: torch.Tensor, parts: list[Part]) -> torch.Tensor:
            return stacked_linear(x, parts)

        compiled = self.compiled(form, dynamic=True)
        for rows in (2, 13, 0, 5000):  # 5000 are merged
            x = draw(rows, N_IN, seed=1).requires_grad_()
            results = []
            for each in (compiled, form):
                y = each(x, parts)
                results.append([y, backwards(y, {"x": x})["x"]])
            for ours, expected in zip(*results, strict=True):
                assert_near(ours, expected, 1e-12, str(rows))

    def test_checkpointing_with_dropout(self) -> None:
        def form(x: torch.Tensor, parts: list[Part]) -> torch.Tensor:
            def once(x: torch.Tensor) -> torch.Tensor:
                return stacked_linear(x, parts).sin()

            y: torch.Tensor = checkpoint(once, x, use_reentrant=False)
            return y

        def make() -> tuple[torch.Tensor, list[Part]]:
            x = draw(N, N_IN, seed=1, dtype=torch.float32).requires_grad_()
            return x, make_parts([3], dropouts=[0.5], dtype=torch.float32)

        self.hold(form, make)

    def test_two_passes_draw_twice(self) -> None:
        def form(x: torch.Tensor, parts: list[Part]) -> torch.Tensor:
            return stacked_linear(x, parts) - stacked_linear(x, parts)

        x = draw(N, N_IN, seed=1, dtype=torch.float32)
        parts = make_parts([3], dropouts=[0.5], dtype=torch.float32)
        assert form(x, parts).abs().max() > 0.1
        assert self.compiled(form)(x, parts).abs().max() > 0.1
