"""Make a figure with matplotlib, and save it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from spafit.errors import ConfigError
from spafit.files.replacing import replacing


def can_draw() -> bool:
    """Return whether there is matplotlib; where there is none, say how to get it."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        print("for a figure of it: pip install '.[plot]'")
    return found


def blank(width: float, height: float) -> Any:
    """Return an empty ``matplotlib.figure.Figure`` of so many inches."""
    # The object interface, which needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Save a figure as a PNG, whole or not at all, its axes open above and on the right.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path, ConfigError) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
