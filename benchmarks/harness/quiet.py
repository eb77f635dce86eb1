"""Whether a machine was quiet during a measurement: what other programs used, how rounds differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from spafit.machine import busy

_MOST_SPREAD = 0.4
_MOST_RANGE = 3.0
_MOST_OTHERS = 0.1


def other_load() -> str:
    """Return how many cores other programs kept busy since this process began, such as "0.03".

    "unknown" where the system does not say.
    """
    load = busy.other_load()
    return "unknown" if load is None else f"{load:.2f}"


def warnings(rows: Sequence[Mapping[str, str | int | float]]) -> list[str]:
    """Return a line for each way in which rows are not to be trusted; none if all is well.

    A row's rounds differ too much if the middle half of its ratios spans more than 40 % of their
    median, or the largest is more than three times the smallest. Other programs disturb if they
    used more than a tenth of a core of those that the measurement needed.
    """
    found = []
    for row in rows:
        if "ratio" not in row:
            continue
        low, high = float(row["ratio_low_quartile"]), float(row["ratio_high_quartile"])
        least, most, median = (float(row[f"ratio{key}"]) for key in ("_min", "_max", ""))
        if high - low > _MOST_SPREAD * median or most > _MOST_RANGE * least:
            found.append(
                f"{row['contender']}: the rounds differ much, {least:.2f} to {most:.2f} times; "
                "measure more of them"
            )
    cores = os.cpu_count() or 1
    disturbed = [
        str(row["other_load"])
        for row in rows
        if row.get("other_load", "unknown") != "unknown"
        and float(row["other_load"]) > cores - int(row["threads"]) + _MOST_OTHERS
    ]
    if disturbed:
        found.append(
            f"other programs kept {max(disturbed, key=float)} of {cores} cores busy meanwhile; "
            "measure again when they are done"
        )
    return found
