"""What many tests hold of tensors: that they are near, freed, and kept for backward in few bytes.

Besides, the ways in which a form runs in low precision.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from spafit.kernels import products
from spafit.kernels.stacking import lay_together

LOW_PRECISION = [
    *((how, dtype) for how in ("autocast", "pure") for dtype in (torch.bfloat16, torch.float16)),
    pytest.param(
        "laid out",  # under autocast, with the frozen matrices as oneDNN wants them
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not products.bf16_products(), reason="this processor has no products in bf16"
        ),
    ),
]


@contextmanager
def laid_out_if(how: str, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lay frozen matrices out if that is ``how``; forward and backward must then read them so."""
    if how != "laid out":
        yield
        return
    lay_together(weights)
    with products.laid_out(weights):
        yield
        forms = products._laid_out[-1]
        assert len(forms.made) == 2  # all W as one, and its transpose


def assert_near(
    ours: torch.Tensor,
    expected: torch.Tensor,
    tolerance: float | Mapping[torch.dtype, float],
    what: str = "",
    scale: float = 1.0,
) -> None:
    """Require the same shape, and no difference above ``tolerance`` times the largest value.

    The largest value counts as ``scale`` at least. A tolerance for each type requires the same
    type too.
    """
    assert ours.shape == expected.shape, what
    if not isinstance(tolerance, float):
        assert ours.dtype == expected.dtype, what
        tolerance = tolerance[expected.dtype]
    if expected.numel():
        scale = max(scale, float(expected.detach().abs().max()))
        worst = float((ours.detach() - expected.detach()).abs().max())
        assert worst <= tolerance * scale, (what, worst, scale)


@contextmanager
def kept_for_backward(own: Iterable[torch.Tensor] = ()) -> Iterator[dict[int, int]]:
    """Collect the bytes of each storage that is kept for backward, except for those of ``own``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def is_freed(make: Callable[[], nn.Module]) -> bool:
    """Return whether a model is gone with its last reference, without a search for cycles."""
    make()  # what torch imports for its first optimizer keeps the frames that asked for it
    gc.collect()
    gc.disable()
    try:
        return weakref.ref(make())() is None
    finally:
        gc.enable()
