"""One display of a running grid: redrawn in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from spafit.machine.terminal import columns, fitted, height, lasting
from spafit.runs.folder import LOG
from spafit.tasks.metrics import is_better


class Display:
    """Lines that stay, and below them a few that are redrawn.

    Parameters
    ----------
    stream : TextIO, optional
        Where to write; None is standard error. Only a terminal is redrawn.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = lasting(sys.stderr if stream is None else stream)
        self._is_terminal = self._stream.isatty()
        self._drawn: list[str] = []

    def line(self, text: str) -> None:
        """Write a line that stays."""
        drawn = self._drawn
        self.draw([])
        print(fitted(text, {}, self._stream), file=self._stream, flush=True)
        self.draw(drawn)

    def draw(self, lines: Sequence[str]) -> None:
        """Replace the lines that are redrawn; does nothing elsewhere than on a terminal.

        Those that it has no room for are counted: above its top nothing can be redrawn.
        """
        if not self._is_terminal:
            return
        width = columns(self._stream) - 1  # a line of full width would be wrapped
        room = max(2, height(self._stream) - 1)  # the cursor stands below the last
        if len(lines) > room:
            lines = [*lines[: room - 1], f"  ... and {len(lines) - room + 1} more"]
        up = f"\x1b[{len(self._drawn)}F\x1b[J" if self._drawn else ""
        self._drawn = [fitted(line, {}, self._stream)[:width] for line in lines]
        text = "".join(f"{line}\n" for line in self._drawn)
        self._stream.write(up + text)
        self._stream.flush()


class Watched:
    """What the log of a run says so far: its step, and its best score on dev.

    Parameters
    ----------
    folder : Path
        The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG
        self._read = 0
        self.step = 0
        self.best: tuple[str, float] | None = None

    def look(self) -> None:
        """Read what was written since the last look; a resumed run has cut off some rows."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._read:
                    self._read, self.best = 0, None
                file.seek(self._read)
                rows = file.read().split(b"\n")[:-1]
        except OSError:  # it has not begun
            return
        self._read += sum(len(row) + 1 for row in rows)
        for row in rows:
            try:
                entries = json.loads(row)
                self.step = int(entries.get("step", self.step))
                for name, score in list(entries.get("evaluation", {}).items())[:1]:
                    if self.best is None or is_better(name, score, self.best[1]):
                        self.best = name, score
            except (ValueError, TypeError, AttributeError, KeyError):  # damaged; the run says so
                continue


def clock(seconds: float) -> str:
    """Return a duration in hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
