"""A linear map with LoRA, forward and backward, on as many tokens as real batches have.

    python -m benchmarks.lora_linear --task rte --maps 3
    python -m benchmarks.lora_linear --device cuda --precision bf16 --maps 3 --tokens 4096

``--maps 1`` is one D x D map such as attention.output.dense; ``--maps 3`` are query, key and value,
which share their input. The frozen weight and bias get no gradient; the input, A and B do. All
contenders get the same real tokens: what padding costs is not in here. W, b and x are in the
precision that is measured, A and B in float32, as they are trained.

Contenders, in turns: the frozen maps alone, a product each (the baseline of the ratios) and as one
product; PEFT's form; unsloth's form (written here from its formulas, with the biases that BERT
has); spafit's reference, fused and, where it is available, Triton forms, and what ``impl="auto"``
takes. Those with LoRA must agree with PEFT's. ``over_frozen`` and ``over_one_product`` say how much
more time a contender takes, in per cent, than the frozen maps in either way.

On a GPU each is timed twice: as its operations are launched one by one, and as a captured CUDA
graph ("graph"), in which launching takes no part; the overhead is that over the frozen maps
launched in the same way. There a round is ``--calls`` runs between two waits for the device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.lora_forms import (
    Maps,
    as_part,
    frozen_as_one,
    frozen_maps,
    peft_maps,
    unsloth_maps,
)
from benchmarks.contenders.models import DTYPES, SHAPES
from benchmarks.harness.arguments import add_data_arguments, device_of, output_of, settings_of
from benchmarks.harness.lengths import load_rows
from benchmarks.harness.report import place, results, write_results
from benchmarks.harness.timing import Contender, Rows, Timing, check_results, take_turns
from spafit.kernels import Part, stacked_linear
from spafit.kernels.forms import why_no_triton
from spafit.kernels.stacking import lay_together
from spafit.machine.precision import autocast

TOLERANCES = {"float32": 1e-4, "bf16": 0.05, "fp16": 0.02}
FROZEN, FROZEN_AS_ONE = "frozen, a product each", "frozen, one product"
GRAPH = ", graph"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_data_arguments(parser, out="lora_linear")
    parser.add_argument("--model-shape", choices=SHAPES, default="large", help="for D")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--maps", type=int, default=1, help="that share their input (1)")
    parser.add_argument("--tokens", type=int, help="so many, instead of a batch's")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, help="runs of a round; default: 1, on a GPU 20")
    parsed = parser.parse_args(arguments)
    device = device_of(parsed)
    is_gpu = device.type == "cuda"
    dtype = DTYPES[parsed.dtype]
    D = SHAPES[parsed.model_shape].hidden_size

    if parsed.tokens is None:
        data = load_rows(parsed.task, "train", parsed.data, parsed.vocab)
        batches, source = data.draw(parsed.batches, parsed.batch_size, parsed.seed), data.source
    else:
        batches, source = [Rows((0,), parsed.tokens)], "none"
    torch.manual_seed(parsed.seed)
    maps = peft_maps(parsed.maps, D, parsed.rank, device, dtype)
    parts = [as_part(each) for each in maps]
    for field in zip(*((part.weight, part.A, part.B) for part in parts), strict=True):
        lay_together(field)  # as a model does; the other forms see the same values
    problems = {rows: Problem.draw(rows.tokens, parsed.maps, D, device, dtype) for rows in batches}

    frozen, adapted = forms_of(maps, parts, device, dtype)
    trained = [each for part in parts for each in (part.A, part.B)]
    sides = [
        Side(name, form, problems, trained if form in adapted.values() else [], parsed.dtype)
        for name, form in (frozen | adapted).items()
    ]
    contenders = [side.contender() for side in sides]
    check(contenders, len(frozen), batches[0], TOLERANCES[parsed.dtype])
    if is_gpu:
        graphs = [side.captured().contender() for side in sides]
        check(graphs, len(frozen), batches[0], TOLERANCES[parsed.dtype])
        contenders += graphs
    timings = take_turns(
        contenders,
        batches,
        repeats=parsed.repeats,
        every_shape=is_gpu,
        calls=parsed.calls or (20 if is_gpu else 1),
    )
    settings: dict[str, Any] = {
        **settings_of(parsed, source),
        "maps": parsed.maps,
        "rank": parsed.rank,
        "tokens": sum(rows.tokens for rows in batches) / len(batches),
    }
    if parsed.tokens is not None:
        settings |= {"task": "none", "batch_size": ""}
    rows = [
        {**row, **overheads(timing, timings)}
        for row, timing in zip(
            results(settings, timings, place(device, parsed.dtype)), timings, strict=True
        )
    ]
    title = f"{parsed.maps} linear map(s) with LoRA, D = {D}, r = {parsed.rank}"
    where = f"{parsed.tokens} tokens" if parsed.tokens else parsed.task.upper()
    write_results(output_of(parsed, device), rows, f"{title}, {where}")


def forms_of(
    maps: Sequence[Any], parts: Sequence[Part], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Maps], dict[str, Maps]]:
    """Return the frozen forms, and those with LoRA, by name; PEFT's is the first of these."""

    def spafit(impl: str) -> Maps:
        return lambda x: [stacked_linear(x, parts, impl=impl)]

    adapted = {
        "PEFT": lambda x: [module(x) for module in maps],
        "unsloth's form": unsloth_maps(parts),
        "spafit, reference": spafit("reference"),
        "spafit, fused": spafit("fused"),
    }
    if reason := why_no_triton(device, dtype):
        print(f"without spafit's Triton form: {reason}", flush=True)
    else:
        adapted["spafit, triton"] = spafit("triton")
    adapted["spafit, auto"] = spafit("auto")
    return {FROZEN: frozen_maps(parts), FROZEN_AS_ONE: frozen_as_one(parts)}, adapted


def check(contenders: Sequence[Contender], frozen: int, rows: Rows, tolerance: float) -> None:
    """Compare the frozen forms, which come first, with one another, and those with LoRA."""
    check_results(contenders[0], contenders[1:frozen], rows, tolerance)
    check_results(contenders[frozen], contenders[frozen + 1 :], rows, tolerance)


def overheads(timing: Timing, timings: Sequence[Timing]) -> dict[str, float]:
    """Return how much more time it takes than the frozen maps launched alike, in per cent."""
    medians = {each.name: each.median_ms for each in timings}
    end = GRAPH if timing.name.endswith(GRAPH) else ""
    return {
        "over_frozen": 100 * (timing.median_ms / medians[FROZEN + end] - 1),
        "over_one_product": 100 * (timing.median_ms / medians[FROZEN_AS_ONE + end] - 1),
    }


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
    def draw(
        cls,
        tokens: int,
        maps: int,
        D: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> Problem:
        """Draw a batch of so many tokens."""
        x = torch.randn(tokens, D, device=device).to(dtype).requires_grad_()
        dY = torch.randn(tokens, maps * D, device=device).to(dtype)
        return cls(x, dY, [piece.contiguous() for piece in dY.chunk(maps, dim=1)])


@dataclass(frozen=True)
class Side:
    """A form of the maps at work: forward, and backward to the input, and to A and B.

    Attributes
    ----------
    name : str
        Its name in the tables.
    form : callable
        The maps.
    problems : dict of Rows to Problem
        The batches.
    trained : list of Tensor
        What gets a gradient beside the input.
    precision : str
        Other than float32 is autocast.
    """

    name: str
    form: Maps
    problems: dict[Rows, Problem]
    trained: list[Tensor]
    precision: str

    def run(self, rows: Rows) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Return outputs and gradients."""
        problem = self.problems[rows]
        with autocast(self.precision, problem.x.device):
            outputs = self.form(problem.x)
        upstream = [problem.upstream] if len(outputs) == 1 else problem.upstream_by_map
        dY = [piece.to(output.dtype) for piece, output in zip(upstream, outputs, strict=True)]
        return outputs, torch.autograd.grad(outputs, [problem.x, *self.trained], dY)

    def contender(self) -> Contender:
        """Return it, to be timed."""
        return Contender(self.name, self.run, lambda rows: named(*self.run(rows)))

    def captured(self) -> CapturedSide:
        """Record it as CUDA graphs, one for each batch."""
        return CapturedSide(self)


class CapturedSide:
    """A form of the maps, replayed from CUDA graphs."""

    def __init__(self, side: Side) -> None:
        self.name = side.name + GRAPH
        self.recorded = {rows: captured(side, rows) for rows in side.problems}

    def contender(self) -> Contender:
        """Return it, to be timed."""
        return Contender(self.name, lambda rows: self.recorded[rows][1](), self.results)

    def results(self, rows: Rows) -> dict[str, Tensor]:
        """Return what a replay computes."""
        found, replay = self.recorded[rows]
        for tensor in (*found[0], *found[1]):
            tensor.detach().fill_(torch.nan)  # what recording itself left there is no result
        replay()
        return named(*found)


def captured(
    side: Side, rows: Rows
) -> tuple[tuple[list[Tensor], Sequence[Tensor]], Callable[[], object]]:
    """Record a side's work on a batch; return what holds the results, and the replay."""
    device = side.problems[rows].x.device
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what prepares itself at its first use does so here
        for _ in range(3):
            side.run(rows)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = side.run(rows)
    return found, graph.replay


def named(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name the results, to be compared."""
    found = {f"gradient {number}": each for number, each in enumerate(gradients)}
    return {"output": torch.cat(list(outputs), dim=1), **found}


if __name__ == "__main__":
    main()
