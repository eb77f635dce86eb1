"""The matrix product x Wᵀ + b on a CPU, by the faster of PyTorch's two libraries, MKL and oneDNN.

PyTorch's own ``F.linear`` calls MKL. On processors that are not Intel's, MKL leaves half of the
width of AVX-512 unused, while oneDNN, which PyTorch carries too, uses all of it: both rates are in
the rows of ``benchmarks/results/train_step.csv``. The choice depends on the processor alone, never
on a timing, so that a run repeats bit for bit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from spafit.errors import ConfigError

LIBRARY_VARIABLE = "SPAFIT_PRODUCTS"
"""The environment variable that overrides the choice: ``mkl`` or ``onednn``."""

# oneDNN prepares each new shape once, which small products don't repay.
_LEAST_FLOP = 4e6


@functools.cache
def library() -> str:
    """Return the name of the library of large float32 products: ``"mkl"`` or ``"onednn"``.

    Raises
    ------
    ConfigError
        If the environment asks for another, or for oneDNN where it is not available.
    """
    asked = os.environ.get(LIBRARY_VARIABLE, "")
    if asked not in ("", "mkl", "onednn"):
        raise ConfigError(f'{LIBRARY_VARIABLE} must be "mkl" or "onednn", found {asked!r}')
    if asked == "onednn" and not has_onednn():
        raise ConfigError(f"{LIBRARY_VARIABLE} asks for oneDNN, which this PyTorch lacks")
    if asked:
        return asked
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "onednn" if wide and has_onednn() and not _is_intel() else "mkl"


def library_on(device: torch.device) -> str:
    """Return the library of products on a device: :func:`library`, or ``"cublas"`` on a GPU."""
    return library() if device.type == "cpu" else "cublas"


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x Wᵀ + b; no gradient is recorded.

    Parameters
    ----------
    x : torch.Tensor, (N, in)
        Input.
    weight : torch.Tensor, (out, in)
        W, in any memory order: ``product(dY, W.T, None)`` is dY W. Of another type than x it is
        cast, unless it is one of those that are :func:`laid_out`.
    bias : torch.Tensor, (out,), or None
        b, of x's type.

    Returns
    -------
    torch.Tensor, (N, out)
    """
    if _laid_out and x.dtype == torch.bfloat16 and len(x):
        made = _form(weight)
        if made is not None:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, made, bias, "none", [], "")
            return y
    weight = weight.to(x.dtype)
    if _by_onednn(x, weight):
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def transposed_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return aᵀ b, such as dW = dYᵀ x: a sum over rows, in float32 or wider.

    Parameters
    ----------
    a : torch.Tensor, (N, m)
        Such as dY.
    b : torch.Tensor, (N, n)
        Of the same type, such as x.

    Returns
    -------
    torch.Tensor, (m, n)
        In float32 if the factors are bfloat16 or float16.
    """
    is_half = a.dtype in (torch.float16, torch.bfloat16)
    if is_half and a.device.type == "cuda" and a.dtype == b.dtype:
        summed: torch.Tensor = torch.mm(a.t(), b, out_dtype=torch.float32)
        return summed
    if a.dtype == b.dtype == torch.bfloat16 and a.device.type == "cpu" and bf16_products():
        # Summed in float32 and rounded once, which costs less than two copies in float32.
        return torch.mm(a.t(), b).float()
    dtype = torch.float32 if is_half else a.dtype
    # oneDNN accepts a transposed matrix without a copy, but is very slow on a slice of columns.
    return product(a.to(dtype).contiguous().t(), b.to(dtype).contiguous().t(), None)


class LaidOut:
    """y = x Wᵀ + b for many x: W rounded once, and laid out once as oneDNN multiplies fastest.

    Its plain form is :func:`product`, after which GELU may follow. oneDNN reads a matrix in blocks;
    one that lies row by row is brought into them by each product, which weighs most where there
    are few rows.

    Parameters
    ----------
    weight : torch.Tensor, (out, in)
        W, which is not kept where oneDNN has it in blocks.
    bias : torch.Tensor, (out,)
        b.
    dtype : torch.dtype
        The type of W, b and x; oneDNN has float32 and bfloat16.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> None:
        self.weight, self.bias = weight.detach().to(dtype), bias.detach().to(dtype)
        self.by_onednn = (dtype == torch.float32 and library() == "onednn") or (
            dtype == torch.bfloat16 and bool(bf16_products())
        )
        if self.by_onednn:
            self.weight = _in_blocks(self.weight)
            self._product = torch.ops.mkldnn._linear_pointwise.default  # no overload to be found

    def __call__(self, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """Return x Wᵀ + b (N, out), or GELU (exact, erf) of it, for x (N, in) of W's type."""
        y: torch.Tensor
        if self.by_onednn:
            then = "gelu" if gelu else "none"
            y = self._product(x, self.weight, self.bias, then, [], "none")
            return y
        y = F.linear(x, self.weight, self.bias)
        return torch.ops.aten.gelu_(y) if gelu else y


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and 2.0 * x.shape[0] * weight.numel() >= _LEAST_FLOP
        and library() == "onednn"
    )


@functools.cache
def bf16_products() -> str:
    """Return the processor's units for bf16 products: AMX-BF16 or AVX512-BF16; empty if none."""
    found = torch.cpu.get_capabilities()
    if not has_onednn():
        return ""
    if found.get("amx_bf16") or found.get("amx_tile"):  # no processor has one without the other
        return "AMX-BF16"
    return "AVX512-BF16" if found.get("avx512_bf16") else ""


_BLOCKS_FOR = 512
"""The rows that oneDNN lays matrices out for: one number, so that a run repeats bit for bit."""


def _in_blocks(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix in oneDNN's own memory order."""
    made: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _BLOCKS_FOR)
    return made


_laid_out: list[_Forms] = []  # one entry for each block of laid_out() that has been entered


class _Forms:
    """Frozen matrices, and their forms in bf16 as oneDNN wants them."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        # They are kept: their addresses must not become those of other tensors.
        self.weights = {each.data_ptr(): each for each in weights}
        self.made: dict[tuple[int, torch.Size, bool], torch.Tensor] = {}

    def form(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return the form of a matrix or a stack of them, made at its first use."""
        by_rows = weight.is_contiguous()
        key = (weight.data_ptr(), weight.shape, by_rows)
        if key not in self.made:
            address = key[0]
            while address < key[0] + weight.nbytes:
                part = self.weights.get(address)
                if part is None:
                    return None
                address += part.nbytes
            if not by_rows and not weight.t().is_contiguous():
                return None
            plain = weight.detach().to(torch.bfloat16).contiguous()
            self.made[key] = _in_blocks(plain)
        return self.made[key]


def _form(weight: torch.Tensor) -> torch.Tensor | None:
    return next((made for each in _laid_out if (made := each.form(weight)) is not None), None)


@contextmanager
def laid_out(weights: Iterable[torch.Tensor]) -> Iterator[None]:
    """Have bf16 products on a CPU read frozen matrices in bf16 and in oneDNN's own memory order.

    Inside the block, :func:`product` of a bfloat16 x makes such a form of a matrix at its first
    use, and one of its transpose where dY W is asked for. The matrices themselves stay as they are,
    and must not be written to. Products take less time than with W by rows, and no weight is cast
    in a step.

    Parameters
    ----------
    weights : iterable of torch.Tensor
        Contiguous matrices on a CPU; those that lie side by side may be used as one.
    """
    mine = _Forms(weights)
    _laid_out.append(mine)
    try:
        yield
    finally:
        _laid_out.remove(mine)


def has_onednn() -> bool:
    """Return whether this PyTorch carries oneDNN's product."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True  # not Linux: stay with PyTorch's own choice
