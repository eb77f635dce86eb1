"""Show files of the repository beside the pages, highlighted: a link to one leads to the line.

A page links to a file as it does on any site that shows Markdown, ``[text](../../spafit/bert.py)``.
What the text names is where the link leads: an object of the file (``Layer.forward``), or a line
(``spafit/bert.py:120``).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
_FORMATTER = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True)


def line_of(path: Path, name: str) -> int | None:
    """Return the line at which a Python file defines an object such as ``Layer.forward``."""
    scope: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        for node in ast.iter_child_nodes(scope):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [getattr(node, "name", None), *(getattr(each, "id", None) for each in targets)]
            if part in names:
                scope = node
                break
        else:
            return None
    return getattr(scope, "lineno", None)


def _anchor(path: Path, text: str) -> str:
    """Return the anchor of what a link's text names in a file, or "" for its first line."""
    if numbered := re.search(r":(\d+)$", text):
        return f"#L-{numbered[1]}"
    is_name = path.suffix == ".py" and re.fullmatch(r"[\w.]+", text)
    line = line_of(path, text) if is_name else None
    return f"#L-{line}" if line else ""


def _lead_to_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Turn links to text files into links to their pages, and those to folders into plain text."""
    for node in list(doctree.findall(addnodes.pending_xref)):
        if node.get("reftype") != "myst":
            continue
        target = node["reftarget"]
        if target.startswith("/"):  # Markdown outside of docs/, which MyST takes for a page
            _lead_to_page(app, node, Path(f"{target}.md"))
        elif node.get("refdomain") is None and _path(app, target).is_dir():
            node.replace_self(node.children)
    for node in list(doctree.findall(addnodes.download_reference)):
        _lead_to_page(app, node, _path(app, node["reftarget"]))


def _path(app: Sphinx, target: str) -> Path:
    return Path(app.env.relfn2path(target)[1]).resolve()


def _lead_to_page(app: Sphinx, node: nodes.Element, path: Path) -> None:
    if not path.is_relative_to(ROOT) or not path.is_file() or b"\0" in path.read_bytes():
        return
    page = f"source/{path.relative_to(ROOT).as_posix()}"
    uri = app.builder.get_relative_uri(app.env.docname, page) + _anchor(path, node.astext())
    for inner in node.findall(nodes.Element):
        inner["classes"] = []
    node.replace_self(nodes.reference("", "", *node.children, internal=True, refuri=uri))


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Make a page of every file that is linked to."""
    found: set[str] = set()
    for docname in app.env.all_docs:
        for node in app.env.get_doctree(docname).findall(nodes.reference):
            if to := re.match(r"(?:\.\./)*source/(.+)\.html(?:#|$)", node.get("refuri", "")):
                found.add(to[1])
    for name in sorted(found):
        text = (ROOT / name).read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(name)
        except ClassNotFound:
            lexer = TextLexer()
        body = highlight(text, lexer, _FORMATTER)
        yield f"source/{name}", {"title": name, "body": f"<h1>{name}</h1>{body}"}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    """Change links as pages are read, before what they lead to is collected for download."""
    app.connect("doctree-read", _lead_to_pages, priority=100)
    app.connect("html-collect-pages", _pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
