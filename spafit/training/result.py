"""What came of a run, and how it is shown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spafit.summary import Summary


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes
    ----------
    metrics : dict of str to float
        Of the best evaluation on dev, by the task's first metric; of equal ones the earliest.
    majority : dict of str to float
        What always predicting the commonest class scores on dev.
    best_epoch : int
        The epoch of the best evaluation, from 1.
    best_step : int
        Its step, from 1.
    history : tuple of dict
        Every evaluation: step, epoch, metrics.
    losses : tuple of float
        The training loss of every step.
    trainable, percent : int, float
        Numbers that train, and their share of the model's.
    examples_per_s : float
        In training, evaluations not counted.
    peak_memory_mib : float
        Of the GPU, or of the process.
    seconds : float
        In all.
    truncated : dict of str to int
        Examples cut to the maximum length, of "train" and "dev".
    files : tuple of Path
        What was written.
    skipped : int
        Steps whose loss or gradient was NaN or infinite, and from which nothing was learnt.
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


def result_screen(result: Result, summary: Summary, display: str) -> str:
    """Say what came of a run, in one screen."""
    scores = [
        f"{name} {score:.4f}   (always the commonest class: {result.majority[name]:.4f})"
        for name, score in result.metrics.items()
    ]
    cut = ", ".join(f"{count} of {name}" for name, count in result.truncated.items() if count)
    rows = [
        ("task", f"{display}, {summary.plan.name}"),
        ("dev", scores[0]),
        *(("", score) for score in scores[1:]),
        ("best", f"epoch {result.best_epoch}, step {result.best_step}"),
        ("trained", f"{result.trainable:,} numbers, {result.percent:.2f} % of the model"),
        ("speed", f"{result.examples_per_s:.1f} examples/s in training, {result.seconds:.0f} s"),
        ("memory", f"{result.peak_memory_mib:,.0f} MiB at the peak"),
        ("truncated", cut or "nothing"),
        *([("skipped", f"{result.skipped} steps, of no finite gradient")] * bool(result.skipped)),
        *((("written" if n == 0 else ""), str(file)) for n, file in enumerate(result.files)),
    ]
    return "\n" + "\n".join(f"{name:>10}  {text}" for name, text in rows)


def spread_screen(results: list[Result], seeds: list[int]) -> str:
    """Say what came of several seeds: mean and spread first, the best beside them."""
    lines = [f"\n{len(seeds)} seeds ({', '.join(map(str, seeds))})"]
    for name, majority in results[0].majority.items():
        scores = [result.metrics[name] for result in results]
        lines.append(
            f"{name:>10}  mean {statistics.mean(scores):.4f}, standard deviation "
            f"{statistics.stdev(scores):.4f}, maximum {max(scores):.4f}, "
            f"commonest class {majority:.4f}"
        )
    return "\n".join(lines)
