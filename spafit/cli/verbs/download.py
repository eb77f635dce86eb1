"""``spafit download``: its options; spafit/cli/commands.py does the work."""

from __future__ import annotations

import argparse

from spafit.cli.option_types import as_name, as_new_path

SUMMARY = "download a model or GLUE's data once, and check it"
EXAMPLES = "spafit download glue rte mrpc"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument("what", choices=("model", "glue"))
    parser.add_argument(
        "names",
        nargs="*",
        type=as_name,
        help="hub names (owner/name or owner/name@revision), or tasks",
    )
    parser.add_argument(
        "--folder", type=as_new_path, help="folder for GLUE's files; default: the cache"
    )


def run(parsed: argparse.Namespace) -> int:
    """Download a model, or GLUE's files."""
    from spafit.cli import commands

    commands.run_download(parsed.what, parsed.names, parsed.folder)
    return 0
