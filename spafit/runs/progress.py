"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO, cast

from tqdm import tqdm


class _Lasting:
    """A stream that drops everything after the first failure of the stream it wraps."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_lost = False

    def write(self, text: str) -> int:
        if not self._is_lost:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # ValueError: the stream was closed
                self._is_lost = True
        return len(text)

    def flush(self) -> None:
        if not self._is_lost:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._is_lost = True

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:  # encoding, fileno ...
        return getattr(self._stream, name)


def lasting(stream: TextIO) -> TextIO:
    """Wrap a stream so that writing never raises; after the first failure nothing is written.

    A pipe's reader may exit, a terminal close, a disk fill up: that must not end a long run.

    Parameters
    ----------
    stream : TextIO
        The stream to wrap; it is never closed.
    """
    return stream if isinstance(stream, _Lasting) else cast(TextIO, _Lasting(stream))


class Progress:
    """Show steps, loss, examples per second and the time left; a context manager.

    If the stream fails (see :func:`lasting`), nothing more is shown.

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
            self._bar = tqdm(total=total, unit="step", file=self._stream, dynamic_ncols=True)
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
