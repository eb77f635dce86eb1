"""``spafit download``: its options, and all that it does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spafit.cli.option_types import as_name, as_new_path
from spafit.errors import ConfigError

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
    """Download a model or GLUE's files once; afterwards everything works offline."""
    if parsed.what == "model":
        _models(parsed.names, parsed.folder)
    else:
        _glue(parsed.names, parsed.folder)
    return 0


def _models(names: list[str], folder: Path | None) -> None:
    from spafit.weights.hub import local_folder, pinned_revision

    if folder is not None:
        raise ConfigError("--folder is for glue; models go to the hub's cache (HF_HOME)")
    for name in names:
        if Path(name).expanduser().is_dir():
            raise ConfigError(f"{name} is a local folder already; name a model")
    for name in names or ["google-bert/bert-large-cased"]:
        place, commit = local_folder(name), pinned_revision(name)
        print(f"{name} at commit {commit}: {place}" if commit else f"{name}: {place}")


def _glue(names: list[str], folder: Path | None) -> None:
    from spafit.files.replacing import refuse_place
    from spafit.tasks import glue
    from spafit.tasks.download import download_glue, glue_cache

    tasks = names or [task.name for task in glue.TASKS.values()]
    place = glue_cache() if folder is None else folder
    refuse_place(place, is_folder=True)
    shown: dict[str, int] = {}

    def show(name: str, done: int, total: int) -> None:
        percent = 100 * done // max(1, total)
        if percent // 10 > shown.get(name, -1):
            shown[name] = percent // 10
            print(f"{name}: {done:,} of {total:,} bytes", file=sys.stderr)

    for path in download_glue(tasks, place, progress=show):
        print(f"written: {path}")
