"""The Triton form of the stacked linear map with LoRA: bias, update and dropout in the product.

P parts (query, key, value) of one shape are one launch: a tile of y belongs to one part. With N
tokens, r rank of a part, R = P·r, U = drop(x) Aᵀ (N, R), V = s·dY B (N, R), and m the mask of
dropout, the kernels of this module are

=============  =======================================
``_forward``   y = x Wᵀ + (b + δ) + s·U Bᵀ
``_dx``        dx = Σ dY W + (V A) ⊙ m / (1 - rate)
=============  =======================================

and those of :mod:`spafit.kernels.gpu.triton_low_rank` the rest. U is made beside the product where
tokens are few: the tile of x that W meets meets A too, in every program, which repeats the making
of U for each tile of columns. Where tokens are many it is made once before; :func:`_is_beside` has
the rule. The same holds for V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from spafit.kernels.gpu.triton_common import dot, draw_seed, precision_of, rounded
from spafit.kernels.gpu.triton_gelu import add_bias_gelu, bias_gelu_backward
from spafit.kernels.gpu.triton_low_rank import (
    PROGRAMS,
    WIDEST,
    block_r,
    keeps,
    load_as,
    make_gradients,
    make_U,
    make_V,
)
from spafit.kernels.parts import (
    Kept,
    Part,
    all_A,
    all_B,
    all_W,
    give_sums,
    outs,
    ranks,
    width_in,
)
from spafit.kernels.products import product, transposed_product


class Tiles(NamedTuple):
    """How a product (rows, inner) (inner, columns) is divided among programs."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# From large to small: the first is taken that gives every multiprocessor a program, else the last.
# Float32 products without tensor cores hold both tiles in registers, and drawing a mask takes many.
_TILES = {
    "half": (Tiles(128, 128, 64, 8, 4), Tiles(64, 64, 64, 4, 4), Tiles(32, 64, 64, 4, 4)),
    "half, drawing": (Tiles(128, 64, 64, 8, 4), Tiles(64, 64, 64, 8, 4), Tiles(32, 64, 64, 4, 4)),
    "float32": (Tiles(64, 64, 16, 8, 3), Tiles(32, 64, 16, 4, 3)),
    "float32, drawing": (Tiles(64, 64, 16, 8, 3), Tiles(32, 64, 16, 8, 3)),
}

# A launch costs about as long as this many multiplications in half precision (4 µs).
_LAUNCH = 2**30

# Rows of tiles that are worked on together, so that they find W in the cache.
_GROUP = tl.constexpr(8)


@triton.jit
def _place(tiles_m, tiles_n):
    """Return the row and the column of tiles that a program has, in groups of rows."""
    of_group = _GROUP * tiles_n
    first = tl.program_id(0) // of_group * _GROUP
    rows = tl.minimum(tiles_m - first, _GROUP)
    inside = tl.program_id(0) % of_group
    return first + inside % rows, inside // rows


@triton.jit
def _of_part(part, first, second, third):
    """Choose the pointer of a part."""
    chosen = first
    if part == 1:
        chosen = second
    if part == 2:
        chosen = third
    return chosen


@triton.jit(do_not_specialize=["N"])
def _forward(
    x, W, A, B, U, y, b0, b1, b2, delta0, delta1, delta2,
    N, IN, OUT, scaling,
    R: tl.constexpr, PARTS: tl.constexpr, DELTAS: tl.constexpr,
    U_GIVEN: tl.constexpr, STORE_U: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return a tile of y (N, P·out); ``DELTAS`` has a bit for each part that has δ."""
    DTYPE: tl.constexpr = y.dtype.element_ty
    tiles_of_part = tl.cdiv(OUT, BLOCK_N)
    tile_m, tile_n = _place(tl.cdiv(N, BLOCK_M), PARTS * tiles_of_part)
    part = tile_n // tiles_of_part
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)  # (m, 1)
    columns = tile_n % tiles_of_part * BLOCK_N + tl.arange(0, BLOCK_N)  # of the part
    ks = tl.arange(0, BLOCK_K)
    rs = tl.arange(0, BLOCK_R)
    is_row, is_column = rows < N, columns < OUT

    x_at = x + rows * IN + ks[None, :]
    W_at = W + (part * OUT + columns)[None, :] * IN + ks[:, None]  # Wᵀ
    A_at = A + (part * R + rs)[None, :] * IN + ks[:, None]  # Aᵀ
    base = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, IN, BLOCK_K):
        inside = ks < IN - k
        x_tile = load_as(x_at + k, is_row & inside[None, :], DTYPE)
        W_tile = load_as(W_at + k, inside[:, None] & is_column[None, :], DTYPE)
        base = dot(x_tile, W_tile, base, PRECISION)
        if not U_GIVEN:
            A_tile = load_as(A_at + k, inside[:, None] & (rs < R)[None, :], DTYPE)
            u = dot(x_tile, A_tile, u, PRECISION)

    U_at = U + rows * (PARTS * R) + part * R + rs[None, :]
    B_at = B + (part * OUT + columns)[None, :] * R + rs[:, None]  # Bᵀ
    low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if U_GIVEN:
        for r in tl.range(0, R, BLOCK_R, num_stages=2):
            inside = rs < R - r
            U_tile = load_as(U_at + r, is_row & inside[None, :], DTYPE)
            B_tile = load_as(B_at + r, inside[:, None] & is_column[None, :], DTYPE)
            low = dot(U_tile, B_tile, low, PRECISION)
    else:
        U_tile = rounded(u, DTYPE)
        if STORE_U and tile_n % tiles_of_part == 0:
            tl.store(U_at, U_tile, mask=is_row & (rs < R)[None, :])
        B_tile = load_as(B_at, (rs < R)[:, None] & is_column[None, :], DTYPE)
        low = dot(U_tile, B_tile, low, PRECISION)

    b = tl.load(_of_part(part, b0, b1, b2) + columns, mask=is_column, other=0.0).to(tl.float32)
    if DELTAS != 0:
        has_delta = (DELTAS >> part) & 1 == 1
        delta_at = _of_part(part, delta0, delta1, delta2) + columns
        b += tl.load(delta_at, mask=is_column & has_delta, other=0.0).to(tl.float32)
    y_at = y + rows * (PARTS * OUT) + (part * OUT + columns)[None, :]
    out = base + scaling * low + b[None, :]
    tl.store(y_at, rounded(out, DTYPE), mask=is_row & is_column[None, :])


@triton.jit
def _times_A(
    V_tile, A, low, part, columns, r, IN,
    R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add V A, of ranks r to r + BLOCK_R of a part, to ``low``."""
    rs = r + tl.arange(0, BLOCK_R)
    mask = (rs < R)[:, None] & (columns < IN)[None, :]
    A_tile = load_as(A + (part * R + rs)[:, None] * IN + columns[None, :], mask, DTYPE)
    return dot(V_tile, A_tile, low, PRECISION)


@triton.jit
def _dropped(low, seed, part, rows, columns, N, IN, rate):
    mask = keeps(seed, part, rows, columns[None, :], N, IN, rate)
    return tl.where(mask, low / (1.0 - rate), 0.0)


@triton.jit(do_not_specialize=["N"])
def _dx(
    dY, W, A, B, V, seed_at, dx,
    N, IN, OUT, scaling, rate,
    R: tl.constexpr, PARTS: tl.constexpr,
    V_GIVEN: tl.constexpr, STORE_V: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return a tile of dx (N, in), summed over the parts."""
    DTYPE: tl.constexpr = dx.dtype.element_ty
    tile_m, tile_n = _place(tl.cdiv(N, BLOCK_M), tl.cdiv(IN, BLOCK_N))
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)  # (m, 1)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    rs = tl.arange(0, BLOCK_R)
    is_row, is_column = rows < N, columns < IN
    seed = 0
    if DROPS:
        seed = tl.load(seed_at)

    # Where V is given, the parts' products are one: their W lie one below the other.
    LOOPS: tl.constexpr = 1 if V_GIVEN else PARTS
    length = PARTS * OUT if V_GIVEN else OUT
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(LOOPS):
        dY_at = dY + rows * (PARTS * OUT) + part * length + ks[None, :]
        W_at = W + (part * length + ks)[:, None] * IN + columns[None, :]
        B_at = B + (part * length + ks)[:, None] * R + rs[None, :]
        v = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k in range(0, length, BLOCK_K):
            inside = ks < length - k
            dY_tile = load_as(dY_at + k, is_row & inside[None, :], DTYPE)
            W_tile = load_as(W_at + k * IN, inside[:, None] & is_column[None, :], DTYPE)
            acc = dot(dY_tile, W_tile, acc, PRECISION)
            if not V_GIVEN:
                B_tile = load_as(B_at + k * R, inside[:, None] & (rs < R)[None, :], DTYPE)
                v = dot(dY_tile, B_tile, v, PRECISION)
        if not V_GIVEN:
            V_tile = rounded(scaling * v, DTYPE)
            if STORE_V and tile_n == 0:
                V_at = V + rows * (PARTS * R) + part * R + rs[None, :]
                tl.store(V_at, V_tile, mask=is_row & (rs < R)[None, :])
            if DROPS:
                low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                low = _times_A(V_tile, A, low, part, columns, 0, IN, R, PRECISION, BLOCK_R, DTYPE)
                acc += _dropped(low, seed, part, rows, columns, N, IN, rate)
            else:
                acc = _times_A(V_tile, A, acc, part, columns, 0, IN, R, PRECISION, BLOCK_R, DTYPE)

    if V_GIVEN:
        # Not in stages: loading the next part's V and A ahead would take registers and memory.
        for part in tl.range(0, PARTS, num_stages=1):
            V_at = V + rows * (PARTS * R) + part * R + rs[None, :]
            low = acc
            if DROPS:
                low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for r in tl.range(0, R, BLOCK_R, num_stages=2):
                V_tile = load_as(V_at + r, is_row & (rs < R - r)[None, :], DTYPE)
                low = _times_A(V_tile, A, low, part, columns, r, IN, R, PRECISION, BLOCK_R, DTYPE)
            if DROPS:
                low = acc + _dropped(low, seed, part, rows, columns, N, IN, rate)
            acc = low
    tl.store(
        dx + rows * IN + columns[None, :], rounded(acc, DTYPE), mask=is_row & is_column[None, :]
    )


def _choose(
    rows: torch.Tensor, W: torch.Tensor, inner: int, widths: Sequence[int], r: int, draws: bool
) -> tuple[Tiles, bool]:
    """Choose the tiles of a product, and whether U or V is made beside it.

    Beside the product every tile of columns makes it, each time by rows · inner · r
    multiplications; once before, it costs a launch.
    """
    kind = "float32" if rows.dtype == torch.float32 else "half"
    for tiles in _TILES[f"{kind}, drawing" if draws else kind]:
        columns = sum(triton.cdiv(width, tiles.BLOCK_N) for width in widths)
        if triton.cdiv(len(rows), tiles.BLOCK_M) * columns >= PROGRAMS:
            break
    made = len(rows) * inner * r * columns
    # In float32 the tiles leave no registers for a second sum.
    beside = kind == "half" and r <= WIDEST and made <= _LAUNCH
    if beside and W.dtype == torch.float32:
        tiles = tiles._replace(BLOCK_K=32)  # W takes twice the room until it is cast
    return tiles, beside


def _block_r(r: int, dtype: torch.dtype) -> int:
    """Return how many ranks U Bᵀ or V A sums at once, so that they stay in registers."""
    if dtype == torch.float32:
        return 16
    return block_r(r) if r <= WIDEST else 32


def forward(
    x: torch.Tensor, parts: Sequence[Part], gelu: bool, keep: bool
) -> tuple[torch.Tensor, Kept]:
    """Return y (N, Σ out) for x (N, in), and what to keep for :func:`backward`.

    Parameters
    ----------
    x : torch.Tensor, (N, in)
        Input, N at least 1.
    parts : sequence of Part
        From 1 to 3 maps with LoRA that differ in their values alone, or one without LoRA that GELU
        is applied to: there bias and GELU are one kernel after the product.
    gelu : bool
        Whether to apply GELU to the maps' outputs.
    keep : bool
        Whether there will be a backward.

    Returns
    -------
    tuple of torch.Tensor, (N, Σ out), and Kept
    """
    x = x.contiguous()
    if not ranks(parts):
        [part] = parts
        h = product(x, part.weight.to(x.dtype), None)
        y = add_bias_gelu(h, part.bias, part.bias_delta)
        return y, Kept(before_gelu=h if keep else None)
    N, IN, P = len(x), width_in(parts), len(parts)
    out, r, rate = outs(parts)[0], ranks(parts)[0], parts[0].dropout
    W = all_W(parts).contiguous()
    tiles, beside = _choose(x, W, IN, [out] * P, r, False)
    # Every tile of columns would draw the mask, at some 100 instructions an element: far above a
    # launch.
    beside = beside and not rate
    seed = draw_seed(x.device) if rate else None
    if beside:
        U = x.new_empty(N if keep else 0, P * r)
    else:
        U = make_U(x, parts, seed)
        W = W.to(x.dtype)  # once for many rows of tiles
    y = x.new_empty(N, P * out)
    biases = [parts[min(i, P - 1)].bias for i in range(3)]
    given = [part.bias_delta for part in parts] + [None] * (3 - P)
    some = next((delta for delta in given if delta is not None), parts[0].bias)
    deltas = [some if delta is None else delta for delta in given]
    grid = (triton.cdiv(N, tiles.BLOCK_M) * P * triton.cdiv(out, tiles.BLOCK_N),)
    _forward[grid](
        x, W, all_A(parts).contiguous(), all_B(parts).contiguous(), U, y, *biases, *deltas,
        N, IN, out, parts[0].scaling,
        R=r, PARTS=P, DELTAS=sum(1 << i for i, delta in enumerate(given) if delta is not None),
        U_GIVEN=not beside, STORE_U=keep, PRECISION=precision_of(x.dtype),
        BLOCK_R=_block_r(r, x.dtype), **tiles._asdict(),
    )  # fmt: skip
    if not keep:
        return torch.ops.aten.gelu_(y) if gelu else y, Kept()
    return (F.gelu(y), Kept(U, None, y, seed)) if gelu else (y, Kept(U, seed=seed))


def backward(
    dY: torch.Tensor,
    x: torch.Tensor | None,
    parts: Sequence[Part],
    kept: Kept,
    needs_x: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[torch.Tensor | None, list[list[torch.Tensor | None]]]:
    """Return dx, and the gradients of W, b, δ, A and B of every part, None where not asked for.

    Parameters
    ----------
    dY : torch.Tensor, (N, Σ out)
        Gradient of the output.
    x : torch.Tensor, (N, in), or None
        Input; None where no matrix's gradient is asked for.
    parts, kept
        As :func:`forward` had and gave them.
    needs_x : bool
        Whether dx is asked for.
    needs : sequence of five sequences of bool
        Whether the gradient of each part's W, b, δ, A and B is.

    Returns
    -------
    tuple of torch.Tensor, (N, in), or None, and five lists of torch.Tensor or None
    """
    needs_W, needs_b, needs_delta, needs_A, needs_B = needs
    needs_sums = any(needs_b) or any(needs_delta)
    dB = dA = sums = None
    if kept.before_gelu is not None and ranks(parts):
        dY = torch.ops.aten.gelu_backward(dY, kept.before_gelu)
    elif kept.before_gelu is not None:
        [part] = parts
        h = kept.before_gelu
        dh, sums = bias_gelu_backward(dY, h, part.bias, part.bias_delta, needs_sums)
        assert dh is not None
        dY = dh
    dY = dY.contiguous()
    x = None if x is None else x.contiguous()
    gradients: list[list[torch.Tensor | None]] = [[None] * len(parts) for _ in needs]
    if any(needs_W):
        assert x is not None
        for i, dY_i in enumerate(torch.split(dY, outs(parts), dim=1)):
            if needs_W[i]:
                gradients[0][i] = transposed_product(dY_i, x).to(parts[i].weight.dtype)

    dx = V = None
    if needs_x and not ranks(parts):
        dx = product(dY, parts[0].weight.to(dY.dtype).t(), None)
    elif needs_x:
        dx, V = _make_dx(dY, parts, kept, any(needs_A))
    elif any(needs_A):
        V = make_V(dY, parts)

    if any(needs_A) or any(needs_B):
        assert x is not None
        wanted = any(needs_B), any(needs_A), needs_sums and any(needs_B)
        dB, dA, sums = make_gradients(dY, x, V, parts, kept, wanted)
    if needs_sums:
        sums = dY.sum(0, dtype=torch.float32) if sums is None else sums
        gradients[1], gradients[2] = give_sums(sums, parts, needs_b, needs_delta)
    for i, part in enumerate(parts):
        if dA is not None and needs_A[i]:
            gradients[3][i] = dA[i].to(part.A.dtype)
        if dB is not None and needs_B[i]:
            gradients[4][i] = dB[i].to(part.B.dtype)
    return dx, gradients


def _make_dx(
    dY: torch.Tensor, parts: Sequence[Part], kept: Kept, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dx (N, in) and, if it is to be kept, V (N, R)."""
    N, IN, P = len(dY), width_in(parts), len(parts)
    out, r = outs(parts)[0], ranks(parts)[0]
    W = all_W(parts).contiguous()
    tiles, beside = _choose(dY, W, P * out, [IN], r, kept.seed is not None)
    if beside:
        V = dY.new_empty(N if keep else 0, P * r)
    else:
        V = make_V(dY, parts)
        W = W.to(dY.dtype)  # once for many rows of tiles
    dx = dY.new_empty(N, IN)
    _dx[(triton.cdiv(N, tiles.BLOCK_M) * triton.cdiv(IN, tiles.BLOCK_N),)](
        dY, W, all_A(parts).contiguous(), all_B(parts).contiguous(), V,
        dx if kept.seed is None else kept.seed, dx,
        N, IN, out, parts[0].scaling, parts[0].dropout,
        R=r, PARTS=P, V_GIVEN=not beside, STORE_V=keep, DROPS=kept.seed is not None,
        PRECISION=precision_of(dY.dtype), BLOCK_R=_block_r(r, dY.dtype), **tiles._asdict(),
    )  # fmt: skip
    return dx, V
