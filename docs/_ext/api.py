"""Write the reference of the public names: ``spafit.__all__``, under the headings that it has."""

from __future__ import annotations

import inspect
import operator
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import spafit

_ALL = re.compile(r"^__all__ = \[\n(.*?)^\]", flags=re.MULTILINE | re.DOTALL)


def names() -> dict[str, list[str]]:
    """Return the public names by the comment in ``__all__`` under which they stand."""
    source = Path(spafit.__file__).read_text(encoding="utf-8")
    listed = _ALL.search(source)
    assert listed is not None
    found: dict[str, list[str]] = {}
    heading = ""
    for line in listed[1].splitlines():
        if title := re.match(r" *# (.*)", line):
            heading = title[1][0].upper() + title[1][1:]
        elif heading:
            found.setdefault(heading, []).append(line.strip(' ",'))
    return found


def reference() -> str:
    """Return the page: a heading for each group of names, and what the docstrings say."""
    lines = []
    for heading, group in names().items():
        lines += [f"## {heading}", "", "```{eval-rst}"]
        for name in group:
            lines += [_entry(name), ""]
        lines += ["```", ""]
    return "\n".join(lines)


def _entry(name: str) -> str:
    """Return the directives that document a name; of a module, those of its names that are new."""
    thing = operator.attrgetter(name)(spafit)
    if inspect.ismodule(thing):
        public = [getattr(spafit, each) for each in spafit.__all__]
        own = [each for each in thing.__all__ if getattr(thing, each) not in public]
        module = f".. automodule:: spafit.{name}\n   :no-members:"
        return "\n\n".join([module, *(_entry(f"{name}.{each}") for each in own)])
    if inspect.isclass(thing):
        return f".. autoclass:: spafit.{name}\n   :members:"
    if inspect.isfunction(thing):
        return f".. autofunction:: spafit.{name}"
    return f".. autodata:: spafit.{name}\n   :no-value:"


def _keep_names_together(*event: Any) -> None:
    """Have two names with one description, ``a, b : int``, read as one, which napoleon splits."""
    lines = event[-1]
    for number, line in enumerate(lines):
        if re.match(r" *\w+(, \w+)+ :", line):
            names, colon, kind = line.partition(" :")
            lines[number] = names.replace(", ", ",\u00a0") + colon + kind


def setup(app: Sphinx) -> dict[str, bool]:
    """Mend docstrings before napoleon reads them."""
    app.connect("autodoc-process-docstring", _keep_names_together, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
