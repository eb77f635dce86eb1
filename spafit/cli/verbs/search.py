"""``spafit search``: its options; spafit/experiments/search/ does the work."""

from __future__ import annotations

import argparse

from spafit.cli.option_types import as_new_path, as_number, as_seed, as_whole
from spafit.cli.shared_options import (
    add_lora_options,
    add_model_and_data_options,
    add_settings,
    data_options,
    default_folder,
)
from spafit.machine.busy import note_if_busy
from spafit.runs.train_config import TrainConfig

SUMMARY = "choose N1, N2 and the type under a budget, beside random choice"
EXAMPLES = """\
spafit search --task rte --model minilm --learning-rate 5e-4
spafit search --task mrpc --parameters 4000000 --epochs 3"""

_OF_TRAIN = ("epochs", "batch_size", "learning_rate", "max_length", "metric", "device", "quiet")
"""The settings of ``spafit train`` that are its options, too."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument("--task", help="a GLUE task, such as rte; or a name for data of your own")
    add_model_and_data_options(parser)
    parser.add_argument(
        "--out",
        type=as_new_path,
        metavar="DIR",
        help="folder of the search, which is resumed there (default searches/TASK)",
    )
    group = parser.add_argument_group("what is searched")
    group.add_argument(
        "--parameters",
        type=as_whole,
        metavar="N",
        help="the most numbers that may train, layers and head together as in Table 2 (default: "
        "those of the paper's SPAFIT-4-9-II, scaled to the model's layers)",
    )
    group.add_argument(
        "--minutes",
        type=as_number,
        help="instead: the most minutes that a full run may take, by a few steps measured now",
    )
    group.add_argument(
        "--plans",
        type=as_whole,
        default=27,
        help="the most plans that successive halving begins with (default %(default)s)",
    )
    group.add_argument("--rows", type=as_whole, help="the most rows of train that are used")
    group.add_argument(
        "--seeds",
        "--seed",
        type=as_seed,
        nargs="+",
        default=[0, 1, 2],
        metavar="SEED",
        help="of the runs that are reported (default 0 1 2)",
    )
    group.add_argument(
        "--selection-seed",
        type=as_seed,
        default=1000,
        metavar="SEED",
        help="of the runs that choose, and of what is drawn (default %(default)s)",
    )
    group = parser.add_argument_group("plan and training; the defaults are the paper's")
    add_lora_options(group)
    add_settings(group, *_OF_TRAIN)


def run(parsed: argparse.Namespace) -> int:
    """Search by short runs, and report on full ones."""
    config = TrainConfig(**{name: getattr(parsed, name) for name in _OF_TRAIN})
    from spafit.cli.own_data import refuse_wrong_place

    refuse_wrong_place(parsed.task, parsed.data)
    data = data_options(parsed)
    from spafit.experiments.search.start import SearchOptions, run_search

    options = SearchOptions(
        model=parsed.model,
        revision=parsed.revision,
        mapped=parsed.mapped,
        r=parsed.r,
        alpha=parsed.alpha,
        parameters=parsed.parameters,
        minutes=parsed.minutes,
        plans=parsed.plans,
        rows=parsed.rows,
        seeds=tuple(parsed.seeds),
        selection_seed=parsed.selection_seed,
        out=default_folder("searches", data.task_name) if parsed.out is None else parsed.out,
        config=config,
    )
    note_if_busy()
    run_search(options, *data.load(), {**data.about(), "max_bad_rows": data.max_bad_rows})
    return 0
