"""JSON without its one silent trap: of a key that stands twice, the last would be taken."""

from __future__ import annotations

from typing import Any


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs; the ``object_pairs_hook`` of ``json.loads``.

    Raises
    ------
    ValueError
        If a key stands twice; the message names all such keys.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"it holds twice: {', '.join(twice)}")
    return result
