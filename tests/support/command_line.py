"""Call the command line inside this process, and read the tables that it prints."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from spafit.cli import main

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: str | Path) -> tuple[int, str, str]:
    """Return the exit code, and what is printed to standard output and to standard error."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def table(out: str, delimiter: str = "\t") -> list[dict[str, str]]:
    """Return the rows of a table, by the names in its first line."""
    return list(csv.DictReader(io.StringIO(out), delimiter=delimiter))
