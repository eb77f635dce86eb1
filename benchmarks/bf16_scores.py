"""Scores in bf16 beside those in float32: the same runs in both, and whether they agree.

    spafit grid benchmarks/plans/bf16.json --out runs/bf16
    python -m benchmarks.bf16_scores runs/bf16/*/SPAFIT-1-3-II/*

Each folder holds the runs of one cell of the grid, by seed. The table is that of
:mod:`benchmarks.peft_scores`: both means, their difference with its 95 % confidence interval,
Welch's t-test, and the difference that this test finds with a probability of 80 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.glue_minilm import write_rows
from benchmarks.harness.arguments import RESULTS
from benchmarks.peft_scores import COLUMNS, finished_runs, rows_of, table
from spafit.errors import CheckpointError

PRECISIONS = ("float32", "bf16")


def main(arguments: Sequence[str] | None = None) -> None:
    """Gather the scores, and write the rows and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cells", nargs="+", type=Path, help="folders with runs, one a seed")
    parser.add_argument("--out", type=Path, default=RESULTS / "bf16_scores.csv")
    parsed = parser.parse_args(arguments)
    try:
        records = finished_runs(parsed.cells).values()
    except CheckpointError as error:
        parser.exit(2, f"{error}\n")
    rows = [row for each in records for row in rows_of(each, each["settings"]["precision"])]
    write_rows(parsed.out, rows, COLUMNS)
    text = table(rows, PRECISIONS)
    parsed.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
