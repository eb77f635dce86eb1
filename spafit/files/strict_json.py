"""Files from elsewhere without their silent traps, and how to speak of what stands in them."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from spafit.errors import listed

MAX_JSON_BYTES = 2**24
"""A longer JSON file is refused; BERT-large's index takes 40 thousand bytes."""

_PIECE_BYTES = 2**16


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs; the ``object_pairs_hook`` of ``json.loads``.

    Raises
    ------
    ValueError
        If a key stands twice, of which JSON's readers would take the last.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)
        raise ValueError(f"it holds twice: {listed(twice, ', ')}")
    return result


def parse_json(raw: bytes) -> Any:
    """Read UTF-8 as JSON.

    Raises
    ------
    ValueError
        If it is not both, holds a key twice, or is nested too deeply.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    OSError
        If it is missing, no regular file, or cannot be read.
    ValueError
        As :func:`parse_json`, or if it takes more than :data:`MAX_JSON_BYTES`.
    """
    raw = bytearray()
    with open_regular(path) as file:
        # In pieces: asked for all at once, the limit itself would be allocated for every file.
        while len(raw) <= MAX_JSON_BYTES and (piece := file.read(_PIECE_BYTES)):
            raw += piece
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"it takes more than the {MAX_JSON_BYTES} bytes that are accepted")
    return parse_json(bytes(raw))


def open_regular(path: Path) -> BinaryIO:
    """Open a file to be read, and nothing else that may stand under its name.

    Raises
    ------
    OSError
        If it is missing or cannot be read, or is a device or a pipe, which may have no end.
    """

    def without_waiting(name: str, flags: int) -> int:
        # A pipe would wait for somebody to write to it.
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=without_waiting)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file
