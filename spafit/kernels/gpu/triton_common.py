"""Helpers of all Triton kernels: the product of two tiles, rounding, dropout masks and their seed.

This module and those named ``triton_*`` beside it are imported only where a kernel is about to run;
:func:`spafit.kernels.forms.why_no_triton` says where none can. With ``TRITON_INTERPRET=1`` set
before the import the same kernels run on the CPU, in numpy, slowly: the tests use this.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from spafit.kernels.forms import precision

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in numpy on the CPU."""


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b for tiles a (m, k) and b (k, n) of one type, summed in float32.

    ``PRECISION`` is that of float32 tiles: "ieee" or "tf32". The other types' products are exact.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter holds bfloat16 as whole numbers and would multiply these.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 ``x`` in the type ``dtype``, rounded to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts the lower half of the bits off, so they are rounded away before it.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def is_kept(seed, counter, rate):
    """Draw for each element whether dropout keeps it: Philox's number of its counter is >= rate.

    The same seed and counter give the same draw, so that no mask has to be kept for backward.
    """
    return tl.rand(seed, counter) >= rate


def draw_seed(device: torch.device) -> torch.Tensor:
    """Draw a seed (1,) of int64 for :func:`is_kept` from PyTorch's own generator of the device.

    It stays on the device, so that nothing waits for it and a captured graph draws anew at each
    replay; and whatever restores the generator (activation checkpointing, a resumed run) repeats
    the mask.
    """
    return torch.empty(1, dtype=torch.int64, device=device).random_()


def precision_of(dtype: torch.dtype) -> str:
    """Name the precision of float32 products, as PyTorch's own setting has it: "tf32" or "ieee"."""
    return "tf32" if precision(dtype) == "tf32" else "ieee"
