"""Runs that are stopped at a given step and resumed, shared by the tests of resuming."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spafit.errors import StoppedError
from spafit.training.fit import Result
from spafit.training.loop import Loop
from support.small_runs import SmallRun, read_log, trained


@contextmanager
def stopped_after(step: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Send this process a signal once a run has done so many steps."""
    take = Loop._take

    def taking(self: Loop, fed: Any) -> None:
        take(self, fed)
        if self.state.step == step:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_take", taking)
        yield


def interrupted(
    small: SmallRun, out: Path, stops: list[int], model: Any = None, **changes: Any
) -> tuple[Result, Any]:
    """Train, stopped after each of some steps and resumed by a fresh model each time."""
    for step in stops:
        with stopped_after(step), pytest.raises(StoppedError):
            small.fit(small.model() if model is None else model(), out=out, **changes)
    last = small.model() if model is None else model()
    return small.fit(last, out=out, **changes), last


def everything(folder: Path) -> dict[str, Any]:
    """Read all that the last checkpoint of a run and its log hold, but for times and notes."""
    checkpoints = folder / "checkpoints"
    last = max(checkpoints.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
    state = json.loads((last / "state.json").read_text())
    for name in ("record", "training_s", "seconds", "peak_memory_mib", "log_bytes"):
        del state[name]
    rows = [
        {key: value for key, value in row.items() if key != "step_time_ms"}
        for row in read_log(folder, "step")
    ]
    found: dict[str, Any] = {"last": last.name, "state": state, "log": rows}
    found["the best adapter"] = load_file(folder / "adapter.safetensors")
    for path in last.glob("*.safetensors"):
        found[path.name] = load_file(path)
    return found


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Name everything in which two runs differ, bit for bit."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [each for key in one for each in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            each
            for number, pair in enumerate(zip(one, other, strict=True))
            for each in differences(*pair, f"{where}/{number}")
        ]
    return [] if one == other else [f"{where}: {one!r:.80} and {other!r:.80}"]


__all__ = ["differences", "everything", "interrupted", "stopped_after", "trained"]
