"""What stands in a page as a formula, or as the name of a function, is written out by the build.

Oracle: a page that Sphinx builds.
"""

from collections.abc import Callable
from pathlib import Path

import equations
import pytest


def test_formulas_are_mathml(build: Callable[..., Path]) -> None:
    """Within a line and by itself, where it scrolls; no script draws them."""
    out = build(
        "Here $W_3$ stands.\n\n$$\nH_4 = \\frac{x}{2}\n$$",
        extensions=["myst_parser", "mathml"],
        myst_enable_extensions=["dollarmath"],
        html_math_renderer="mathml",
    )
    html = (out / "index.html").read_text(encoding="utf-8")
    assert html.count("<math") == 2 and "<mfrac>" in html
    assert 'overflow: auto hidden"><math' in html.replace("\n", "") and 'display="block"' in html
    assert 'src="http' not in html


def test_what_a_function_returns_stands_in_the_page(
    build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is Markdown, and may have headings."""
    monkeypatch.setattr(equations, "table", lambda: "## A heading\n\nSome *words*.")
    out = build("```{generated} equations.table\n```", extensions=["myst_parser", "generated"])
    html = (out / "index.html").read_text(encoding="utf-8")
    assert "<h2>A heading" in html and "<em>words</em>" in html
