"""The heat map of what a run added, by layer and sub-layer. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spafit.errors import ConfigError
from spafit.experiments.figure import blank
from spafit.experiments.inspect.norms import Addition
from spafit.experiments.inspect.report import COLUMNS, kinds_of, percent, places_of
from spafit.files.replacing import replacing


def draw(found: Sequence[Addition], num_layers: int, title: str, path: Path) -> None:
    """Draw each norm relative to what it was added to: a panel for each kind.

    The colour is on a logarithmic scale, and its brightness alone tells it; each cell has its
    number. Cells without an addition are empty.

    Parameters
    ----------
    found : sequence of Addition
        From :func:`spafit.experiments.inspect.norms.norms`.
    num_layers : int
        L.
    title : str
        What was inspected.
    path : Path
        The PNG to write, whole or not at all.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    inside = [each for each in found if each.layer is not None and each.relative]
    panels = {kind: places_of(inside, kind) for kind in kinds_of(inside)}
    widths = [max(len(places), 2) for places in panels.values()]
    # A panel is at least as wide as its title, and a cell as wide as its number.
    figure = blank(2.2 + 0.72 * sum(widths), 1.9 + 0.36 * num_layers)
    figure.suptitle(f"{title:.90}", fontsize=12, parse_math=False)
    values = [100 * (each.relative or 0.0) for each in inside]
    low, high = min(values), max(values)
    scale = LogNorm(low * 0.9, high * 1.1)
    grid = figure.subplots(
        1, len(panels), sharey=True, squeeze=False, gridspec_kw={"width_ratios": widths}
    )[0]
    for axes, (kind, places) in zip(grid, panels.items(), strict=True):
        cells = np.full((num_layers, len(places)), np.nan)
        for each in inside:
            if each.kind == kind and each.layer is not None:
                cells[each.layer, places.index(each.place)] = 100 * (each.relative or 0.0)
        axes.imshow(cells, norm=scale, cmap="cividis", aspect="auto")
        for layer, column in np.argwhere(~np.isnan(cells)):
            value = cells[layer, column]
            axes.text(
                column,
                layer,
                percent(value / 100),
                ha="center",
                va="center",
                fontsize=11,
                color="white" if scale(value) < 0.5 else "black",
            )
        axes.set_title(kind, fontsize=12)
        axes.set_xticks(range(len(places)), [COLUMNS.get(each, each) for each in places])
        axes.tick_params(axis="x", labelrotation=45, labelsize=11, length=0)
        axes.tick_params(axis="y", labelsize=11, length=0)
        axes.set_facecolor("white")
    grid[0].set_yticks(range(num_layers))
    grid[0].set_ylabel("layer", fontsize=12)
    bar = figure.colorbar(
        ScalarMappable(scale, "cividis"), ax=list(grid), format=FuncFormatter(lambda x, _: f"{x:g}")
    )
    bar.set_label("% of what it was added to", fontsize=11)
    with replacing(path, ConfigError) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
