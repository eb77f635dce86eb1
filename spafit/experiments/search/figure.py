"""The figure of a search: score against what trains. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spafit.errors import one_line
from spafit.experiments.figure import blank, save
from spafit.experiments.report.statistics import spread
from spafit.experiments.report.text import number
from spafit.experiments.search.report import Point
from spafit.tasks.metrics import METRICS

# Told apart by colour (Okabe and Ito) and by mark.
_STYLES: dict[str, dict[str, Any]] = {
    "held out": {"color": "#D55E00", "marker": "s", "markerfacecolor": "white"},
    "dev": {"color": "#0072B2", "marker": "o"},
}


def draw(points: Sequence[Point], summary: Mapping[str, Any], path: Path) -> None:
    """Draw the scores on dev with one standard deviation over seeds, and those on held-out rows.

    Parameters
    ----------
    points : sequence of Point
        In the order of what they train.
    summary : mapping
        What search.json holds: display, model, majority, rows and seeds.
    path : Path
        The PNG to write, whole or not at all.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    from matplotlib.ticker import FuncFormatter

    metric, majority = next(iter(summary["majority"].items()))
    rows, seeds = summary["rows"], len(summary["seeds"])
    figure = blank(8.5, 5)
    axes = figure.subplots()
    labels = {
        "held out": f"choosing: {rows['held_out']:,} rows held out of train,\none run each",
        "dev": f"reported: {rows['dev']:,} rows of dev,\n"
        + (f"mean ± deviation of {seeds} seeds" if seeds > 1 else "1 seed"),
    }
    for on, style in _STYLES.items():
        some = [each for each in points if each.on == on]
        if not some:
            continue
        numbers = [each.candidate.trainable for each in some]
        of = [spread(each.scores) for each in some]
        axes.errorbar(
            numbers,
            [each.mean for each in of],
            yerr=[each.deviation or 0.0 for each in of] if on == "dev" else None,
            label=labels[on],
            linestyle="none",
            capsize=3,
            markersize=6,
            **style,
        )
    best = [each for each in points if each.on == "dev" and each.is_on_frontier]
    if best:
        axes.plot(
            [each.candidate.trainable for each in best],
            [spread(each.scores).mean for each in best],
            color="black",
            linewidth=1,
            drawstyle="steps-post",
            label="frontier on dev",
            zorder=0,
        )
    for each in best:
        axes.annotate(
            each.candidate.name,
            (each.candidate.trainable, spread(each.scores).mean),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize="small",
        )
    # In words, because its line would press the plans together where it is far below them.
    constant = METRICS[metric].constant
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.tick_params(axis="x", labelrotation=20)
    axes.margins(x=0.12)
    axes.set_xlabel("numbers that train")
    axes.set_ylabel(f"{metric} ({constant} of dev: {number(majority)})")
    of_what = f"{one_line(summary['display'])}, {one_line(Path(summary['model']).name)}"
    axes.set_title(f"{of_what:.60}: SPAFIT plans", fontsize="medium", parse_math=False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
