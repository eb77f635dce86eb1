"""How fast the finished runs of a grid were, and how long the others will take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spafit.machine.versions import machine


class Speeds:
    """The speeds of finished runs on this machine, from their records."""

    def __init__(self) -> None:
        here = machine()
        self._here = {name: here.get(name) for name in _SAME}
        self._times: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Take note of a finished run; one of another machine is left out."""
        where = record.get("machine")
        if not isinstance(where, dict) or {n: where.get(n) for n in _SAME} != self._here:
            return
        try:
            seconds = float(record["result"]["seconds"])
            examples = record["data"]["train"]["rows"] * record["settings"]["epochs"]
            key = record["task"], record["method"]
        except (KeyError, TypeError, ValueError):
            return  # an older record
        self._times.setdefault(key, []).append((float(examples), seconds))

    def seconds(self, task: str, method: str, examples: float, near: bool = True) -> float | None:
        """Return how long a run over so many examples in all epochs takes, evaluations included.

        Parameters
        ----------
        task, method : str
            Of the run.
        examples : float
            Rows times epochs.
        near : bool
            Whether runs of another task or method may stand in where there is none of both.

        Returns
        -------
        float or None
            None if nothing is known.
        """
        by_nearness = [
            [key for key in self._times if key == (task, method)],
            [key for key in self._times if key[0] == task],
            [key for key in self._times if key[1] == method],
            list(self._times),
        ]
        for keys in by_nearness[: 4 if near else 1]:
            found = [each for key in keys for each in self._times[key]]
            if found:
                return examples * sum(s for _, s in found) / max(1.0, sum(e for e, _ in found))
        return None


_SAME = ("platform", "processor", "cpus", "gpu")
