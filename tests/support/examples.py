"""The programs of examples/, which are no package."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from support import REPOSITORY


def example(name: str) -> ModuleType:
    """Import a program of examples/."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
