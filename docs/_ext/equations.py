"""Find where each equation is computed and where it is tested, and write the table of it.

Code marks an equation by a comment at the line that computes it, ``# Eq. (LABEL)  FORMULA``. A test
names it in its docstring, ``Eq. (LABEL)``.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Place(NamedTuple):
    """A line of a file that shows an equation, with its formula or the name of its test."""

    label: str
    path: Path
    line: int
    words: str

    def link(self, text: str) -> str:
        """Return a link to the line, for a page in a folder of docs/."""
        return f"[{text}:{self.line}](../../{self.path.relative_to(ROOT).as_posix()})"


def _files(folder: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "Eq. (" in text:
            yield path, text


def computed() -> Iterator[Place]:
    """Find the lines of code that are marked, in the order of the files and lines."""
    for path, text in _files("spafit"):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and (
                marked := re.match(r"# Eq\. \(([^)]+)\)  +(\S.*)", token.string)
            ):
                yield Place(marked[1], path, token.start[0], marked[2])


def tested() -> Iterator[Place]:
    """Find the tests that name an equation, once for each that they name."""
    for path, text in _files("tests"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for label in set(re.findall(r"Eq\. \(([^)]+)\)", ast.get_docstring(node) or "")):
                    yield Place(label, path, node.lineno, node.name)


def table() -> str:
    """Return the table in Markdown: the paper's equations by number, then the others by label."""
    tests = list(tested())
    lines = ["| Eq. | computes | code | tests |", "| --- | --- | --- | --- |"]

    def order(place: Place) -> tuple[bool, int, str]:
        number = re.match(r"\d+", place.label)
        return number is None, int(number[0]) if number else 0, place.label

    for place in sorted(computed(), key=order):
        by = [
            each.link(each.words.removeprefix("test_").replace("_", " "))
            for each in tests
            if each.label == place.label
        ]
        code = place.link(place.path.name)
        lines.append(f"| `{place.label}` | `{place.words}` | {code} | {'<br>'.join(by)} |")
    return "\n".join(lines)
