"""Whether a machine was quiet during a measurement: what other programs used, how rounds differ."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_COUNTS = Path("/proc/stat")
_MOST_SPREAD = 0.4
_MOST_RANGE = 3.0
_MOST_OTHERS = 0.1


def others_s() -> float | None:
    """Return the processor seconds that all other programs have used since the machine started.

    None where the system does not count them as Linux does.
    """
    try:
        first = _COUNTS.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _, _, *rest = (int(number) for number in first[1:9])
    except (OSError, ValueError):
        return None
    own = os.times()
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system


_BEGAN = time.monotonic(), others_s()


def other_load() -> str:
    """Return how many cores other programs kept busy since this process began, such as "0.03".

    It is counted from the import of this module, by this process and those that it has waited for;
    "unknown" where the system does not say.
    """
    began, before = _BEGAN
    now = others_s()
    if before is None or now is None:
        return "unknown"
    return f"{max(0.0, now - before) / max(1e-3, time.monotonic() - began):.2f}"


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
