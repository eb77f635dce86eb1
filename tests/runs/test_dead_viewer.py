"""A run continues to its end if the reader of its output exits, or the output's disk is full."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.tortured_runs import arguments, leftovers, logged_steps, record_of

from spafit.cli import main
from spafit.errors import StoppedError

Capture = pytest.CaptureFixture[str]
Promise = Callable[[str, int, str], None]


@contextlib.contextmanager
def closed_pipe() -> Iterator[int]:
    """Return the end of a pipe that is written to; its reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextlib.contextmanager
def full_disk() -> Iterator[int]:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    writer = os.open("/dev/full", os.O_WRONLY)
    yield writer
    os.close(writer)


@contextlib.contextmanager
def hung_up_terminal() -> Iterator[int]:
    """Return a terminal whose other end is closed: nothing can be written to it."""
    main_end, terminal = pytest.importorskip("pty").openpty()
    os.close(main_end)
    yield terminal
    os.close(terminal)


DEAD = {"pipe": closed_pipe, "full": full_disk, "terminal": hung_up_terminal}


def spafit(
    words: list[str], dead: dict[str, str], *, unbuffered: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; what is not dead is captured.

    Unbuffered, as in a container, each line is written as it comes; or else many at once, at the
    end at the latest.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONUNBUFFERED", None)
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    with contextlib.ExitStack() as opened:
        streams = {name: opened.enter_context(DEAD[kind]()) for name, kind in dead.items()}
        return subprocess.run(
            [sys.executable, "-m", "spafit", *words],
            stdout=streams.get("stdout", subprocess.PIPE),
            stderr=streams.get("stderr", subprocess.PIPE),
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )


def check_finished(out: Path) -> None:
    record = record_of(out)
    assert record["status"] == "finished", record
    assert (out / "adapter.safetensors").exists()
    assert logged_steps(out) == [1, 2, 3, 4, 5]
    assert not leftovers(out)
    assert not (out / "run.lock").exists()


class TestTrain:
    """Oracle: the exit code of a real process, and run.json and the log of all its steps.

    The streams are a pipe without a reader, a disk that is full, and a terminal that is closed.
    """

    @pytest.mark.parametrize(
        "kind",
        [
            "pipe",
            pytest.param("full", marks=pytest.mark.full),
            pytest.param("terminal", marks=pytest.mark.full),
        ],
    )
    def test_standard_error(self, root: Path, tmp_path: Path, kind: str, promise: Promise) -> None:
        """What is printed elsewhere is all there."""
        ended = spafit(arguments(root, tmp_path / "out", "--epochs", "1"), {"stderr": kind})
        assert ended.returncode == 0
        check_finished(tmp_path / "out")
        assert "      task  RTE, SPAFIT-0-1-II" in ended.stdout
        assert f"written  {tmp_path / 'out' / 'adapter.safetensors'}" in ended.stdout
        promise("viewers that were gone", 1, "run finished, exit code 0")

    @pytest.mark.parametrize(
        ("kind", "unbuffered"),
        [
            pytest.param("pipe", True, marks=pytest.mark.full),
            pytest.param("full", True, marks=pytest.mark.full),
            ("full", False),
        ],
    )
    def test_standard_output(
        self, root: Path, tmp_path: Path, kind: str, unbuffered: bool, promise: Promise
    ) -> None:
        """All seeds are trained, although no screen of the first can be shown."""
        words = arguments(root, tmp_path, "--epochs", "1", "--seeds", "4", "0")
        ended = spafit(words, {"stdout": kind}, unbuffered=unbuffered)
        assert ended.returncode == 0, ended.stderr
        for seed in (4, 0):
            check_finished(tmp_path / f"seed-{seed}")
        assert ended.stderr.count("step 5/5") == 2
        assert "Error" not in ended.stderr  # of the interpreter, at its end
        assert "ignored" not in ended.stderr
        promise("viewers that were gone", 1, "run finished, exit code 0")

    @pytest.mark.full
    def test_both(self, root: Path, tmp_path: Path, promise: Promise) -> None:
        ended = spafit(
            arguments(root, tmp_path / "out", "--epochs", "1"),
            {"stdout": "terminal", "stderr": "terminal"},
        )
        assert ended.returncode == 0
        check_finished(tmp_path / "out")
        promise("viewers that were gone", 1, "run finished, exit code 0")

    def test_no_streams_at_all(self, root: Path, tmp_path: Path, promise: Promise) -> None:
        """Of ``>&- 2>&-``: nor is anything printed into a file that got their numbers."""
        words = [
            sys.executable,
            "-m",
            "spafit",
            *arguments(root, tmp_path / "out", "--epochs", "1"),
        ]
        shell = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *words]
        assert subprocess.run(shell, timeout=120, check=False).returncode == 0
        check_finished(tmp_path / "out")
        promise("viewers that were gone", 1, "run finished, exit code 0")


class TestWhatOnlyPrints:
    """Oracle: the exit codes that the help promises, and nothing of the interpreter's own."""

    def test_a_pipe_that_is_closed_early_is_well(self) -> None:
        ended = spafit(["plan", "SPAFIT-4-9-II"], {"stdout": "pipe"}, unbuffered=False)
        assert (ended.returncode, ended.stderr) == (0, "")

    def test_a_full_disk_is_one_line(self) -> None:
        """The plan is not where it was to go, which is a failure."""
        ended = spafit(["plan", "SPAFIT-4-9-II"], {"stdout": "full"}, unbuffered=False)
        assert (ended.returncode, ended.stderr) == (
            2,
            "spafit: [Errno 28] No space left on device\n",
        )

    @pytest.mark.full
    def test_what_is_written_beside_it(self, tmp_path: Path) -> None:
        file = tmp_path / "plan.json"
        ended = spafit(["plan", "SPAFIT-4-9-II", "--save", str(file)], {"stdout": "pipe"})
        assert (ended.returncode, ended.stderr) == (0, "")
        assert file.read_text().startswith("{")


class Closed(io.StringIO):
    """A stream whose reader is gone; it has no descriptor."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


class TestExitCodes:
    """Oracle: the exit code where standard error cannot tell the error."""

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (StoppedError("stopped", signal.SIGTERM), 143),
            (BrokenPipeError(32, "Broken pipe"), 2),  # of a file of the run
            (OSError(28, "No space left on device"), 2),
            (KeyboardInterrupt(), 130),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("dead", [(), ("stderr",), ("stdout", "stderr")], ids=repr)
    def test_of_training(
        self,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        code: int,
        dead: tuple[str, ...],
    ) -> None:
        def run_train(*_: object) -> None:
            print("a line", flush=True)
            raise error

        monkeypatch.setattr("spafit.cli.training.run_train", run_train)
        for name in dead:
            monkeypatch.setattr(sys, name, Closed())
        assert main(["train", "--task", "rte", "--method", "full"]) == code

    def test_of_the_demo(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """What comes after a line that nobody read is done."""
        done = []

        def run_demo(*, out: Path, **_: object) -> None:
            print("a line")
            done.append(out)

        monkeypatch.setattr("spafit.demo.run.run_demo", run_demo)
        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(["demo", "--out", str(tmp_path)]) == 0
        assert done == [tmp_path]

    @pytest.mark.parametrize("dead", ["stdout", "stderr"])
    def test_of_a_download(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dead: str
    ) -> None:
        """It is whole, and not left where its first file is reported."""
        fetched = []

        def download_glue(tasks: list[str], *_: object, progress: Callable[..., None]) -> list[str]:
            for task in tasks:
                progress(task, 1, 1)
                fetched.append(task)
            return tasks

        monkeypatch.setattr("spafit.tasks.download.download_glue", download_glue)
        monkeypatch.setattr(sys, dead, Closed())
        words = ["download", "glue", "rte", "mrpc", "--folder", str(tmp_path)]
        assert main(words) == 0
        assert fetched == ["rte", "mrpc"]

    def test_of_absurd_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stderr", Closed())
        with pytest.raises(SystemExit) as raised:
            main(["plan"])
        assert raised.value.code == 2

    def test_the_streams_are_given_back(self, capsys: Capture) -> None:
        before = sys.stdout, sys.stderr
        assert main(["plan", "SPAFIT-4-9-II"]) == 0
        assert (sys.stdout, sys.stderr) == before
        assert capsys.readouterr().out
