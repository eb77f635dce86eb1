"""Random stacks of linear maps with LoRA for tests of the Triton form, and their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spafit.kernels import Part, stacked_linear
from spafit.kernels.gpu import triton_linear, triton_low_rank
from support.triton_compiler import compiling_for  # noqa: F401 - skips where there is no Triton

FIELDS = ("weight", "bias", "bias_delta", "lora_A", "lora_B")
N, IN, OUT = 37, 70, 83  # no multiples of a tile; each but N spans two
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16]

Results = dict[str, torch.Tensor]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def make_parts(
    ranks: Sequence[int],
    dtype: torch.dtype = torch.float32,
    deltas: Sequence[bool] = (True, False, True),
    dropout: float = 0.0,
    width: int = IN,
    out: int = OUT,
) -> list[Part]:
    """Draw a part for each rank, 0 being none; all tensors ask for gradients."""
    parts = []
    for i, r in enumerate(ranks):
        tensors = (
            draw(out, width, seed=10 + i, dtype=dtype) / width**0.5,
            draw(out, seed=20 + i, dtype=dtype),
            draw(out, seed=30 + i, dtype=dtype) if deltas[i] else None,
            draw(r, width, seed=40 + i, dtype=dtype) / width**0.5 if r else None,
            draw(out, r, seed=50 + i, dtype=dtype) / r**0.5 if r else None,
        )
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        parts.append(Part(*leaves, 1.7, dropout if r else 0.0))
    return parts


def in_float64(parts: Sequence[Part]) -> list[Part]:
    exact = []
    for part in parts:
        tensors = [None if t is None else t.detach().double().requires_grad_() for t in part[:5]]
        exact.append(Part(*tensors, *part[5:]))
    return exact


def tensors_of(parts: Sequence[Part]) -> Results:
    found = {}
    for i, part in enumerate(parts):
        for field in FIELDS:
            if getattr(part, field) is not None:
                found[f"{i} {field}"] = getattr(part, field)
    return found


def results(
    x: torch.Tensor, parts: Sequence[Part], impl: str = "triton", gelu: bool = False
) -> Results:
    """Return the output and all gradients of Σ y ⊙ noise."""
    y = stacked_linear(x, parts, gelu=gelu, impl=impl)
    sources = {"x": x, **tensors_of(parts)}
    pull = draw(*y.shape, seed=7, dtype=torch.bfloat16).to(y.dtype)  # the same in every type
    gradients = torch.autograd.grad(y, list(sources.values()), pull)
    return {"y": y.detach(), **dict(zip(sources, gradients, strict=True))}


def with_masks(x: torch.Tensor, parts: Sequence[Part], masks: Sequence[torch.Tensor]) -> Results:
    """Write the equation out with the masks given; the output and all gradients."""
    outputs = []
    for part, mask in zip(parts, masks, strict=True):
        b = part.bias if part.bias_delta is None else part.bias + part.bias_delta
        dropped = x * mask.to(x.dtype) / (1 - part.dropout)
        low = F.linear(F.linear(dropped, part.A), part.B)
        outputs.append(F.linear(x, part.weight, b) + part.scaling * low)
    y = torch.cat(outputs, -1)
    sources = {"x": x, **tensors_of(parts)}
    pull = draw(*y.shape, seed=7, dtype=torch.bfloat16).to(y.dtype)
    gradients = torch.autograd.grad(y, list(sources.values()), pull)
    return {"y": y.detach(), **dict(zip(sources, gradients, strict=True))}


def assert_errs_at_most_twice_as_much(ours: Results, plain: Results, true: Results) -> None:
    """Compare the norms of the errors against float64.

    Sums of float32 in another order may differ by a few units in the last place of the largest
    number even where the plain form happens to be exact, as for a sum of few numbers.
    """
    assert set(ours) == set(plain) == set(true)
    for name, exact in true.items():
        assert ours[name].shape == exact.shape, name
        assert ours[name].dtype == plain[name].dtype, name
        error, allowed = (float((each[name].double() - exact).norm()) for each in (ours, plain))
        ulps = 4 * 2**-24 * float(exact.norm())
        assert error <= 2 * allowed + ulps, (name, error, allowed)


class Launches:
    """Counts a kernel's launches, and passes them on."""

    def __init__(self, patch: pytest.MonkeyPatch, *names: str) -> None:
        self.grids: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
        for name in names:
            for module in (triton_linear, triton_low_rank):
                if hasattr(module, name):
                    patch.setattr(module, name, _Counted(getattr(module, name), self.grids[name]))


class _Counted:
    def __init__(self, kernel: Any, grids: list[tuple[int, ...]]) -> None:
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]
