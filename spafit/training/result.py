"""The result of a run, and the texts that show what trains and what came of it."""

from __future__ import annotations

import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spafit.errors import one_line
from spafit.machine.terminal import fitted
from spafit.summary import Summary, percent_of
from spafit.tasks.metrics import METRICS

# On a terminal, by the number of an ANSI escape sequence: what is frozen steps back.
_COLOURS = {
    "frozen": "2",
    **dict.fromkeys(("bias", "gain", "(IA)³"), "36"),
    **dict.fromkeys(("LoRA", "rsLoRA", "Series", "Pfeiffer", "Parallel"), "33"),
    "full": "35",
}


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes
    ----------
    metrics : dict of str to float
        The best evaluation on dev, by the task's first metric; the earliest of equal ones.
    majority : dict of str to float
        The scores on dev of always predicting the commonest class, or the mean score.
    best_epoch : int
        The epoch of the best evaluation, from 1.
    best_step : int
        Its step, from 1.
    history : tuple of dict
        Every evaluation: step, epoch, metrics.
    losses : tuple of float
        The training loss of every step.
    trainable, percent : int, float
        Number of trained values, and their percentage of the model's.
    examples_per_s : float
        Training speed, without evaluations.
    peak_memory_mib : float
        Peak memory of the GPU, or of the process: what earlier runs in it left counts too, such as
        the products that oneDNN compiled for their batches.
    seconds : float
        Duration of the whole run.
    truncated : dict of str to int
        Number of truncated examples of "train" and "dev".
    files : tuple of Path
        The files written.
    skipped : int
        Steps that were skipped because the loss or the gradient was NaN or infinite.
    """

    metrics: dict[str, float]
    majority: dict[str, float]
    best_epoch: int
    best_step: int
    history: tuple[dict[str, Any], ...]
    losses: tuple[float, ...]
    trainable: int
    percent: float
    examples_per_s: float
    peak_memory_mib: float
    seconds: float
    truncated: dict[str, int]
    files: tuple[Path, ...]
    skipped: int = 0


def plan_screen(summary: Summary, epochs: int | None = None) -> str:
    """Return the drawing of what trains, in the characters and colours of standard output."""
    return fitted(summary.drawn(epochs), _COLOURS)


def result_screen(result: Result, summary: Summary, display: str) -> str:
    """Return the text of a run's result, one screen long."""
    scores = [
        f"{name} {score:.4f}   (always the {_constant(name)}: {result.majority[name]:.4f})"
        for name, score in result.metrics.items()
    ]
    cut = ", ".join(f"{count} of {name}" for name, count in result.truncated.items() if count)
    rows = [
        ("task", f"{display}, {summary.plan.name}"),
        ("dev", scores[0]),
        *(("", score) for score in scores[1:]),
        ("best", f"epoch {result.best_epoch}, step {result.best_step}"),
        ("trained", f"{result.trainable:,} numbers, {percent_of(result.percent)} % of the model"),
        ("speed", f"{result.examples_per_s:.1f} examples/s in training, {result.seconds:.0f} s"),
        ("memory", f"{result.peak_memory_mib:,.0f} MiB at the peak"),
        ("truncated", cut or "nothing"),
        *([("skipped", f"{result.skipped} steps, gradient not finite")] * bool(result.skipped)),
        *(
            (("written" if n == 0 else ""), one_line(str(file), 600))
            for n, file in enumerate(result.files)
        ),
    ]
    return "\n" + "\n".join(f"{name:>10}  {text}" for name, text in rows)


def _constant(metric: str) -> str:
    return "mean" if METRICS[metric].of == "scores" else "commonest class"


def spread_screen(results: list[Result], seeds: list[int]) -> str:
    """Return the text of several seeds' results: mean and spread first, then the best."""
    lines = ["", *textwrap.wrap(f"{len(seeds)} seeds ({', '.join(map(str, seeds))})", 80)]
    for name, majority in results[0].majority.items():
        scores = [result.metrics[name] for result in results]
        is_error = METRICS[name].smaller_is_better
        best = f"minimum {min(scores):.4f}" if is_error else f"maximum {max(scores):.4f}"
        lines += [
            f"{name:>10}  mean {statistics.mean(scores):.4f}, standard deviation "
            f"{statistics.stdev(scores):.4f}, {best}",
            f"{'':>10}  (always the {_constant(name)}: {majority:.4f})",
        ]
    return "\n".join(lines)
