"""``spafit plan``: its options; spafit/cli/commands.py does the work."""

from __future__ import annotations

import argparse

from spafit.cli.option_types import as_name, as_new_path, as_size
from spafit.cli.shared_options import add_plan_options, plan_options

SUMMARY = "show what trains, layer by layer, with counts"
EXAMPLES = "spafit plan SPAFIT-4-9-II"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument(
        "method",
        help="a method of Table 1, SPAFIT-[N1]-[N2]-[I|II], houlsby, pfeiffer, parallel, ia3, "
        "linear-probe, or a plan file",
    )
    parser.add_argument(
        "--model",
        type=as_name,
        help="folder of weights, minilm, or hub name; default: bert-large-cased's sizes",
    )
    parser.add_argument(
        "--num-labels",
        type=as_size,
        default=3,
        help="outputs of the head (default %(default)s, as in Table 2)",
    )
    parser.add_argument(
        "--save", type=as_new_path, metavar="FILE", help="write the plan as JSON, for editing"
    )
    add_plan_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Print what trains."""
    from spafit.cli import commands

    commands.run_plan(plan_options(parsed), parsed.model, parsed.num_labels, parsed.save)
    return 0
