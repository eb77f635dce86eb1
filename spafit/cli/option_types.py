"""The types of the command line's options: strict, with one-line errors.

Python's own int() and float() also accept "1_000", " 1", "nan" and the digits of other scripts.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path

from spafit.errors import ConfigError, has_controls


def as_whole(text: str) -> int:
    """Parse a whole number."""
    if not re.fullmatch("[+-]?[0-9]{1,30}", text):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number")
    return int(text)


def as_number(text: str) -> float:
    """Parse a finite number."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a number such as 0.1 or 6e-5")
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is too large a number")
    return float(text)


def as_size(text: str) -> int:
    """Parse a rank or a number of labels; a very large one is a typing error that fills memory."""
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number from 1 to 100,000")
    return int(text)


def as_seed(text: str) -> int:
    """Parse a seed."""
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number of at least 0")
    return int(text)


def as_part(text: str) -> tuple[int, int]:
    """Parse which of how many parts, such as 2/8."""
    match = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} is not a part of several, such as 1/8 to 8/8"
        )
    return int(match[1]), int(match[2])


def as_address(text: str) -> str:
    """Parse the address of a Ray cluster."""
    place = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}"
    if not re.fullmatch(f"auto|local|(ray://)?{place}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} is not the address of a Ray cluster: HOST:PORT, ray://HOST:PORT, auto "
            "or local"
        )
    return text


def as_class_weights(text: str) -> str | dict[str, float]:
    """Parse "balanced", or read a JSON file of label names and weights."""
    if text == "balanced":
        return text
    from spafit.config import read_json  # it is not needed for help

    try:
        weights = read_json(as_path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f'{text!r:.200} is neither "balanced" nor a JSON file such as {{"spam": 2.0}} '
            f"({error!s:.300})"
        ) from None
    if not isinstance(weights, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.200} holds no JSON object of labels")
    return weights


def as_delimiter(text: str) -> str:
    """Parse the character between the fields of a table."""
    character = "\t" if text in ("tab", "\\t") else text
    if (
        len(character) != 1
        or not (character == "\t" or character.isprintable())
        or character in ' "'
    ):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not one character, nor the word tab")
    return character


def as_encoding(text: str) -> str:
    """Parse the name of an encoding of texts."""
    from spafit.tasks.own_files import known_encoding  # it is not needed for help

    try:
        return known_encoding(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def as_name(text: str) -> str:
    """Parse the name of a model or a folder; an empty one would mean the current folder.

    A folder that is there may have any name.
    """
    try:
        is_folder = text != "" and Path(text).expanduser().is_dir()
    except RuntimeError:
        is_folder = Path(text).is_dir()  # a name that begins with ~, and no user's
        if not is_folder:
            raise argparse.ArgumentTypeError(f"{text!r:.60}: there is no such user") from None
    except OSError:  # too long a name, for example
        is_folder = False
    if not is_folder and (not text.strip() or not text.isprintable()):
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} is not the name of a model, nor a folder that is there"
        )
    return text


def as_path(text: str) -> Path:
    """Parse a path."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # not from a shell
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a path") from None
    if not text.strip() or "\0" in text:  # "" comes from an unset variable in a script
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a path")
    return Path(text)


def as_new_path(text: str) -> Path:
    """Parse the path of a file or folder to be written.

    A control character or a line end in a new name is a slip of a script, as of one with the line
    ends of Windows. What is there may have any name.
    """
    path = as_path(text)
    for each in (path, *path.parents):
        name = os.fsencode(each.name).decode(errors="replace")  # it need not be a text
        if has_controls(name) and not os.path.lexists(each):
            raise argparse.ArgumentTypeError(
                f"{text!r:.60} has a control character or a line end in the name of a new file or "
                "folder"
            )
    return path
