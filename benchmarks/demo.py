"""The demo's table over seeds: five methods on the sentiment of negated sentences.

    python -m benchmarks.demo --seeds 0 1 2

A row has what `spafit demo --seed N` prints, with machine, versions and commit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.arguments import RESULTS
from benchmarks.harness.report import place, write_results
from spafit.demo.run import BATCH_SIZE, EPOCHS, LEARNING_RATES, fine_tune
from spafit.demo.sentiment import datasets
from spafit.text.tokenization import load_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--model", default="minilm", help="folder, or hub name")
    parser.add_argument("--out", type=Path, default=RESULTS / "demo", help="without an ending")
    parsed = parser.parse_args(arguments)
    tokenizer = load_tokenizer(parsed.model)
    rows = []
    for seed in parsed.seeds:
        train, dev = datasets(seed)
        for method, rate in LEARNING_RATES.items():
            network, result = fine_tune(method, parsed.model, tokenizer, train, dev, seed)
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "learning_rate": rate,
                    "trainable": result.trainable,
                    "accuracy": result.metrics["accuracy"],
                    "commonest_class": result.majority["accuracy"],
                    "time_s": result.seconds,
                    "task": train.task.name,
                    "epochs": EPOCHS,
                    "batch_size": BATCH_SIZE,
                    "train_rows": len(train),
                    "dev_rows": len(dev),
                    "model": parsed.model,
                    **place(torch.device(network.classifier.weight.device), "float32"),
                }
            )
    write_results(parsed.out, rows, "the demo", in_table=("method", "seed"))


if __name__ == "__main__":
    main()
