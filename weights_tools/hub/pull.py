"""Fetch an adapter from the hub, as a folder like that of a run of one's own (``pull``)."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from spafit.errors import CheckpointError, WeightsError
from spafit.files.replacing import replacing
from spafit.runs.record import ADAPTER, RUN, read_record, read_run
from spafit.weights.adapter_files import read_adapter_header
from spafit.weights.hub import fetch_today
from weights_tools.exporting import made
from weights_tools.hub.shared_record import require_adapter_of, shared_record

EPILOG = """\
examples:
  python -m weights_tools pull me/rte-spafit adapter
  spafit predict adapter --text "It rains." --text2 "It is wet."
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command."""
    parser = verbs.add_parser(
        "pull",
        help="fetch an adapter that push has put on the hub",
        description="Fetch an adapter and its record, hold both against the hub's hashes and "
        "against each other, and write a folder that eval, predict and export take like that of a "
        "run of one's own. Only safetensors and JSON are fetched.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", metavar="REPO", help="owner/name, or owner/name@revision")
    parser.add_argument("folder", metavar="OUT", help="to be made; empty if it exists")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fetch, and print what is there now."""
    commit, base = pull(options.repository, Path(options.folder))
    more = "" if base else "; its base is not on the hub: give it with --model"
    print(f"{options.folder}: commit {commit} of {options.repository}{more}")
    return 0


def pull(repository: str, folder: Path, endpoint: str | None = None) -> tuple[str, str | None]:
    """Fetch an adapter and the record of its run, as they are on the hub today.

    Parameters
    ----------
    repository : str
        ``owner/name``, or ``owner/name@revision``.
    folder : Path
        Made if it does not exist, else empty.
    endpoint : str, optional
        The address of the hub; None takes huggingface_hub's.

    Returns
    -------
    tuple of str and (str or None)
        The commit, and the name of the base if the record has one.

    Raises
    ------
    CheckpointError
        If the record is none, or not that of the adapter.
    WeightsError
        If the repository is not there or has no adapter, a file is not what the hub lists, or the
        folder is not empty or cannot be written.
    """
    with made(folder):
        files = fetch_today(repository, (ADAPTER, RUN), endpoint=endpoint)
        record = shared_record(read_run(files / RUN))
        require_adapter_of(record, read_adapter_header(files / ADAPTER), files / ADAPTER)
        try:
            with replacing(folder / ADAPTER, WeightsError) as temporary:
                shutil.copyfile(files / ADAPTER, temporary)
            # Last, so that an incomplete folder is no run.
            with replacing(folder / RUN, WeightsError) as temporary:
                content = json.dumps(record, indent=2, allow_nan=False)
                temporary.write_text(f"{content}\n", encoding="utf-8")
            read_record(folder)
        except CheckpointError:
            (folder / RUN).unlink(missing_ok=True)
            (folder / ADAPTER).unlink(missing_ok=True)
            raise
    return files.name, record["about"].get("model")
