"""The types of the command line's options: strict, and refused in one line.

Python's own int() and float() also take "1_000", " 1", "nan" and the digits of other scripts.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path


def one_line(text: str) -> str:
    """Show what may hold a hostile name: in one line, of reasonable length."""
    if len(text) > 1200:
        text = f"{text[:800]} ... {text[-300:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_whole(text: str) -> int:
    """Read a whole number."""
    if not re.fullmatch("[+-]?[0-9]{1,30}", text):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no whole number")
    return int(text)


def as_number(text: str) -> float:
    """Read a finite number."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no number such as 0.1 or 6e-5")
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is beyond any number here")
    return float(text)


def as_size(text: str) -> int:
    """Read a rank or a number of labels; a larger one is a slip that memory would pay for."""
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no whole number from 1 to 100,000")
    return int(text)


def as_seed(text: str) -> int:
    """Read a seed."""
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no whole number of at least 0")
    return int(text)


def as_name(text: str) -> str:
    """Read the name of a model or a folder; one that is empty would be the folder we are in."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no name")
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            raise argparse.ArgumentTypeError(f"{text!r:.60}: there is no such user") from None
    return text


def as_path(text: str) -> Path:
    """Read a path."""
    if not text.strip() or "\0" in text:  # "" is what an unset variable of a script leaves
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no path")
    return Path(text)
