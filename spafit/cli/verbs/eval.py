"""``spafit eval``: its options; spafit/cli/evaluating.py does the work."""

from __future__ import annotations

import argparse

from spafit.cli.option_types import as_new_path, as_path
from spafit.cli.shared_options import add_run_options

SUMMARY = "score a run on a labelled split"
EXAMPLES = "spafit eval runs/rte"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument("run", type=as_path, help="run folder of spafit train")
    add_run_options(parser)
    parser.add_argument("--split", choices=("dev", "train"), default="dev")
    parser.add_argument(
        "--errors", type=as_new_path, metavar="FILE", help="write all wrong predictions, with texts"
    )
    parser.set_defaults(prints_only=lambda parsed: parsed.errors is None)


def run(parsed: argparse.Namespace) -> int:
    """Score a run."""
    from spafit.cli.evaluating import evaluate_run
    from spafit.cli.predicting import form_of
    from spafit.cli.trained import trained_in
    from spafit.files.replacing import refuse_place

    if parsed.errors is not None:
        form_of(parsed.errors)
        refuse_place(parsed.errors)
    run = trained_in([parsed.run], parsed.model, parsed.mapped, parsed.average, parsed.precision)
    evaluate_run(
        run,
        parsed.data,
        parsed.split,
        form=run.table_form(parsed.delimiter, parsed.unquoted, parsed.encoding),
        max_bad_rows=run.bad_rows_allowed(parsed.max_bad_rows),
        errors=parsed.errors,
    )
    return 0
