"""The demo's figure: the strata drawn, loss and dev score by step. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spafit.errors import ConfigError
from spafit.files.replacing import replacing
from spafit.plans import MODULES, Plan
from spafit.training.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stay apart in print and for colour-blind readers (Okabe and Ito).
_COLOURS = {"frozen": "#D9D9D9", "bias": "#56B4E9", "LoRA": "#E69F00", "full": "#CC79A7"}
_OTHER = "#F0E442"  # techniques of the user's own
_SHORT = (
    "query",
    "key",
    "value",
    "attn dense",
    "attn norm",
    "intermediate",
    "out dense",
    "out norm",
)


def draw(plan: Plan, result: Result, probe_score: float, metric: str, path: Path) -> None:
    """Draw a run.

    Parameters
    ----------
    plan : Plan
        What trained.
    result : Result
        What came of it.
    probe_score : float
        What a linear probe scores by the same metric.
    metric : str
        The task's first metric.
    path : Path
        The PNG to write, whole or not at all.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    # The object interface, which needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    strata, curves = figure.subplots(1, 2, width_ratios=(1.0, 1.5))
    _draw_strata(strata, plan)
    _draw_curves(curves, result, probe_score, metric)
    with replacing(path, ConfigError) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_strata(axes: Axes, plan: Plan) -> None:
    """Draw a row per layer, the first at the bottom, a cell per module, coloured by what trains."""
    from matplotlib.patches import Patch, Rectangle

    labels: dict[str, str] = {}  # of the colours that are used
    for stratum in plan.strata:
        for layer in range(stratum.first, stratum.last + 1):
            for column, module in enumerate(MODULES):
                techniques = stratum.train.get(module, ())
                drawn = techniques[-1].short if techniques else "frozen"  # LoRA before bias
                colour = _COLOURS.get(drawn, _OTHER)
                labels[colour] = drawn if colour != _OTHER else "other"
                axes.add_patch(
                    Rectangle((column, layer), 0.94, 0.9, facecolor=colour, edgecolor="none")
                )
        middle = (stratum.first + stratum.last + 1) / 2
        axes.text(len(MODULES) + 0.15, middle, stratum.name, va="center")
    axes.set_xlim(0, len(MODULES) + 2.2)
    axes.set_ylim(0, plan.num_layers)
    axes.set_xticks(
        [column + 0.47 for column in range(len(MODULES))], _SHORT, rotation=60, ha="right"
    )
    axes.set_yticks(
        [layer + 0.45 for layer in range(plan.num_layers)], map(str, range(plan.num_layers))
    )
    axes.set_ylabel("layer")
    axes.set_title(plan.name)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(
        handles=[
            Patch(facecolor=colour, label=labels[colour])
            for colour in (*_COLOURS.values(), _OTHER)
            if colour in labels
        ],
        loc="upper left",
        bbox_to_anchor=(0, -0.32),
        ncols=4,
        frameon=False,
    )


def _draw_curves(axes: Axes, result: Result, probe_score: float, metric: str) -> None:
    """Draw the loss of every step on the left axis, the dev scores on the right one."""
    steps = range(1, len(result.losses) + 1)
    axes.plot(steps, result.losses, color="#BBBBBB", linewidth=0.7, label="loss of the step")
    mean = result.losses[0]
    smooth = []
    for loss in result.losses:
        mean += 0.05 * (loss - mean)
        smooth.append(mean)
    axes.plot(steps, smooth, color="#555555", label="its running mean")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)

    scores = axes.twinx()
    evaluated = [evaluation["step"] for evaluation in result.history]
    values = [evaluation["metrics"][metric] for evaluation in result.history]
    scores.plot(evaluated, values, "o-", color="#009E73", label=f"dev {metric}")
    scores.axhline(probe_score, color="#0072B2", linestyle="--", label="linear probe")
    scores.axhline(result.majority[metric], color="#D55E00", linestyle=":", label="commonest class")
    scores.set_ylabel(f"dev {metric}")
    scores.set_ylim(min(-0.05, *values), 1.02)
    handles = [*axes.get_legend_handles_labels()[0], *scores.get_legend_handles_labels()[0]]
    labels = [*axes.get_legend_handles_labels()[1], *scores.get_legend_handles_labels()[1]]
    axes.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False
    )
    axes.set_title("loss and score by step")
