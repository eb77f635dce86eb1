"""The figure of the probes: score by layer, of both states. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spafit.experiments.figure import blank, save
from spafit.experiments.probe.layers import Probed, deviation
from spafit.experiments.probe.states import SHOWN
from spafit.tasks.metrics import METRICS, Floats

# Told apart by colour (Okabe and Ito), by line and by mark.
_STYLES: dict[str, dict[str, Any]] = {
    "cls": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "mean": {"color": "#D55E00", "linestyle": "--", "marker": "s", "markerfacecolor": "white"},
}


def draw(found: dict[str, Probed], summary: dict[str, Any], path: Path) -> None:
    """Draw the score of every layer with a band of one standard deviation over seeds.

    Parameters
    ----------
    found : dict of str to Probed
        By the kind of state.
    summary : dict
        What probe.json holds: task, model, rows, chance and majority.
    path : Path
        The PNG to write, whole or not at all.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    figure = blank(7.5, 4.5)
    axes = figure.subplots()
    for name, one in found.items():
        metric = one.metric
        draw_curve(axes, name, one.scores[metric].mean(axis=1), deviation(one.scores[metric]))
    constant = METRICS[metric].constant
    chance, majority = summary["chance"][metric], summary["majority"][metric]
    lines = [("chance", chance, ":"), (constant, majority, "-.")]
    if abs(chance - majority) < 0.005:  # one line would hide the other
        lines = [(f"chance, {constant}", majority, ":")]
    for label, value, style in lines:
        axes.axhline(value, color="black", linestyle=style, linewidth=1, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel(f"{metric} on dev")
    seeds = len(summary["seeds"])
    of = f"{summary['display']}, {Path(summary['model']).name}"
    axes.set_title(
        f"{of:.60}: linear probe of each layer, {seeds} seed{'s' if seeds > 1 else ''}",
        fontsize="medium",
        parse_math=False,
    )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def draw_curve(axes: Any, states: str, mean: Floats, spread: Floats) -> None:
    """Draw the scores (L + 1,) of one kind of state by layer, with a band of their spread."""
    style, layers = _STYLES[states], range(len(mean))
    axes.plot(layers, mean, label=SHOWN[states], markersize=6, **style)
    axes.fill_between(layers, mean - spread, mean + spread, color=style["color"], alpha=0.2, lw=0)
