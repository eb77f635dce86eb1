"""``spafit probe``: its options; spafit/experiments/probe/ does the work."""

from __future__ import annotations

import argparse

from spafit.cli.option_types import as_new_path, as_seed, as_whole
from spafit.cli.shared_options import (
    add_model_and_data_options,
    add_settings,
    data_options,
    default_folder,
)
from spafit.errors import ConfigError, DataError
from spafit.machine.busy import note_if_busy

SUMMARY = "probe which layers of the frozen model know a task"
EXAMPLES = """\
spafit probe --task rte --model minilm
spafit probe --task order --model minilm"""


_OF_A_FILE = (
    *("dev", "text", "text2", "label", "regression", "dev-share", "split-seed"),
    *("delimiter", "unquoted", "encoding"),
)
"""The options that a generated task does without."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument(
        "--task",
        help="a GLUE task, such as rte; pos, number, depth or order, which are generated; or a "
        "name for data of your own",
    )
    add_model_and_data_options(parser)
    parser.add_argument(
        "--seeds",
        "--seed",
        type=as_seed,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        metavar="SEED",
        help="of the training rows that are drawn (default 0 1 2 3 4)",
    )
    parser.add_argument(
        "--rows",
        type=as_whole,
        default=2000,
        help="the most rows of train, and of dev, that are used (default %(default)s)",
    )
    parser.add_argument(
        "--out", type=as_new_path, metavar="DIR", help="where to write (default probes/TASK)"
    )
    add_settings(parser, "quiet")


def run(parsed: argparse.Namespace) -> int:
    """Probe a generated task, one of GLUE's, or data of your own."""
    from spafit.cli.own_data import refuse_wrong_place
    from spafit.experiments.probe import linguistic

    is_generated = parsed.task in linguistic.TASKS and parsed.data is None
    if parsed.task in linguistic.TASKS and parsed.data is not None and parsed.data.is_dir():
        raise ConfigError(
            f"--data {parsed.data} is a folder, and the task {parsed.task} is generated; leave "
            "--data out, or name a file of your own"
        )
    if is_generated:
        for option in _OF_A_FILE:
            value = getattr(parsed, option.replace("-", "_"))
            if value is not None and value is not False:
                raise ConfigError(
                    f"--{option} is for a file of your own; the task {parsed.task} is generated"
                )
        train, dev = linguistic.datasets(parsed.task)
        name = parsed.task
    else:
        try:
            refuse_wrong_place(parsed.task, parsed.data)
            options = data_options(parsed)
            name = options.task_name
        except DataError as error:
            generated = ", ".join(linguistic.TASKS)
            raise DataError(f"{error}; the tasks that are generated are {generated}") from None
    from spafit.experiments.probe.report import run_probe  # after what is wrong without torch

    note_if_busy()
    if not is_generated:
        train, dev = options.load()
    run_probe(
        parsed.model,
        train,
        dev,
        seeds=parsed.seeds,
        rows=parsed.rows,
        out=default_folder("probes", name) if parsed.out is None else parsed.out,
        revision=parsed.revision,
        mapped=parsed.mapped,
        quiet=parsed.quiet,
    )
    return 0
