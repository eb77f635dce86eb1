"""Bias and GELU in one Triton kernel each way; the sum h + b + δ is never written to memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spafit.kernels.gpu.triton_add_norm import as_rows
from spafit.kernels.gpu.triton_common import rounded

# A tile, its warps, and the most programs. A warp's row of a tile is 512 bytes of a half type, 16 a
# thread. Above some 500 rows a program takes several tiles: it reads the bias once for all of them,
# and sums dh in registers. The number of programs is the same on every device, and with it the
# order of the sums.
_BLOCK_N, _BLOCK_F, _NUM_WARPS = 4, 256, 4
_PROGRAMS = 2048


@triton.jit
def _bias_of(BIAS, DELTA, column, F):
    """Return b + δ of the columns, (BLOCK_F,), in float32."""
    bias = tl.load(BIAS + column, column < F, 0.0).to(tl.float32)
    if DELTA is not None:
        bias += tl.load(DELTA + column, column < F, 0.0).to(tl.float32)
    return bias


# The number of rows changes from batch to batch: no kernel of its own for the multiples of 16.
@triton.jit(do_not_specialize=["N", "rows_of_a_program"])
def _forward_kernel(
    H,  # (N, F)
    BIAS,  # (F,)
    DELTA,  # (F,), or None
    Y,  # (N, F)
    N,
    rows_of_a_program,
    h_stride,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    first = tl.program_id(1).to(tl.int64) * rows_of_a_program
    bias = _bias_of(BIAS, DELTA, column, F)
    for start in tl.range(0, rows_of_a_program, BLOCK_N, num_stages=NUM_STAGES):
        # A program's rows are a multiple of BLOCK_N.
        row = first + start + tl.arange(0, BLOCK_N)
        inside = (row < N)[:, None] & (column < F)[None, :]  # (BLOCK_N, BLOCK_F)
        u = tl.load(H + row[:, None] * h_stride + column[None, :], inside, 0.0).to(tl.float32)
        u += bias[None, :]
        y = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
        tl.store(Y + row[:, None] * F + column[None, :], rounded(y, Y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["N", "rows_of_a_program"])
def _backward_kernel(
    DY,  # (N, F)
    H,  # (N, F)
    BIAS,  # (F,)
    DELTA,  # (F,), or None
    DH,  # (N, F), or None
    DBIAS,  # (programs, F), or None
    N,
    rows_of_a_program,
    dy_stride,
    h_stride,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    first = tl.program_id(1).to(tl.int64) * rows_of_a_program
    bias = _bias_of(BIAS, DELTA, column, F)
    if DBIAS is not None:
        dbias = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for start in tl.range(0, rows_of_a_program, BLOCK_N, num_stages=NUM_STAGES):
        row = first + start + tl.arange(0, BLOCK_N)
        inside = (row < N)[:, None] & (column < F)[None, :]  # (BLOCK_N, BLOCK_F)
        dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], inside, 0.0).to(tl.float32)
        u = tl.load(H + row[:, None] * h_stride + column[None, :], inside, 0.0).to(tl.float32)
        u += bias[None, :]
        # GELU(u) = u Φ(u), so that its derivative is Φ(u) + u φ(u) with the normal density φ.
        cumulative = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
        dh = dy * (cumulative + u * density)
        if DBIAS is not None:
            dbias += dh
        if DH is not None:
            place = row[:, None] * F + column[None, :]
            tl.store(DH + place, rounded(dh, DH.dtype.element_ty), inside)
    if DBIAS is not None:
        partial = tl.program_id(1) * F + column
        tl.store(DBIAS + partial, tl.sum(dbias, axis=0), column < F)


def _division(N: int, F: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Return the grid, the rows of a program, and the settings of a kernel."""
    columns = triton.cdiv(F, _BLOCK_F)
    tiles = triton.cdiv(triton.cdiv(N, _BLOCK_N) * columns, _PROGRAMS)  # of a program
    rows = _BLOCK_N * max(1, tiles)
    settings = {
        "BLOCK_N": _BLOCK_N,
        "BLOCK_F": _BLOCK_F,
        "NUM_STAGES": 3 if tiles > 1 else 1,
        "num_warps": _NUM_WARPS,
    }
    # Programs that run at the same time lie side by side in a row.
    return (columns, triton.cdiv(N, rows)), rows, settings


def add_bias_gelu(
    h: torch.Tensor, bias: torch.Tensor, bias_delta: torch.Tensor | None
) -> torch.Tensor:
    """Launch y = GELU(h + b + δ), exact (erf), computed in float32 and rounded once.

    Parameters
    ----------
    h : torch.Tensor, (..., F)
        A product without its bias.
    bias, bias_delta : torch.Tensor, (F,)
        b and δ, without gaps, in types of their own; δ may be None.

    Returns
    -------
    torch.Tensor, (..., F)
        In the type of h.
    """
    h_rows = as_rows(h)
    N, F = h_rows.shape
    y = h.new_empty(h.shape)
    if N:
        grid, rows, settings = _division(N, F)
        with torch.cuda.device_of(h):
            _forward_kernel[grid](
                h_rows, bias, bias_delta, y, N, rows, h_rows.stride(0), F=F, **settings
            )
    return y


def bias_gelu_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    bias: torch.Tensor,
    bias_delta: torch.Tensor | None,
    needs_bias: bool,
    needs_h: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Launch the gradients of :func:`add_bias_gelu` that are asked for.

    dh = dy ⊙ GELU'(u) for u = h + b + δ, with GELU'(u) = Φ(u) + u φ(u); db = dδ = Σ dh, summed over
    rows before dh is rounded.

    Parameters
    ----------
    dy, h : torch.Tensor, (..., F)
        The gradient of y, and what forward was given.
    bias, bias_delta : torch.Tensor, (F,)
        As for forward.
    needs_bias, needs_h : bool
        Whether db and dh are asked for.

    Returns
    -------
    dh : torch.Tensor, (..., F), or None
        In the type of h.
    db : torch.Tensor of float32, (F,), or None
    """
    dy_rows, h_rows = as_rows(dy), as_rows(h)
    N, F = h_rows.shape
    grid, rows, settings = _division(N, F)
    dh = h.new_empty(h.shape) if needs_h else None
    db = h.new_empty(grid[1], F, dtype=torch.float32) if needs_bias else None
    if N:
        with torch.cuda.device_of(h):
            _backward_kernel[grid](
                dy_rows,
                h_rows,
                bias,
                bias_delta,
                dh,
                db,
                N,
                rows,
                dy_rows.stride(0),
                h_rows.stride(0),
                F=F,
                **settings,
            )
    return dh, None if db is None else db.sum(0)
