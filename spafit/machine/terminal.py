"""What a terminal shows: its size, its characters and colours, and whether it is still there."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO, cast

_ASCII = str.maketrans("─│┌┬┐├┼┤└┴┘³×█░", "-|+++++++++3x#.") | {ord("±"): "+-"}


def columns(stream: TextIO) -> int:
    """Return the columns to write in: 80, or the terminal's own if it has fewer."""
    return min(_own("columns", stream), 80) or 80


def height(stream: TextIO) -> int:
    """Return the lines of a terminal; 24 if it does not know."""
    return _own("lines", stream) or 24


def _own(what: str, stream: TextIO) -> int:
    """Return a size of the terminal, or what the user's variable for it says, or 0."""
    try:
        own: int = getattr(os.get_terminal_size(stream.fileno()), what)
    except (AttributeError, OSError, ValueError):  # no terminal
        own = 0
    given = os.environ.get(what.upper(), "")
    if own == 0 and given.isascii() and given.isdigit():  # also of a terminal that does not know
        own = int(given[:9])
    return own


def is_ascii(stream: TextIO) -> bool:
    """Return whether a stream shows ASCII alone: by its encoding, the locale or ``TERM=dumb``."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_CTYPE", "LANG"))), "")
    return (
        not encoding.lower().startswith("utf")
        or locale in ("C", "POSIX")  # in UTF-8 here, but Python chose it, not the user
        or os.environ.get("TERM") == "dumb"
    )


def has_colours(stream: TextIO) -> bool:
    """Return whether a stream is a terminal with colours, and ``NO_COLOR`` is not set."""
    is_wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return is_wanted and stream.isatty()


def fitted(text: str, colours: Mapping[str, str], stream: TextIO | None = None) -> str:
    """Return a drawing in the characters and colours that a stream shows.

    Parameters
    ----------
    text : str
        The drawing. In ASCII a letter that is lacking becomes a question mark, so that what stands
        below each other stays there.
    colours : mapping of str to str
        The colour of each word that has one, as the number of an ANSI escape sequence.
    stream : TextIO, optional
        None is standard output.
    """
    stream = sys.stdout if stream is None else stream
    if is_ascii(stream):
        text = text.translate(_ASCII).encode("ascii", "replace").decode()
    if colours and has_colours(stream):
        words = "|".join(map(re.escape, colours))
        text = re.sub(
            rf"(?<!\w)({words})(?!\w)",
            lambda word: f"\x1b[{colours[word[0]]}m{word[0]}\x1b[m",
            text,
        )
    return text


class _Lasting:
    """A stream that drops everything after the first failure of the stream it wraps."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_lost = False

    def write(self, text: str) -> int:
        if not self._is_lost:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # ValueError: the stream was closed
                self._is_lost = True
        return len(text)

    def flush(self) -> None:
        if not self._is_lost:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._is_lost = True

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:  # encoding, fileno ...
        return getattr(self._stream, name)


def lasting(stream: TextIO) -> TextIO:
    """Wrap a stream so that writing never raises; after the first failure nothing is written.

    A pipe's reader may exit, a terminal close, a disk fill up: that must not end a long run.

    Parameters
    ----------
    stream : TextIO
        The stream to wrap; it is never closed.
    """
    return stream if isinstance(stream, _Lasting) else cast(TextIO, _Lasting(stream))
