"""The exceptions that spafit raises, and how text from files is made fit for a message.

Every message names the thing, what was expected, what was found, and the remedy. The command line
prints it in one line and exits with code 2.
"""

from __future__ import annotations

import difflib
import re
import signal
import unicodedata
from collections.abc import Iterable, Sequence


class SpafitError(Exception):
    """Base of every error that spafit raises on purpose.

    Attributes
    ----------
    is_told_elsewhere : bool
        Whether another process of the same run has the same error, and prints it.
    """

    is_told_elsewhere = False


class ConfigError(SpafitError, ValueError):
    """A model configuration or a setting that cannot be honoured."""


class WeightsError(SpafitError):
    """A file of weights or of an adapter that cannot be trusted or does not fit the model."""


class PlanError(SpafitError, ValueError):
    """A plan of strata that is impossible, or that does not fit the model."""


class DataError(SpafitError):
    """A data file that cannot be read as declared; names file and line."""


class TrainingError(SpafitError):
    """A run that cannot go on, such as a loss that is NaN or infinite."""


class DivergedError(TrainingError):
    """A run whose loss, gradient or logits were no longer finite."""


class CheckpointError(SpafitError):
    """A run folder or checkpoint that cannot be written, read or resumed."""


class InUseError(CheckpointError):
    """A run folder that another process holds."""


class StoppedError(SpafitError):
    """A run that was asked to stop, and has saved where it stands.

    Parameters
    ----------
    message : str
        What was saved, and how to go on.
    signal : signal.Signals
        The request.
    """

    def __init__(self, message: str, signal: signal.Signals) -> None:
        super().__init__(message)
        self.signal = signal


_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""What has the text after it run the other way, so that it shows as another one."""


def has_controls(text: str) -> bool:
    """Return whether a text has controls, ends of lines, halves of surrogates, turns of direction.

    Letters and spaces that ``str.isprintable`` refuses are none, such as the zero-width non-joiner
    of Persian words.
    """
    return not text.isprintable() and any(
        c in _TURNS or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text
    )


def one_line(text: str, limit: int = 200) -> str:
    """Return text that may come from a file as one printable line, cut if it is long."""
    cut = text[:limit]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return shown if max(len(text), len(shown)) <= limit else f"{shown[:limit]} ..."


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return the known names that somebody may have meant, if there are any.

    These are the ones whose initials they gave, as ``lr`` for ``learning_rate``, or else the one
    that is most like it.
    """
    asked = name[:80].lower()
    bare = asked.strip("-")
    initials = {each: "".join(re.findall(r"(?<![a-z0-9])[a-z0-9]", each)) for each in known}
    found = [each for each in known if len(bare) > 1 and initials[each] == bare]
    return found or difflib.get_close_matches(asked, known, n=1)


def counted(number: int, name: str) -> str:
    """Return a number with its noun: "1 row", "2 rows"."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def listed(texts: Iterable[str], between: str = "; ", limit: int = 6) -> str:
    """Join the first texts, each fit for a message, and count the others."""
    every = list(texts)
    shown = between.join(one_line(text, 120) for text in every[:limit])
    return shown if len(every) <= limit else f"{shown} and {len(every) - limit} more"
