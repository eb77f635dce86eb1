"""The cost of keeping and reading the hidden states after group 1, against computing them.

    python -m benchmarks.prefix_cache --task rte

The contenders take turns; a round is one batch:

- computing group 1 on the packed batch, without dropout (the baseline)
- filling: the same, and storing the result in memory or in a file
- reading from memory, from a file in float32, and from a file in half

A file's states are checked when they are first read, so the first of ``--repeats`` rounds of a
batch costs more than the others. Files were just written, so they are in the system's page cache.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from benchmarks.contenders.models import SHAPES, adapted_model, prefix_states, random_weights_key
from benchmarks.harness.arguments import add_model_arguments, device_of, method_of, settings_of
from benchmarks.harness.lengths import load_rows
from benchmarks.harness.report import place, results, write_results
from benchmarks.harness.timing import Contender, Rows, compare
from spafit.training.prefix.cache import PrefixCache

HALF_TOLERANCE = 1e-3  # float16 has 11 bits
_LIMIT_BYTES = 2**40


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_model_arguments(parser, out="prefix_cache")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parsed = parser.parse_args(arguments)
    device = device_of(parsed)

    data = load_rows(parsed.task, "train", parsed.data, parsed.vocab)
    encodings = data.encodings
    batches = data.draw(parsed.batches, parsed.batch_size, parsed.seed)
    model = adapted_model(SHAPES[parsed.model_shape], method_of(parsed), parsed.seed, device)

    def compute(rows: Rows) -> Tensor:
        order = encodings.by_length(rows.numbers)
        return prefix_states(model, encodings, order, parsed.dtype)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def opened(dtype: str, name: str) -> PrefixCache:
            key = random_weights_key(model, dtype, parsed.dtype)
            where = Path(folder) / name if name else None
            cache = PrefixCache(encodings, key, folder=where, limit_bytes=_LIMIT_BYTES)
            return stack.enter_context(cache)

        def filled(dtype: str, name: str) -> PrefixCache:
            cache = opened(dtype, name)
            for rows in batches:
                cache.store(encodings.by_length(rows.numbers), compute(rows).float())
            if not name:
                return cache
            cache.close()
            return opened(dtype, name)

        def filling(cache: PrefixCache) -> Callable[[Rows], Tensor]:
            def fill(rows: Rows) -> Tensor:
                states = compute(rows)
                cache.store(encodings.by_length(rows.numbers), states.float())
                return states

            return fill

        def reading(cache: PrefixCache) -> Callable[[Rows], Tensor]:
            return lambda rows: cache.read(encodings.by_length(rows.numbers)).to(device)

        candidates = [
            _contender("fill memory", filling(opened("float32", ""))),
            _contender("fill a file, float32", filling(opened("float32", "fill"))),
            _contender("read memory", reading(filled("float32", ""))),
            _contender("read a file, float32", reading(filled("float32", "read"))),
            _contender("read a file, half", reading(filled("half", "half")), HALF_TOLERANCE),
        ]
        timings = compare(
            _contender("compute group 1", compute),
            candidates,
            batches,
            repeats=parsed.repeats,
            tolerance=1e-5,
        )
    settings = {
        **settings_of(parsed, data.source),
        "method": method_of(parsed),
        "layers": model.bert.frozen_depth,
    }
    rows = results(settings, timings, place(device, parsed.dtype))
    title = f"Group 1 ({model.bert.frozen_depth} layers), computed, stored and read"
    write_results(parsed.out, rows, f"{title}: {parsed.model_shape}, {parsed.task.upper()}")


def _contender(
    name: str, states: Callable[[Rows], Tensor], tolerance: float | None = None
) -> Contender:
    return Contender(name, states, lambda rows: {"hidden states": states(rows)}, tolerance)


if __name__ == "__main__":
    main()
