"""Record in ``pins.json`` the commit that each hub name is pinned to on this machine.

With each commit it records the files that spafit may read, with the size and hash that the hub
lists.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from spafit.config import read_json
from spafit.errors import WeightsError
from spafit.files.replacing import cache_folder, replacing
from spafit.files.transfers import alone_in

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
"""The files a tokenizer is read from; those that the repository has are fetched."""

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILES = ("config.json", "model.safetensors", INDEX_FILE)
"""The files a model is read from, and the parts that an index names. Never a ``.bin``, a pickle."""

MODEL_FILES = WEIGHT_FILES + TOKENIZER_FILES
"""The files that :func:`spafit.weights.hub.local_folder` fetches by default."""

COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
PART = re.compile(r"model-[\w.-]+\.safetensors")


@dataclass(frozen=True)
class PinnedFile:
    """One file of a pinned commit, as the hub lists it.

    Attributes
    ----------
    size : int
        Bytes.
    hash : str
        64 hexadecimal digits: the SHA-256 of a large file. 40: git's SHA-1 of a small one.
    """

    size: int
    hash: str


@dataclass(frozen=True)
class Pin:
    """The commit that a hub name is pinned to on this machine.

    Attributes
    ----------
    commit : str
        The 40 hexadecimal digits of the commit.
    files : dict of str to PinnedFile
        The files of that commit that spafit may read.
    asked : tuple of str
        The names that were looked for; an older record does not say whether there are others.
    """

    commit: str
    files: dict[str, PinnedFile]
    asked: tuple[str, ...] = MODEL_FILES


def may_be_read(name: str) -> bool:
    """Return whether spafit may read a file of this name: data only, and not in a subfolder."""
    return name in MODEL_FILES or PART.fullmatch(name) is not None


def read_pins() -> dict[str, Pin]:
    """Read the pins, by ``owner/name@revision``.

    Raises
    ------
    WeightsError
        If ``pins.json`` cannot be read or has an invalid entry.
    """
    path = cache_folder() / "pins.json"
    try:
        content = read_json(path)
        return {key: _pin_from_json(entry) for key, entry in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path}, which records the pinned commits, cannot be used ({error}); delete it, and "
            "the hub is asked again"
        ) from None


def _pin_from_json(entry: dict[str, Any]) -> Pin:
    files = {
        name: PinnedFile(int(file["size"]), str(file["hash"]))
        for name, file in entry["files"].items()
    }
    if not COMMIT.fullmatch(entry["commit"]) or not all(map(may_be_read, files)):
        raise ValueError("an entry is not a commit with plain file names")
    older = tuple(name for name in MODEL_FILES if name != "added_tokens.json")
    return Pin(entry["commit"], files, tuple(map(str, entry.get("asked", older))))


def write_pin(key: str, pin: Pin) -> None:
    """Pin a name, keeping what other processes pin at the same time.

    Raises
    ------
    WeightsError
        If ``pins.json`` cannot be written.
    """
    path = cache_folder() / "pins.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(path.parent), replacing(path, WeightsError) as temporary:
            pins = {**read_pins(), key: pin}
            content = {name: asdict(pins[name]) for name in sorted(pins)}
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error}; set SPAFIT_CACHE") from None
