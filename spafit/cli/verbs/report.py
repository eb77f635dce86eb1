"""``spafit report``: its options; spafit/cli/reporting.py does the work."""

from __future__ import annotations

import argparse

from spafit.cli.option_types import as_name, as_new_path, as_path

SUMMARY = "compare the runs below a folder, over seeds"
EXAMPLES = "spafit report runs"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument("folder", type=as_path, help="folder with runs of spafit train or grid")
    parser.add_argument(
        "--out",
        type=as_new_path,
        metavar="DIR",
        help="where report.md, .csv, .tex and .html are written (default: in the folder itself)",
    )
    parser.add_argument(
        "--against",
        metavar="METHOD",
        help="the method, as the table has it, that all others are tested against (default: the "
        "best SPAFIT, against all methods that are none)",
    )
    parser.add_argument(
        "--submission",
        type=as_new_path,
        metavar="DIR",
        help="write GLUE's submission files, each by the best run of its task on dev, and the zip",
    )
    parser.add_argument(
        "--data", type=as_path, help="GLUE's root, for --submission; default: as in training"
    )
    parser.add_argument(
        "--model",
        type=as_name,
        help="folder of weights, minilm, or hub name, for --submission; default: as in training",
    )


def run(parsed: argparse.Namespace) -> int:
    """Compare runs; 1 if a submission was asked for and is not complete."""
    from spafit.cli.reporting import run_report

    return run_report(
        parsed.folder,
        parsed.out,
        parsed.submission,
        against=parsed.against,
        data=parsed.data,
        model=parsed.model,
    )
