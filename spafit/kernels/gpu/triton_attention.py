"""Attention over packed sequences on a GPU: FlashAttention-2 (Dao 2023), written in Triton.

For each head, with S = Q Kᵀ / √Dh of one sequence, and Z what dropout multiplies by (0 or 1 over
the keep rate),

    P = softmax(S),    H1 = (P ⊙ Z) V,    dV = (P ⊙ Z)ᵀ dH1,    dP = (dH1 Vᵀ) ⊙ Z,
    dS = P ⊙ (dP - Δ),    dQ = dS K / √Dh,    dK = dSᵀ Q / √Dh,    Δ = rowsum(dP ⊙ P).

Nothing of the size of S is kept. Forward takes the softmax one block of keys after the other and
keeps one number a row, the logarithm of its sum; backward computes P from it and draws Z again. Row
i of dP ⊙ P sums to dH1ᵢ · Σⱼ Pᵢⱼ Zᵢⱼ Vⱼ, so that Δ = rowsum(dH1 ⊙ H1), with dropout as without it.
Exponentials are of base 2, whose factor log₂e joins the scale of S.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spafit.errors import ConfigError
from spafit.kernels.forms import refuse_second_derivative
from spafit.kernels.gpu.triton_common import dot, draw_seed, precision_of, rounded

LEVELS = 65_536
"""A draw of dropout has 16 bits, so that the rate is rounded to a multiple of 1/65,536."""


@triton.jit
def _draw_levels(seed, row, first_key, head, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Draw a number of 16 bits for each probability of a tile, (ROWS, KEYS) of uint32.

    Philox gives 128 bits a counter, which serve eight keys side by side; the counter is (group of
    eight keys, row of QKV, head, 0). One draw a key would cost more than all products together.
    Seven rounds, as FlashAttention takes, are the fewest that pass the tests of randomness.
    """
    group = first_key // 8 + tl.arange(0, KEYS // 8)
    a, b, c, d = tl.philox(seed, group[None, :], row[:, None], head, 0, n_rounds=7)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (ROWS, KEYS // 2))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, KEYS))


@triton.jit
def _load_rows(base, stride, row, length, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load a head's rows, 0 beyond the sequence and beyond the head: (rows, WIDTH).

    Offsets within one sequence fit 32 bits.
    """
    column = tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (column < DIM)[None, :]
    return tl.load(base + row[:, None] * stride + column[None, :], inside, 0.0)


@triton.jit
def _store_rows(base, stride, row, length, x, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store float32 x (rows, WIDTH) where :func:`_load_rows` would load it from."""
    column = tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (column < DIM)[None, :]
    place = base + row[:, None] * stride + column[None, :]
    tl.store(place, rounded(x, base.dtype.element_ty), inside)


@triton.jit
def _clear_rows(
    base, stride, first, step, N, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Store 0 into a head's rows first .. first + ROWS - 1, and so on every ``step`` rows to N."""
    zeros = tl.zeros((ROWS, WIDTH), tl.float32)
    for begin in range(first, N, step):
        rest = base + tl.cast(begin, tl.int64) * stride
        _store_rows(rest, stride, tl.arange(0, ROWS), N - begin, zeros, DIM, WIDTH)


# Every kernel's grid: (blocks of the longest sequence) for each sequence and once more for the rows
# that belong to none, whose outputs are 0; times heads. All it must know of the sequences it reads
# on the device, so that a captured graph serves any lengths up to the longest.


@triton.jit(do_not_specialize=["N", "sequences", "longest", "dropped"])
def _forward_kernel(
    QKV,  # (N, 3·D)
    BOUNDARIES,  # (sequences + 1,)
    SEED,  # (1,), or None without dropout
    H1,  # (N, D)
    LSE,  # (A, N), log₂ of the sum of 2 to the scores
    N,
    sequences,
    longest,
    qkv_stride,
    score_scale,
    dropped,
    keep_scale,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    dtype: tl.constexpr = QKV.dtype.element_ty
    head = tl.program_id(1)
    D = tl.num_programs(1) * DIM
    blocks = tl.cdiv(longest, ROWS)
    sequence = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * ROWS
    start = tl.load(BOUNDARIES + sequence)
    if sequence == sequences:
        _clear_rows(H1 + head * DIM, D, start + first, blocks * ROWS, N, DIM, WIDTH, ROWS)
        return
    length = tl.load(BOUNDARIES + sequence + 1) - start
    if first >= length:
        return
    Q = QKV + start.to(tl.int64) * qkv_stride + head * DIM
    K = Q + D
    V = K + D
    row = first + tl.arange(0, ROWS)
    q = _load_rows(Q, qkv_stride, row, length, DIM, WIDTH)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    seed = 0 if SEED is None else tl.load(SEED)
    for first_key in range(0, length, KEYS):
        key = first_key + tl.arange(0, KEYS)
        k = _load_rows(K, qkv_stride, key, length, DIM, WIDTH)
        s = dot(q, tl.trans(k), tl.zeros((ROWS, KEYS), tl.float32), PRECISION)
        s = tl.where((key < length)[None, :], s * score_scale, float("-inf"))
        # Each block has a key that exists, so that the highest is a number.
        new_highest = tl.maximum(highest, tl.max(s, axis=1))
        p = tl.exp2(s - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(p, axis=1)
        if SEED is not None:
            level = _draw_levels(seed, start + row, first_key, head, ROWS, KEYS)
            p = tl.where(level >= dropped, p, 0.0)
        v = _load_rows(V, qkv_stride, key, length, DIM, WIDTH)
        acc = dot(rounded(p, dtype), v, acc * shrink[:, None], PRECISION)
        highest = new_highest
    acc *= (keep_scale / total)[:, None]
    _store_rows(H1 + start.to(tl.int64) * D + head * DIM, D, row, length, acc, DIM, WIDTH)
    lse = highest + tl.log2(total)
    tl.store(LSE + tl.cast(head, tl.int64) * N + start + row, lse, row < length)


@triton.jit(do_not_specialize=["N", "sequences", "longest", "dropped"])
def _query_gradient_kernel(
    QKV,  # (N, 3·D)
    BOUNDARIES,  # (sequences + 1,)
    SEED,  # (1,), or None without dropout
    H1,  # (N, D)
    LSE,  # (A, N)
    DH1,  # (N, D)
    DELTA,  # (A, N), written for the kernel below
    DQKV,  # (N, 3·D), of which dQ is written
    N,
    sequences,
    longest,
    qkv_stride,
    dh1_stride,
    score_scale,
    gradient_scale,
    dropped,
    keep_scale,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    dtype: tl.constexpr = QKV.dtype.element_ty
    head = tl.program_id(1)
    D = tl.num_programs(1) * DIM
    blocks = tl.cdiv(longest, ROWS)
    sequence = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * ROWS
    start = tl.load(BOUNDARIES + sequence)
    if sequence == sequences:
        _clear_rows(DQKV + head * DIM, 3 * D, start + first, blocks * ROWS, N, DIM, WIDTH, ROWS)
        return
    length = tl.load(BOUNDARIES + sequence + 1) - start
    if first >= length:
        return
    begin = start.to(tl.int64)
    Q = QKV + begin * qkv_stride + head * DIM
    row = first + tl.arange(0, ROWS)
    q = _load_rows(Q, qkv_stride, row, length, DIM, WIDTH)
    dh1 = _load_rows(DH1 + begin * dh1_stride + head * DIM, dh1_stride, row, length, DIM, WIDTH)
    h1 = _load_rows(H1 + begin * D + head * DIM, D, row, length, DIM, WIDTH)
    delta = tl.sum(dh1.to(tl.float32) * h1.to(tl.float32), axis=1)  # (ROWS,)
    place = tl.cast(head, tl.int64) * N + start + row
    tl.store(DELTA + place, delta, row < length)
    lse = tl.load(LSE + place, row < length, 0.0)
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    seed = 0 if SEED is None else tl.load(SEED)
    for first_key in range(0, length, KEYS):
        key = first_key + tl.arange(0, KEYS)
        k = _load_rows(Q + D, qkv_stride, key, length, DIM, WIDTH)
        v = _load_rows(Q + 2 * D, qkv_stride, key, length, DIM, WIDTH)
        s = dot(q, tl.trans(k), tl.zeros((ROWS, KEYS), tl.float32), PRECISION)
        p = tl.exp2(s * score_scale - lse[:, None])
        p = tl.where((key < length)[None, :], p, 0.0)
        dp = dot(dh1, tl.trans(v), tl.zeros((ROWS, KEYS), tl.float32), PRECISION)
        if SEED is not None:
            level = _draw_levels(seed, start + row, first_key, head, ROWS, KEYS)
            dp = tl.where(level >= dropped, dp * keep_scale, 0.0)
        ds = rounded(p * (dp - delta[:, None]), dtype)
        dq = dot(ds, k, dq, PRECISION)
    dQ = DQKV + begin * (3 * D) + head * DIM
    _store_rows(dQ, 3 * D, row, length, dq * gradient_scale, DIM, WIDTH)


@triton.jit(do_not_specialize=["N", "sequences", "longest", "dropped"])
def _key_gradient_kernel(
    QKV,  # (N, 3·D)
    BOUNDARIES,  # (sequences + 1,)
    SEED,  # (1,), or None without dropout
    H1,  # (N, D), read where ALL_KEYS
    LSE,  # (A, N)
    DH1,  # (N, D)
    DELTA,  # (A, N), or None where ALL_KEYS
    DQKV,  # (N, 3·D), of which dK and dV are written, and dQ where ALL_KEYS
    N,
    sequences,
    longest,
    qkv_stride,
    dh1_stride,
    score_scale,
    gradient_scale,
    dropped,
    keep_scale,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ALL_KEYS: tl.constexpr,  # a block holds all keys of any sequence, so that dQ is had here
):
    dtype: tl.constexpr = QKV.dtype.element_ty
    head = tl.program_id(1)
    D = tl.num_programs(1) * DIM
    blocks = tl.cdiv(longest, KEYS)
    sequence = tl.program_id(0) // blocks
    first_key = (tl.program_id(0) % blocks) * KEYS
    start = tl.load(BOUNDARIES + sequence)
    if sequence == sequences:
        for field in tl.static_range(0 if ALL_KEYS else 1, 3):
            rest = DQKV + field * D + head * DIM
            _clear_rows(rest, 3 * D, start + first_key, blocks * KEYS, N, DIM, WIDTH, KEYS)
        return
    length = tl.load(BOUNDARIES + sequence + 1) - start
    if first_key >= length:
        return
    begin = start.to(tl.int64)
    Q = QKV + begin * qkv_stride + head * DIM
    dH1 = DH1 + begin * dh1_stride + head * DIM
    dQ = DQKV + begin * (3 * D) + head * DIM
    key = first_key + tl.arange(0, KEYS)
    k = _load_rows(Q + D, qkv_stride, key, length, DIM, WIDTH)
    v = _load_rows(Q + 2 * D, qkv_stride, key, length, DIM, WIDTH)
    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)
    seed = 0 if SEED is None else tl.load(SEED)
    for first in range(0, length, ROWS):
        row = first + tl.arange(0, ROWS)
        q = _load_rows(Q, qkv_stride, row, length, DIM, WIDTH)
        dh1 = _load_rows(dH1, dh1_stride, row, length, DIM, WIDTH)
        place = tl.cast(head, tl.int64) * N + start + row
        lse = tl.load(LSE + place, row < length, 0.0)
        if ALL_KEYS:
            h1 = _load_rows(H1 + begin * D + head * DIM, D, row, length, DIM, WIDTH)
            delta = tl.sum(dh1.to(tl.float32) * h1.to(tl.float32), axis=1)  # (ROWS,)
        else:
            delta = tl.load(DELTA + place, row < length, 0.0)
        # Transposed, (KEYS, ROWS), so that P and dS are left factors, which stay in registers. Rows
        # beyond the sequence add 0, for their dH1, Q and Δ are 0.
        s = dot(k, tl.trans(q), tl.zeros((KEYS, ROWS), tl.float32), PRECISION)
        p = tl.exp2(s * score_scale - lse[None, :])
        if ALL_KEYS:  # else what lies in the rows of keys beyond the sequence is not stored
            p = tl.where((key < length)[:, None], p, 0.0)
        dp = dot(v, tl.trans(dh1), tl.zeros((KEYS, ROWS), tl.float32), PRECISION)
        kept_p = p
        if SEED is not None:
            level = _draw_levels(seed, start + row, first_key, head, ROWS, KEYS)
            keep = tl.trans(level >= dropped)
            kept_p = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = dot(rounded(kept_p, dtype), dh1, dv, PRECISION)
        ds = rounded(p * (dp - delta[None, :]), dtype)
        dk = dot(ds, q, dk, PRECISION)
        if ALL_KEYS:
            dq = dot(tl.trans(ds), k, tl.zeros((ROWS, WIDTH), tl.float32), PRECISION)
            _store_rows(dQ, 3 * D, row, length, dq * gradient_scale, DIM, WIDTH)
    _store_rows(dQ + D, 3 * D, key, length, dk * gradient_scale, DIM, WIDTH)
    _store_rows(dQ + 2 * D, 3 * D, key, length, dv * keep_scale, DIM, WIDTH)


class _Tiles(NamedTuple):
    """Queries and keys of a kernel's tile, its warps, and the stages of its loop."""

    ROWS: int
    KEYS: int
    num_warps: int
    num_stages: int


# Half types: Dh <= 64 and sequences of up to 64 tokens, longer ones, Dh > 64. Float32: Dh <= 64 and
# more. Of a thread's 255 registers none is spilled on sm_80 and sm_90 where Dh <= 64, with and
# without dropout; elsewhere 12 bytes at most.
_TILES = {
    "forward": [(64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)],
    "query": [(64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)],
    "key": [(32, 64, 4, 2), (32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)],
    "all_keys": [(32, 64, 4, 2), (16, 128, 8, 2), (32, 64, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1)],
}


def _tiles(kernel: str, dtype: torch.dtype, head_size: int, length: int) -> _Tiles:
    """Choose tiles for a kernel, "forward", "query", "key" or "all_keys", for sequences so long."""
    if dtype == torch.float32:
        column = 3 if head_size <= 64 else 4
    else:
        column = int(length > 64) if head_size <= 64 else 2
    return _Tiles(*_TILES[kernel][column])


class _Problem(NamedTuple):
    """What every launch is told, beside its tensors."""

    boundaries: torch.Tensor
    seed: torch.Tensor | None
    tokens: int
    longest: int
    num_heads: int
    dropout: float


def _launch(kernel, name, QKV, problem, length, **others):
    """Launch a kernel on all blocks of all sequences, with tiles for sequences of ``length``."""
    head_size = QKV.shape[1] // 3 // problem.num_heads
    sequences = len(problem.boundaries) - 1
    dropped = min(round(problem.dropout * LEVELS), LEVELS - 1)
    tiles = _tiles(name, QKV.dtype, head_size, length)
    longest = max(problem.longest, 1)
    block = tiles.ROWS if name in ("forward", "query") else tiles.KEYS
    grid = ((sequences + 1) * triton.cdiv(longest, block), problem.num_heads)
    with torch.cuda.device_of(QKV):
        kernel[grid](
            QKV=QKV,
            BOUNDARIES=problem.boundaries,
            SEED=problem.seed,
            N=len(QKV),
            sequences=sequences,
            longest=longest,
            qkv_stride=QKV.stride(0),
            score_scale=math.log2(math.e) / math.sqrt(head_size),
            dropped=dropped,
            keep_scale=LEVELS / (LEVELS - dropped),
            PRECISION=precision_of(QKV.dtype),
            DIM=head_size,
            WIDTH=max(16, triton.next_power_of_2(head_size)),
            **others,
            **tiles._asdict(),
        )


def _forward(QKV: torch.Tensor, problem: _Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Return H1 (N, D) and the logarithms (A, N)."""
    N = len(QKV)
    H1 = QKV.new_empty(N, QKV.shape[1] // 3)
    LSE = QKV.new_empty(problem.num_heads, N, dtype=torch.float32)
    if N:
        _launch(_forward_kernel, "forward", QKV, problem, _typical(problem), H1=H1, LSE=LSE)
    return H1, LSE


def _backward(
    dH1: torch.Tensor, QKV: torch.Tensor, H1: torch.Tensor, LSE: torch.Tensor, problem: _Problem
) -> torch.Tensor:
    """Return dQKV (N, 3·D)."""
    dQKV = torch.empty_like(QKV, memory_format=torch.contiguous_format)
    if not len(QKV):
        return dQKV
    head_size = H1.shape[1] // problem.num_heads
    all_keys = problem.longest <= _tiles("all_keys", QKV.dtype, head_size, problem.longest).KEYS
    given = {
        "H1": H1,
        "LSE": LSE,
        "DH1": dH1,
        "DELTA": None if all_keys else torch.empty_like(LSE),
        "DQKV": dQKV,
        "dh1_stride": dH1.stride(0),
        "gradient_scale": 1.0 / math.sqrt(head_size),
    }
    length = problem.longest if all_keys else _typical(problem)
    if not all_keys:
        _launch(_query_gradient_kernel, "query", QKV, problem, length, **given)
    name = "all_keys" if all_keys else "key"
    _launch(_key_gradient_kernel, name, QKV, problem, length, ALL_KEYS=all_keys, **given)
    return dQKV


def _typical(problem: _Problem) -> int:
    """Return the mean length, which tiles are chosen for where a sequence may take several."""
    return -(-problem.tokens // max(len(problem.boundaries) - 1, 1))


class _PackedAttention(torch.autograd.Function):
    """Keeps QKV, H1, one float32 a row and head, and the seed of dropout."""

    @staticmethod
    def forward(ctx, QKV, boundaries, tokens, longest, num_heads, dropout):
        if QKV.stride(1) != 1:
            QKV = QKV.contiguous()
        seed = draw_seed(QKV.device) if dropout else None
        problem = _Problem(boundaries, seed, tokens, longest, num_heads, dropout)
        H1, LSE = _forward(QKV, problem)
        ctx.numbers = tokens, longest, num_heads, dropout
        ctx.save_for_backward(QKV, H1, LSE, boundaries, seed)
        return H1

    @staticmethod
    def backward(ctx, dH1):
        refuse_second_derivative("packed_attention")
        QKV, H1, LSE, boundaries, seed = ctx.saved_tensors
        if dH1.stride(1) != 1:
            dH1 = dH1.contiguous()
        dQKV = _backward(dH1, QKV, H1, LSE, _Problem(boundaries, seed, *ctx.numbers))
        return dQKV, None, None, None, None, None


def packed_attention_triton(
    QKV: torch.Tensor,
    boundaries: torch.Tensor,
    tokens: int,
    longest: int,
    num_heads: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute attention within each sequence, Eq. (4): H1 = softmax(QKᵀ / √Dh) V in each head.

    Parameters
    ----------
    QKV : torch.Tensor, (N, 3·D)
        Queries, keys and values side by side, A heads of size Dh = D / A in each, Dh from 1 to 128;
        float32, bfloat16 or float16, on a GPU. Its rows may lie apart.
    boundaries : torch.Tensor of int32, (B + 1,)
        On the same device: sequence i has the rows boundaries[i] .. boundaries[i + 1] - 1. The
        first is 0; a sequence may be empty.
    tokens : int
        Rows that belong to a sequence. Tiles are chosen by it; which rows they are is read from
        ``boundaries``, so that a captured graph may be replayed with other lengths.
    longest : int
        No sequence is longer.
    num_heads : int
        A.
    dropout : float
        Rate at which attention probabilities are dropped, rounded to a multiple of 1/65,536; 0
        outside training. The mask depends on PyTorch's generator of the device alone.

    Returns
    -------
    torch.Tensor, (N, D)
        H1 with its heads joined; 0 in rows that belong to no sequence. A run repeats bit for bit.

    Raises
    ------
    ConfigError
        If heads are larger than 128, or a second derivative is asked for.
    """
    head_size = QKV.shape[1] // 3 // num_heads
    if head_size > 128:
        raise ConfigError(
            f"packed_attention(impl='triton') has heads of at most 128, found {head_size}; "
            "use impl='sdpa'"
        )
    H1: torch.Tensor = _PackedAttention.apply(QKV, boundaries, tokens, longest, num_heads, dropout)
    return H1
