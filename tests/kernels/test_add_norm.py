"""Dropout, residual and LayerNorm as one operation, at random."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import assert_near, kept_for_backward
from torch.utils.checkpoint import checkpoint

from spafit.errors import ConfigError
from spafit.kernels import dropout_add_norm
from spafit.kernels.dropout import keep_mask

EPS = 1e-5
NAMES = ("x", "residual", "weight", "bias", "bias_delta")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

Found = dict[str, torch.Tensor | None]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make(
    *shape: int, D: int = 20, delta: bool = True, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
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


def equation(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    bias_delta: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    rate: float = 0.0,
) -> torch.Tensor:
    """Write it out in float64, mean and variance by hand."""
    z = x.double() if mask is None else x.double() * mask / (1 - round(rate * 65536) / 65536)
    z = z + residual.double()
    centred = z - z.mean(-1, keepdim=True)
    x_hat = centred / ((centred**2).mean(-1, keepdim=True) + EPS).sqrt()
    y = weight.double() * x_hat + bias.double()
    return y if bias_delta is None else y + bias_delta.double()


def fused(tensors: dict[str, torch.Tensor], rate: float = 0.0, impl: str = "fused") -> torch.Tensor:
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


def backwards(y: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Found:
    """Return the gradients of Σ y ⊙ noise that ``backward`` leaves, None where it leaves none."""
    for tensor in tensors.values():
        tensor.grad = None
    (y * draw(*y.shape, seed=9).to(y.dtype)).sum().backward()
    return {name: tensor.grad for name, tensor in tensors.items()}


class TestIsTheEquation:
    """Oracle: the equation in float64, with the mask that the same seed draws."""

    @settings(max_examples=120, deadline=None)
    @given(st.data())
    def test_values_and_exactly_the_gradients_asked_for(self, data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
        shape = data.draw(st.sampled_from([(), (0,), (1,), (13,), (3, 7), (2, 0)]))
        tensors = make(*shape, delta=data.draw(st.booleans()), dtype=dtype)
        if len(shape) and data.draw(st.booleans(), "transposed"):
            for name in ("x", "residual"):
                given = tensors[name].detach().transpose(0, -1).contiguous()
                tensors[name] = given.transpose(0, -1).requires_grad_()
        for name, tensor in tensors.items():
            tensor.requires_grad_(data.draw(st.booleans(), name))
        rate = data.draw(st.sampled_from([0.0, 0.1, 0.5]))
        torch.manual_seed(3)
        mask = keep_mask(tensors["x"], rate).double() if rate else None
        torch.manual_seed(3)
        y = fused(tensors, rate)
        expected = equation(**tensors, mask=mask, rate=rate)
        assert y.dtype == dtype
        assert_near(y, expected, TOLERANCE[dtype], "y")
        assert y.requires_grad == any(tensor.requires_grad for tensor in tensors.values())
        if not y.requires_grad:
            return
        mine, true = backwards(y, tensors), backwards(expected, tensors)
        for name, gradient in true.items():
            assert (mine[name] is None) == (not tensors[name].requires_grad), name
            if gradient is not None:
                assert_near(mine[name], gradient, TOLERANCE[dtype], name)

    @pytest.mark.parametrize("delta", [True, False])
    def test_is_the_reference(self, delta: bool) -> None:
        tensors = make(3, 7, delta=delta)
        plain = fused(tensors, impl="reference")
        assert_near(fused(tensors), plain, 1e-12, "y")
        assert_near(fused(tensors, impl="auto"), plain, 1e-12, "auto")
        assert_near(equation(**tensors), plain, 1e-12, "the equation")

    def test_gradients_are_finite_differences(self) -> None:
        tensors = make(3)

        def form(*given: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return fused(dict(zip(tensors, given, strict=True)), 0.3)

        assert torch.autograd.gradcheck(form, tuple(tensors.values()))

    def test_backward_twice(self) -> None:
        tensors = make(7)
        y = fused(tensors, 0.3)
        first = torch.autograd.grad(y.square().sum(), list(tensors.values()), retain_graph=True)
        second = torch.autograd.grad(y.square().sum(), list(tensors.values()))
        assert all(map(torch.equal, first, second))

    def test_checkpointing_repeats_the_draw(self) -> None:
        results = []
        for recompute in (False, True):
            tensors = make(7)
            torch.manual_seed(3)
            y = (
                checkpoint(fused, tensors, 0.3, use_reentrant=False)
                if recompute
                else fused(tensors, 0.3)
            )
            results.append([y, *backwards(y, tensors).values()])
        assert all(map(torch.equal, *results))


class TestMemory:
    """Oracle: bytes that autograd is given, and the addresses of the gradients."""

    @staticmethod
    def kept(tensors: dict[str, torch.Tensor], rate: float, impl: str) -> int:
        with kept_for_backward(tensors.values()) as sizes:
            fused(tensors, rate, impl)
        return sum(sizes.values())

    @pytest.mark.parametrize("rate", [0.0, 0.1])
    @pytest.mark.parametrize("delta", [True, False])
    def test_is_z_two_numbers_a_token_and_a_byte_an_element(self, delta: bool, rate: float) -> None:
        rows, D = 21, 20
        tensors = make(3, 7, delta=delta, dtype=torch.float32)
        ours, plain = (self.kept(tensors, rate, impl) for impl in ("fused", "reference"))
        assert ours == rows * (4 * D + 8 + (D if rate else 0))
        assert ours <= plain

    @pytest.mark.parametrize("rate", [0.0, 0.3])
    def test_no_gradient_lies_in_the_memory_of_another(self, rate: float) -> None:
        """Of what ``backward`` leaves: x and the residual have the same gradient at rate 0."""
        tensors = make(7)
        backwards(fused(tensors, rate), tensors)
        gradients = [tensor.grad for tensor in tensors.values()]
        for i, gradient in enumerate(gradients):
            before = [each.clone() for each in gradients]
            gradient.fill_(float(i) + 0.5)
            changed = [not torch.equal(a, b) for a, b in zip(before, gradients, strict=True)]
            assert changed.count(True) == 1

    def test_b_and_delta_are_never_one_tensor(self) -> None:
        """Before ``backward`` copies what it was given twice, too."""
        tensors = make(7)
        y = fused(tensors)
        db, ddelta = torch.autograd.grad(y.sum(), [tensors["bias"], tensors["bias_delta"]])
        assert torch.equal(db, ddelta)
        assert db.untyped_storage().data_ptr() != ddelta.untyped_storage().data_ptr()


class TestLowPrecision:
    """Oracle: the equation in float64; the error is at most twice the plain form's."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("how", ["pure", "autocast", "autocast, low x", "autocast, low both"])
    @pytest.mark.parametrize("delta", [True, False])
    def test_errs_at_most_twice_as_much(self, delta: bool, how: str, dtype: torch.dtype) -> None:
        tensors = make(203, delta=delta, dtype=dtype if how == "pure" else torch.float32)
        for name in {"autocast, low x": ["x"], "autocast, low both": ["x", "residual"]}.get(
            how, []
        ):
            tensors[name] = tensors[name].detach().to(dtype).requires_grad_()
        results = []
        for impl in ("fused", "reference"):
            with torch.autocast("cpu", dtype, enabled=how != "pure"):
                y = fused(tensors, impl=impl)
            results.append({"y": y, **backwards(y, tensors)})
        exact = equation(**tensors)
        true = {"y": exact, **backwards(exact, tensors)}
        for name, gradient in true.items():
            ours, plain = (found[name] for found in results)
            # Of two low inputs under autocast the fused form is in float32 wherever it runs, the
            # plain one on a GPU alone.
            assert ours.dtype == (
                torch.float32 if how.startswith("auto") and name == "y" else plain.dtype
            )
            error, allowed = ((each - gradient).detach().norm() for each in (ours, plain))
            assert error <= 2 * allowed + 1e-6 * gradient.detach().norm(), (name, error, allowed)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_autocast_of_a_model_of_another_type(self, dtype: torch.dtype) -> None:
        """LayerNorm is in float32 under autocast, but float64 stays, as in the plain form."""
        tensors = make(7, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            plain = fused(tensors, impl="reference")
            ours = fused(tensors)
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 0.02
        assert_near(ours.double(), plain.double(), tolerance, "y")


class TestOnlyWhatIsAskedFor:
    """Oracle: the list of what requires a gradient."""

    @pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5)), ids=str)
    def test_every_subset(self, wanted: tuple[bool, ...]) -> None:
        tensors = make(7)
        for name, needed in zip(NAMES, wanted, strict=True):
            tensors[name].requires_grad_(needed)
        y = fused(tensors, 0.3)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            found = backwards(y, tensors)
            assert tuple(found[name] is not None for name in NAMES) == wanted

    def test_refusals(self) -> None:
        tensors = make(7)
        with pytest.raises(ConfigError, match=r"no impl='best'"):
            fused(tensors, impl="best")
        y = fused(tensors)
        with pytest.raises(ConfigError, match="differentiated twice"):
            torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)
