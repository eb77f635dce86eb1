"""Helpers that several tests share."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process that imports what this one does, and more variables."""
    path = os.pathsep.join([str(TESTS), str(REPOSITORY), *sys.path])
    return {**os.environ, "PYTHONPATH": path, **variables}
