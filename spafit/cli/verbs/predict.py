"""``spafit predict``: its options; spafit/cli/predicting.py does the work."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spafit.cli.option_types import as_new_path, as_path
from spafit.cli.shared_options import add_run_options
from spafit.errors import ConfigError

SUMMARY = "predict with a run, or with several of one base at once"
EXAMPLES = """\
spafit predict runs/rte --input FILE.tsv
spafit predict runs/rte --submission DIR
spafit predict runs/tickets --text "my invoice is wrong" --probabilities
spafit predict runs/rte runs/mrpc --input FILE.tsv --output FILE.csv"""


_OF_INPUT = {
    "output": "--submission names its files itself",
    "max-bad-rows": "a submission has every row",
    "encoding": "GLUE's files are in UTF-8",
    "delimiter": "GLUE's files have TABs",
    "unquoted": "no field of GLUE's files is quoted",
}
"""The options that say how a file is read or where its predictions go, and why no other need."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument(
        "run",
        nargs="+",
        type=as_path,
        help="run folder of spafit train; of several, each has a column of its name, and the first "
        "says how the input is read",
    )
    add_run_options(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--input",
        type=as_path,
        metavar="FILE",
        help="CSV, TSV, JSONL or parquet file, its labels are not read; - is standard input",
    )
    target.add_argument("--text", nargs="+", metavar="TEXT", help="predict texts given here")
    target.add_argument(
        "--submission",
        type=as_new_path,
        metavar="DIR",
        help="write GLUE's submission file for the test split",
    )
    parser.add_argument(
        "--text2", nargs="+", metavar="TEXT", default=[], help="second texts of pairs"
    )
    parser.add_argument(
        "--output",
        type=as_new_path,
        metavar="FILE",
        help="TSV, CSV or JSONL by its extension; default: standard output, as TSV",
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="write the probability of every label, too"
    )
    parser.set_defaults(
        prints_only=lambda parsed: parsed.output is None and parsed.submission is None
    )


def run(parsed: argparse.Namespace) -> int:
    """Predict a file, texts, or GLUE's test split."""
    for option, why in _OF_INPUT.items():
        value = getattr(parsed, option.replace("-", "_"))
        if value is not None and value is not False and parsed.input is None:
            raise ConfigError(f"--{option} needs --input; {why}")
    if parsed.data is not None and parsed.submission is None:
        raise ConfigError("--data needs --submission; name other rows with --input")
    if parsed.probabilities and parsed.submission is not None:
        raise ConfigError("--probabilities is not for --submission; GLUE takes labels alone")
    if parsed.text2 and not parsed.text:
        raise ConfigError("--text2 needs --text")
    if parsed.submission is not None and len(parsed.run) > 1:
        raise ConfigError("--submission is for one run; give one after the other")
    if parsed.input == Path("-") and sys.stdin is None:
        raise ConfigError("--input -: standard input is closed; name a file, or write rows to it")
    from spafit.cli import predicting
    from spafit.cli.trained import trained_in
    from spafit.files.replacing import refuse_place

    output = None if parsed.output == Path("-") else parsed.output
    is_stream = parsed.input == Path("-")
    if output is not None:
        predicting.form_of(output, ".jsonl")
        refuse_place(output)
        predicting.refuse_to_replace(output, None if is_stream else parsed.input)
    if parsed.submission is not None:
        refuse_place(parsed.submission, is_folder=True)
    runs = trained_in(parsed.run, parsed.model, parsed.mapped, parsed.average, parsed.precision)
    if parsed.text:
        predicting.predict_texts(
            runs, parsed.text, parsed.text2, probabilities=parsed.probabilities
        )
    elif parsed.submission is not None:
        data = parsed.data or Path(runs.recorded("data", "--data"))
        predicting.write_submissions(runs, data, parsed.submission)
    else:
        predicting.predict_rows(
            runs,
            sys.stdin.buffer if is_stream else parsed.input,
            output,
            probabilities=parsed.probabilities,
            form=runs.table_form(parsed.delimiter, parsed.unquoted, parsed.encoding),
            max_bad_rows=runs.bad_rows_allowed(parsed.max_bad_rows),
        )
    return 0
