"""Query, key and value with LoRA, in the forms of other libraries, and without LoRA.

All return [Q | K | V] for one input; W, b and x have the precision that is measured, A and B are in
float32, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spafit.kernels import Part

#: Gives the outputs of all maps for x (N, D): one tensor a map, or one for all of them.
Maps = Callable[[Tensor], list[Tensor]]

ALPHA_OVER_R = 2.0


def peft_maps(
    count: int, D: int, rank: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[nn.Module]:
    """Return D x D maps with PEFT's LoRA; B is not zero, so that mistakes in it show."""
    maps = nn.ModuleDict({f"map{number}": nn.Linear(D, D) for number in range(count)})
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA_OVER_R * rank, target_modules=list(maps))
    maps = peft.inject_adapter_in_model(config, maps).to(device)
    for name, parameter in maps.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.02)
        elif "base_layer" in name:
            parameter.data = parameter.data.to(dtype)
    return list(maps.values())


def as_part(module: Any) -> Part:
    """Return the parameters of one of PEFT's maps as spafit's kernels take them, not copied."""
    base, A, B = module.base_layer, module.lora_A["default"], module.lora_B["default"]
    return Part(base.weight, base.bias, None, A.weight, B.weight, ALPHA_OVER_R)


def frozen_maps(parts: Sequence[Part]) -> Maps:
    """Return the frozen maps alone, one product each."""
    return lambda x: [F.linear(x, part.weight, part.bias) for part in parts]


def frozen_as_one(parts: Sequence[Part]) -> Maps:
    """Return the frozen maps alone, as one product with their stacked weights."""
    W = torch.cat([part.weight.detach() for part in parts])
    b = torch.cat([part.bias.detach() for part in parts])
    return lambda x: [F.linear(x, W, b)]


def unsloth_maps(parts: Sequence[Part]) -> Maps:
    """Return the maps in unsloth's form, with the biases that BERT has and it has not.

    Written from the formulas: y = x Wᵀ + b, to which ``addmm`` adds s·(x Aᵀ) Bᵀ, map by map. x Aᵀ
    is not kept: backward computes it again, and dY·B twice, for dA and for dx.
    """
    tensors = [
        each for part in parts for each in (part.weight, part.bias, part.lora_A, part.lora_B)
    ]

    def run(x: Tensor) -> list[Tensor]:
        return list(_Unsloth.apply(x, ALPHA_OVER_R, *tensors))  # type: ignore[no-untyped-call]

    return run


class _Unsloth(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, s, *tensors):  # type: ignore[no-untyped-def]
        outputs = []
        for W, b, A, B in _by_map(tensors):
            y = F.linear(x, W, b)
            y.addmm_(x @ A.to(x.dtype).t(), B.to(x.dtype).t(), alpha=s)
            outputs.append(y)
        ctx.save_for_backward(x, *tensors)
        ctx.s = s
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dYs):  # type: ignore[no-untyped-def]
        x, *tensors = ctx.saved_tensors
        s, dx, gradients = ctx.s, None, []
        for dY, (W, _, A, B) in zip(dYs, _by_map(tensors), strict=True):
            low_A, low_B = A.to(x.dtype), B.to(x.dtype)
            dA = torch.empty_like(low_A).addmm_((dY @ low_B).t(), x, alpha=s, beta=0)
            dB = torch.empty_like(low_B).addmm_(dY.t(), x @ low_A.t(), alpha=s, beta=0)
            if dx is None:
                dx = dY @ W
            else:
                dx.addmm_(dY, W)
            dx.addmm_(dY @ low_B, low_A, alpha=s)
            gradients += [None, None, dA.to(A.dtype), dB.to(B.dtype)]
        return dx, None, *gradients


def _by_map(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [tensors[start : start + 4] for start in range(0, len(tensors), 4)]
