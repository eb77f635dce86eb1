"""Scores on a file of one's own: a run of `spafit train` for each seed, beside the majority.

    python -m benchmarks.own_data tickets.csv --seeds 0 1 2

A row has the best dev score of a run by each metric, what the commonest label would score, and the
file's hash; options that are not listed here go to `spafit train`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.arguments import RESULTS
from benchmarks.harness.report import place, write_results
from spafit import cli
from spafit.files.durable import measure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--method", default="SPAFIT-1-3-II")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "own_data", help="without an ending")
    parsed, options = parser.parse_known_args(arguments)
    rows: list[dict[str, Any]] = []
    for seed in parsed.seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = ["train", "--data", parsed.data, "--method", parsed.method]
            command += ["--model", parsed.model, "--seeds", seed, "--out", Path(folder) / "run"]
            if code := cli.main([*map(str, command), *options]):
                raise SystemExit(code)
            record = json.loads((Path(folder) / "run" / "run.json").read_text(encoding="utf-8"))
        rows += rows_of(record, parsed, options, seed)
    write_results(parsed.out, rows, "data of one's own", in_table=("seed",))


def rows_of(
    record: dict[str, Any], parsed: argparse.Namespace, options: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Return a row for each metric of a run's record."""
    result, settings = record["result"], record["settings"]
    return [
        {
            "seed": seed,
            "metric": metric,
            "score": score,
            "commonest_class": result["majority"][metric],
            "best_epoch": result["best_epoch"],
            "time_s": result["seconds"],
            "task": parsed.data.name,
            "sha256": measure(parsed.data).sha256,
            "method": parsed.method,
            "model": parsed.model,
            **{key: settings[key] for key in ("epochs", "batch_size", "learning_rate")},
            "options": " ".join(options),
            **place(torch.device("cpu"), "float32"),
        }
        for metric, score in result["metrics"].items()
    ]


if __name__ == "__main__":
    main()
