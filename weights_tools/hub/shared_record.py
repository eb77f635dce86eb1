"""What of a run's record other people are given: what eval and predict need, and nothing else.

A record also says where files lie on its machine, what machine that is, and what the data's hashes
are. These are no one else's business, so that what is given is a list of what it may be.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from spafit.errors import CheckpointError
from spafit.runs.identity import require_trained_with
from spafit.weights import minilm
from spafit.weights.adapter_files import AdapterHeader
from spafit.weights.pins import COMMIT

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""The name of a repository of the hub."""

_OF_THE_RUN = (
    *("task", "definition", "labels", "method", "base_fingerprint", "base_config"),
    *("tokenizer_fingerprint", "trainable", "pretrained"),
)
_SETTINGS = ("max_length", "precision", "device", "metric")
_ABOUT = ("split_special_tokens", "lowercase", "max_bad_rows", "quoted", "encoding")


def shared_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return what of a record may leave the machine, and is taken from another's.

    The base is named if it has the same name everywhere: at a commit of the hub, or ``minilm``.

    Parameters
    ----------
    record : dict
        Of a run that is finished, or what this function gave.
    """
    settings, about = record.get("settings"), record.get("about")
    settings = settings if isinstance(settings, dict) else {}
    about = about if isinstance(about, dict) else {}
    return {
        "status": "finished",
        **_some(record, _OF_THE_RUN),
        "about": {**_base(about), **_some(about, _ABOUT)},
        "settings": _some(settings, _SETTINGS),
    }


def require_adapter_of(record: dict[str, Any], header: AdapterHeader, place: Path) -> None:
    """Refuse an adapter file that is not the one of a record.

    Raises
    ------
    CheckpointError
        If task, labels or base differ; the message has both.
    """
    if not isinstance(header.task or record.get("task"), str):
        raise CheckpointError(f"{place} does not say what task it is for")
    loaded = {
        "labels": None if header.labels is None else list(header.labels),
        "base_fingerprint": header.base_fingerprint,
    }
    if header.task is not None:
        loaded["task"] = header.task
    require_trained_with(place, record, loaded)


def _some(entries: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: entries[key] for key in keys if key in entries}


def _base(about: dict[str, Any]) -> dict[str, Any]:
    """Return name and commit of a base that others can have; nothing for a folder of one's own."""
    model, commit = about.get("model"), about.get("commit")
    if model == minilm.NAME:
        return {"model": model, "revision": None}
    if not isinstance(model, str) or not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        return {}
    name = model.partition("@")[0]
    if not NAME.fullmatch(name):
        return {}
    return {"model": name, "revision": commit, "commit": commit}
