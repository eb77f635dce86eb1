"""Register the stacked linear map as a PyTorch operator, which torch.compile does not take apart.

In eager mode :mod:`spafit.kernels.lora_linear` calls its autograd function directly, which takes a
sixth of the time of an operator's call (5 against 30 µs).

An operator can neither take nor return None. An empty tensor takes the place of a δ, A or B that a
part does not have, and of U, the mask or GELU's input if they are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import library as torch_library

from spafit.kernels.lora_linear import backward, forward, merges_forward
from spafit.kernels.parts import Kept, Part, by_field, make_parts

_STACK = (
    "Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] deltas, Tensor[] lora_A, "
    "Tensor[] lora_B, float[] scalings, float dropout"
)


def _parts(stack: Sequence[Any]) -> list[Part]:
    """Make the parts from the arguments that follow x in the schema."""
    weights, biases, *optional, scalings, dropout = stack
    lacking = [[t if t.numel() else None for t in row] for row in optional]
    return make_parts([weights, biases, *lacking], scalings, dropout)


# The tag makes activation checkpointing keep the results instead of drawing dropout again.
# ``fresh`` is an empty tensor made for each call: without it torch.compile would merge two equal
# calls into one, with one mask.
@torch_library.custom_op(
    "spafit::stacked_linear",
    mutates_args=(),
    schema=f"({_STACK}, bool gelu, Tensor fresh) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded,),
)
def _stacked_linear(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """Return y, U, the mask and GELU's input."""
    *stack, gelu, _ = arguments
    y, kept = forward(x, _parts(stack), gelu, keep=True)
    empty = (x.new_empty(0, dtype=dtype) for dtype in (x.dtype, torch.bool, x.dtype))
    return y, *(
        nothing if each is None else each for each, nothing in zip(kept[:3], empty, strict=True)
    )


@_stacked_linear.register_fake
def _(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    *stack, gelu, _ = arguments
    parts = _parts(stack)
    ranks = sum(len(part.A) for part in parts if part.lora_A is not None)
    additive = ranks > 0 and not merges_forward(x, parts)
    y = x.new_empty(x.shape[0], sum(len(part.bias) for part in parts))
    U = x.new_empty((x.shape[0], ranks) if additive else (0,))
    mask = x.new_empty(x.shape if additive and parts[0].dropout else (0,), dtype=torch.bool)
    return y, U, mask, torch.empty_like(y) if gelu else x.new_empty(0)


@torch_library.custom_op(
    "spafit::stacked_linear_backward",
    mutates_args=(),
    schema=(
        f"(Tensor dY, {_STACK}, Tensor U, Tensor mask, Tensor before_gelu, bool needs_x, "
        "bool[] needs) -> Tensor[]"
    ),
)
def _stacked_linear_backward(
    dY: torch.Tensor, x: torch.Tensor, *arguments: Any
) -> list[torch.Tensor]:
    """Return the gradients that are asked for, in the order of the inputs."""
    *stack, U, mask, before_gelu, needs_x, needs = arguments
    parts = _parts(stack)
    kept = Kept(*(each if each.numel() else None for each in (U, mask, before_gelu)))
    dx, gradients = backward(dY, x, parts, kept, needs_x, by_field(needs, len(parts)))
    wanted = [dx, *(gradient for field in gradients for gradient in field)]
    # An operator's results must not share memory, as slices of one product do.
    return [gradient.clone() for gradient in wanted if gradient is not None]


@_stacked_linear_backward.register_fake
def _(dY: torch.Tensor, x: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    *fields, _, _, _, _, _, needs_x, needs = arguments
    inputs = [x, *(each for field in fields for each in field)]
    wanted = zip(inputs, [needs_x, *needs], strict=True)
    return [each.new_empty(each.shape) for each, needed in wanted if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, *fields, scalings, dropout, _, _ = inputs
    tensors = [tensor for field in fields for tensor in field]
    ctx.scalings, ctx.dropout = scalings, dropout
    ctx.save_for_backward(x, *tensors, *output[1:])
    ctx.needs_x, ctx.needs = x.requires_grad, [tensor.requires_grad for tensor in tensors]


def _backward(ctx: Any, dY: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    x, *tensors, U, mask, before_gelu = ctx.saved_tensors
    count = len(ctx.scalings)
    fields = by_field(tensors, count)
    found = iter(
        torch.ops.spafit.stacked_linear_backward(
            dY, x, *fields, ctx.scalings, ctx.dropout, U, mask, before_gelu, ctx.needs_x, ctx.needs
        )
    )
    dx = next(found) if ctx.needs_x else None
    gradients = [next(found) if needed else None for needed in ctx.needs]
    return dx, *by_field(gradients, count), None, None, None, None


_stacked_linear.register_autograd(_backward, setup_context=_setup_context)
