"""``{generated} module.function``: a part of a page that a function writes, anew in every build."""

from __future__ import annotations

import importlib

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Generated(SphinxDirective):
    """Put the Markdown that a function returns in the directive's place."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Call the function and read what it returns."""
        module, _, function = self.arguments[0].rpartition(".")
        self.env.note_reread()  # what it is made from may have changed
        markdown = getattr(importlib.import_module(module), function)()
        return self.parse_text_to_nodes(markdown, allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Name the directive."""
    app.add_directive("generated", Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
