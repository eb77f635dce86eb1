"""A link to a file of the repository leads to the page of that file, at what its text names.

Oracle: the lines of the file; a page that Sphinx builds.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sources
from support import REPOSITORY

BERT = REPOSITORY / "spafit" / "bert.py"
LINES = BERT.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Layer", "class Layer(nn.Module):"),
        ("BertOutput.pooler_output", "    pooler_output: torch.Tensor | None"),
        ("set_impl", "def set_impl(model: nn.Module, impl: str) -> None:"),
    ],
)
def test_the_line_of_a_name(name: str, line: str) -> None:
    assert LINES[sources.line_of(BERT, name) - 1] == line


def test_of_two_methods_of_one_name_the_class_decides() -> None:
    first = sources.line_of(BERT, "SelfOutput.forward")
    assert LINES.index("class SelfOutput(SublayerEnd):") < first - 1
    assert first < sources.line_of(BERT, "Output.forward")


@pytest.mark.parametrize("name", ["Nobody", "Layer.nothing", "Layer.forward.H9"])
def test_what_is_not_there_has_no_line(name: str) -> None:
    assert sources.line_of(BERT, name) is None


def test_a_page(build: Callable[..., Path], tmp_path: Path) -> None:
    """Links by name, by line and to the file as a whole; a folder is no link."""
    root = os.path.relpath(REPOSITORY, tmp_path)
    out = build(
        f"[Layer]({root}/spafit/bert.py) [bert.py:7]({root}/spafit/bert.py) "
        f"[the licence]({root}/LICENSE) [docs/]({root}/docs)",
        extensions=["myst_parser", "sources"],
    )
    html = (out / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="(source/[^"]+)"[^>]*><span>(.*?)</span></a>', html)
    assert links == [
        (f"source/spafit/bert.py.html#L-{LINES.index('class Layer(nn.Module):') + 1}", "Layer"),
        ("source/spafit/bert.py.html#L-7", "bert.py:7"),
        ("source/LICENSE.html", "the licence"),
    ]
    shown = (out / "source" / "spafit" / "bert.py.html").read_text(encoding="utf-8")
    assert 'id="L-7"' in shown and shown.count("<a id=") >= len(LINES)
    assert "Apache" in (out / "source" / "LICENSE.html").read_text(encoding="utf-8")
