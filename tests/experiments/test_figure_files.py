"""What all figures with matplotlib have in common. Oracle: the file, and matplotlib's own axes."""

from __future__ import annotations

from pathlib import Path

import pytest

from spafit.errors import ConfigError
from spafit.experiments.figure import blank, save


def test_a_figure_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = blank(2.5, 1.5)
    for axes in figure.subplots(1, 2):
        axes.plot([1, 2])
    save(figure, tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG") and content[16:24] == bytes([0, 0, 1, 44, 0, 0, 0, 180])
    for axes in figure.axes:
        shown = {name for name, each in axes.spines.items() if each.get_visible()}
        assert shown == {"left", "bottom"}
    with pytest.raises(ConfigError, match=r"b\.png cannot be written"):
        save(figure, tmp_path / "none" / "b.png")
    (tmp_path / "c.png").mkdir()
    with pytest.raises(ConfigError, match=r"c\.png cannot be written: it is a folder"):
        save(figure, tmp_path / "c.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "c.png"]
