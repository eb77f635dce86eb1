"""The parts of a stack of linear maps: their tensors, and what all forms of the stack share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch

from spafit.kernels.stacking import stacked


class Part(NamedTuple):
    """One linear map of a stack.

    Attributes
    ----------
    weight : torch.Tensor, (out, in)
        W.
    bias : torch.Tensor, (out,)
        b.
    bias_delta : torch.Tensor, (out,), optional
        δ.
    lora_A, lora_B : torch.Tensor, (r, in) and (out, r), optional
        A and B: both or neither.
    scaling : float
        s = alpha / r.
    dropout : float
        Rate at which the input of A alone is dropped; 0 outside training.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    bias_delta: torch.Tensor | None = None
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def A(self) -> torch.Tensor:
        """A of a part that has one."""
        assert self.lora_A is not None
        return self.lora_A

    @property
    def B(self) -> torch.Tensor:
        """B of a part that has one."""
        assert self.lora_B is not None
        return self.lora_B


class Kept(NamedTuple):
    """The tensors kept for backward, besides the inputs.

    Attributes
    ----------
    U : torch.Tensor, (N, R), optional
        drop(x) Aᵀ, unless backward recomputes it.
    mask : torch.Tensor, (N, in), optional
        The mask of the fused form's dropout.
    before_gelu : torch.Tensor, (N, Σ out), optional
        The input of GELU.
    seed : torch.Tensor, (1,), optional
        The seed from which the Triton form draws its masks again.
    """

    U: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    before_gelu: torch.Tensor | None = None
    seed: torch.Tensor | None = None


def outs(parts: Sequence[Part]) -> list[int]:
    """Return the width of each part's output."""
    return [len(part.bias) for part in parts]


def width_in(parts: Sequence[Part]) -> int:
    """Return the width of the input."""
    return parts[0].weight.shape[1]


def ranks(parts: Sequence[Part]) -> list[int]:
    """Return the rank of each part that has LoRA."""
    return [len(part.lora_A) for part in parts if part.lora_A is not None]


def are_uniform(parts: Sequence[Part]) -> bool:
    """Return whether there are at most three parts, all with LoRA, that differ in values alone."""
    if len(parts) > 3 or any(part.lora_A is None for part in parts):
        return False
    kinds = {
        (
            part.B.shape,
            part.scaling,
            part.dropout,
            *(tensor.dtype for tensor in (part.weight, part.bias, part.A, part.B)),
        )
        for part in parts
    }
    deltas = {part.bias_delta.dtype for part in parts if part.bias_delta is not None}
    return len(kinds) == 1 and len(deltas) <= 1


def all_W(parts: Sequence[Part]) -> torch.Tensor:
    """Return W of all parts, stacked, (Σ out, in)."""
    return stacked([part.weight for part in parts])


def all_A(parts: Sequence[Part]) -> torch.Tensor:
    """Return A of all parts, stacked, (R, in)."""
    return stacked([part.lora_A for part in parts if part.lora_A is not None])


def all_B(parts: Sequence[Part]) -> torch.Tensor:
    """Return B of parts of equal rank, stacked, (Σ out, r)."""
    return stacked([part.lora_B for part in parts if part.lora_B is not None])


def give_sums(
    sums: torch.Tensor, parts: Sequence[Part], needs_b: Sequence[bool], needs_delta: Sequence[bool]
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Return db and dδ of each part from Σ dY (Σ out,), None if not asked for."""
    db: list[torch.Tensor | None] = [None] * len(parts)
    ddelta: list[torch.Tensor | None] = [None] * len(parts)
    for i, (part, sum_i) in enumerate(zip(parts, torch.split(sums, outs(parts)), strict=True)):
        if needs_b[i]:
            db[i] = sum_i.to(part.bias.dtype)
        if needs_delta[i]:  # in memory of its own, because b's gradient may be modified in place
            assert part.bias_delta is not None
            ddelta[i] = sum_i.to(part.bias_delta.dtype, copy=needs_b[i])
    return db, ddelta


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which values of a type are summed: float32 or wider."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


Each = TypeVar("Each")


def by_field(flat: Sequence[Each], count: int) -> list[Sequence[Each]]:
    """Split a flat sequence into those of all W, all b, all δ, all A and all B, of ``count``."""
    return [flat[start : start + count] for start in range(0, 5 * count, count)]


def make_parts(
    fields: Sequence[Sequence[torch.Tensor | None]], scalings: Sequence[float], dropout: float
) -> list[Part]:
    """Make the parts from all W, all b, all δ, all A and all B."""
    columns = zip(*fields, scalings, [dropout] * len(scalings), strict=True)
    return [Part(*column) for column in columns]
