"""Scaled dot-product attention, Eq. (4), over packed sequences (without padding between them).

Tokens attend within their sequence alone, so attention is the one operation that must know where
each sequence begins. Consecutive sequences are computed together in bundles, padded to the longest
of the bundle if their lengths differ. A bundle for each sequence wastes calls, one bundle for all
wastes padding; :func:`bundling` finds the cheapest division.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from spafit.errors import ConfigError
from spafit.kernels import reference
from spafit.kernels.attention import attention
from spafit.kernels.dropout import draw_bits, scale_of, threshold
from spafit.kernels.forms import (
    choose_form,
    is_transformed,
    precision,
    refuse_second_derivative,
    why_no_triton,
)
from spafit.kernels.parts import wide

BY_SPANS = ("triton", "flash", "efficient")
"""The forms that find each sequence by its boundaries and compute no padding."""

TRITON_WIDEST_HEAD = 128
"""The largest Dh that the Triton kernel is for."""

FORMS = ("reference", "sdpa", "fused", *BY_SPANS)

_FUSED_TYPES = (torch.bfloat16, torch.float32, torch.float64)

# What one more bundle costs, in elements of a head's probabilities (T² of a sequence): the calls of
# forward and backward take 120 µs, an element of twelve to sixteen heads 0.14 µs.
_BUNDLE_COST = 850
# What padding a bundle costs for each of its tokens: its rows are gathered and scattered.
_GATHER_COST = 12

# One sequence alone of at most so many tokens takes less time in PyTorch's one operation than in
# the fused form, whose calls then outweigh what they compute.
_SHORT = 64


@dataclass(frozen=True)
class Bundle:
    """Sequences that attention takes together.

    Attributes
    ----------
    start, rows : int
        Its tokens: rows start .. start + rows - 1 of the packed tensor.
    count : int
        n sequences.
    longest : int
        T tokens of the longest.
    lengths : tuple of int
        The tokens of each sequence.
    gather : torch.Tensor of int64, (n·T,), or None
        The row, from start, that each place of the padded bundle is filled from; None where all
        sequences have T tokens, so that nothing is padded.
    scatter : torch.Tensor of int64, (rows,), or None
        The place in the padded bundle of each row.
    keep : torch.Tensor of bool, (n, 1, 1, T), or None
        True where there is a token.
    """

    start: int
    rows: int
    count: int
    longest: int
    lengths: tuple[int, ...]
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    keep: torch.Tensor | None


class Spans(NamedTuple):
    """Where each sequence lies, for the forms that look it up on the device.

    Attributes
    ----------
    boundaries : torch.Tensor of int32, (B + 1,)
        Sequence i has the rows from boundaries[i] to boundaries[i + 1] - 1.
    tokens : int
        boundaries[B], known on the host.
    longest : int
        What no sequence's length exceeds, known on the host.
    """

    boundaries: torch.Tensor
    tokens: int
    longest: int


def bundling(lengths: Sequence[int]) -> list[int]:
    """Divide sequences, in their order, into the bundles that cost least; give each one's count.

    The cost of a bundle of n sequences padded to T is n·T² + 850, and 12·n·T more where lengths
    differ.
    """
    best = [0.0] + [math.inf] * len(lengths)
    first = [0] * (len(lengths) + 1)
    for end in range(1, len(lengths) + 1):
        longest = shortest = lengths[end - 1]
        for start in range(end - 1, -1, -1):
            longest, shortest = max(longest, lengths[start]), min(shortest, lengths[start])
            cost = best[start] + (end - start) * longest**2 + _BUNDLE_COST
            if longest != shortest:
                cost += _GATHER_COST * (end - start) * longest
            if cost < best[end]:
                best[end], first[end] = cost, start
    counts, end = [], len(lengths)
    while end:
        counts.append(end - first[end])
        end = first[end]
    return counts[::-1]


def make_bundles(
    lengths: Sequence[int], counts: Sequence[int], device: torch.device, longest: int = 0
) -> tuple[Bundle, ...]:
    """Return the bundles of so many sequences each, with the index tensors that padding needs.

    With ``longest`` every bundle is padded to that many tokens and has its index tensors even where
    none of them is needed, so that their shapes depend on it alone.
    """
    bundles, sequence, row = [], 0, 0
    for count in counts:
        members = lengths[sequence : sequence + count]
        T, rows = longest or max(members), sum(members)
        gather = scatter = keep = None
        if longest or min(members) < T:
            sizes = torch.tensor(members)
            place = torch.arange(T)
            is_token = place < sizes[:, None]  # (n, T)
            begins = sizes.cumsum(0) - sizes
            # Padding repeats the first token of its sequence: a row that is there and finite.
            # Made on the host and sent without waiting, so that a GPU is never held up.
            gather = (begins[:, None] + place * is_token).flatten().to(device, non_blocking=True)
            scatter = is_token.flatten().nonzero().flatten().to(device, non_blocking=True)
            keep = is_token[:, None, None, :].to(device, non_blocking=True)
        bundles.append(Bundle(row, rows, count, T, tuple(members), gather, scatter, keep))
        sequence, row = sequence + count, row + rows
    return tuple(bundles)


def packed_attention(
    QKV: torch.Tensor,
    bundles: Sequence[Bundle],
    num_heads: int,
    dropout: float = 0.0,
    impl: str = "auto",
    spans: Spans | None = None,
) -> torch.Tensor:
    """Compute attention within each sequence, Eq. (4): H1 = softmax(QKᵀ / √Dh) V in each head.

    Parameters
    ----------
    QKV : torch.Tensor, (N, 3·D)
        Queries, keys and values side by side, A heads of size Dh = D / A in each.
    bundles : sequence of Bundle
        The sequences, one after the other from row 0. Rows after the last belong to none.
    num_heads : int
        A.
    dropout : float
        Rate at which attention probabilities are dropped; 0 outside training.
    impl : {"auto", "reference", "sdpa", "fused", "triton", "flash", "efficient"}
        ``"sdpa"`` is PyTorch's ``scaled_dot_product_attention`` on each bundle; ``"fused"`` is one
        operation on a CPU that keeps QKV and one number a probability for backward; bfloat16 it
        converts to float32, computes in that and rounds the result. ``"triton"``
        (:mod:`~spafit.kernels.gpu.triton_attention`), ``"flash"`` and
        ``"efficient"`` (:mod:`~spafit.kernels.gpu.varlen_attention`) are for a GPU and compute no
        padding. ``"auto"`` is ``"fused"`` on a CPU, but ``"sdpa"`` for one short sequence of which
        no gradient is asked for; on a GPU the fastest of those that the device has
        (:mod:`~spafit.kernels.gpu.choices`).
    spans : Spans, optional
        The same sequences once more, for the last three forms.

    Returns
    -------
    torch.Tensor, (N, D)
        H1, the heads side by side; 0 in rows that belong to no sequence.

    Raises
    ------
    ConfigError
        If ``impl`` is none of the seven or is not available, or a second derivative of a fused or
        Triton form is asked for.
    """
    auto = ""
    if impl == "auto" and not is_transformed():
        auto = _best(QKV, bundles, num_heads, dropout, spans)
    form = choose_form("packed_attention", impl, FORMS, auto)
    if form == "reference":
        lengths = [length for bundle in bundles for length in bundle.lengths]
        return reference.packed_attention(QKV, lengths, num_heads, dropout)
    if form == "sdpa":
        return _by_bundles(QKV, bundles, num_heads, dropout)
    if form != "fused":
        return _by_spans(QKV, spans, num_heads, dropout, form)
    if not _can_fuse(QKV):
        raise ConfigError(
            f"packed_attention(impl='fused') is for bfloat16, float32 and float64 on a CPU, found "
            f'{QKV.dtype} on {QKV.device}; use "sdpa"'
        )
    with torch.autocast("cpu", enabled=False):  # it would round the products that are in float32
        if torch.is_grad_enabled() and QKV.requires_grad:
            H1: torch.Tensor = _PackedAttention.apply(QKV, bundles, num_heads, dropout)  # type: ignore[no-untyped-call]
            return H1
        return _forward(QKV, bundles, num_heads, dropout, keep=False)[0]


def why_not(form: str, QKV: torch.Tensor, num_heads: int) -> str:
    """Return why one of the forms that take spans is not available for QKV; empty if it is."""
    head_size = QKV.shape[1] // 3 // num_heads
    if form == "triton" and head_size > TRITON_WIDEST_HEAD:
        return f"it has heads of at most {TRITON_WIDEST_HEAD}, found {head_size}"
    if form == "triton":
        return why_no_triton(QKV.device, QKV.dtype)
    from spafit.kernels.gpu.varlen_attention import why_no_efficient, why_no_flash

    reasons = {"flash": why_no_flash, "efficient": why_no_efficient}
    return reasons[form](QKV.device, QKV.dtype, head_size)


def _can_fuse(QKV: torch.Tensor) -> bool:
    return QKV.device.type == "cpu" and QKV.dtype in _FUSED_TYPES


def _best(
    QKV: torch.Tensor,
    bundles: Sequence[Bundle],
    num_heads: int,
    dropout: float,
    spans: Spans | None,
) -> str:
    """Return the fastest form for such sequences on such a device."""
    if torch.compiler.is_compiling():
        return "sdpa"
    if QKV.device.type == "cpu":
        learns = torch.is_grad_enabled() and QKV.requires_grad
        alone = len(bundles) == 1 and bundles[0].count == 1 and len(QKV) <= _SHORT
        is_short = alone and not learns and not dropout and QKV.dtype != torch.bfloat16
        return "fused" if _can_fuse(QKV) and not is_short else "sdpa"
    if spans is None:
        return "sdpa"
    # The gradients of PyTorch's two operators are sums in no fixed order.
    repeats = torch.are_deterministic_algorithms_enabled()
    candidates = BY_SPANS[:1] if repeats else BY_SPANS
    can_be_had = [form for form in candidates if not why_not(form, QKV, num_heads)]
    if not can_be_had:
        return "sdpa"
    return _fastest(QKV, bundles, num_heads, dropout, spans, [*can_be_had, "sdpa"])


def _fastest(
    QKV: torch.Tensor,
    bundles: Sequence[Bundle],
    num_heads: int,
    dropout: float,
    spans: Spans,
    forms: Sequence[str],
) -> str:
    learns = torch.is_grad_enabled() and QKV.requires_grad
    head_size = QKV.shape[1] // 3 // num_heads
    T = max(64, 1 << (spans.longest - 1).bit_length())
    key = (
        f"N<={1 << (len(QKV) - 1).bit_length()} T<={T} A={num_heads} Dh={head_size} "
        f"dropout={dropout > 0} backward={learns} {precision(QKV.dtype)}"
    )
    made: list[torch.Tensor] = []

    def run(form: str, rate: float) -> list[torch.Tensor]:
        if not made:  # only now: nothing is drawn if the choice is known already
            made.append(_stand_in(QKV, learns))
        [given] = made
        H1 = packed_attention(given, bundles, num_heads, rate, form, spans)
        return [H1, *torch.autograd.grad(H1, given, H1.detach())] if learns else [H1]

    from spafit.kernels.gpu.choices import fastest  # only where a GPU is at hand

    return fastest("packed_attention", key, QKV.device, forms, run, dropout)


def _stand_in(QKV: torch.Tensor, learns: bool) -> torch.Tensor:
    """Return random numbers of QKV's shape and type for the timing, from a separate generator."""
    generator = torch.Generator(QKV.device).manual_seed(0)
    given = torch.randn(QKV.shape, generator=generator, device=QKV.device)
    return given.to(QKV.dtype).requires_grad_(learns)


def _by_spans(
    QKV: torch.Tensor, spans: Spans | None, num_heads: int, dropout: float, form: str
) -> torch.Tensor:
    if spans is None:
        raise ConfigError(f"packed_attention(impl={form!r}) needs the sequences' spans")
    reason = why_not(form, QKV, num_heads)
    if reason:
        raise ConfigError(f"packed_attention(impl={form!r}) is not available: {reason}")
    if form == "triton":
        from spafit.kernels.gpu.triton_attention import packed_attention_triton

        return packed_attention_triton(QKV, *spans, num_heads, dropout)
    from spafit.kernels.gpu.varlen_attention import efficient, flash

    attend = flash if form == "flash" else efficient
    return attend(QKV, *spans, num_heads, dropout)


def _by_bundles(
    QKV: torch.Tensor, bundles: Sequence[Bundle], num_heads: int, dropout: float
) -> torch.Tensor:
    outputs = []
    for bundle in bundles:
        Q, K, V = _heads(padded_rows(QKV, bundle), bundle, num_heads)  # (n, A, T, Dh)
        H1 = (
            attention(Q, K, V, bundle.keep, dropout, "sdpa").transpose(1, 2).flatten(2)
        )  # (n, T, D)
        H1 = H1.flatten(0, 1)  # (n·T, D)
        outputs.append(H1 if bundle.scatter is None else H1.index_select(0, bundle.scatter))
    tail = len(QKV) - sum(bundle.rows for bundle in bundles)
    if tail:
        outputs.append(QKV.new_zeros(tail, QKV.shape[1] // 3))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def padded_rows(rows: torch.Tensor, bundle: Bundle) -> torch.Tensor:
    """Return a bundle's rows of (N, ...) padded to (n·T, ...); a view where nothing is padded."""
    x = rows[bundle.start : bundle.start + bundle.rows]
    return x if bundle.gather is None else x.index_select(0, bundle.gather)


def _heads(x: torch.Tensor, bundle: Bundle, num_heads: int, fields: int = 3) -> torch.Tensor:
    """View (n·T, fields·D) as (fields, n, A, T, Dh): the fields are queries, keys and values."""
    return x.view(bundle.count, bundle.longest, fields, num_heads, -1).permute(2, 0, 3, 1, 4)


def _forward(
    QKV: torch.Tensor, bundles: Sequence[Bundle], num_heads: int, dropout: float, keep: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return H1, and each bundle's probabilities (n·A, T, T), negated where they are dropped."""
    N, D = QKV.shape[0], QKV.shape[1] // 3
    dtype = QKV.dtype
    QKV = QKV.to(wide(dtype))
    H1 = QKV.new_empty(N, D)
    H1[sum(bundle.rows for bundle in bundles) :] = 0
    scale = scale_of(dropout, QKV.device) if dropout else 1.0
    signed = []
    for bundle in bundles:
        # With one sequence these are views; with several, copies that lie head by head.
        Q, K, V = _heads(padded_rows(QKV, bundle), bundle, num_heads).flatten(1, 2)  # (n·A, T, Dh)
        scores = _bmm(Q, K.transpose(1, 2), 1.0 / math.sqrt(Q.shape[-1]))  # (n·A, T, T)
        if bundle.keep is not None:
            by_sequence = scores.view(bundle.count, num_heads, bundle.longest, bundle.longest)
            by_sequence.masked_fill_(~bundle.keep, float("-inf"))
        P = torch.softmax(scores, dim=-1)
        if dropout:
            dropped = torch.empty_like(P)
            torch.lt(draw_bits(P.shape), threshold(dropout), out=dropped)
            dropped.mul_(P)  # P where it is dropped, else 0
            P.sub_(dropped)  # 0 where it is dropped
        head_outputs = _bmm(P, V, scale)  # (n·A, T, Dh)
        if keep:
            # The sign is the mask, so that it needs no memory of its own.
            signed.append(P.sub_(dropped) if dropout else P)
        _write(H1, bundle, num_heads, [head_outputs])
    return H1.to(dtype), signed


class _PackedAttention(torch.autograd.Function):
    """With dP = dH1 Vᵀ dropped as P was: dS = P ⊙ (dP - rowsum(dP ⊙ P)), dQ = dS K, dK = dSᵀ Q."""

    @staticmethod
    def forward(ctx, QKV, bundles, num_heads, dropout):  # type: ignore[no-untyped-def]
        H1, signed = _forward(QKV, bundles, num_heads, dropout, keep=True)
        ctx.bundles, ctx.num_heads, ctx.dropout = bundles, num_heads, dropout
        ctx.save_for_backward(QKV, *signed)
        return H1

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, dH1):  # type: ignore[no-untyped-def]
        refuse_second_derivative("packed_attention")
        QKV, *all_signed = ctx.saved_tensors
        dtype = QKV.dtype
        QKV, dH1 = QKV.to(wide(dtype)), dH1.to(wide(dtype))
        A, dropout = ctx.num_heads, ctx.dropout
        dropout_scale = scale_of(dropout, QKV.device) if dropout else 1.0
        dQKV = torch.empty_like(QKV)
        dQKV[sum(bundle.rows for bundle in ctx.bundles) :] = 0
        for bundle, signed in zip(ctx.bundles, all_signed, strict=True):
            Q, K, V = _heads(padded_rows(QKV, bundle), bundle, A).flatten(1, 2)  # (n·A, T, Dh)
            scale = 1.0 / math.sqrt(Q.shape[-1])
            padded = dH1[bundle.start : bundle.start + bundle.rows]
            if bundle.scatter is not None:  # at padding the gradient is 0
                padded = padded.new_zeros(
                    bundle.count * bundle.longest, padded.shape[1]
                ).index_copy_(0, bundle.scatter, padded)
            [dO] = _heads(padded, bundle, A, fields=1).flatten(1, 2)  # (n·A, T, Dh)
            kept = torch.relu(signed) if dropout else signed
            dV = _bmm(kept.transpose(1, 2), dO, dropout_scale)
            dP = _bmm(dO, V.transpose(1, 2), dropout_scale)  # (n·A, T, T)
            P = signed
            if dropout:
                dP = torch.ops.aten.threshold_backward(dP, signed, 0.0)  # 0 where P was dropped
                P = signed.abs()
            dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
            dQ = _bmm(dS, K, scale)
            dK = _bmm(dS.transpose(1, 2), Q, scale)
            _write(dQKV, bundle, A, [dQ, dK, dV])
        return dQKV.to(dtype), None, None, None


def _bmm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(a.new_empty(()), a, b, beta=0.0, alpha=scale)


def _write(
    rows: torch.Tensor, bundle: Bundle, num_heads: int, fields: Sequence[torch.Tensor]
) -> None:
    """Write fields (n·A, T, Dh) each into a bundle's rows of (N, fields·D), side by side."""
    target = rows[bundle.start : bundle.start + bundle.rows]
    places = target
    if bundle.scatter is not None:
        places = rows.new_empty(bundle.count * bundle.longest, rows.shape[1])
    for into, field in zip(
        _heads(places, bundle, num_heads, len(fields)), fields, strict=True
    ):  # (n, A, T, Dh)
        into.copy_(field.view(into.shape))
    if bundle.scatter is not None:
        torch.index_select(places, 0, bundle.scatter, out=target)
