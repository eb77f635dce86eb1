"""How far a run is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Show steps, loss, examples per second and the time left; a context manager.

    Parameters
    ----------
    total : int
        Steps in all.
    quiet : bool
        Show nothing.
    stream : TextIO, optional
        Where to write; None is standard error.
    """

    def __init__(self, total: int, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._total = total
        self._quiet = quiet
        self._stream = sys.stderr if stream is None else stream
        self._bar = None
        if not quiet and self._stream.isatty():
            self._bar = tqdm(total=total, unit="step", file=self._stream, dynamic_ncols=True)
        self._start = self._last_line = time.perf_counter()
        self._begun = 0

    def begin(self, step: int) -> None:
        """Tell after how many steps the run is taken up again."""
        self._begun = step
        self._start = time.perf_counter()
        if self._bar is not None:
            self._bar.initial = self._bar.n = step

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, step: int, epoch: int, loss: float, examples_per_s: float) -> None:
        """Tell that ``step`` steps are done; a plain line at most every 10 s, and at the end."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"epoch {epoch}, loss {loss:.4f}, {examples_per_s:.1f} examples/s", refresh=False
            )
            self._bar.update()
            return
        now = time.perf_counter()
        if self._quiet or (now - self._last_line < 10 and step < self._total):
            return
        self._last_line = now
        left = (now - self._start) / (step - self._begun) * (self._total - step)
        self.line(
            f"step {step}/{self._total}, epoch {epoch}, loss {loss:.4f}, "
            f"{examples_per_s:.1f} examples/s, {_clock(left)} left"
        )

    def line(self, text: str) -> None:
        """Write a line without disturbing the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
