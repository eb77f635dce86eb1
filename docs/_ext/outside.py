"""Let pages link to what lies outside of docs/: a file is copied, a folder is only named.

On a code host such a link leads to the file or the folder itself.
"""

from __future__ import annotations

import os
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx


def _resolve(app: Sphinx, tree: nodes.document) -> None:
    here = Path(app.env.doc2path(app.env.docname)).parent
    for node in list(tree.findall(addnodes.pending_xref)):
        target = node["reftarget"]
        if node["reftype"] != "myst":
            continue
        if target.startswith("/"):  # MyST takes Markdown for a page of these, without its ending
            file = addnodes.download_reference(reftarget=os.path.relpath(f"{target}.md", here))
            node.replace_self(file)
            file += node.children
        elif (here / target).is_dir():
            node.replace_self(node.children)


def setup(app: Sphinx) -> dict[str, bool]:
    """Resolve such links before Sphinx collects what is to be copied."""
    app.connect("doctree-read", _resolve, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
