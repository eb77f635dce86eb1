"""``spafit grid``: its options; spafit/experiments/grid/ does the work."""

from __future__ import annotations

import argparse

from spafit.cli.option_types import as_address, as_name, as_new_path, as_part, as_path, as_size

SUMMARY = "train a grid of methods, tasks and seeds from one file"
EXAMPLES = """\
spafit grid minilm --workers 2
spafit grid table-2 --dry-run"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument(
        "file", type=as_name, help="a grid file, or table-1, table-2 or minilm, which come with it"
    )
    parser.add_argument(
        "--out",
        type=as_new_path,
        help="folder of the runs, which are resumed there (default: runs/ and the grid's name)",
    )
    parser.add_argument("--data", type=as_path, help="GLUE's root (default: the download cache)")
    parser.add_argument(
        "--model", type=as_name, help="folder of weights or hub name, in place of the grid's"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=as_size, default=1, help="processes that train (default %(default)s)"
    )
    where.add_argument(
        "--ray",
        type=as_address,
        metavar="ADDRESS",
        help="have a Ray cluster train, each run as a task of its own: HOST:PORT, ray://HOST:PORT, "
        "auto (the cluster of this machine) or local (one made for this command)",
    )
    parser.add_argument(
        "--threads",
        type=as_size,
        help="threads of each (default: the cores divided among them); with --ray the CPUs that "
        "each run asks for (default: 1)",
    )
    parser.add_argument(
        "--cells",
        type=as_part,
        default=(1, 1),
        metavar="I/N",
        help="run only the I-th of N parts, as in an array of jobs; what chooses a learning rate "
        "is in the same part as what it is chosen for",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the runs with what trains, their steps and the time that they take",
    )
    parser.set_defaults(prints_only=lambda parsed: parsed.dry_run)


def run(parsed: argparse.Namespace) -> int:
    """Train the runs of a grid, or print them."""
    from spafit.experiments.grid.start import GridOptions, run_grid
    from spafit.tasks.download import glue_cache

    options = GridOptions(
        file=parsed.file,
        out=parsed.out,
        data=glue_cache() if parsed.data is None else parsed.data,
        model=parsed.model,
        workers=parsed.workers,
        threads=parsed.threads,
        ray=parsed.ray,
        part=parsed.cells,
    )
    return run_grid(options, dry=parsed.dry_run)
