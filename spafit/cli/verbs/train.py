"""``spafit train``: its options; spafit/cli/training.py does the work."""

from __future__ import annotations

import argparse

from spafit.cli.option_types import as_path, as_seed
from spafit.cli.shared_options import (
    SETTINGS,
    add_model_and_data_options,
    add_plan_options,
    add_settings,
    data_options,
    plan_options,
)
from spafit.errors import ConfigError
from spafit.machine.busy import note_if_busy
from spafit.runs.train_config import TrainConfig

SUMMARY = "fine-tune on a GLUE task, or on data of your own"
EXAMPLES = """\
spafit train --task rte --method SPAFIT-4-9-II --out runs/rte --seeds 0 1 2
spafit train --data tickets.csv --method SPAFIT-4-9-II --out runs/tickets"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument("--task", help="a GLUE task, such as rte; or a name for data of your own")
    parser.add_argument("--method", required=True, help="as for spafit plan")
    add_model_and_data_options(parser)
    add_settings(parser, "out", "overwrite")
    parser.add_argument(
        "--split-special-tokens",
        action="store_true",
        help="read special tokens such as [SEP] in a text as plain text (default: as tokens, as in "
        "transformers)",
    )
    parser.add_argument(
        "--lowercase",
        action=argparse.BooleanOptionalAction,
        help="lower-case the texts, or not (default: as the tokenizer's files say)",
    )
    add_plan_options(parser)
    group = parser.add_argument_group("training; the defaults are the paper's")
    group.add_argument(
        "--seeds",
        "--seed",
        type=as_seed,
        nargs="+",
        default=[TrainConfig().seed],
        metavar="SEED",
        help=f"one run each; several give mean and spread (default {TrainConfig().seed})",
    )
    group.add_argument(
        "--together",
        action="store_true",
        help="compute group 1 once for all seeds, and keep its output in memory; with "
        "--no-dropout-in-group-1",
    )
    group.add_argument(
        "--start-from",
        type=as_path,
        metavar="RUN",
        help="begin with what a run of the same method has trained, such as on a related task; its "
        "head is taken too if it has the same labels",
    )
    group.add_argument(
        "--init-seed",
        type=as_seed,
        help="seed of the initial values of head, LoRA and the like alone (default: --seed)",
    )
    add_settings(group, *(name for name in SETTINGS if name not in ("out", "overwrite")))


def run(parsed: argparse.Namespace) -> int:
    """Fine-tune for one seed or several."""
    settings = {name: getattr(parsed, name) for name in SETTINGS if name != "recompute"}
    config = TrainConfig(seed=parsed.seeds[0], recompute=tuple(parsed.recompute), **settings)
    if parsed.together and len(parsed.seeds) < 2:
        raise ConfigError("--together is for several seeds, such as --seeds 0 1 2; leave it out")
    from spafit.cli.own_data import refuse_wrong_place

    refuse_wrong_place(parsed.task, parsed.data)
    from spafit.cli.training import ModelOptions, run_train  # after what is wrong without torch

    note_if_busy()
    run_train(
        data_options(parsed),
        plan_options(parsed),
        ModelOptions(
            parsed.model,
            parsed.revision,
            parsed.split_special_tokens,
            parsed.lowercase,
            parsed.mapped,
            parsed.start_from,
        ),
        parsed.seeds,
        config,
        parsed.init_seed,
        parsed.together,
    )
    return 0
