"""Real training processes to be killed, stopped and raced, and faults of the file system.

A fresh Python with PyTorch takes seconds to start. So one process is started, imports everything,
and forks a trainer for each request (:class:`Zygote`): a process of its own, which runs the console
command and really is killed. Run as a program, this file is that process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from support import environment, many_processes
from support.file_faults import FileOperations, makes_or_writes

LEFTOVER = re.compile(r"step-\d+\.tmp-\d+.*|\..*\.part")

INTERVAL = 4
"""Steps between the checkpoints of :func:`arguments`."""


# ---- What is checked from outside ----------------------------------------------------------------


def step_of(path: Path) -> int:
    return int(path.name.partition(".")[0].removeprefix("step-"))


def checkpoints(out: Path) -> list[Path]:
    """Return the folders that have a checkpoint's name, in order."""
    found = [
        path
        for path in (out / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d+", path.name)
    ]
    return sorted(found, key=step_of)


def faults_of(checkpoint: Path) -> list[str]:
    """Hold a checkpoint's files against its manifest, by nothing of spafit's."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        faults = [] if manifest["step"] == step_of(checkpoint) else ["the step is another one"]
        for name, record in manifest["files"].items():
            content = (checkpoint / name).read_bytes()
            found = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            if found != record:
                faults.append(f"{name} is {found}, not {record}")
        there = {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
        if there != manifest["files"].keys():
            faults.append(f"holds {sorted(there)}")
        json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError, KeyError) as error:
        faults = [repr(error)]
    return [f"{checkpoint.name}: {fault}" for fault in faults]


def newest_sound(out: Path) -> int:
    """Require every checkpoint to be sound, and give the newest one's step; 0 where none is.

    One that is being replaced has, between two operations, the name that it is set aside under.
    """
    found = checkpoints(out)
    for path in (out / "checkpoints").glob("step-*-old"):
        if not path.with_name(path.name.partition(".")[0]).exists():
            found.append(path)
    faults = [fault for path in found for fault in faults_of(path)]
    assert not faults, faults
    return max(map(step_of, found), default=0)


def leftovers(out: Path) -> set[str]:
    """Name what is there of saves that did not end."""
    places = [place for place in (out, out / "checkpoints") if place.is_dir()]
    return {path.name for place in places for path in place.iterdir() if LEFTOVER.match(path.name)}


def logged_steps(out: Path) -> list[int]:
    """Return the steps in the log; its last line may be half-written."""
    try:
        lines = (out / "log.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines]
    return [row["step"] for row in rows if "loss" in row]


def record_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run.json").read_text()))


# ---- The trainers --------------------------------------------------------------------------------


def arguments(root: Path, out: Path | None, *more: str) -> list[str]:
    """Return the arguments of a run of 30 steps with dropout, 5 evaluations and 7 intervals.

    ``root`` holds the folders ``tiny``, of the model, and ``glue``.
    """
    settings = (
        "--task rte --method SPAFIT-0-1-II --r 5 --lora-dropout 0.2 --epochs 6 --batch-size 6 "
        f"--learning-rate 3e-3 --seed 3 --eval-every 7 --save-every {INTERVAL} --device cpu"
    )
    places = ["--model", str(root / "tiny"), "--data", str(root / "glue")]
    return [
        "train",
        *settings.split(),
        *places,
        *(() if out is None else ("--out", str(out))),
        *more,
    ]


@dataclass
class Trainer:
    """A forked process that runs the console command; its output goes to ``output``."""

    zygote: Zygote
    pid: int
    output: Path
    code: int | None = None

    def ended(self) -> bool:
        if self.code is None:
            self.code = self.zygote.ask({"poll": self.pid})
        return self.code is not None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it was waited for already: its number may be another's."""
        if self.code is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 60.0) -> int:
        """Return the exit code, below 0 that of a signal."""
        self.until(lambda: False, seconds, pause=0.005)
        assert self.code is not None
        return self.code

    def until(
        self, happened: Callable[[], bool], seconds: float = 60.0, pause: float = 0.0005
    ) -> bool:
        """Wait until something happened, or the process ended; gives whether it happened.

        ``pause`` is the number of seconds between two looks.
        """
        end = time.monotonic() + seconds
        while not happened():
            if self.ended():
                return happened()
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"still running after {seconds} s: {self.said()}")
            time.sleep(pause)
        return True

    def said(self) -> str:
        return self.output.read_text(errors="replace")


class Zygote:
    """The warm process; a context manager. ``root`` holds model and data, as for arguments()."""

    def __init__(self, root: Path) -> None:
        self.folder = root
        self._outputs = 0
        # Threads would be missing in a forked process: none of OpenMP, none for a GPU's gradients.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.tortured_runs", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        )
        assert self.ask({}) == "ready"

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        return json.loads(self._process.stdout.readline())

    def train(self, arguments: list[str], **tampering: Any) -> Trainer:
        """Fork a trainer; ``tampering`` names functions of :data:`TAMPERINGS`, with a value."""
        self._outputs += 1
        output = self.folder / f"output-{self._outputs}.txt"
        output.touch()
        request = {"train": arguments, "output": str(output), "tampering": tampering}
        return Trainer(self, self.ask(request), output)


def serve(root: Path) -> None:
    """Answer the requests on standard input, one a line; at its end no trainer is left."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import torch

    import spafit.cli

    torch.set_num_threads(1)
    # A short run, so that all is imported and allocated that a trainer needs.
    with tempfile.TemporaryDirectory() as warm:
        assert spafit.cli.main(arguments(root, Path(warm), "--epochs", "1", "--quiet")) == 0
    living = set()
    for line in sys.stdin:
        request = json.loads(line)
        if not request:
            print(json.dumps("ready"), file=answers)
        elif "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            living.discard(pid)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), file=answers)
        else:
            pid = os.fork()
            if pid == 0:
                answers.close()
                _train(spafit.cli.main, request)
            living.add(pid)
            print(pid, file=answers)
    for pid in living:
        os.kill(pid, signal.SIGKILL)


def _train(main: Callable[[list[str]], int], request: dict[str, Any]) -> NoReturn:
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for file, number in ((null, 0), (output, 1), (output, 2)):
        os.dup2(file, number)
    code = 70
    try:
        for name, value in request["tampering"].items():
            TAMPERINGS[name](value)
        code = main(request["train"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Uninterrupted(NamedTuple):
    """All that a run left that nothing happened to, and its seconds."""

    everything: dict[str, Any]
    seconds: float


# ---- What is done to a trainer, in its own process -----------------------------------------------


def _wrap(home: Any, name: str, before: Callable[..., object]) -> None:
    function = getattr(home, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        before(*arguments, **named)
        return function(*arguments, **named)

    setattr(home, name, wrapped)


def _marking(value: dict[str, Any]) -> Callable[..., None]:
    """Give a function that, once, touches the file ``mark`` and takes its time: at its first call.

    With ``from``, at its n-th call. A signal ends the wait, unless it is to be ``deaf``.
    """
    calls = iter(range(1, 10**6))
    heard, hears = os.pipe()
    os.set_blocking(hears, False)

    def mark_and_wait(*_: object, **__: object) -> None:
        if next(calls) != value.get("from", 1):
            return
        if not value.get("deaf"):
            signal.set_wakeup_fd(hears)
        Path(value["mark"]).touch()
        end = time.monotonic() + value["seconds"]
        while not select.select([heard], [], [], 0.05)[0] and time.monotonic() < end:
            pass

    return mark_and_wait


def _kill_at(value: dict[str, Any]) -> None:
    """Die before the n-th operation of the k-th save that changes a file or folder.

    The operations until then, with that one, are written to the file ``names``, a line each; all
    those of the save where it has fewer than n, and the process ends.
    """
    from spafit.training.saving import Saver

    changes: list[str] = []
    report = os.open(value["names"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    write = os.write

    def die(_: int, name: str, arguments: tuple[Any, ...]) -> None:
        if makes_or_writes(name, arguments):
            changes.append(name)
            if len(changes) == value["operation"]:
                write(report, "\n".join(changes).encode())
                os.kill(os.getpid(), signal.SIGKILL)

    operations = FileOperations(die, active=False)
    operations.__enter__()
    save, saves = Saver._save, iter(range(1, 1000))

    def saving(self: Any, state: Any) -> None:
        if next(saves) != value["save"]:
            save(self, state)
            return
        with operations.only_inside():
            save(self, state)
        write(report, "\n".join(changes).encode())
        os._exit(0)  # what comes after is no part of it

    Saver._save = saving  # type: ignore[method-assign]


def _slow_saves(value: dict[str, Any]) -> None:
    import spafit.runs.checkpoint

    _wrap(spafit.runs.checkpoint, "write_file", _marking(value))


def _slow_evaluations(value: dict[str, Any]) -> None:
    import spafit.training.loop

    _wrap(spafit.training.loop, "predict_logits", _marking(value))


def _slow_start(value: dict[str, Any]) -> None:
    from spafit.training.loop import Loop

    _wrap(Loop, "run", _marking(value))


def _slow_steps(value: dict[str, Any]) -> None:
    from spafit.training.loop import Loop

    _wrap(Loop, "_take", _marking(value))


def _held_steps(value: dict[str, Any]) -> None:
    """Wait in the n-th step for as long as the mark is there."""
    from spafit.training.loop import Loop

    steps, mark = iter(range(1, 10**6)), Path(value["mark"])

    def hold(*_: object) -> None:
        if next(steps) == value["from"]:
            mark.touch()
            while mark.exists():
                time.sleep(0.001)

    _wrap(Loop, "_take", hold)


def _slow_end(value: dict[str, Any]) -> None:
    from spafit.runs.folder import RunFolder

    _wrap(RunFolder, "__exit__", _marking(value))


def _stop_after(value: int) -> None:
    """Ask this process to stop once so many steps are done."""
    from spafit.training.loop import Loop

    take = Loop._take

    def taking(self: Any, fed: Any) -> None:
        take(self, fed)
        if self.state.step == value:
            os.kill(os.getpid(), signal.SIGTERM)

    Loop._take = taking  # type: ignore[method-assign]


def _gate(value: str) -> None:
    """Wait for whoever opens a FIFO for writing before the lock is asked for, and say so."""
    from spafit.files.durable import Lock

    def wait(*_: object) -> None:
        gate = os.open(value, os.O_RDONLY | os.O_NONBLOCK)  # or else the opening would wait
        Path("/proc/self/fd/1").readlink().with_suffix(".waits").touch()
        poll = select.poll()
        poll.register(gate, select.POLLHUP)
        poll.poll(60_000)
        os.close(gate)

    _wrap(Lock, "acquire", wait)


def _without_privileges(_: bool) -> None:
    """Have modes bind also root: give up all capabilities (of Linux)."""
    import ctypes

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: twice 32 bits each
    failed = ctypes.CDLL(None).capset(ctypes.byref(Header(0x20080522, 0)), nothing)
    assert not failed


def _forked_workers(_: bool) -> None:
    """Have the workers of a grid be forks of this process, which need not import everything."""
    from types import SimpleNamespace

    import spafit.experiments.grid.workers
    from support.grids import Forked

    spafit.experiments.grid.workers.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=Forked, PIPE=subprocess.PIPE
    )


def _file_size(value: int) -> None:
    """Allow no file to be longer: a limit that the system sees to."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))


TAMPERINGS: dict[str, Callable[[Any], None]] = {
    "kill_at": _kill_at,
    "slow_saves": _slow_saves,
    "slow_evaluations": _slow_evaluations,
    "slow_start": _slow_start,
    "slow_steps": _slow_steps,
    "held_steps": _held_steps,
    "slow_end": _slow_end,
    "stop_after": _stop_after,
    "gate": _gate,
    "without_privileges": _without_privileges,
    "file_size": _file_size,
    "forked_workers": _forked_workers,
    **many_processes.TAMPERINGS,
}

if __name__ == "__main__":
    serve(Path(sys.argv[1]))
