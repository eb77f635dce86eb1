"""Several seeds that share the output of the frozen layers, against one seed after the other.

    python -m benchmarks.together --task rte --seeds 0 1 2 --epochs 3
    python -m benchmarks.together --task rte --rows 128 --epochs 1 --repeats 3

MiniLM by SPAFIT-2-3-II, dropout off in group 1. The contenders take turns; a round is one training
of all seeds, from texts to the scores of the last epoch:

- one after the other, computing group 1 in every epoch (the baseline)
- one after the other, each keeping the output of group 1 in memory for its own epochs
- together: kept in memory once for all seeds

Before any timing the last two are held against each other, bit for bit, and against the first, to
rounding. Building the models is not timed. ``cpu_ratio`` is the ratio of the processor's times,
which other programs disturb less.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.arguments import add_run_arguments, set_threads
from benchmarks.harness import Contender, Rows, Spread, check_results, rotated, timings
from benchmarks.lengths import DATA
from benchmarks.report import place, write_results
from spafit.bert import BertForSequenceClassification
from spafit.strata import adapt
from spafit.tasks import glue
from spafit.tasks.glue import Dataset
from spafit.text.tokenization import load_tokenizer
from spafit.training.fit import fit
from spafit.training.inference import encode
from spafit.training.prefix.shared import SharedPrefix
from spafit.training.settings import TrainConfig
from spafit.weights.pretrained import load_pretrained

COMPUTED, KEPT, TOGETHER = "one after the other", "each keeps its own", "together"
CACHES = {COMPUTED: "off", KEPT: "memory", TOGETHER: "memory"}
_CHECKED = 48  # rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_run_arguments(parser, out="together")
    parser.add_argument("--task", default="rte")
    parser.add_argument("--data", type=Path, default=DATA, help="GLUE's root")
    parser.add_argument("--model", default="minilm", help="folder, or hub name")
    parser.add_argument("--method", default="SPAFIT-2-3-II")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rows", type=int, help="train on the first ones alone")
    parser.add_argument("--repeats", type=int, default=3)
    parsed = parser.parse_args(arguments)
    set_threads(parsed)

    train, dev = (glue.load(parsed.task, split, parsed.data) for split in ("train", "dev"))
    train = first(train, parsed.rows)
    tokenizer = load_tokenizer(parsed.model)
    config = TrainConfig(
        batch_size=parsed.batch_size,
        learning_rate=parsed.learning_rate,
        dropout_in_group_1=False,
        precision="float32",
        device="cpu",
        quiet=True,
    )

    def fresh_model(seed: int) -> BertForSequenceClassification:
        model = load_pretrained(parsed.model, num_labels=train.task.num_labels, seed=seed)
        adapt(model, parsed.method, seed=seed)
        return model

    def losses(
        name: str,
        models: Sequence[BertForSequenceClassification],
        train: Dataset,
        dev: Dataset,
        epochs: int,
    ) -> list[Tensor]:
        shared = SharedPrefix() if name == TOGETHER else None
        found = []
        for seed, model in zip(parsed.seeds, models, strict=True):
            settings = dataclasses.replace(
                config, seed=seed, epochs=epochs, cache_prefix=CACHES[name]
            )
            result = fit(model, tokenizer, train, dev, settings, shared=shared)
            found.append(torch.tensor(result.losses, dtype=torch.float64))
        return found

    def checked(name: str, tolerance: float) -> Contender:
        def check(_: Rows) -> dict[str, Tensor]:
            models = [fresh_model(seed) for seed in parsed.seeds]
            found = losses(name, models, first(train, _CHECKED), first(dev, _CHECKED), 1)
            return {
                f"losses of seed {seed}": its for seed, its in zip(parsed.seeds, found, strict=True)
            }

        return Contender(name, check, check, tolerance)

    whole = Rows((), 0)
    check_results(checked(KEPT, 0.0), [checked(TOGETHER, 0.0), checked(COMPUTED, 1e-4)], whole, 0)

    times_ms: dict[str, list[float]] = {name: [] for name in CACHES}
    cpu_ms: dict[str, list[float]] = {name: [] for name in CACHES}
    for number in range(parsed.repeats):
        for name in rotated(list(CACHES), number):
            models = [fresh_model(seed) for seed in parsed.seeds]
            began, cpu_began = time.perf_counter(), time.process_time()
            losses(name, models, train, dev, parsed.epochs)
            times_ms[name].append(1000 * (time.perf_counter() - began))
            cpu_ms[name].append(1000 * (time.process_time() - cpu_began))
            its = f"{times_ms[name][-1] / 1000:.1f} s, {cpu_ms[name][-1] / 1000:.1f} s of processor"
            print(f"{name}: {its}", flush=True)

    model = fresh_model(parsed.seeds[0])
    lengths = encode(model, tokenizer, train, None).lengths
    runs = parsed.epochs * len(parsed.seeds)
    whole = Rows(tuple(range(len(train))) * runs, sum(lengths) * runs)
    cpu_ratios = {timing.name: timing.ratio for timing in timings(cpu_ms, [whole] * parsed.repeats)}
    about = {
        "task": parsed.task,
        "lengths": "data",
        "method": parsed.method,
        "model": "MiniLM" if parsed.model == "minilm" else Path(parsed.model).name,
        "layers": f"{model.bert.frozen_depth} of {len(model.bert.encoder.layer)} frozen",
        "batch_size": parsed.batch_size,
        "epochs": parsed.epochs,
        "train_rows": len(train),
        "dev_rows": len(dev),
        "seed": " ".join(map(str, parsed.seeds)),
    }
    rows = [
        {
            **about,
            **timing.columns(),
            **cpu_columns(cpu_ratios[timing.name], cpu_ms[timing.name]),
            **place(torch.device("cpu"), "float32"),
        }
        for timing in timings(times_ms, [whole] * parsed.repeats)
    ]
    title = f"{len(parsed.seeds)} seeds: MiniLM, {parsed.method}, {train.task.display}"
    write_results(parsed.out, rows, f"{title}, {len(train)} rows, {parsed.epochs} epochs")


def first(data: Dataset, rows: int | None) -> Dataset:
    """Return the first rows of a data set, or all."""
    return dataclasses.replace(data, examples=data.examples[:rows])


def cpu_columns(ratio: Spread, times_ms: Sequence[float]) -> dict[str, float]:
    """Return the columns of the processor's times."""
    return {
        "cpu_ratio": ratio.median,
        "cpu_ratio_min": ratio.minimum,
        "cpu_ratio_max": ratio.maximum,
        "median_cpu_ms": Spread.of(times_ms).median,
    }


if __name__ == "__main__":
    main()
