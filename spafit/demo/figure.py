"""The demo's figure: score by numbers trained, and loss by step. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from spafit.experiments.figure import blank, save
from spafit.training.result import Result

# Colours that stay apart in print and for colour-blind readers (Okabe and Ito).
_COLOURS = ("#999999", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")


def draw(results: dict[str, Result], path: Path) -> None:
    """Draw the runs of a few methods.

    Parameters
    ----------
    results : dict of str to Result
        By method, at most five.
    path : Path
        The PNG to write, whole or not at all.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    figure = blank(11, 4.2)
    scores, losses = figure.subplots(1, 2)
    for number, ((method, result), colour) in enumerate(
        zip(results.items(), _COLOURS, strict=False)
    ):
        metric, score = next(iter(result.metrics.items()))
        scores.plot(result.trainable, score, "o", color=colour, markersize=10)
        # Above and below the point in turn, so that neighbours stay legible.
        scores.annotate(
            f"{method}\n{result.trainable:,}: {score:.3f}",
            (result.trainable, score),
            xytext=(0, -10 if number % 2 else 10),
            textcoords="offset points",
            ha="center",
            va="top" if number % 2 else "bottom",
            color=colour,
        )
        running, smooth = result.losses[0], []
        for loss in result.losses:
            running += 0.05 * (loss - running)
            smooth.append(running)
        losses.plot(range(1, len(smooth) + 1), smooth, color=colour, label=method)
    majority = result.majority[metric]
    scores.axhline(majority, color="black", linestyle=":", linewidth=1)
    scores.annotate(
        "commonest class", (1, majority), xycoords=("axes fraction", "data"), ha="right", va="top"
    )
    scores.set_xscale("log")
    scores.margins(x=0.2)
    scores.set_ylim(0.4, 1.12)
    scores.set_yticks([0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    scores.set_xlabel("numbers that train")
    scores.set_ylabel(f"{metric} on dev")
    scores.set_title("score by what trains")
    losses.set_xlabel("step")
    losses.set_ylabel("training loss, running mean")
    losses.set_ylim(bottom=0)
    losses.set_title("loss by step")
    losses.legend(frameon=False)
    save(figure, path)
