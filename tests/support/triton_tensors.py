"""Helpers for the tests of Triton's elementwise kernels: tensors, gradients, errors, launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Tensors = dict[str, torch.Tensor]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def with_gradients(y: torch.Tensor, tensors: Tensors) -> Tensors:
    """Return y and the gradients of Σ y ⊙ noise for each tensor that asks for one.

    The noise is the same in every type of y.
    """
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    noise = draw(*y.shape, seed=9).bfloat16().to(y.dtype)
    gradients = torch.autograd.grad(y, list(wanted.values()), noise)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_errs_at_most_twice(ours: Tensors, plain: Tensors, truth: Tensors) -> None:
    """Hold each error, as a norm, against twice the plain form's.

    Four float32 units in the last place of the values, or of 1 where they are smaller, are granted
    beyond that: the plain form may be exact by luck, most of all in a sum that is a single number.
    """
    assert ours.keys() == truth.keys() == plain.keys()
    for name, true in truth.items():
        assert ours[name].shape == true.shape, name
        error, allowed = ((each[name].double() - true).norm() for each in (ours, plain))
        granted = 4 * 2**-23 * max(true.norm().item(), true.numel() ** 0.5)
        assert error <= 2 * allowed + granted, (name, error, allowed)


class Watched:
    """A kernel that notes what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[Any, ...]] = []
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append(args)
            self.grids.append(grid)
            self.kernel[grid](*args, **kwargs)

        return launch
