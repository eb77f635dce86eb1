"""How Sphinx builds the documentation: ``make docs``.

Every page is Markdown (MyST). The code cells of a page are run by the build, which fails at any
error or warning, and code is shown by ``literalinclude`` from the file that runs, never copied.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from nbclient import NotebookClient

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "spafit"
author = "the spafit authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "api",
    "generated",
    "mathml",
    "one_sentence",
    "sources",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "text"  # of a block that names none: commands, and what they print

# A cell's kernel is another process: it finds the checkout, and computes on one thread.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_execution_show_tb = True
# A build says nothing unless something is wrong.
logging.getLogger("traitlets").setLevel(logging.WARNING)
NotebookClient.extra_arguments = ["--log-level=ERROR"]

# Docstrings have the types, so that signatures can be short.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "spafit"
html_math_renderer = "mathml"
