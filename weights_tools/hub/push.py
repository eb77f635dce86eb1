"""Put the adapter of a run on the hub, with a card made from its record (``push``)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from spafit.cli.trained import SUMMARY
from spafit.config import read_json
from spafit.errors import CheckpointError, WeightsError, one_line
from spafit.runs.record import ADAPTER, RUN, read_record, status_of
from spafit.weights.adapter_files import read_adapter_header
from weights_tools.hub.card import Score, card
from weights_tools.hub.shared_record import NAME, require_adapter_of, shared_record

EPILOG = """\
examples:
  hf auth login
  python -m weights_tools push runs/rte me/rte-spafit
  python -m weights_tools pull me/rte-spafit adapter
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command."""
    parser = verbs.add_parser(
        "push",
        help="put a run's adapter on the hub, with a card made from its record",
        description="Send three files to a repository of the hub, in one commit: the adapter, what "
        "eval and predict need of its record, and a card. No path, host name or hash of the data "
        "is sent. A repository that is not there yet is made, and is private until you change "
        "that on its page.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_folder", metavar="RUN", help="the folder of a run, or of several seeds"
    )
    parser.add_argument("repository", metavar="REPO", help="owner/name")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Send, and print where it is."""
    print(push(Path(options.run_folder), options.repository))
    return 0


def push(folder: Path, repository: str, endpoint: str | None = None) -> str:
    """Send the adapter of a run, or of the best of several seeds' runs.

    Parameters
    ----------
    folder : Path
        The folder of a finished run, or of several seeds' runs.
    repository : str
        ``owner/name``; made, as a private one, if it does not exist.
    endpoint : str, optional
        The address of the hub; None takes huggingface_hub's.

    Returns
    -------
    str
        The address of the commit.

    Raises
    ------
    CheckpointError
        If there is no finished run, or its files do not belong together.
    WeightsError
        If the adapter is no valid file, or the hub does not take it.
    """
    if not NAME.fullmatch(repository):
        raise WeightsError(f"{one_line(repository)} names no repository; give owner/name")
    files = files_of(folder, repository)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        sent = api.create_commit(repository, operations, commit_message="Add the adapter of a run")
    except Exception as error:  # the HTTP library behind it differs from version to version
        raise WeightsError(
            f"{repository} did not get the adapter: {_explained(error, repository)}"
        ) from error
    return str(sent.commit_url)


def files_of(folder: Path, repository: str) -> dict[str, bytes]:
    """Return the content of each file that is sent.

    Raises
    ------
    CheckpointError, WeightsError
        As :func:`push`.
    """
    best, scores = _summary(folder)
    record = read_record(best)
    if record.get("status", "finished") != "finished":
        raise CheckpointError(f"{best}: its run is {status_of(record)}; finish it, then push")
    header = read_adapter_header(best / ADAPTER)
    shared = shared_record(record)
    require_adapter_of(shared, header, best / ADAPTER)
    try:
        if not scores:
            result = record.get("result") or {"metrics": {}, "majority": {}}
            scores = [
                Score(name, [float(value)], float(value), float(result["majority"][name]))
                for name, value in result["metrics"].items()
            ]
        data = record.get("data") or {}
        rows = {split: int(data[split]["rows"]) for split in ("train", "dev") if split in data}
        text = card(repository, shared, header, scores, rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = one_line(repr(error), 200)
        raise CheckpointError(f"{best / RUN} is damaged: {reason}; train again") from None
    content = json.dumps(shared, indent=2, allow_nan=False) + "\n"
    return {
        ADAPTER: (best / ADAPTER).read_bytes(),
        RUN: content.encode(),
        "README.md": text.encode(),
    }


def _summary(folder: Path) -> tuple[Path, list[Score]]:
    """Return the best of several seeds' runs and the scores of all; or the one run, and none."""
    path = folder / SUMMARY
    if not path.is_file():
        return folder, []
    try:
        summary = read_json(path)
        scores = [
            Score(name, [*map(float, each["values"])], float(each["best"]), float(each["majority"]))
            for name, each in summary["metrics"].items()
        ]
        return folder / summary["best"], scores
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(repr(error), 200)}") from None


def _explained(error: Exception, repository: str) -> str:
    """Return in one line what went wrong and what to do; no part of an address is repeated."""
    from huggingface_hub import errors

    while isinstance(error.__cause__, Exception) and not isinstance(error, errors.HfHubHTTPError):
        error = error.__cause__
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if status == 401 or isinstance(error, errors.LocalTokenNotFoundError):
        return "the hub was given no token that it knows; run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return (
            f"the token may not write to {repository}; give one with the right to write there "
            "(`hf auth login`), or another repository"
        )
    if status == 404:
        return "there is no such owner or repository for this token; check the spelling"
    if status is not None:
        return f"the hub answered with status {status}; push again later"
    return (
        f"the connection broke, or the hub gave no usable answer ({type(error).__name__}); check "
        "the network and HF_ENDPOINT, and push again"
    )
