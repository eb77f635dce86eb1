"""Remember which form of an operation was fastest on a device: the file ``kernels.json``.

The file is in spafit's cache folder (``$SPAFIT_CACHE``). It has one entry for each device, version
of PyTorch, operation and shape, with the measured times and the reasons why a form was not used
(:mod:`spafit.kernels.gpu.choices`). It may be deleted at any time; forms are then measured again.

It is in use in every process that has imported this module, as all do that load weights or choose a
device by :mod:`spafit.machine.precision`.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from spafit.config import read_json
from spafit.files.replacing import cache_folder, replacing
from spafit.kernels.gpu import choices


class KernelsFile:
    """The file, as a :class:`spafit.kernels.gpu.choices.Memory`."""

    def find(self, device: str, operation: str, shape: str) -> Any:
        """Return the entry for a shape; None if there is none."""
        entry: Any = read()
        for name in (device, operation, shape):
            entry = entry.get(name) if isinstance(entry, dict) else None
        return entry

    def keep(self, device: str, operation: str, shape: str, entry: dict[str, Any]) -> None:
        """Add an entry to the file atomically; do nothing if it cannot be written."""
        known = read()
        for name in (device, operation):  # foreign content is replaced
            inner = known if name == device else known[device]
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
        known[device][operation][shape] = entry
        text = json.dumps(known, indent=1, sort_keys=True) + "\n"
        with contextlib.suppress(OSError):
            path().parent.mkdir(parents=True, exist_ok=True)
            with replacing(path()) as temporary:
                temporary.write_text(text, encoding="utf-8")


def path() -> Path:
    """Return the path of the file."""
    return cache_folder() / "kernels.json"


def read() -> dict[str, Any]:
    """Return the file's content; an empty dict if it is missing or cannot be read."""
    try:
        found = read_json(path())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remembered(device: torch.device) -> dict[str, dict[str, Any]]:
    """Return the file's entries for a device: operation -> shape -> entry."""
    here = read().get(choices.device_name(device))
    if not isinstance(here, dict):
        return {}
    return {
        operation: {
            shape: entry
            for shape, entry in shapes.items()
            if isinstance(entry, dict) and isinstance(entry.get("choice"), str)
        }
        for operation, shapes in here.items()
        if isinstance(shapes, dict)
    }


choices.remember_in(KernelsFile())
