"""Width, characters and colours of the stream that is written to.

Oracle: pseudo-terminals of given sizes, and streams of given encodings.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import termios
from collections.abc import Callable, Iterator
from typing import TextIO

import pytest

from spafit.machine.terminal import columns, fitted, has_colours, height, is_ascii
from spafit.runs.progress import Progress

DRAWING = "┌───┬─┐\n│ é │ │ frozen LoRA r=8 unfrozen\n├───┼─┤\n└───┴─┘"

Sized = Callable[[int], TextIO]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sized]:
    """Return a function that makes a terminal of so many columns; 0: it does not know."""
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = pty.openpty()
    stream = os.fdopen(theirs, "w", encoding="utf-8")

    def sized(width: int) -> TextIO:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        os.set_blocking(ours, False)
        stream.ours = ours  # type: ignore[attr-defined]
        return stream

    yield sized
    stream.close()
    os.close(ours)


def shown_on(stream: TextIO) -> str:
    """Return what a terminal has been sent since the last call."""
    stream.flush()
    sent = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += os.read(stream.ours, 1 << 16)  # type: ignore[attr-defined]
    return sent.decode()


class TestColumns:
    @pytest.mark.parametrize(("own", "expected"), [(200, 80), (80, 80), (57, 57), (0, 80)])
    def test_of_a_terminal(self, terminal: Sized, own: int, expected: int) -> None:
        assert columns(terminal(own)) == expected

    @pytest.mark.parametrize(
        ("given", "expected"),
        [("57", 57), ("300", 80), ("0", 80), ("", 80), ("wide", 80), ("²", 80), ("9" * 5000, 80)],
    )
    def test_by_the_environment(
        self, terminal: Sized, monkeypatch: pytest.MonkeyPatch, given: str, expected: int
    ) -> None:
        """Where nothing else is known; a terminal knows better."""
        monkeypatch.setenv("COLUMNS", given)
        for stream in (io.StringIO(), terminal(0)):
            assert columns(stream) == expected
        assert columns(terminal(61)) == 61


def test_height(terminal: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's own; where nothing is known that of the environment, or 24."""
    monkeypatch.setenv("LINES", "7")
    stream = terminal(80)
    assert (height(stream), height(io.StringIO())) == (24, 7)
    fcntl.ioctl(stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 51, 80, 0, 0))
    assert height(stream) == 51
    monkeypatch.delenv("LINES")
    assert height(io.StringIO()) == 24


class TestCharacters:
    @pytest.mark.parametrize(
        ("encoding", "variables", "expected"),
        [
            ("utf-8", {}, False),
            ("UTF-8", {"LANG": "de_DE.UTF-8"}, False),
            ("utf-16", {"LC_ALL": "", "LC_CTYPE": "C.UTF-8", "LANG": "C"}, False),
            ("ascii", {}, True),
            ("latin-1", {}, True),
            ("utf-8", {"LC_ALL": "C"}, True),
            ("utf-8", {"LC_ALL": "POSIX", "LANG": "de_DE.UTF-8"}, True),
            ("utf-8", {"LC_CTYPE": "C"}, True),
            ("utf-8", {"LC_ALL": "C.UTF-8", "LC_CTYPE": "C"}, False),
            ("utf-8", {"TERM": "dumb"}, True),
        ],
    )
    def test_of_a_stream(
        self,
        monkeypatch: pytest.MonkeyPatch,
        encoding: str,
        variables: dict[str, str],
        expected: bool,
    ) -> None:
        for name in ("LC_ALL", "LC_CTYPE", "LANG", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        assert is_ascii(stream) == expected
        text = fitted(DRAWING, {}, stream)
        plain = "+---+-+\n| ? | | frozen LoRA r=8 unfrozen\n+---+-+\n+---+-+"
        assert text == (plain if expected else DRAWING)

    def test_signs_of_a_drawing(self) -> None:
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        assert fitted("│ (IA)³: rate × 2 ± 1", {}, stream) == "| (IA)3: rate x 2 +- 1"

    def test_of_no_encoding(self) -> None:
        assert not is_ascii(io.StringIO())


class TestColours:
    def test_on_a_terminal(self, terminal: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whole words; without them the text is the same."""
        text = fitted(DRAWING, {"frozen": "2", "LoRA": "33"}, terminal(80))
        assert "\x1b[2mfrozen\x1b[m \x1b[33mLoRA\x1b[m r=8 unfrozen" in text
        assert re.sub(r"\x1b\[\d*m", "", text) == DRAWING
        monkeypatch.setenv("NO_COLOR", "1")
        assert fitted(DRAWING, {"frozen": "2"}, terminal(80)) == DRAWING
        monkeypatch.setenv("NO_COLOR", "")  # as if it were not there: https://no-color.org
        assert has_colours(terminal(80))
        monkeypatch.setenv("TERM", "dumb")
        assert not has_colours(terminal(80))

    def test_elsewhere(self) -> None:
        assert fitted(DRAWING, {"frozen": "2"}, io.StringIO()) == DRAWING


class TestProgressLine:
    @pytest.mark.parametrize("total", [4, 1560, 454_810])
    @pytest.mark.parametrize("width", [20, 40, 57, 80, 200])
    def test_fits_the_terminal(self, terminal: Sized, total: int, width: int) -> None:
        """Oracle: the line is no wider, and no word of it is cut."""
        stream = terminal(width)
        with Progress(total, stream=stream) as progress:
            shown_on(stream)
            progress.begin(total - 1)
            progress.step(total, 10, 0.69314, 1234.56)
            progress._bar.refresh()  # type: ignore[union-attr]
            lines = [line for line in shown_on(stream).split("\r") if line.strip()]
        assert lines
        for line in lines:
            assert len(line) <= min(width, 80)
            if width >= 57:
                assert line.endswith("]")
                assert "epoch 10" in line
            if width >= 80 and total < 10_000:
                assert "epoch 10, loss 0.6931, 1234.6 examples/s]" in line

    def test_follows_the_window(self, terminal: Sized) -> None:
        stream = terminal(80)
        with Progress(9, stream=stream) as progress:
            for width in (80, 44, 66):
                terminal(width)
                progress.step(1, 1, 0.5, 3.0)
                progress._bar.refresh()  # type: ignore[union-attr]
                line = shown_on(stream).rstrip().rpartition("\r")[2]
                assert len(line) == width, repr(line)

    def test_in_ascii(self, terminal: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
        for locale in ("C.UTF-8", "C"):
            monkeypatch.setenv("LC_ALL", locale)
            shown_on(terminal(80))
            with Progress(3, stream=terminal(80)) as progress:
                progress.step(2, 1, 0.5, 3.0)
                progress._bar.refresh()  # type: ignore[union-attr]
                assert shown_on(terminal(80)).isascii() == (locale == "C")
