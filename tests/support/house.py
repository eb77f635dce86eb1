"""The rooms of the house: which module stands in which, and what each imports."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from support import REPOSITORY

PACKAGE = REPOSITORY / "spafit"

# From the ground up: a room may import what stands before it. The files at the top of the package
# are the core (tests/test_core_stands_alone.py), with kernels/ and trunk/.
ROOMS = "core files machine weights text tasks runs training experiments interop demo cli".split()
OUTSIDE = ("__init__", "__main__", "glue", "version")  # they belong to no room

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """Return the room of a module such as ``weights.hub``."""
    first = module.partition(".")[0]
    return first if first in ROOMS else "core"


def module_name(path: Path) -> str:
    """Return a module's name below ``spafit``."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Return the modules of spafit that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "spafit":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spafit."):
            found.add((node.module or "").removeprefix("spafit."))
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("spafit.")
                for alias in node.names
                if alias.name.startswith("spafit.")
            }
    return found - set(OUTSIDE)


@functools.cache
def rooms() -> dict[str, set[str]]:
    """Return the rooms, each with those that it imports."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in MODULES:
        if (name := module_name(path)) not in OUTSIDE:
            found[room_of(name)] |= {room_of(each) for each in imports_of(path)} - {room_of(name)}
    return found
