"""A linear map with LoRA, forward and backward, on as many tokens as real batches have.

    python -m benchmarks.lora_linear --task rte --maps 3

``--maps 1`` is one D x D map such as attention.output.dense; ``--maps 3`` are query, key and value,
which share their input. The frozen weight and bias get no gradient; the input, A and B do. All
contenders get the same real tokens: what padding costs is not in here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.arguments import add_data_arguments, device_of, settings_of
from benchmarks.contenders import SHAPES
from benchmarks.harness import Contender, Rows, compare
from benchmarks.lengths import load_rows
from benchmarks.report import place, results, write_results
from spafit.inference import autocast
from spafit.kernels import Part, stacked_linear

TOLERANCES = {"float32": 1e-4, "bf16": 0.05}
ALPHA_OVER_R = 2.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_data_arguments(parser, out="lora_linear")
    parser.add_argument("--model-shape", choices=SHAPES, default="large", help="for D")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--maps", type=int, default=1, help="that share their input (1)")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parsed = parser.parse_args(arguments)
    device = device_of(parsed)
    D = SHAPES[parsed.model_shape].hidden_size

    data = load_rows(parsed.task, "train", parsed.data, parsed.vocab)
    batches = data.draw(parsed.batches, parsed.batch_size, parsed.seed)
    torch.manual_seed(parsed.seed)
    maps = peft_maps(parsed.maps, D, parsed.rank, device)
    parts = [as_part(each) for each in maps]
    problems = {rows: Problem.draw(rows.tokens, parsed.maps, D, device) for rows in batches}

    def side(name: str, function: Callable[[Tensor], list[Tensor]]) -> Contender:
        trained = [each for module in maps for each in module.parameters() if each.requires_grad]

        def run(rows: Rows) -> tuple[list[Tensor], Sequence[Tensor]]:
            problem = problems[rows]
            with autocast(parsed.dtype, device):
                outputs = function(problem.x)
            upstream = [problem.upstream] if len(outputs) == 1 else problem.upstream_by_map
            dY = [piece.to(output.dtype) for piece, output in zip(upstream, outputs, strict=True)]
            return outputs, torch.autograd.grad(outputs, [problem.x, *trained], dY)

        def check(rows: Rows) -> dict[str, Tensor]:
            outputs, gradients = run(rows)
            found = {f"gradient {number}": each for number, each in enumerate(gradients)}
            return {"output": torch.cat(outputs, dim=1), **found}

        return Contender(name, run, check)

    timings = compare(
        side("PEFT", lambda x: [module(x) for module in maps]),
        [
            side("spafit, reference", lambda x: [stacked_linear(x, parts, impl="reference")]),
            side("spafit, fused", lambda x: [stacked_linear(x, parts, impl="fused")]),
        ],
        batches,
        repeats=parsed.repeats,
        tolerance=TOLERANCES[parsed.dtype],
    )
    settings = {
        **settings_of(parsed, data.source),
        "maps": parsed.maps,
        "rank": parsed.rank,
    }
    rows = results(settings, timings, place(device, parsed.dtype))
    title = f"{parsed.maps} linear map(s) with LoRA, D = {D}, r = {parsed.rank}"
    write_results(parsed.out, rows, f"{title}, {parsed.task.upper()}")


@dataclass(frozen=True)
class Problem:
    """One batch: the input, which needs a gradient, and the gradient of the output.

    Attributes
    ----------
    x : Tensor, (N, D)
        Shared by all maps.
    upstream : Tensor, (N, maps·D)
        For maps that are computed as one.
    upstream_by_map : list of Tensor, (N, D)
        The same for each map alone.
    """

    x: Tensor
    upstream: Tensor
    upstream_by_map: list[Tensor]

    @classmethod
    def draw(cls, tokens: int, maps: int, D: int, device: torch.device) -> Problem:
        """Draw a batch of so many tokens."""
        x = torch.randn(tokens, D, device=device).requires_grad_()
        dY = torch.randn(tokens, maps * D, device=device)
        return cls(x, dY, [piece.contiguous() for piece in dY.chunk(maps, dim=1)])


def peft_maps(count: int, D: int, rank: int, device: torch.device) -> list[nn.Module]:
    """Make D x D maps with PEFT's LoRA; B is not zero, under which mistakes would not show."""
    maps = nn.ModuleDict({f"map{number}": nn.Linear(D, D) for number in range(count)})
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA_OVER_R * rank, target_modules=list(maps))
    maps = peft.inject_adapter_in_model(config, maps).to(device)
    for name, parameter in maps.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.02)
    return list(maps.values())


def as_part(module: Any) -> Part:
    """Give the parameters of one of PEFT's maps as spafit's kernels take them, not copied."""
    base, A, B = module.base_layer, module.lora_A["default"], module.lora_B["default"]
    return Part(base.weight, base.bias, None, A.weight, B.weight, ALPHA_OVER_R)


if __name__ == "__main__":
    main()
