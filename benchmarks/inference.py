"""Inference on the rows of dev: spafit against transformers + PEFT.

    python -m benchmarks.inference --task rte
    python -m benchmarks.inference --rows 64 --merged

Contenders, in turns, a round being all rows once, from row numbers to logits:

- transformers + PEFT, batches in the order of the file, padded to their longest (the baseline)
- the same, with all rows sorted by length first
- transformers with LoRA merged into its weights, sorted (``--merged``)
- spafit, the same batches in the order of the file
- spafit, sorted, which is what ``spafit.predict`` does
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import add_model_arguments, device_of, method_of, settings_of
from benchmarks.baseline import Logits, padded_logits, peft_twin
from benchmarks.contenders import SHAPES, TOLERANCES, adapted_model, packed_logits
from benchmarks.harness import Contender, Rows, compare
from benchmarks.lengths import load_rows
from benchmarks.report import place, results, write_results
from spafit.machine.memory import keep_freed_memory
from spafit.text.tokenization import Encodings

FILE_ORDER, SORTED = "in file order", "sorted by length"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_model_arguments(parser, out="inference")
    parser.add_argument("--rows", type=int, default=277, help="the first ones of dev (277)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--merged", action="store_true")
    parsed = parser.parse_args(arguments)
    device = device_of(parsed)
    keep_freed_memory()  # both sides then have what spafit.predict alone would ask for

    data = load_rows(parsed.task, "dev", parsed.data, parsed.vocab)
    [rows] = data.first(parsed.rows, parsed.rows)
    model = adapted_model(SHAPES[parsed.model_shape], method_of(parsed), parsed.seed, device)
    twin = peft_twin(model)
    theirs = padded_logits(twin, data.encodings, parsed.dtype)
    ours = packed_logits(model, data.encodings, parsed.dtype)
    sides = [
        ("transformers + PEFT", theirs, FILE_ORDER),
        ("transformers + PEFT", theirs, SORTED),
        ("spafit", ours, FILE_ORDER),
        ("spafit", ours, SORTED),
    ]
    if parsed.merged:
        merge: Any = copy.deepcopy(twin)
        merged = padded_logits(merge.merge_and_unload(), data.encodings, parsed.dtype)
        sides.insert(2, ("transformers, merged", merged, SORTED))
    baseline, *candidates = (
        predicting(name, logits, order, data.encodings, parsed.batch_size)
        for name, logits, order in sides
    )
    timings = compare(
        baseline,
        candidates,
        [rows],
        warmup=0,  # the check has run a batch of each
        repeats=parsed.repeats,
        tolerance=TOLERANCES[parsed.dtype],
    )
    settings = {
        **settings_of(parsed, data.source),
        "split": f"dev, {len(rows.numbers)} rows",
        "method": method_of(parsed),
        "layers": SHAPES[parsed.model_shape].num_hidden_layers,
    }
    title = f"Inference: {parsed.model_shape}, {method_of(parsed)}, {parsed.task.upper()} dev"
    found = results(settings, timings, place(device, parsed.dtype))
    write_results(parsed.out, found, f"{title}, batches of {parsed.batch_size}")


def predicting(
    name: str, logits: Logits, order: str, encodings: Encodings, batch_size: int
) -> Contender:
    """Return a contender that predicts all rows it is given, in batches."""
    predict = predictor(logits, order, encodings, batch_size)

    def check(rows: Rows) -> dict[str, Tensor]:
        return {"logits": predict(rows.numbers[:batch_size])}

    return Contender(f"{name}, {order}", lambda rows: predict(rows.numbers), check)


def predictor(
    logits: Logits, order: str, encodings: Encodings, batch_size: int
) -> Callable[[Sequence[int]], Tensor]:
    """Return a function from row numbers to their logits (n, C), in one order or another."""

    @torch.inference_mode()
    def predict(numbers: Sequence[int]) -> Tensor:
        taken = encodings.by_length(numbers) if order == SORTED else list(numbers)
        batches = (
            logits(taken[start : start + batch_size]) for start in range(0, len(taken), batch_size)
        )
        found = torch.cat([batch.float().cpu() for batch in batches])
        place_of = {row: at for at, row in enumerate(taken)}
        return found[[place_of[row] for row in numbers]]

    return predict


if __name__ == "__main__":
    main()
