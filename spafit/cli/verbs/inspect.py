"""``spafit inspect``: its options; spafit/cli/inspecting.py does the work."""

from __future__ import annotations

import argparse

from spafit.cli.option_types import as_name, as_new_path, as_path, as_seed, as_whole
from spafit.cli.shared_options import add_no_mapped, add_settings
from spafit.errors import ConfigError

SUMMARY = "show what a run added to its base, what merging loses, what was forgotten"
EXAMPLES = """\
spafit inspect runs/rte --out inspected
spafit inspect runs/rte --merging
spafit inspect runs/rte --forgetting --tasks sst-2 cola --data DIR"""

_PROBED = ("sst-2", "cola")
"""The tasks that ``--forgetting`` probes."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument("run", type=as_path, help="run folder of spafit train")
    parser.add_argument(
        "--merging",
        action="store_true",
        help="the error of the merged model, layer by layer, in fp16, bf16 and float32",
    )
    parser.add_argument(
        "--forgetting",
        action="store_true",
        help="the model with its adapter off against its base, and with it on what linear probes "
        "of its features find of other tasks, before and after",
    )
    parser.add_argument(
        "--texts",
        type=as_path,
        metavar="FILE",
        help="texts, one a line: their hidden states (default: of the run's dev, or the probed "
        "task's) and, with --forgetting, the loss of their masked tokens",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"tasks of GLUE that are probed (default {' '.join(_PROBED)})",
    )
    parser.add_argument(
        "--data",
        type=as_path,
        help="GLUE's root; with --merging, for a run on a file of your own, another such file; "
        "default: as in training, or the download cache",
    )
    parser.add_argument(
        "--max-bad-rows",
        type=as_whole,
        help="malformed rows that may be left out; default: as in training",
    )
    parser.add_argument(
        "--rows",
        type=as_whole,
        help="the most rows of train, and of dev, that a probe has (default 2000)",
    )
    parser.add_argument(
        "--seeds",
        "--seed",
        type=as_seed,
        nargs="+",
        metavar="SEED",
        help="of the probes' rows and of the masks (default 0 1 2)",
    )
    parser.add_argument(
        "--out",
        type=as_new_path,
        metavar="DIR",
        help="where to write norms.json and norms.png, merging.json, forgetting.json (default: "
        "nowhere)",
    )
    parser.add_argument(
        "--model",
        type=as_name,
        help="folder of weights, minilm, or hub name; default: as in training",
    )
    add_no_mapped(parser)
    add_settings(parser, "quiet")
    parser.set_defaults(prints_only=lambda parsed: parsed.out is None)


def run(parsed: argparse.Namespace) -> int:
    """Inspect a run."""
    for option in ("tasks", "rows", "seeds"):
        if getattr(parsed, option) is not None and not parsed.forgetting:
            raise ConfigError(f"--{option} needs --forgetting")
    for option in ("texts", "data", "max_bad_rows"):
        if getattr(parsed, option) is not None and not (parsed.forgetting or parsed.merging):
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} needs --forgetting or --merging")
    from spafit.cli.inspecting import InspectOptions, run_inspect

    run_inspect(
        InspectOptions(
            run=parsed.run,
            model=parsed.model,
            mapped=parsed.mapped,
            merging=parsed.merging,
            forgetting=parsed.forgetting,
            texts=parsed.texts,
            tasks=parsed.tasks or _PROBED,
            data=parsed.data,
            max_bad_rows=parsed.max_bad_rows,
            rows=2000 if parsed.rows is None else parsed.rows,
            seeds=parsed.seeds or (0, 1, 2),
            out=parsed.out,
            quiet=parsed.quiet,
        )
    )
    return 0
