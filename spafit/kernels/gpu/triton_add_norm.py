"""Dropout, residual and LayerNorm in one Triton kernel each way.

A row of D elements is read once, lies in registers while its mean and variance are taken, and is
written once: forward reads x and the residual and writes y and z, backward reads dy and z and
writes dx and the residual's gradient. The mask is drawn again in backward, not kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spafit.errors import ConfigError
from spafit.kernels.forms import refuse_second_derivative
from spafit.kernels.gpu.triton_common import draw_seed, rounded

_PROGRAMS = 512
"""The most programs of a backward that sums over rows, each a row of partial sums: 4 a multi-
processor of an H100. The same number everywhere, so that all devices sum in the same order."""


@triton.jit
def _is_kept(seed, row, rate, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Draw for rows (BLOCK_N,) what dropout keeps of them, (BLOCK_N, BLOCK_D).

    As ``triton_common.is_kept``, but each draw of Philox gives the numbers of four neighbours. A
    thread has just those four, so that this is a quarter of the work, which else takes as long as
    the memory does.
    """
    quad = tl.arange(0, BLOCK_D // 4)
    a, b, c, d = tl.rand4x(seed, row[:, None] * ((D + 3) // 4) + quad[None, :])
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_N, BLOCK_D)) >= rate


# The number of rows changes from batch to batch: no kernel of its own for the multiples of 16.
@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    X,  # (N, D)
    RESIDUAL,  # (N, D)
    WEIGHT,  # (D,)
    BIAS,  # (D,)
    DELTA,  # (D,), or None
    SEED,  # (1,), or None without dropout
    Y,  # (N, D)
    Z,  # (N, D), or None: then neither the mean nor the reciprocal deviation is kept
    MEAN,  # (N,)
    RECIPROCAL_DEVIATION,  # (N,)
    N,
    x_stride,
    residual_stride,
    eps,
    rate,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (column < D)[None, :]  # (BLOCK_N, BLOCK_D)
    # int64, for N·D may exceed what 32 bits count.
    place = row[:, None] * D + column[None, :]
    x = tl.load(X + row[:, None] * x_stride + column[None, :], inside, 0.0).to(tl.float32)
    z = tl.load(RESIDUAL + row[:, None] * residual_stride + column[None, :], inside, 0.0)
    z = z.to(tl.float32)
    if SEED is not None:
        kept = _is_kept(tl.load(SEED), row, rate, D, BLOCK_N, BLOCK_D)
        x = tl.where(kept, x * scale, 0.0)
    z += x
    mean = tl.sum(z, axis=1) / D  # (BLOCK_N,)
    centred = tl.where(inside, z - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    reciprocal_deviation = tl.rsqrt(variance + eps)
    if Z is not None:
        tl.store(Z + place, rounded(z, Z.dtype.element_ty), inside)
        tl.store(MEAN + row, mean, row < N)
        tl.store(RECIPROCAL_DEVIATION + row, reciprocal_deviation, row < N)
    weight = tl.load(WEIGHT + column, column < D, 0.0).to(tl.float32)  # (BLOCK_D,)
    bias = tl.load(BIAS + column, column < D, 0.0).to(tl.float32)
    if DELTA is not None:
        bias += tl.load(DELTA + column, column < D, 0.0).to(tl.float32)
    y = centred * reciprocal_deviation[:, None] * weight[None, :] + bias[None, :]
    tl.store(Y + place, rounded(y, Y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["N", "rows_of_a_program"])
def _backward_kernel(
    DY,  # (N, D)
    Z,  # (N, D), or None where the sum of dy alone is wanted
    MEAN,  # (N,)
    RECIPROCAL_DEVIATION,  # (N,)
    WEIGHT,  # (D,)
    SEED,  # (1,), or None without dropout
    DX,  # (N, D); each of the last four may be None
    DRESIDUAL,  # (N, D)
    DWEIGHT,  # (programs, D)
    DBIAS,  # (programs, D)
    N,
    rows_of_a_program,
    dy_stride,
    rate,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK_D)
    first = tl.program_id(0).to(tl.int64) * rows_of_a_program
    if DX is not None or DRESIDUAL is not None:
        weight = tl.load(WEIGHT + column, column < D, 0.0).to(tl.float32)  # (BLOCK_D,)
    if DX is not None and SEED is not None:
        seed = tl.load(SEED)
    if DWEIGHT is not None:
        dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if DBIAS is not None:
        dbias = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(0, rows_of_a_program, BLOCK_N, num_stages=NUM_STAGES):
        # A program's rows are a multiple of BLOCK_N.
        row = first + start + tl.arange(0, BLOCK_N)
        there = row < N
        inside = there[:, None] & (column < D)[None, :]  # (BLOCK_N, BLOCK_D)
        place = row[:, None] * D + column[None, :]
        dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], inside, 0.0).to(tl.float32)
        if DBIAS is not None:
            dbias += dy
        if Z is not None:
            z = tl.load(Z + place, inside, 0.0).to(tl.float32)
            mean = tl.load(MEAN + row, there, 0.0)  # (BLOCK_N,)
            reciprocal_deviation = tl.load(RECIPROCAL_DEVIATION + row, there, 0.0)
            x_hat = (z - mean[:, None]) * reciprocal_deviation[:, None]
            if DWEIGHT is not None:
                dweight += dy * x_hat
            if DX is not None or DRESIDUAL is not None:
                g = dy * weight[None, :]
                # g is 0 where there is no column, and with it what is summed.
                mean_of_g = tl.sum(g, axis=1) / D
                mean_of_g_x_hat = tl.sum(g * x_hat, axis=1) / D
                dz = g - mean_of_g[:, None] - x_hat * mean_of_g_x_hat[:, None]
                dz *= reciprocal_deviation[:, None]
                if DRESIDUAL is not None:
                    tl.store(DRESIDUAL + place, rounded(dz, DRESIDUAL.dtype.element_ty), inside)
                if DX is not None:
                    if SEED is not None:
                        kept = _is_kept(seed, row, rate, D, BLOCK_N, BLOCK_D)
                        dz = tl.where(kept, dz * scale, 0.0)
                    tl.store(DX + place, rounded(dz, DX.dtype.element_ty), inside)
    partial = tl.program_id(0) * D + column
    if DWEIGHT is not None:
        tl.store(DWEIGHT + partial, tl.sum(dweight, axis=0), column < D)
    if DBIAS is not None:
        tl.store(DBIAS + partial, tl.sum(dbias, axis=0), column < D)


def _tile(D: int) -> dict[str, int]:
    """Return rows and columns of a tile, and the warps for it.

    Four elements a thread up to D = 2048: the threads of a warp then read 8 or 16 bytes each, side
    by side, of a half type as of float32, and nothing is moved between the two layouts.
    """
    block_d = max(4, triton.next_power_of_2(D))
    block_n = max(1, 512 // block_d)
    num_warps = min(max(block_n * block_d // 128, 1), 16)
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": num_warps}


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View (..., D) as (N, D) whose rows lie without gaps; a copy where they do not."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def add_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    bias_delta: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Launch y = γ ⊙ (z - mean) / √(variance + eps) + β + δ for z = Dropout(x) + residual.

    Parameters
    ----------
    x, residual : torch.Tensor, (..., D)
        Each in its own type; the sums are float32.
    weight, bias, bias_delta : torch.Tensor, (D,)
        γ, β and δ, each in its own type, without gaps; δ may be None.
    seed : torch.Tensor of int64, (1,), or None
        What the mask is drawn from; None without dropout.
    eps, dropout : float
        What is added to the variance, and the rate.
    dtype : torch.dtype
        Of y.
    keep : bool
        Whether to give what backward needs.

    Returns
    -------
    y : torch.Tensor, (..., D)
    z : torch.Tensor, (N, D), or None
        In the type that x + residual has.
    mean, reciprocal_deviation : torch.Tensor of float32, (N,), or None
    """
    rows, residual_rows = as_rows(x), as_rows(residual)
    N, D = rows.shape
    y = x.new_empty(x.shape, dtype=dtype)
    z = mean = reciprocal_deviation = None
    if keep:
        z = x.new_empty(N, D, dtype=torch.promote_types(x.dtype, residual.dtype))
        mean = x.new_empty(N, dtype=torch.float32)
        reciprocal_deviation = torch.empty_like(mean)
    if N:
        tile = _tile(D)
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(N, tile["BLOCK_N"]),)](
                rows,
                residual_rows,
                weight,
                bias,
                bias_delta,
                seed,
                y,
                z,
                mean,
                reciprocal_deviation,
                N,
                rows.stride(0),
                residual_rows.stride(0),
                eps,
                dropout,
                1.0 / (1.0 - dropout),
                D=D,
                **tile,
            )
    return y, z, mean, reciprocal_deviation


def add_norm_backward(
    dy: torch.Tensor,
    z: torch.Tensor | None,
    mean: torch.Tensor | None,
    reciprocal_deviation: torch.Tensor | None,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float,
    x_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Launch the gradients of :func:`add_norm_forward` that are asked for.

    With ẑ = (z - mean) · r for the reciprocal deviation r, and g = γ ⊙ dy::

        dz = r · (g - mean(g) - ẑ · mean(g ⊙ ẑ))        dresidual = dz
        dx = m ⊙ dz / (1 - rate)        dγ = Σ dy ⊙ ẑ        dβ = dδ = Σ dy

    Parameters
    ----------
    dy : torch.Tensor, (..., D)
        The gradient of y.
    z, mean, reciprocal_deviation, seed
        What forward kept; the first three may be None where Σ dy alone is asked for.
    weight : torch.Tensor, (D,)
        γ.
    dropout : float
        The rate.
    x_dtype, residual_dtype : torch.dtype or None
        The types of dx and of dresidual; None where there is no need of one.
    needs_weight, needs_bias : bool
        Whether dγ and Σ dy are asked for.

    Returns
    -------
    dx, dresidual : torch.Tensor, (..., D), or None
    dweight, dbias : torch.Tensor of float32, (D,), or None
    """
    dy_rows = as_rows(dy)
    N, D = dy_rows.shape
    tile = _tile(D)
    rows = tile["BLOCK_N"]
    if needs_weight or needs_bias:  # fewer programs, each with a sum of its own
        rows *= max(1, triton.cdiv(triton.cdiv(N, rows), _PROGRAMS))
    programs = triton.cdiv(N, rows)
    dx = dresidual = dweight = dbias = None
    if x_dtype is not None:
        dx = dy.new_empty(dy.shape, dtype=x_dtype)
    if residual_dtype is not None:
        dresidual = dy.new_empty(dy.shape, dtype=residual_dtype)
    if needs_weight:
        dweight = dy.new_empty(programs, D, dtype=torch.float32)
    if needs_bias:
        dbias = dy.new_empty(programs, D, dtype=torch.float32)
    if N:
        with torch.cuda.device_of(dy):
            _backward_kernel[(programs,)](
                dy_rows,
                z,
                mean,
                reciprocal_deviation,
                weight,
                seed,
                dx,
                dresidual,
                dweight,
                dbias,
                N,
                rows,
                dy_rows.stride(0),
                dropout,
                1.0 / (1.0 - dropout),
                D=D,
                NUM_STAGES=3 if rows > tile["BLOCK_N"] else 1,
                **tile,
            )
    dweight, dbias = (None if each is None else each.sum(0) for each in (dweight, dbias))
    return dx, dresidual, dweight, dbias


def bias_gradients(
    db: torch.Tensor | None,
    needs_bias: bool,
    bias_dtype: torch.dtype,
    needs_delta: bool,
    delta_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return db and dδ, which are equal, each in its type and in memory of its own."""
    if db is None:
        return None, None
    dbias = db.to(bias_dtype) if needs_bias else None
    # Whoever is given the gradients may write to the one of them.
    return dbias, db.to(delta_dtype, copy=needs_bias) if needs_delta else None


class _DropoutAddNorm(torch.autograd.Function):
    """:func:`add_norm_forward` and :func:`add_norm_backward` in autograd."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, bias_delta, eps, dropout, dtype):
        needs_x, needs_residual, needs_weight, *_ = ctx.needs_input_grad
        seed = draw_seed(x.device) if dropout else None
        y, z, mean, reciprocal_deviation = add_norm_forward(
            x,
            residual,
            weight,
            bias,
            bias_delta,
            seed,
            eps,
            dropout,
            dtype,
            keep=needs_x or needs_residual or needs_weight,
        )
        ctx.dropout = dropout
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, bias, bias_delta)]
        ctx.save_for_backward(z, mean, reciprocal_deviation, weight, seed)
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("dropout_add_norm")
        z, mean, reciprocal_deviation, weight, seed = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, needs_bias, needs_delta, *_ = ctx.needs_input_grad
        x_dtype, residual_dtype, bias_dtype, delta_dtype = ctx.dtypes
        dx, dresidual, dweight, db = add_norm_backward(
            dy,
            z,
            mean,
            reciprocal_deviation,
            weight,
            seed,
            ctx.dropout,
            x_dtype if needs_x else None,
            residual_dtype if needs_residual else None,
            needs_weight,
            needs_bias or needs_delta,
        )
        dbias, ddelta = bias_gradients(db, needs_bias, bias_dtype, needs_delta, delta_dtype)
        dweight = None if dweight is None else dweight.to(weight.dtype)
        return dx, dresidual, dweight, dbias, ddelta, None, None, None


def dropout_add_norm_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    bias_delta: torch.Tensor | None,
    dropout: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Run the Triton form of :func:`spafit.kernels.dropout_add_norm`; ``dtype`` is y's.

    Raises
    ------
    ConfigError
        If the shapes are not (..., D), (..., D) and (D,).
    """
    D = x.shape[-1]
    vectors = [weight, bias] if bias_delta is None else [weight, bias, bias_delta]
    if residual.shape != x.shape or any(each.shape != (D,) for each in vectors):
        found = ", ".join(str(tuple(each.shape)) for each in (x, residual, *vectors))
        raise ConfigError(
            "dropout_add_norm(impl='triton') needs x and residual (..., D), weight, bias and delta "
            f"(D,), found {found}; use impl='reference' for shapes that are broadcast"
        )
    weight, bias, *rest = (each.contiguous() for each in vectors)
    delta = rest[0] if rest else None
    y: torch.Tensor
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, residual, *vectors)):
        y = _DropoutAddNorm.apply(x, residual, weight, bias, delta, eps, dropout, dtype)
    else:
        seed = draw_seed(x.device) if dropout else None
        y, *_ = add_norm_forward(
            x, residual, weight, bias, delta, seed, eps, dropout, dtype, keep=False
        )
    return y
