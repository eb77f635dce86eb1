"""What the build of the documentation imports is found by its tests, too."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import REPOSITORY

pytest.importorskip("sphinx", reason="Sphinx comes with the extra docs")
sys.path.insert(0, str(REPOSITORY / "docs" / "_ext"))


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Have Sphinx build a page of Markdown, with settings; give the folder of what it made."""
    from sphinx.application import Sphinx

    def built(page: str, **settings: object) -> Path:
        (tmp_path / "index.md").write_text(f"# Page\n\n{page}\n", encoding="utf-8")
        out = tmp_path / "out"
        all_of_them = {"html_theme": "basic", **settings}
        app = Sphinx(tmp_path, None, out, tmp_path / "trees", "html", all_of_them, None, None)
        app.build()
        assert app.statuscode == 0
        return out

    return built
