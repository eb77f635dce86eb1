"""The thin products of LoRA in Triton: U and V, and the gradients of A, B and δ.

N tokens, P parts of a stack, r rank of a part, R = P·r:

U = drop(x) Aᵀ (N, R), V = s·dY B (N, R), dA = Vᵀ drop(x), dB = s·dYᵀ U, dδ = db = Σ dY,

with drop(x) = x ⊙ m / (1 - rate). m is never kept: it is drawn again from one seed, by the counter
(part·N + row)·in + column. Sums over rows are made in parts, a program each, and the parts summed
after, so that a run repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from spafit.kernels.gpu.triton_common import dot, is_kept, precision_of, rounded
from spafit.kernels.parts import Kept, Part, all_A, all_B, outs, ranks, width_in

WIDEST = 64
"""The most ranks that a tile takes."""

PROGRAMS = 128
"""Programs that occupy a GPU: about its multiprocessors, 108 of an A100, 132 of an H100."""


@triton.jit
def load_as(at, mask, DTYPE: tl.constexpr):
    """Load a tile, zero outside, in the type of the product."""
    tile = tl.load(at, mask=mask, other=0.0)
    if tile.dtype != DTYPE:
        tile = rounded(tile.to(tl.float32), DTYPE)
    return tile


@triton.jit
def keeps(seed, part, rows, columns, N, WIDTH, rate):
    """Draw the mask of a part at rows, of int64, (m, 1) and columns (1, n), or the reverse."""
    return is_kept(seed, (part * N + rows) * WIDTH + columns, rate)


@triton.jit(do_not_specialize=["N"])
def _narrow(
    x, M, out, seed_at,
    N, K, x_stride, x_step, M_step, M_stride_k, M_stride_r, scaling, rate,
    R: tl.constexpr, PARTS: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return a tile of U = drop(x) Aᵀ or V = s·dY B (N, P·r).

    ``x_step`` is how far a part's columns of x lie from those of the part before it.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    tiles_of_part = tl.cdiv(R, BLOCK_R)
    part = tl.program_id(1) // tiles_of_part
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)  # (m, 1)
    rs = tl.program_id(1) % tiles_of_part * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    is_row, is_rank = rows < N, (rs < R)[None, :]
    if DROPS:
        seed = tl.load(seed_at)

    x_at = x + rows * x_stride + part * x_step + ks[None, :]
    M_at = M + part * M_step + ks[:, None] * M_stride_k + rs[None, :] * M_stride_r
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = ks < K - k
        x_tile = tl.load(x_at + k, mask=is_row & inside[None, :], other=0.0)
        if DROPS:
            mask = keeps(seed, part, rows, k + ks[None, :], N, K, rate)
            x_tile = rounded(tl.where(mask, x_tile.to(tl.float32) / (1.0 - rate), 0.0), DTYPE)
        M_tile = load_as(M_at + k * M_stride_k, inside[:, None] & is_rank, DTYPE)
        acc = dot(x_tile, M_tile, acc, PRECISION)
    out_at = out + rows * (PARTS * R) + part * R + rs[None, :]
    tl.store(out_at, rounded(scaling * acc, DTYPE), mask=is_row & is_rank)


def block_r(r: int) -> int:
    """Return how many ranks a tile takes, of which a product needs at least 16."""
    return max(16, min(WIDEST, 1 << (r - 1).bit_length()))


def _make_narrow(
    x: torch.Tensor,
    matrix: torch.Tensor,
    r: int,
    parts: Sequence[Part],
    scaling: float,
    seed: torch.Tensor | None,
    steps: tuple[int, int, int, int, int],
) -> torch.Tensor:
    """Launch ``_narrow``: give U or V (N, P·r)."""
    K, x_step, M_step, M_stride_k, M_stride_r = steps
    N, P = len(x), len(parts)
    out = x.new_empty(N, P * r)
    few = triton.cdiv(N, 64) * P < PROGRAMS
    BLOCK_M, BLOCK_R = 16 if few else 64, block_r(r)
    _narrow[(triton.cdiv(N, BLOCK_M), P * triton.cdiv(r, BLOCK_R))](
        x, matrix, out, out if seed is None else seed,
        N, K, x.shape[1], x_step, M_step, M_stride_k, M_stride_r, scaling, parts[0].dropout,
        R=r, PARTS=P, DROPS=seed is not None, PRECISION=precision_of(x.dtype),
        BLOCK_M=BLOCK_M, BLOCK_R=BLOCK_R, BLOCK_K=32 if x.dtype == torch.float32 else 64,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def make_U(x: torch.Tensor, parts: Sequence[Part], seed: torch.Tensor | None) -> torch.Tensor:
    """Return U = drop(x) Aᵀ (N, R)."""
    K, r = width_in(parts), ranks(parts)[0]
    A = all_A(parts).contiguous()
    return _make_narrow(x, A, r, parts, 1.0, seed, (K, 0, r * K, 1, K))


def make_V(dY: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """Return V = s·dY B (N, R)."""
    out, r = outs(parts)[0], ranks(parts)[0]
    B = all_B(parts).contiguous()
    return _make_narrow(dY, B, r, parts, parts[0].scaling, None, (out, out, out * r, r, 1))


@triton.jit
def _gradient_tile(
    left, right, partial, sums, seed, tile, start, stop, N, WIDTH, left_stride, left_step,
    partial_step, stride_column, stride_r, scaling, rate,
    R: tl.constexpr, PARTS: tl.constexpr, DROPS: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store s·leftᵀ right (columns, r) over rows start to stop, and the sums of left's columns."""
    DTYPE: tl.constexpr = right.dtype.element_ty
    tiles_r: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    tiles_n = tl.cdiv(WIDTH, BLOCK_N)
    part = tile // (tiles_n * tiles_r)
    tile_r = tile % tiles_r
    columns = tile // tiles_r % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rs = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    is_column, is_rank = (columns < WIDTH)[:, None], (rs < R)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(start, stop, BLOCK_K):
        rows = (k + ks).to(tl.int64)
        inside = rows < stop
        left_at = left + rows[None, :] * left_stride + part * left_step + columns[:, None]
        left_tile = tl.load(left_at, mask=is_column & inside[None, :], other=0.0)  # (columns, k)
        if SUMS:
            total += left_tile.to(tl.float32)
        if DROPS:
            mask = keeps(seed, part, rows[None, :], columns[:, None], N, WIDTH, rate)
            left_tile = tl.where(mask, left_tile.to(tl.float32) / (1.0 - rate), 0.0)
            left_tile = rounded(left_tile, DTYPE)
        right_at = right + rows[:, None] * (PARTS * R) + part * R + rs[None, :]
        right_tile = tl.load(right_at, mask=inside[:, None] & is_rank, other=0.0)
        acc = dot(left_tile, right_tile, acc, PRECISION)
    at = partial + part * partial_step + columns[:, None] * stride_column + rs[None, :] * stride_r
    tl.store(at, scaling * acc, mask=is_column & is_rank)
    if SUMS and tile_r == 0:
        tl.store(sums + part * WIDTH + columns, tl.sum(total, 1), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["N", "rows_of_split"])
def _gradients(
    dY, x, U, V, partial, seed_at,
    N, IN, OUT, rows_of_split, size, scaling, rate,
    R: tl.constexpr, PARTS: tl.constexpr, NEEDS_B: tl.constexpr, NEEDS_A: tl.constexpr,
    SUMS: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return a tile of dB and dδ, or one of dA, summed over one of the splits of the rows.

    A split's results lie one after the other: dB (P·out, r), dA (P·r, in), dδ (P·out).
    """
    start = tl.program_id(1) * rows_of_split
    stop = tl.minimum(start + rows_of_split, N)
    dB = partial + tl.program_id(1).to(tl.int64) * size
    dA = dB
    tiles_of_B = 0
    if NEEDS_B:
        dA = dB + PARTS * OUT * R
        tiles_of_B = PARTS * tl.cdiv(OUT, BLOCK_N) * tl.cdiv(R, BLOCK_R)
    sums = dA
    if NEEDS_A:
        sums = dA + PARTS * R * IN
    tile = tl.program_id(0)
    seed = 0
    if DROPS:
        seed = tl.load(seed_at)
    if NEEDS_B and tile < tiles_of_B:
        _gradient_tile(
            dY, U, dB, sums, seed, tile, start, stop, N, OUT, PARTS * OUT, OUT,
            OUT * R, R, 1, scaling, rate,
            R, PARTS, False, SUMS, PRECISION, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    if NEEDS_A and tile >= tiles_of_B:
        _gradient_tile(
            x, V, dA, sums, seed, tile - tiles_of_B, start, stop, N, IN, IN, 0,
            R * IN, 1, IN, 1.0, rate,
            R, PARTS, DROPS, False, PRECISION, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip


def make_gradients(
    dY: torch.Tensor,
    x: torch.Tensor,
    V: torch.Tensor | None,
    parts: Sequence[Part],
    kept: Kept,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return dB (P, out, r), dA (P, r, in) and Σ dY (P·out,), in float32, those that are wanted."""
    needs_B, needs_A, needs_sums = wanted
    N, IN, P = len(dY), width_in(parts), len(parts)
    out, r = outs(parts)[0], ranks(parts)[0]
    BLOCK_N, BLOCK_K, BLOCK_R = 64, 16 if dY.dtype == torch.float32 else 64, block_r(r)
    sizes = [P * out * r * needs_B, P * r * IN * needs_A, P * out * needs_sums]
    tiles = triton.cdiv(out, BLOCK_N) * needs_B + triton.cdiv(IN, BLOCK_N) * needs_A
    tiles *= P * triton.cdiv(r, BLOCK_R)
    # Four programs a multiprocessor, each of at least four tiles of rows.
    splits = max(1, min(triton.cdiv(4 * PROGRAMS, tiles), N // (4 * BLOCK_K)))
    rows_of_split = triton.cdiv(triton.cdiv(N, splits), BLOCK_K) * BLOCK_K
    splits = triton.cdiv(N, rows_of_split)
    partial = torch.empty(splits, sum(sizes), dtype=torch.float32, device=dY.device)
    unused = partial
    _gradients[(tiles, splits)](
        dY, x, unused if kept.U is None else kept.U, unused if V is None else V, partial,
        unused if kept.seed is None else kept.seed,
        N, IN, out, rows_of_split, sum(sizes), parts[0].scaling, parts[0].dropout,
        R=r, PARTS=P, NEEDS_B=needs_B, NEEDS_A=needs_A, SUMS=needs_sums,
        DROPS=kept.seed is not None, PRECISION=precision_of(dY.dtype),
        BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R,
        num_warps=8 if dY.dtype == torch.float32 else 4, num_stages=3,
    )  # fmt: skip
    whole = partial[0] if splits == 1 else partial.sum(0)
    dB, dA, sums = torch.split(whole, sizes)
    return (
        dB.view(P, out, r) if needs_B else None,
        dA.view(P, r, IN) if needs_A else None,
        sums if needs_sums else None,
    )
