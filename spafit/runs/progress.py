"""Progress of a run, or of predictions: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from spafit.machine.terminal import columns, is_ascii, lasting

# tqdm's own form has steps per second too, and would be cut at 80 columns.
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

_SECONDS_A_LINE = 10
"""Between two lines where there is no terminal."""


class Progress:
    """Show steps, loss, examples per second and the time left; a context manager.

    If the stream fails (see :func:`~spafit.machine.terminal.lasting`), nothing more is shown.

    Parameters
    ----------
    total : int
        Steps in all.
    quiet : bool
        Show nothing.
    stream : TextIO, optional
        Where to write; None is standard error, if there is one.
    """

    def __init__(self, total: int, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._total = total
        shown = sys.stderr if stream is None else stream
        self._quiet = quiet or shown is None  # Python has none where its descriptor is closed
        self._stream = lasting(shown)
        self._bar = None
        if not self._quiet and self._stream.isatty():
            self._bar = tqdm(
                total=total,
                file=self._stream,
                ncols=columns(self._stream),
                ascii=is_ascii(self._stream),
                bar_format=_BAR,
            )
        self._start = self._last_line = time.perf_counter()
        self._begun = 0

    def begin(self, step: int) -> None:
        """Set the number of steps done when the run is resumed."""
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
        """Show that ``step`` steps are done; plain lines at most every 10 s, and at the end."""
        if self._bar is not None:
            self._bar.ncols = columns(self._stream)  # of a window whose size may change
            rest = f"100%|#| {self._total}/{self._total} [1:00:00<1:00:00, ]"
            words = [f"epoch {epoch}", f"loss {loss:.4f}", f"{examples_per_s:.1f} examples/s"]
            while len(rest + ", ".join(words)) > self._bar.ncols and words:
                words.pop()  # better than half a word at the edge
            self._bar.set_postfix_str(", ".join(words), refresh=False)
            self._bar.update()
            return
        now = time.perf_counter()
        if self._quiet or (now - self._last_line < _SECONDS_A_LINE and step < self._total):
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


class RowsDone:
    """Show how many rows of a file are predicted, of a number that is not known; a context manager.

    Parameters
    ----------
    quiet : bool
        Show nothing.
    stream : TextIO, optional
        Where to write; None is standard error, if there is one.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        shown = sys.stderr if stream is None else stream
        self._quiet = quiet or shown is None
        self._stream = lasting(shown)
        self._width, self._rows = 0, 0.0
        self._start = self._last = time.perf_counter()

    def __enter__(self) -> RowsDone:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            print(file=self._stream, flush=True)

    def add(self, rows: float) -> None:
        """Show that so many more are done; where there is no terminal, at most every 10 s."""
        self._rows += rows
        now = time.perf_counter()
        text = f"{self._rows:,.0f} rows, {self._rows / (now - self._start):,.0f} rows/s"
        if self._quiet:
            return
        if self._stream.isatty():
            print(f"\r{text:<{self._width}}", end="", file=self._stream, flush=True)
            self._width = len(text)
        elif now - self._last >= _SECONDS_A_LINE:
            self._last = now
            print(text, file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
