"""Match regular expressions that come from a file, which may be written to take forever."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from spafit.errors import WeightsError, one_line

TIME_LIMIT_S = 10.0
"""For all patterns of a file; those of real files take milliseconds."""

# A process of its own can be ended while it matches. It does nothing but match.
_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    json.dump([[bool(re.fullmatch(p, n)) for n in names] for p in patterns], sys.stdout)
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    json.dump(str(error) or type(error).__name__, sys.stdout)
"""

_WITHOUT_REPEATS = re.compile(r"(\w|\\?\.)*")


def is_plain(pattern: str) -> bool:
    r"""Return whether a pattern has nothing but letters, digits, ``_``, ``.`` and ``\.``."""
    return _WITHOUT_REPEATS.fullmatch(pattern) is not None


def full_matches(
    patterns: Iterable[str], names: Sequence[str], source: object
) -> dict[str, frozenset[str]]:
    """Return for each pattern the names that it matches as a whole.

    Parameters
    ----------
    patterns : iterable of str
        Regular expressions of Python, from a file.
    names : sequence of str
        Names of modules.
    source : object
        The file, for the message.

    Raises
    ------
    WeightsError
        If one is no regular expression, or matching takes longer than :data:`TIME_LIMIT_S`.
    """
    every = list(dict.fromkeys(patterns))
    if not every:
        return {}
    try:
        said = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([every, list(names)]),
            capture_output=True,
            text=True,
            check=True,
            timeout=TIME_LIMIT_S,
        ).stdout
        found = json.loads(said)
    except subprocess.TimeoutExpired:
        found = f"matching takes longer than {TIME_LIMIT_S:g} s"
    except (subprocess.CalledProcessError, ValueError):
        found = "matching it failed"
    if isinstance(found, str):
        raise WeightsError(
            f"{source}: a regular expression in it cannot be used: {one_line(found)}; write the "
            "names of the modules as a list"
        )
    return {
        pattern: frozenset(name for name, is_matched in zip(names, row, strict=True) if is_matched)
        for pattern, row in zip(every, found, strict=True)
    }
