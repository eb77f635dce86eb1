"""The stacked linear map as an operator of PyTorch's library, so that torch.compile keeps it whole.

In eager mode :mod:`spafit.kernels.lora_linear` calls its autograd function itself, which costs a
fifth of the library's way (5 against 30 µs a call).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spafit.kernels.lora_linear import Kept, Part, backward, forward, merges_forward


def _make_parts(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scalings: Sequence[float],
    dropout: float,
) -> list[Part]:
    """Put the parts together; of δ, A and B, what a part lacks is an empty tensor."""
    optional = [[t if t.numel() else None for t in row] for row in (deltas, lora_A, lora_B)]
    columns = (weights, biases, *optional, scalings, [dropout] * len(weights))
    return [Part(*row) for row in zip(*columns, strict=True)]


# Whoever computes it again must not draw again: it is kept instead (activation checkpointing).
@torch.library.custom_op(
    "spafit::stacked_linear", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _stacked_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scalings: Sequence[float],
    dropout: float,
    gelu: bool,
    fresh: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give y, and U, the mask and what GELU was applied to, each empty where there is none.

    ``fresh`` is an empty tensor made for each call: without it two equal calls would be taken for
    one, with one draw of dropout.
    """
    parts = _make_parts(weights, biases, deltas, lora_A, lora_B, scalings, dropout)
    y, kept = forward(x, parts, gelu, keep=True)
    empty = [x.new_empty(0, dtype=dtype) for dtype in (x.dtype, torch.bool, x.dtype)]
    U, mask, before_gelu = (
        nothing if each is None else each for each, nothing in zip(kept, empty, strict=True)
    )
    return y, U, mask, before_gelu


@_stacked_linear.register_fake
def _(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scalings: Sequence[float],
    dropout: float,
    gelu: bool,
    fresh: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    parts = _make_parts(weights, biases, deltas, lora_A, lora_B, scalings, dropout)
    ranks = sum(len(A) for A in lora_A)
    additive = ranks > 0 and not merges_forward(x, parts)
    y = x.new_empty(x.shape[0], sum(len(bias) for bias in biases))
    U = x.new_empty((x.shape[0], ranks) if additive else (0,))
    mask = x.new_empty(x.shape, dtype=torch.bool) if additive and dropout else x.new_empty(0).bool()
    return y, U, mask, torch.empty_like(y) if gelu else x.new_empty(0)


@torch.library.custom_op("spafit::stacked_linear_backward", mutates_args=())
def _stacked_linear_backward(
    dY: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scalings: Sequence[float],
    dropout: float,
    U: torch.Tensor,
    mask: torch.Tensor,
    before_gelu: torch.Tensor,
    needs_x: bool,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Give the gradients that are asked for, in the order of the inputs."""
    parts = _make_parts(weights, biases, deltas, lora_A, lora_B, scalings, dropout)
    kept = Kept(*(each if each.numel() else None for each in (U, mask, before_gelu)))
    rows = [list(needs[len(parts) * f : len(parts) * (f + 1)]) for f in range(5)]
    dx, gradients = backward(dY, x, parts, kept, needs_x, rows)
    wanted = [dx, *(gradient for row in gradients for gradient in row)]
    # An operator's results must not share memory, as the parts of one product's rows do.
    return [gradient.clone() for gradient in wanted if gradient is not None]


@_stacked_linear_backward.register_fake
def _(
    dY: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scalings: Sequence[float],
    dropout: float,
    U: torch.Tensor,
    mask: torch.Tensor,
    before_gelu: torch.Tensor,
    needs_x: bool,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    inputs = [*weights, *biases, *deltas, *lora_A, *lora_B]
    wanted = [each for each, needed in zip(inputs, needs, strict=True) if needed]
    return [
        each.new_empty(each.shape) for each in ([x] if needs_x else []) + wanted if each is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, *rows, scalings, dropout, _, _ = inputs
    ctx.count, ctx.scalings, ctx.dropout = len(rows[0]), scalings, dropout
    ctx.save_for_backward(x, *(tensor for row in rows for tensor in row), *output[1:])
    ctx.needs_x = x.requires_grad
    ctx.needs = [t.requires_grad for row in rows for t in row]
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, dY: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    x, *tensors, U, mask, before_gelu = ctx.saved_tensors
    n = ctx.count
    rows = [tensors[n * field : n * field + n] for field in range(5)]
    found = iter(
        torch.ops.spafit.stacked_linear_backward(
            dY, x, *rows, ctx.scalings, ctx.dropout, U, mask, before_gelu, ctx.needs_x, ctx.needs
        )
    )
    dx = next(found) if ctx.needs_x else None
    gradients = [next(found) if needed else None for needed in ctx.needs]
    by_row = [gradients[n * field : n * field + n] for field in range(5)]
    return dx, *by_row, None, None, None, None


_stacked_linear.register_autograd(_backward, setup_context=_setup_context)
