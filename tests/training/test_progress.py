"""The progress display of a run."""

from __future__ import annotations

import io
import sys

import pytest

from spafit.runs import progress as progress_module
from spafit.runs.progress import Progress, RowsDone, lasting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a clock that stands still until its one entry is set."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    return now


class TestProgress:
    """Oracle: a clock that is set by hand."""

    def test_taken_up_again_it_counts_from_there(self, clock: list[float]) -> None:
        """The time left follows from the steps of this process, and from when it began them."""
        stream = io.StringIO()
        progress = Progress(5000, stream=stream)
        clock[0] += 3600  # until everything is loaded
        progress.begin(4000)
        for step in range(4001, 4101):
            clock[0] += 0.25
            progress.step(step, 9, 0.5, 7.0)
        lines = stream.getvalue().splitlines()
        # The first is due at once; then 40 steps are 10 seconds.
        assert lines[0] == "step 4001/5000, epoch 9, loss 0.5000, 7.0 examples/s, 4:10 left"
        assert lines[-1].startswith("step 4081/5000")
        assert lines[-1].endswith(" 3:50 left")

    def test_a_bar_taken_up_again(self, clock: list[float]) -> None:
        stream = Terminal()
        with Progress(30, stream=stream) as progress:
            progress.begin(27)
            for step in (28, 29, 30):
                clock[0] += 1
                progress.step(step, 1, 0.25, 7.0)
        shown = stream.getvalue()
        assert "30/30" in shown
        assert "31/30" not in shown
        assert "| 3/30" not in shown

    def test_finished_already(self, clock: list[float]) -> None:
        """Nothing divides by the steps that were not taken."""
        stream = io.StringIO()
        with Progress(30, stream=stream) as progress:
            progress.begin(30)
            progress.line("a line")
        assert stream.getvalue() == "a line\n"

    def test_plain_lines_every_ten_seconds_and_at_the_end(self, clock: list[float]) -> None:
        stream = io.StringIO()
        with Progress(5000, stream=stream) as progress:
            for step in range(1, 5001):
                clock[0] = 1000 + step / 10
                progress.step(step, 1 + step // 2501, 2 / step, 123.45)
        lines = stream.getvalue().splitlines()
        assert len(lines) == 50
        assert lines[0] == "step 100/5000, epoch 1, loss 0.0200, 123.5 examples/s, 8:10 left"
        assert lines[-1] == "step 5000/5000, epoch 2, loss 0.0004, 123.5 examples/s, 0:00 left"

    def test_hours(self, clock: list[float]) -> None:
        stream = io.StringIO()
        progress = Progress(1000, stream=stream)
        clock[0] += 10
        progress.step(1, 1, 0.5, 1.0)
        assert stream.getvalue().endswith("2:46:30 left\n")

    def test_a_bar_on_a_terminal(self, clock: list[float]) -> None:
        stream = Terminal()
        with Progress(3, stream=stream) as progress:
            for step in (1, 2, 3):
                clock[0] += 1
                progress.step(step, 1, 0.25, 7.0)
            progress.line("epoch 1: dev accuracy 0.5")
        shown = stream.getvalue()
        assert "3/3" in shown
        assert "epoch 1, loss 0.2500, 7.0 examples/s" in shown
        assert "epoch 1: dev accuracy 0.5\n" in shown
        assert "step 3/3" not in shown  # no plain lines beside the bar

    @pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["plain", "terminal"])
    def test_quiet(self, stream: io.StringIO, clock: list[float]) -> None:
        with Progress(3, quiet=True, stream=stream) as progress:
            clock[0] += 100
            progress.step(3, 1, 0.25, 7.0)
            progress.line("a line")
        assert stream.getvalue() == ""

    def test_standard_error_by_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        Progress(1).step(1, 1, 0.5, 2.0)
        out, err = capsys.readouterr()
        assert out == ""
        assert err == "step 1/1, epoch 1, loss 0.5000, 2.0 examples/s, 0:00 left\n"


class Dying(io.StringIO):
    """A stream that fails from its n-th call on, at writing or at flushing, and counts the calls.

    It may be a terminal.
    """

    def __init__(self, error: Exception, at: str, sound: int, is_terminal: bool) -> None:
        super().__init__()
        self.error, self.at, self.sound, self.is_terminal = error, at, sound, is_terminal
        self.calls = self.failures = 0

    def _call(self, name: str) -> None:
        self.calls += 1
        if name == self.at and self.calls > self.sound:
            self.failures += 1
            raise self.error

    def write(self, text: str) -> int:
        self._call("write")
        return super().write(text)

    def flush(self) -> None:
        self._call("flush")

    def isatty(self) -> bool:
        return self.is_terminal


class TestAViewerThatIsGone:
    """Oracle: nothing is raised, and a stream that counts what is tried after it has failed."""

    @pytest.mark.parametrize("is_terminal", [False, True], ids=["plain", "terminal"])
    @pytest.mark.parametrize("at", ["write", "flush"])
    @pytest.mark.parametrize(
        "error",
        [
            BrokenPipeError(32, "Broken pipe"),
            OSError(28, "No space left on device"),
            OSError(5, "Input/output error"),
            ValueError("I/O operation on closed file."),
        ],
        ids=["pipe", "full", "hung up", "closed"],
    )
    def test_is_told_nothing_more(
        self, error: Exception, at: str, is_terminal: bool, clock: list[float]
    ) -> None:
        """From the first call on, or in the middle of the run."""
        for sound in (0, 1, 2, 3, 5, 8, 13):
            stream = Dying(error, at, sound, is_terminal)
            with Progress(30, stream=stream) as progress:
                progress.begin(7)
                for step in range(8, 31):
                    clock[0] += 11
                    progress.step(step, 1, 0.25, 7.0)
                    progress.line("epoch 1: dev accuracy 0.5")
            assert stream.failures == 1, sound
            said = stream.getvalue()
            assert "30/30" not in said, sound
            assert sound < 13 or "8/30" in said, (sound, said)

    @pytest.mark.parametrize("is_terminal", [False, True], ids=["plain", "terminal"])
    def test_a_stream_that_its_owner_closed(self, is_terminal: bool, clock: list[float]) -> None:
        """Before the bar is made, or after."""
        for begin_closed in (False, True):
            stream = Terminal() if is_terminal else io.StringIO()
            if begin_closed:
                stream.close()
            with Progress(3, stream=stream) as progress:
                stream.close()
                clock[0] += 11
                progress.step(3, 1, 0.25, 7.0)
                progress.line("a line")

    def test_no_standard_error(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its descriptor is closed (``2>&-``); standard output is not taken for it."""
        monkeypatch.setattr(sys, "stderr", None)
        with Progress(1) as progress:
            progress.step(1, 1, 0.5, 2.0)
            progress.line("a line")
        assert capsys.readouterr().out == ""

    def test_what_is_written_arrives_as_long_as_it_can(self) -> None:
        stream = io.StringIO()
        shown = lasting(stream)
        print("a", "b", sep="\n", file=shown, flush=True)
        assert stream.getvalue() == "a\nb\n"
        assert shown.write("four") == 4
        assert lasting(shown) is shown
        assert shown.getvalue() == "a\nb\nfour"  # type: ignore[attr-defined]


class TestRowsDone:
    """Oracle: a clock that is set by hand."""

    def test_a_line_every_ten_seconds(self, clock: list[float]) -> None:
        stream = io.StringIO()
        with RowsDone(stream=stream) as done:
            for _ in range(4):
                clock[0] += 4
                done.add(1000)
        assert stream.getvalue() == "3,000 rows, 250 rows/s\n"

    def test_on_a_terminal_in_one_line(self, clock: list[float]) -> None:
        stream = Terminal()
        with RowsDone(stream=stream) as done:
            for rows in (9000, 10):
                clock[0] += 4
                done.add(rows)
        assert stream.getvalue() == "\r9,000 rows, 2,250 rows/s\r9,010 rows, 1,126 rows/s\n"

    def test_nothing(self, clock: list[float]) -> None:
        stream = Terminal()
        with RowsDone(quiet=True, stream=stream) as done:
            clock[0] += 40
            done.add(1)
        with RowsDone(stream=stream):
            pass
        assert stream.getvalue() == ""
