"""The options that several verbs share, and what is made of them; nothing here imports torch."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spafit.cli.option_types import (
    as_class_weights,
    as_delimiter,
    as_encoding,
    as_name,
    as_new_path,
    as_number,
    as_path,
    as_seed,
    as_size,
    as_whole,
)
from spafit.errors import ConfigError, one_line
from spafit.machine import PRECISIONS
from spafit.runs.train_config import CACHE_DTYPES, CACHES, FROZEN_WEIGHTS, STEPS, TrainConfig

if TYPE_CHECKING:  # they import torch or numpy, for which no help and no wrong option waits
    from spafit.cli.own_data import DataOptions
    from spafit.plans import Plan

# The settings of TrainConfig that are options of `spafit train`, by name: the parser of a value, or
# the choices, and the help text. Their defaults are TrainConfig's own.
SETTINGS: dict[str, tuple[Any, str]] = {
    "out": (
        as_new_path,
        "run folder; an interrupted run is resumed there; without it nothing is kept",
    ),
    "overwrite": (bool, "replace a run in --out"),
    "order_seed": (as_seed, "seed of the order of the data alone (default: --seed)"),
    "dropout_seed": (as_seed, "seed of dropout alone (default: --seed)"),
    "epochs": (as_whole, "passes over the data"),
    "batch_size": (as_whole, "examples per step (default: the paper's, 16; 8 for MNLI, ...)"),
    "accumulation": (as_whole, "micro-batches that a batch is computed in, to save memory"),
    "learning_rate": (as_number, "its peak (default 6e-5, or 2e-5 for full fine-tuning)"),
    "weight_decay": (as_number, "AdamW's weight decay of matrices"),
    "decay_biases": (bool, "let biases decay too"),
    "warmup": (as_number, "share of the steps over which the learning rate rises"),
    "max_grad_norm": (as_number, "norm to which the gradient is clipped; 0: no clipping"),
    "metric": (str, "metric by which the best epoch is chosen, such as macro_f1"),
    "class_weights": (
        as_class_weights,
        'weights of labels in the loss: "balanced", or a JSON file',
    ),
    "label_smoothing": (as_number, "share of the loss that is spread over all labels"),
    "early_stopping": (as_whole, "evaluations without a better score after which to stop"),
    "max_length": (as_whole, "tokens per example (default: the model's maximum)"),
    "eval_every": (as_whole, "steps between evaluations (default: an epoch)"),
    "save_every": (as_whole, "steps between checkpoints (default: every 10 minutes)"),
    "keep_checkpoints": (as_whole, "how many of the last checkpoints to keep"),
    "precision": (
        PRECISIONS,
        "precision of matrix products; auto: float32 on a CPU, half on a GPU",
    ),
    "device": (str, "cpu, cuda, cuda:1"),
    "dropout_in_group_1": (
        bool,
        "dropout in group 1 as in the others (the default, but for linear-probe)",
    ),
    "cache_prefix": (
        CACHES,
        "keep the hidden states after group 1, with --no-dropout-in-group-1; auto: in memory for "
        "linear-probe, else off; auto-disk: on disk wherever it can be",
    ),
    "cache_dtype": (CACHE_DTYPES, "the type in which they are kept"),
    "cache_limit_gib": (as_number, "the most memory or disk space for them"),
    "recompute": (as_whole, "groups to recompute in backward: less memory, more time"),
    "frozen_weights": (
        FROZEN_WEIGHTS,
        "how frozen matrices are stored (on a CPU half is a copy beside them); auto: half in bf16 "
        "or fp16, if the device has it",
    ),
    "step": (
        STEPS,
        "how a step is launched; auto: captured as CUDA graphs on a GPU, else eager",
    ),
    "quiet": (bool, "show no progress"),
}

MODEL_HELP = "folder of weights, minilm, or hub name (default %(default)s)"
_NO_DROPOUT = "no dropout in group 1, so that its hidden states can be kept"


def add_settings(group: argparse._ActionsContainer, *names: str) -> None:
    """Add the options of some settings, with the defaults of TrainConfig."""
    defaults = TrainConfig()
    for name in names:
        kind, text = SETTINGS[name]
        option, default = f"--{name.replace('_', '-')}", getattr(defaults, name)
        more: dict[str, Any] = {"dest": name, "default": default, "help": text}
        if kind is bool:
            group.add_argument(option, action="store_true", **more)
            if default is None:  # of one setting only
                more |= {"action": "store_false", "help": _NO_DROPOUT}
                group.add_argument("--no-dropout-in-group-1", **more)
                more["help"] = argparse.SUPPRESS
                group.add_argument("--no-frozen-dropout", **more)  # its older name
            continue
        if default not in (None, ()):  # the text explains these defaults
            more["help"] = f"{text} (default %(default)s)"
        if name == "recompute":
            more |= {"nargs": "+", "metavar": "GROUP"}
        more |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        group.add_argument(option, **more)


def add_model_and_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what names the model and the data that are trained on or probed."""
    parser.add_argument(
        "--model",
        type=as_name,
        default="google-bert/bert-large-cased",
        help=MODEL_HELP,
    )
    parser.add_argument("--revision", type=as_name, help="commit, tag or branch of a hub name")
    add_no_mapped(parser)
    parser.add_argument(
        "--data",
        type=as_path,
        help="GLUE's root (default: the download cache), or a file of your own: CSV, TSV, JSONL, "
        "parquet",
    )
    _add_own_data_options(parser)
    parser.add_argument(
        "--max-bad-rows",
        type=as_whole,
        default=0,
        help="malformed rows that may be left out (default %(default)s)",
    )


def _add_own_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data of your own")
    group.add_argument(
        "--dev", type=as_path, metavar="FILE", help="rows to evaluate on; default: split off"
    )
    group.add_argument("--text", metavar="COLUMN", help="column of the text (default text)")
    group.add_argument("--text2", metavar="COLUMN", help="column of the second text of a pair")
    group.add_argument("--label", metavar="COLUMN", help="column of the label (default label)")
    group.add_argument("--regression", action="store_true", help="labels are scores, of any range")
    group.add_argument(
        "--dev-share",
        type=as_number,
        help="share of the rows that is split off, of each label alike (default 0.2)",
    )
    group.add_argument("--split-seed", type=as_seed, help="seed of the split (default 0)")
    _add_table_options(group, "found from its first line", "utf-8")


def _add_table_options(group: argparse._ActionsContainer, delimiter: str, encoding: str) -> None:
    group.add_argument(
        "--delimiter",
        type=as_delimiter,
        metavar="CHARACTER",
        help=f'of a CSV or TSV file, or "tab"; default: {delimiter}',
    )
    group.add_argument(
        "--unquoted", action="store_true", help="a quote in a CSV or TSV file is just a character"
    )
    group.add_argument(
        "--encoding",
        type=as_encoding,
        metavar="NAME",
        help=f"of a text file without a byte-order mark, such as cp1252; default: {encoding}",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how a run predicts, and on which data."""
    parser.add_argument(
        "--data",
        type=as_path,
        help="GLUE's root, or a file of your own; default: as in training",
    )
    parser.add_argument(
        "--max-bad-rows",
        type=as_whole,
        help="malformed rows that may be left out; default: as in training",
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="average the probabilities of all seeds in the folder, instead of taking the best",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="precision of matrix products; default: as in training",
    )
    _add_table_options(parser, "as in training", "as in training")
    parser.add_argument(
        "--model",
        type=as_name,
        help="folder of weights, minilm, or hub name; default: as in training",
    )
    add_no_mapped(parser)


def add_no_mapped(parser: argparse.ArgumentParser) -> None:
    """Add what has the weights copied."""
    parser.add_argument(
        "--no-mapped",
        dest="mapped",
        action="store_const",
        const=False,
        help="copy the weights, if another program may write to their file (default: those of more "
        "than 512 MiB are mapped)",
    )


def add_lora_options(group: argparse._ActionsContainer) -> None:
    """Add LoRA's rank and scale."""
    group.add_argument("--r", type=as_size, help="LoRA's rank (default 64)")
    group.add_argument(
        "--alpha", type=as_number, help="LoRA's scale before division by r (default 128)"
    )


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add what a plan is made from, beside its method."""
    group = parser.add_argument_group("plan")
    add_lora_options(group)
    group.add_argument("--lora-dropout", type=as_number, help="dropout before A (default 0)")
    group.add_argument(
        "--bias",
        choices=("delta", "direct"),
        help="train a delta beside the frozen bias (default), or the bias itself",
    )
    group.add_argument(
        "--numbering",
        choices=("table-2", "text"),
        help="layers from 0 with both ends, as Table 2 counts (default), or from 1",
    )


def data_options(parsed: argparse.Namespace) -> DataOptions:
    """Return which data the options name."""
    from spafit.cli.own_data import DataOptions
    from spafit.tasks.download import glue_cache
    from spafit.tasks.own_files import TableForm

    return DataOptions(
        task=parsed.task,
        data=glue_cache() if parsed.data is None else parsed.data,
        dev=parsed.dev,
        text=parsed.text,
        text2=parsed.text2,
        label=parsed.label,
        regression=parsed.regression,
        form=TableForm(parsed.delimiter, not parsed.unquoted, parsed.encoding or "utf-8"),
        dev_share=parsed.dev_share,
        split_seed=parsed.split_seed,
        max_bad_rows=parsed.max_bad_rows,
    )


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The options that turn a method's name into a plan (see :func:`spafit.plan`)."""

    method: str
    r: int | None
    alpha: float | None
    lora_dropout: float | None
    bias: str | None
    numbering: str | None

    def make(self, num_layers: int) -> Plan:
        """Return the plan for a model of L layers."""
        from spafit.methods import plan

        return plan(
            self.method,
            num_layers,
            r=self.r,
            alpha=self.alpha,
            lora_dropout=self.lora_dropout,
            bias=self.bias,
            numbering=self.numbering,
        )


def plan_options(parsed: argparse.Namespace) -> PlanOptions:
    """Return what the options say of a plan."""
    return PlanOptions(
        parsed.method,
        parsed.r,
        parsed.alpha,
        parsed.lora_dropout,
        parsed.bias,
        parsed.numbering,
    )


def default_folder(parent: str, task: str) -> Path:
    """Return the folder that is named by a task, where it can name one."""
    from spafit.files.durable import is_plain_name

    if not is_plain_name(task):
        raise ConfigError(f"--task {one_line(task)} cannot name a folder; give one (--out)")
    return Path(parent) / task
