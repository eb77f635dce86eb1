"""Report a run's progress on the screen and in the log of its folder."""

from __future__ import annotations

import math
from typing import Any

from spafit.runs.log import RunLog
from spafit.runs.progress import Progress


class Journal:
    """Writes notes, steps and evaluations to the screen and to the log.

    Parameters
    ----------
    progress : Progress
        The progress display on the screen.
    log : RunLog or None
        The log of the run folder, if there is one.
    """

    def __init__(self, progress: Progress, log: RunLog | None) -> None:
        self.progress, self._log = progress, log

    def say(self, note: str) -> None:
        """Report a one-line note."""
        self.progress.line(note)
        self._write({"note": note})

    def step(
        self,
        step: int,
        epoch: int,
        *,
        examples: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        step_s: float,
        is_skipped: bool,
    ) -> None:
        """Report a step, which took ``step_s`` seconds."""
        self.progress.step(step, epoch, loss, examples / step_s)
        self._write(
            {
                "step": step,
                "epoch": epoch,
                "loss": loss if math.isfinite(loss) else None,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                "step_time_ms": 1000 * step_s,
                **({"skipped": True} if is_skipped else {}),
            }
        )

    def evaluation(
        self, found: dict[str, Any], majority: dict[str, float], *, is_best: bool
    ) -> None:
        """Report the scores of an evaluation (step, epoch, metrics) and those of the majority."""
        scores = ",\n  ".join(  # two metrics would be wider than a terminal
            f"{name} {score:.4f} (majority {majority[name]:.4f})"
            for name, score in found["metrics"].items()
        )
        best = ", best so far" if is_best else ""
        self.progress.line(f"epoch {found['epoch']}, step {found['step']}: dev {scores}{best}")
        self._write(
            {"step": found["step"], "epoch": found["epoch"], "evaluation": found["metrics"]}
        )

    def _write(self, row: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(row)
