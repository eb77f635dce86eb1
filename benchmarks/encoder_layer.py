"""One encoder layer of each group, forward and backward: spafit's against transformers' and PEFT's.

    python -m benchmarks.encoder_layer --task rte

The layers are those of SPAFIT-0-1-II on three: frozen, biases, LoRA and biases. The frozen one runs
forward alone, as below the first layer that trains; the others run backward to their input, too.
Baseline: transformers' ``BertLayer`` with PEFT's LoRA, SDPA, on tokens padded to the longest of the
batch; spafit's on packed ones. Dropout is on.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders.baseline import peft_twin, plain_name
from benchmarks.contenders.models import SHAPES, adapted_model
from benchmarks.contenders.packed_pairs import Pair
from benchmarks.harness.arguments import add_data_arguments, device_of, settings_of
from benchmarks.harness.lengths import load_rows
from benchmarks.harness.report import place, results, write_results
from benchmarks.harness.timing import Contender, Rows, compare

LAYERS = ("frozen", "biases", "LoRA and biases")
METHOD = "SPAFIT-0-1-II"
TOLERANCE = 1e-4


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_data_arguments(parser, out="encoder_layer")
    parser.add_argument("--model-shape", choices=SHAPES, default="large")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parsed = parser.parse_args(arguments)
    device = device_of(parsed)
    config = dataclasses.replace(SHAPES[parsed.model_shape], num_hidden_layers=len(LAYERS))

    D = config.hidden_size
    data = load_rows(parsed.task, "train", parsed.data, parsed.vocab)
    batches = data.draw(parsed.batches, parsed.batch_size, parsed.seed)
    lengths = data.encodings.lengths
    model = adapted_model(config, METHOD, parsed.seed, device).train()
    twin: Any = peft_twin(model)
    drawn = {rows: [lengths[row] for row in rows.numbers] for rows in batches}
    pairs = {rows: Pair.draw(its, D, D, device) for rows, its in drawn.items()}
    found = []
    for number, kind in enumerate(LAYERS):
        theirs = twin.base_model.model.bert.encoder.layer[number]
        timings = compare(
            padded_contender(f"transformers + PEFT, {kind}", theirs, pairs),
            [packed_contender(f"spafit, {kind}", model.bert.encoder.layer[number], pairs)],
            batches,
            repeats=parsed.repeats,
            tolerance=TOLERANCE,
        )
        settings = {
            **settings_of(parsed, data.source),
            "method": METHOD,
            "intermediate": config.intermediate_size,
        }
        found += results(settings, timings, place(device, "float32"))
    title = f"Encoder layer: {parsed.model_shape}, {parsed.task.upper()}, dropout on"
    write_results(parsed.out, found, title)


def padded_contender(name: str, layer: nn.Module, pairs: dict[Rows, Pair]) -> Contender:
    """Make the baseline: transformers' layer on (B, T, D)."""

    def forward(pair: Pair) -> Tensor:
        B, T = pair.keep.shape
        mask = pair.keep[:, None, None, :].expand(B, 1, T, T)
        output: Tensor = layer(pair.padded, mask)
        return output

    def run(rows: Rows) -> dict[str, Tensor]:
        pair = pairs[rows]
        return _run(layer, partial(forward, pair), pair.padded, pair.padded_upstream)

    def check(rows: Rows) -> dict[str, Tensor]:
        found = _in_eval(layer, partial(run, rows))
        keep = pairs[rows].keep
        return {name: each[keep] if each.dim() == 3 else each for name, each in found.items()}

    return Contender(name, run, check)


def packed_contender(name: str, layer: nn.Module, pairs: dict[Rows, Pair]) -> Contender:
    """Make the candidate: spafit's layer on (N, D)."""

    def run(rows: Rows) -> dict[str, Tensor]:
        pair = pairs[rows]
        forward = partial(layer, pair.packed, pair.layout)
        return _run(layer, forward, pair.packed, pair.packed_upstream)

    def check(rows: Rows) -> dict[str, Tensor]:
        found = _in_eval(layer, partial(run, rows))
        return {
            name: each[: rows.tokens] if name in ("output", "gradient of the input") else each
            for name, each in found.items()
        }

    return Contender(name, run, check)


def _run(
    layer: nn.Module, forward: Callable[[], Tensor], x: Tensor, dY: Tensor
) -> dict[str, Tensor]:
    """Run forward, and backward where anything trains; return the output and all gradients."""
    trained = {plain_name(name): p for name, p in layer.named_parameters() if p.requires_grad}
    if not trained:
        with torch.no_grad():
            return {"output": forward()}
    output = forward()
    names = sorted(trained)
    dx, *gradients = torch.autograd.grad(output, [x, *(trained[name] for name in names)], dY)
    found = dict(zip(names, gradients, strict=True))
    # A key's bias shifts all scores of a query alike: its gradient is rounding alone.
    found.pop("attention.self.key.bias", None)
    return {"output": output, "gradient of the input": dx, **found}


def _in_eval(layer: nn.Module, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    layer.eval()
    found = run()
    layer.train()
    return found


if __name__ == "__main__":
    main()
