"""``spafit demo``: its options; spafit/demo/ does the work."""

from __future__ import annotations

import argparse
from pathlib import Path

from spafit.cli.option_types import as_name, as_new_path, as_seed
from spafit.cli.shared_options import MODEL_HELP, add_settings
from spafit.machine.busy import note_if_busy

SUMMARY = "fine-tune a small real BERT, without a network"
EXAMPLES = "spafit demo"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument(
        "--out",
        type=as_new_path,
        default=Path("runs/demo"),
        help="where the run folders are, one a method (default %(default)s)",
    )
    add_settings(parser, "overwrite")
    parser.add_argument("--model", type=as_name, default="minilm", help=MODEL_HELP)
    parser.add_argument("--seed", type=as_seed, default=0, help="default %(default)s")
    parser.add_argument(
        "--ask",
        action="store_true",
        help="classify sentences from standard input at the end (on a terminal always)",
    )
    parser.add_argument(
        "--where", action="store_true", help="print the folder of the weights, and train nothing"
    )


def run(parsed: argparse.Namespace) -> int:
    """Train and ask, or say where the weights are."""
    if parsed.where:
        from spafit.weights.hub import local_folder

        print(local_folder(parsed.model))
        return 0
    from spafit.demo.run import run_demo

    note_if_busy()
    run_demo(
        out=parsed.out,
        model=parsed.model,
        seed=parsed.seed,
        ask=parsed.ask,
        overwrite=parsed.overwrite,
    )
    return 0
