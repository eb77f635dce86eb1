"""Several seeds that share the output of the frozen layers, against one seed after the other.

    python -m benchmarks.together --task rte --seeds 0 1 2 --epochs 3
    python -m benchmarks.together --task rte --rows 128 --epochs 1 --repeats 3

MiniLM by SPAFIT-2-3-II, dropout off in group 1. The contenders take turns; a round is one training
of all seeds, from texts to the scores of the last epoch:

- one after the other, computing group 1 in every epoch (the baseline)
- one after the other, each keeping the output of group 1 in memory for its own epochs
- together: kept in memory once for all seeds
- one after the other, kept once on disk, as a grid does

Before any timing the last three are held against each other, bit for bit, and against the first, to
rounding. Building the models is not timed. ``cpu_ratio`` is the ratio of the processor's times,
which other programs disturb less.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness.arguments import add_run_arguments, set_threads
from benchmarks.harness.lengths import DATA
from benchmarks.harness.report import place, write_results
from benchmarks.harness.timing import Contender, Rows, Spread, check_results, rotated, timings
from spafit.bert import BertForSequenceClassification
from spafit.strata import adapt
from spafit.tasks import glue
from spafit.tasks.glue import Dataset
from spafit.text.tokenization import Tokenizer, load_tokenizer
from spafit.training.fit import fit
from spafit.training.inference import encode
from spafit.training.prefix.shared import SharedPrefix
from spafit.training.settings import TrainConfig
from spafit.weights.pretrained import load_pretrained

COMPUTED, KEPT, TOGETHER = "one after the other", "each keeps its own", "together"
ON_DISK = "one after the other, kept on disk"
CACHES = {COMPUTED: "off", KEPT: "memory", TOGETHER: "memory", ON_DISK: "disk"}
_CHECKED = 48  # rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parsed = _parsed(arguments)
    set_threads(parsed)
    train, dev = (glue.load(parsed.task, split, parsed.data) for split in ("train", "dev"))
    trial = _Trial(parsed, first(train, parsed.rows), dev, load_tokenizer(parsed.model))
    others = [
        *(trial.checked(name, 0.0) for name in (TOGETHER, ON_DISK)),
        trial.checked(COMPUTED, 1e-4),
    ]
    check_results(trial.checked(KEPT, 0.0), others, Rows((), 0), 0)
    rows = _rows(trial, *_timed(trial, parsed.repeats))
    title = f"{len(parsed.seeds)} seeds: MiniLM, {parsed.method}, {train.task.display}"
    write_results(parsed.out, rows, f"{title}, {len(trial.train)} rows, {parsed.epochs} epochs")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
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
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class _Trial:
    """What is trained: the options, the data, and the tokenizer."""

    parsed: argparse.Namespace
    train: Dataset
    dev: Dataset
    tokenizer: Tokenizer

    def model(self, seed: int) -> BertForSequenceClassification:
        """Return a fresh model."""
        labels = self.train.task.num_labels
        model = load_pretrained(self.parsed.model, num_labels=labels, seed=seed)
        adapt(model, self.parsed.method, seed=seed)
        return model

    def losses(
        self, name: str, models: Sequence[BertForSequenceClassification], epochs: int
    ) -> list[Tensor]:
        """Train a model for each seed in a contender's way, and return the losses of each.

        What is kept on disk is gone at the end.
        """
        with (
            tempfile.TemporaryDirectory() as cache,
            mock.patch.dict("os.environ", SPAFIT_CACHE=cache),
        ):
            return self._losses(name, models, epochs)

    def _losses(
        self, name: str, models: Sequence[BertForSequenceClassification], epochs: int
    ) -> list[Tensor]:
        shared = SharedPrefix() if name == TOGETHER else None
        found = []
        for seed, model in zip(self.parsed.seeds, models, strict=True):
            settings = TrainConfig(
                seed=seed,
                epochs=epochs,
                cache_prefix=CACHES[name],
                batch_size=self.parsed.batch_size,
                learning_rate=self.parsed.learning_rate,
                dropout_in_group_1=False,
                precision="float32",
                device="cpu",
                quiet=True,
            )
            result = fit(model, self.tokenizer, self.train, self.dev, settings, shared=shared)
            found.append(torch.tensor(result.losses, dtype=torch.float64))
        return found

    def checked(self, name: str, tolerance: float) -> Contender:
        """Return a contender that gives the losses on few rows."""
        train, dev = first(self.train, _CHECKED), first(self.dev, _CHECKED)
        few, seeds = dataclasses.replace(self, train=train, dev=dev), self.parsed.seeds

        def check(_: Rows) -> dict[str, Tensor]:
            found = few.losses(name, list(map(self.model, seeds)), 1)
            return {f"losses of seed {seed}": its for seed, its in zip(seeds, found, strict=True)}

        return Contender(name, check, check, tolerance)


def _timed(trial: _Trial, repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the times of each contender, and those of the processor, interleaved."""
    times_ms: dict[str, list[float]] = {name: [] for name in CACHES}
    cpu_ms: dict[str, list[float]] = {name: [] for name in CACHES}
    for number in range(repeats):
        for name in rotated(list(CACHES), number):
            models = list(map(trial.model, trial.parsed.seeds))
            began, cpu_began = time.perf_counter(), time.process_time()
            trial.losses(name, models, trial.parsed.epochs)
            times_ms[name].append(1000 * (time.perf_counter() - began))
            cpu_ms[name].append(1000 * (time.process_time() - cpu_began))
            its = f"{times_ms[name][-1] / 1000:.1f} s, {cpu_ms[name][-1] / 1000:.1f} s of processor"
            print(f"{name}: {its}", flush=True)
    return times_ms, cpu_ms


def _rows(
    trial: _Trial, times_ms: dict[str, list[float]], cpu_ms: dict[str, list[float]]
) -> list[dict[str, str | int | float]]:
    """Return a row of results for each contender."""
    parsed, train = trial.parsed, trial.train
    model = trial.model(parsed.seeds[0])
    lengths = encode(model, trial.tokenizer, train, None).lengths
    runs = parsed.epochs * len(parsed.seeds)
    whole = [Rows(tuple(range(len(train))) * runs, sum(lengths) * runs)] * parsed.repeats
    cpu_ratios = {timing.name: timing.ratio for timing in timings(cpu_ms, whole)}
    about = {
        "task": parsed.task,
        "lengths": "data",
        "method": parsed.method,
        "model": "MiniLM" if parsed.model == "minilm" else Path(parsed.model).name,
        "layers": f"{model.bert.frozen_depth} of {len(model.bert.encoder.layer)} frozen",
        "batch_size": parsed.batch_size,
        "epochs": parsed.epochs,
        "train_rows": len(train),
        "dev_rows": len(trial.dev),
        "seed": " ".join(map(str, parsed.seeds)),
    }
    return [
        {
            **about,
            **timing.columns(),
            **cpu_columns(cpu_ratios[timing.name], cpu_ms[timing.name]),
            **place(torch.device("cpu"), "float32"),
        }
        for timing in timings(times_ms, whole)
    ]


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
