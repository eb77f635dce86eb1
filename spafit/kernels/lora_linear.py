"""Linear maps with LoRA: y = x Wᵀ + b + δ + s·(drop(x) Aᵀ) Bᵀ, one or several at once.

Several maps of one input (query, key and value) take one product with their stacked weights and one
with their stacked A. A map may have a bias delta δ, a low-rank update, both or neither. The plain
forms are ``linear``, ``lora_linear`` and ``stacked_linear`` in :mod:`spafit.kernels.reference`.

N tokens, r rank, R the sum of the ranks of the stack, U = drop(x) Aᵀ (N, R), V = s·dY B (N, R).

======================  =======================================  ===================================
quantity                additive order                           merged order, W' = W + s·BA
======================  =======================================  ===================================
forward                 y = x Wᵀ + b + δ + s·U Bᵀ, U is kept     y = x W'ᵀ + b + δ, U is recomputed
dx                      dY W + V A                               dY W'
======================  =======================================  ===================================

and in both dA = Vᵀ drop(x), dB = s·dYᵀ U, dδ = db = Σ dY, dW = dYᵀ x. The order that takes fewer
multiplications is chosen, for forward and backward separately. LoRA dropout and half precision
allow only the additive order. In half precision the rounding of W' is the same for every row, so
that it adds up in the sums over rows that all gradients are; the rounding of outputs averages out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from spafit.kernels import reference
from spafit.kernels.dropout import apply_mask, keep_mask
from spafit.kernels.forms import (
    choose_form,
    precision,
    refuse_second_derivative,
    require_triton,
    suits_triton,
)
from spafit.kernels.parts import (
    Kept,
    Part,
    all_A,
    all_W,
    are_uniform,
    by_field,
    give_sums,
    make_parts,
    outs,
    ranks,
    wide,
    width_in,
)
from spafit.kernels.products import product, transposed_product

_HALF = (torch.float16, torch.bfloat16)

# Writing one element of W' takes about as long as this many multiplications.
_WRITING = 16


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias_delta: torch.Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Compute y = x Wᵀ + b + δ + s·(drop(x) Aᵀ) Bᵀ (Hu et al., 2022, Eq. 3, with biases).

    Parameters
    ----------
    x : torch.Tensor, (..., in)
        Input.
    weight : torch.Tensor, (out, in)
        W, the pre-trained weight.
    bias : torch.Tensor, (out,)
        b, the pre-trained bias.
    lora_A : torch.Tensor, (r, in)
        A, the map down to rank r.
    lora_B : torch.Tensor, (out, r)
        B, the map up again.
    scaling : float
        s = alpha / r.
    bias_delta : torch.Tensor, (out,), optional
        δ, added to the frozen bias.
    dropout : float
        Rate at which the input of A alone is dropped; 0 outside training.
    impl : {"auto", "reference", "fused", "triton"}
        The form to use. ``"fused"`` is one operation with a custom backward, which cannot be
        differentiated twice. ``"triton"`` is that operation in kernels for a GPU: bias, update and
        dropout in the product itself, bias and GELU in one kernel; a map with neither update nor
        GELU, and code compiled by ``torch.compile``, use the fused form instead. ``"auto"`` is
        ``"fused"``; on a GPU that has Triton, the faster of the two
        (:mod:`~spafit.kernels.gpu.choices`).

    Returns
    -------
    torch.Tensor, (..., out)

    Raises
    ------
    ConfigError
        If ``impl`` is not one of the four, if the Triton form is not available for the device or
        the types, or if a second derivative of the fused or the Triton form is asked for.
    """
    part = Part(weight, bias, bias_delta, lora_A, lora_B, scaling, dropout)
    return stacked_linear(x, [part], impl=impl)


def stacked_linear(
    x: torch.Tensor, parts: Sequence[Part], *, gelu: bool = False, impl: str = "auto"
) -> torch.Tensor:
    """Compute several linear maps of one input, their outputs side by side in the last dimension.

    Parameters
    ----------
    x : torch.Tensor, (..., in)
        Input.
    parts : sequence of Part
        The maps, one or more.
    gelu : bool
        Whether to apply GELU (exact, erf) to the outputs: with one map, Eq. (8) as one operation.
    impl : {"auto", "reference", "fused", "triton"}
        As for :func:`lora_linear`.

    Returns
    -------
    torch.Tensor, (..., Σ out)

    Raises
    ------
    ConfigError
        As :func:`lora_linear` does.
    """
    form = choose_form("a linear map", impl, ("reference", "fused", "triton"), "auto")
    if form == "reference":
        return reference.stacked_linear(x, parts, gelu)
    if torch.compiler.is_compiling():
        form = "fused"
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
        # The forms choose their own types: the merged weight, for example, is summed in float32.
        with torch.autocast(device_type, enabled=False):
            return _in_form(x, parts, gelu, form)
    return _in_form(x, parts, gelu, form)


def _in_form(x: torch.Tensor, parts: Sequence[Part], gelu: bool, form: str) -> torch.Tensor:
    """Compute the maps in a form, part by part if they cannot be one operation."""
    adapted = any(part.lora_A is not None for part in parts)
    tensors = [tensor for part in parts for tensor in part[:5]]
    if form == "triton":
        require_triton("a linear map", x, *tensors)
    # A map without update and GELU is one product, for which PyTorch's own is the fastest.
    if not (adapted or (gelu and len(parts) == 1)) or x.numel() == 0:
        form = "fused"
    elif form == "auto":
        form = _faster(x, parts, gelu) if suits_triton(x, *tensors) else "fused"
    # In the fused form each A has its own dropout mask: the parts share nothing but x.
    apart = any(part.dropout for part in parts)
    if len(parts) > 1 and (not are_uniform(parts) if form == "triton" else apart):
        return torch.cat([_in_form(x, [part], gelu, form) for part in parts], dim=-1)
    if form == "triton":
        # Triton launches on the current device; backward is on x's already.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return _as_one(x, parts, gelu, form)
    return _as_one(x, parts, gelu, form)


def _faster(x: torch.Tensor, parts: Sequence[Part], gelu: bool) -> str:
    """Return the faster form for such a stack on such a GPU; see the module ``choices``."""
    learns = torch.is_grad_enabled()
    needs = [x, *(tensor for part in parts for tensor in part[:5])]
    learnt = "".join(
        "-" if tensor is None else str(int(learns and tensor.requires_grad)) for tensor in needs
    )
    N, rate = x.numel() // x.shape[-1], parts[0].dropout
    shape = (
        f"N<={1 << (N - 1).bit_length()} in={width_in(parts)} out={outs(parts)} r={ranks(parts)} "
        f"dropout={rate > 0} gelu={gelu} {precision(x.dtype)} weights {parts[0].weight.dtype} "
        f"learnt {learnt}"
    )

    made: list[tuple[torch.Tensor, list[Part]]] = []

    def run(form: str, rate: float) -> list[torch.Tensor]:
        if not made:  # only now: nothing is drawn if the choice is known already
            made.append(_stand_ins(x, parts))
        given, mine = made[0]
        y = _in_form(given, [part._replace(dropout=rate) for part in mine], gelu, form)
        candidates = [given, *(tensor for part in mine for tensor in part[:5])]
        leaves = [each for each in candidates if each is not None and each.requires_grad]
        return [y, *torch.autograd.grad(y, leaves, y.detach())] if leaves else [y]

    from spafit.kernels.gpu.choices import fastest  # only where a GPU is at hand

    return fastest("linear map", shape, x.device, ["triton", "fused"], run, rate)


def _stand_ins(x: torch.Tensor, parts: Sequence[Part]) -> tuple[torch.Tensor, list[Part]]:
    """Return random inputs (N, in) for the timing, and the parts with random B instead of 0."""
    learns = torch.is_grad_enabled()
    generator = torch.Generator(x.device).manual_seed(0)

    def drawn(like: torch.Tensor, size: float) -> torch.Tensor:
        numbers = torch.randn(like.shape, generator=generator, device=like.device)
        return (size * numbers).to(like.dtype).requires_grad_(learns and like.requires_grad)

    rows = [
        [
            None if each is None else each.detach().requires_grad_(learns and each.requires_grad)
            for each in part[:4]
        ]
        + [None if part.lora_B is None else drawn(part.lora_B, 0.02)]
        for part in parts
    ]
    fields = list(zip(*rows, strict=True))
    mine = make_parts(fields, [part.scaling for part in parts], parts[0].dropout)
    given = drawn(x.detach().reshape(-1, x.shape[-1]), 1.0)
    return given.requires_grad_(learns and x.requires_grad), mine


def _as_one(x: torch.Tensor, parts: Sequence[Part], gelu: bool, form: str) -> torch.Tensor:
    """Compute the fused or the Triton form as one operation."""
    weights, biases, deltas, As, Bs, scalings, dropouts = map(list, zip(*parts, strict=True))
    tensors = (*weights, *biases, *deltas, *As, *Bs)
    flat = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        # An operator's lists hold no None: an empty tensor stands for what a part does not have.
        nothing = flat.new_empty(0)
        optional = [[nothing if t is None else t for t in row] for row in (deltas, As, Bs)]
        y, *_ = torch.ops.spafit.stacked_linear(
            flat, weights, biases, *optional, scalings, dropouts[0], gelu, torch.empty(0)
        )
    elif torch.is_grad_enabled() and (
        x.requires_grad or any(each is not None and each.requires_grad for each in tensors)
    ):
        y = _StackedLinear.apply(form, flat, scalings, dropouts[0], gelu, *tensors)  # type: ignore[no-untyped-call]
    else:
        y, _ = _functions(form)[0](flat, parts, gelu, False)
    result: torch.Tensor = y.view(*x.shape[:-1], y.shape[-1])
    return result


def forward(
    x: torch.Tensor, parts: Sequence[Part], gelu: bool, keep: bool
) -> tuple[torch.Tensor, Kept]:
    """Return y (N, Σ out) for x (N, in), and the tensors to keep for :func:`backward`."""
    U = mask = None
    adapted = [part for part in parts if part.lora_A is not None]
    merges = bool(adapted) and merges_forward(x, parts)
    W = _merged(parts, x.dtype) if merges else all_W(parts)
    y = product(x, W, _bias(parts, x.dtype))
    if adapted and not merges:
        mask = keep_mask(x, parts[0].dropout) if parts[0].dropout else None
        U = _down(x, parts, mask)  # (N, R)
        for part, y_i, U_i in _adapted(parts, y, U):
            # y_i is a view of columns of y: this adds to y in place.
            y_i.addmm_(U_i, part.B.to(y.dtype).t(), alpha=part.scaling)
    if keep:
        return (F.gelu(y), Kept(U, mask, y)) if gelu else (y, Kept(U, mask))
    # In place, and not fused into oneDNN's product: the bits are the same with and without keep.
    return torch.ops.aten.gelu_(y) if gelu else y, Kept()


def backward(
    dY: torch.Tensor,
    x: torch.Tensor | None,
    parts: Sequence[Part],
    kept: Kept,
    needs_x: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[torch.Tensor | None, list[list[torch.Tensor | None]]]:
    """Return dx, and the gradients of W, b, δ, A and B of every part, None if not asked for.

    ``needs`` says which are asked for, in the same order; ``x`` may be None if no matrix's is.
    """
    gradients: list[list[torch.Tensor | None]] = [[None] * len(parts) for _ in needs]
    dW, _, _, dA, dB = gradients
    needs_W, needs_b, needs_delta, needs_A, needs_B = needs
    if kept.before_gelu is not None:
        dY = torch.ops.aten.gelu_backward(dY, kept.before_gelu)
    numbers = [i for i, part in enumerate(parts) if part.lora_A is not None]

    if any(needs_b) or any(needs_delta):
        sums = dY.sum(0, dtype=wide(dY.dtype))
        gradients[1], gradients[2] = give_sums(sums, parts, needs_b, needs_delta)
    if any(needs_W):
        assert x is not None
        for i, dY_i in enumerate(torch.split(dY, outs(parts), dim=1)):
            if needs_W[i]:
                dW[i] = transposed_product(dY_i, x).to(parts[i].weight.dtype)

    V = None
    merges = needs_x and merges_backward(dY, parts)
    if any(needs_A) or (needs_x and numbers and not merges):
        V = _up(dY, parts)  # (N, R)
    if any(needs_B):
        assert x is not None
        U = _down(x, parts, kept.mask) if kept.U is None else kept.U
        for i, (part, dY_i, U_i) in zip(numbers, _adapted(parts, dY, U), strict=True):
            if needs_B[i]:
                dB_i = transposed_product(dY_i, U_i).mul_(part.scaling)  # (out, r)
                dB[i] = dB_i.to(part.B.dtype)
    if any(needs_A):
        assert x is not None and V is not None
        dropped = x if kept.mask is None else apply_mask(x, kept.mask, parts[0].dropout)
        together = transposed_product(V, dropped)  # (R, in)
        for i, dA_i in zip(numbers, torch.split(together, ranks(parts)), strict=True):
            if needs_A[i]:
                dA[i] = dA_i.to(parts[i].A.dtype)

    if not needs_x:
        return None, gradients
    if merges:
        return product(dY, _merged(parts, dY.dtype).t(), None), gradients
    dx = product(dY, all_W(parts).t(), None)
    if V is not None and kept.mask is None:
        dx.addmm_(V, all_A(parts).to(dY.dtype))
    elif V is not None and kept.mask is not None:
        dx += apply_mask(V @ all_A(parts).to(dY.dtype), kept.mask, parts[0].dropout)
    return dx, gradients


def merges_forward(x: torch.Tensor, parts: Sequence[Part]) -> bool:
    """Return whether y = x W'ᵀ, with W' recomputed, costs less than the additive order.

    For each token the additive order takes R·in multiplications for U and Σ out·r for U Bᵀ.
    """
    return _merges(x, parts, sum(ranks(parts)) * width_in(parts) + _elements_of_B(parts))


def merges_backward(dY: torch.Tensor, parts: Sequence[Part]) -> bool:
    """Return whether dx = dY W', with W' recomputed, costs less than adding V A.

    For each token the additive order takes R·in multiplications; V is needed for dA in any case.
    """
    return _merges(dY, parts, sum(ranks(parts)) * width_in(parts))


def _merges(rows: torch.Tensor, parts: Sequence[Part], additive_of_a_token: int) -> bool:
    """Return whether making and writing W', Σ out·in·r, costs less than the additive order."""
    if rows.dtype in _HALF or parts[0].dropout or not ranks(parts):
        return False
    merging = width_in(parts) * (_elements_of_B(parts) + _WRITING * sum(outs(parts)))
    # Not len(rows): torch.compile would compile again for each value of that int.
    return merging < rows.shape[0] * additive_of_a_token


def _elements_of_B(parts: Sequence[Part]) -> int:
    """Return Σ out·r."""
    return sum(part.lora_B.numel() for part in parts if part.lora_B is not None)


def _bias(parts: Sequence[Part], dtype: torch.dtype) -> torch.Tensor:
    """Return b + δ of all parts, stacked, (Σ out,)."""
    biases = [
        part.bias if part.bias_delta is None else part.bias + part.bias_delta for part in parts
    ]
    return (biases[0] if len(biases) == 1 else torch.cat(biases)).to(dtype)


def _merged(parts: Sequence[Part], dtype: torch.dtype) -> torch.Tensor:
    """Return W' = W + s·BA of all parts (Σ out, in), summed in float32 or wider, rounded once."""
    first = parts[0].weight
    W = first.new_empty(sum(outs(parts)), width_in(parts), dtype=wide(first.dtype))
    for part, W_i in zip(parts, torch.split(W, outs(parts)), strict=True):
        if part.lora_A is None:
            W_i.copy_(part.weight)
        else:
            weight, B, A = (t.to(W.dtype) for t in (part.weight, part.B, part.A))
            torch.addmm(weight, B, A, alpha=part.scaling, out=W_i)
    return W.to(dtype)


def _adapted(
    parts: Sequence[Part], y: torch.Tensor, U: torch.Tensor
) -> Iterator[tuple[Part, torch.Tensor, torch.Tensor]]:
    """Yield each adapted part with its columns of y (N, Σ out) and of U (N, R)."""
    U_parts = iter(torch.split(U, ranks(parts), dim=1))
    for part, y_i in zip(parts, torch.split(y, outs(parts), dim=1), strict=True):
        if part.lora_A is not None:
            yield part, y_i, next(U_parts)


def _down(x: torch.Tensor, parts: Sequence[Part], mask: torch.Tensor | None) -> torch.Tensor:
    """Return U = drop(x) Aᵀ (N, R)."""
    dropped = x if mask is None else apply_mask(x, mask, parts[0].dropout)
    return product(dropped, all_A(parts), None)


def _up(dY: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """Return V = s·dY B (N, R), side by side for the adapted parts."""
    V = dY.new_empty(dY.shape[0], sum(ranks(parts)))
    for part, dY_i, V_i in _adapted(parts, dY, V):
        torch.mm(dY_i, part.scaling * part.B.to(dY.dtype), out=V_i)
    return V


def _functions(form: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return ``forward`` and ``backward`` of a form."""
    if form == "fused":
        return forward, backward
    from spafit.kernels.gpu.triton_linear import backward as triton_backward
    from spafit.kernels.gpu.triton_linear import forward as triton_forward

    return triton_forward, triton_backward


class _StackedLinear(torch.autograd.Function):
    """A form's forward and backward in autograd; x is kept only for the gradient of a matrix."""

    @staticmethod
    def forward(ctx, form, x, scalings, rate, gelu, *tensors):  # type: ignore[no-untyped-def]
        n = len(scalings)
        ctx.needs = by_field(ctx.needs_input_grad[5:], n)
        ctx.form, ctx.scalings, ctx.rate = form, scalings, rate
        parts = make_parts(by_field(tensors, n), scalings, rate)
        y, kept = _functions(form)[0](x, parts, gelu, True)
        needs_W, _, _, needs_A, needs_B = ctx.needs
        needs_input = any(needs_W) or any(needs_A) or any(needs_B)
        ctx.save_for_backward(x if needs_input else None, *kept, *tensors)
        return y

    @staticmethod
    def backward(ctx, dY):  # type: ignore[no-untyped-def]
        refuse_second_derivative("linear map")
        count = len(Kept._fields)
        x, *saved = ctx.saved_tensors
        kept, tensors = Kept(*saved[:count]), saved[count:]
        parts = make_parts(by_field(tensors, len(ctx.scalings)), ctx.scalings, ctx.rate)
        # Backward may be called under autocast, which would round the sums over rows.
        with torch.autocast(dY.device.type, enabled=False):
            dx, gradients = _functions(ctx.form)[1](
                dY, x, parts, kept, ctx.needs_input_grad[1], ctx.needs
            )
        return None, dx, None, None, None, *(each for field in gradients for each in field)
