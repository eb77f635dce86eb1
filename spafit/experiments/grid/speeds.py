"""How fast the finished runs of a grid were, and how long the others will take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from spafit.machine.versions import machine

SLOWING = (
    *("max_length", "batch_size", "accumulation", "precision", "frozen_weights", "recompute"),
    *("step", "device"),
)
"""The settings that a training step's time depends on."""


class Kind(NamedTuple):
    """What the time of an example depends on, with its share of the evaluations."""

    task: str
    plan: str
    others: str


def kind_of(task: str, model: str, plan: Mapping[str, Any], settings: Mapping[str, Any]) -> Kind:
    """Return the kind of a run, from the entries that its record has."""
    others = [settings.get(name) for name in (*SLOWING, "cache_prefix", "eval_every")]
    nameless = {**plan, "name": ""}
    return Kind(task, json.dumps(nameless, sort_keys=True), json.dumps([model, *others]))


class Speeds:
    """The speeds of finished runs on this machine, from their records.

    Parameters
    ----------
    threads : int, optional
        The threads of a run; None has as many as this process.
    """

    def __init__(self, threads: int | None = None) -> None:
        here = machine() | ({} if threads is None else {"torch_threads": threads})
        self._here = {name: here.get(name) for name in _SAME}
        self._times: dict[Kind, list[tuple[float, float]]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Take note of a finished run; one elsewhere, or with other threads, is left out."""
        where = record.get("machine")
        if not isinstance(where, dict) or {n: where.get(n) for n in _SAME} != self._here:
            return
        try:
            seconds = float(record["result"]["seconds"])
            examples = record["data"]["train"]["rows"] * record["settings"]["epochs"]
            model = record["about"]["model"]
            kind = kind_of(record["task"], model, record["plan"], record["settings"])
        except (KeyError, TypeError, ValueError):
            return  # an older record
        self._times.setdefault(kind, []).append((float(examples), seconds))

    def seconds(self, kind: Kind, examples: float, near: bool = True) -> float | None:
        """Return how long a run over so many examples in all epochs takes, evaluations included.

        Parameters
        ----------
        kind : Kind
            Of the run.
        examples : float
            Rows times epochs.
        near : bool
            Whether runs of another task or plan may stand in where there is none of both. Those of
            another model or with other settings never do.

        Returns
        -------
        float or None
            None if nothing is known.
        """
        others = [each for each in self._times if each.others == kind.others]
        by_nearness = [
            [each for each in others if each == kind],
            [each for each in others if each.task == kind.task],
            [each for each in others if each.plan == kind.plan],
            others,
        ]
        for kinds in by_nearness[: 4 if near else 1]:
            found = [time for each in kinds for time in self._times[each]]
            if found:
                return examples * sum(s for _, s in found) / max(1.0, sum(e for e, _ in found))
        return None


_SAME = ("platform", "processor", "cpus", "gpu", "torch_threads")
