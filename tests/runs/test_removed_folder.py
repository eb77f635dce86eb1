"""A log that cannot be written for some time, and a run folder that is removed during its run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.file_faults import Arguments, Failing, FileOperations, raised, save_failing
from support.interruptions import differences, everything, interrupted
from support.small_runs import SmallRun, read_log
from support.tortured_runs import leftovers, record_of

from spafit.errors import TrainingError
from spafit.training.loop import Loop

Sized = Callable[[int, int], int]
Promise = Callable[[str, int, str], None]

RUN = {"epochs": 4, "save_every": 4, "eval_every": 7}
"""20 steps; saved after 4, 7, 8, 12, 14, 16 and 20."""


@pytest.fixture(scope="module")
def clean(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return all that a run leaves that nothing happened to."""
    out = tmp_path_factory.mktemp("clean") / "run"
    small.fit(out=out, **RUN)
    return {"everything": everything(out)}


class TestLog:
    """Oracle: the log of a run that nothing happened to."""

    def test_rows_that_cannot_be_written_are_written_later(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any], monkeypatch: Any
    ) -> None:
        """Also those of which a part was; none stands there twice, and none half."""
        out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
        take, seen = Loop._take, []
        operations = FileOperations(active=False)

        def fault(_: int, name: str, arguments: Arguments) -> int | None:
            if name != "write" or not os.path.samestat(os.fstat(arguments[0]), log.stat()):
                return None
            seen.append(len(seen) % 2)
            if seen[-1]:
                raise raised(errno.ENOSPC)
            return len(arguments[1]) // 2

        def taking(self: Loop, fed: Any) -> None:
            operations.active = self.state.step + 1 in (5, 6, 10, 11)
            try:
                take(self, fed)
            finally:
                operations.active = False
            assert log.read_bytes().endswith(b"}\n"), self.state.step

        operations.fault = fault
        monkeypatch.setattr(Loop, "_take", taking)
        with operations:
            small.fit(out=out, **RUN)
        assert len(seen) >= 8
        assert differences(everything(out), clean["everything"]) == []
        assert [row["step"] for row in read_log(out, "loss")] == list(range(1, 21))

    def test_a_log_that_is_never_written(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any]
    ) -> None:
        """Two saves fail for it, with the bytes that its rows need; then it can be written."""
        out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"

        def fault(_: int, name: str, arguments: Arguments) -> None:
            is_there = name == "write" and log.exists()
            if is_there and os.path.samestat(os.fstat(arguments[0]), log.stat()):
                raise raised(errno.EDQUOT)

        match = r"log\.jsonl cannot be written: .* quota exceeded; [\d,]+ bytes are needed, "
        with FileOperations(fault), pytest.raises(TrainingError, match=match):
            small.fit(out=out, **RUN)
        assert log.read_bytes() == b""
        small.fit(out=out, **RUN)
        assert differences(everything(out), clean["everything"]) == []


class TestRemovedFolder:
    """Oracle: as above. The folder goes away between two steps."""

    @contextmanager
    def _after(self, step: int, do: Callable[[], object]) -> Iterator[None]:
        take = Loop._take

        def taking(loop: Loop, fed: Any) -> None:
            take(loop, fed)
            if loop.state.step == step:
                do()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "_take", taking)
            yield

    @pytest.mark.parametrize("step", [2, 9, 19, 20])
    @pytest.mark.parametrize("how", ["removed", "moved"])
    def test_it_is_made_anew(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any], step: int, how: str
    ) -> None:
        out = tmp_path / "run"
        gone = {
            "removed": lambda: shutil.rmtree(out),
            "moved": lambda: out.rename(tmp_path / "elsewhere"),
        }[how]
        with self._after(step, gone):
            small.fit(out=out, **RUN)
        assert differences(everything(out), clean["everything"]) == []
        assert record_of(out)["status"] == "finished"
        assert not (out / "run.lock").exists()
        assert "was removed during its run" in read_log(out, "note")[0]["note"]
        for each in tmp_path.iterdir():
            assert not leftovers(each)

    def test_only_its_checkpoints(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any]
    ) -> None:
        out = tmp_path / "run"
        with self._after(9, lambda: shutil.rmtree(out / "checkpoints")):
            small.fit(out=out, **RUN)
        assert differences(everything(out), clean["everything"]) == []

    def test_it_is_gone_on_from(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any]
    ) -> None:
        out = tmp_path / "run"
        with self._after(9, lambda: shutil.rmtree(out)):
            interrupted(small, out, [10, 13], **RUN)
        assert differences(everything(out), clean["everything"]) == []

    def test_making_it_anew_may_fail(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any], sized: Sized, promise: Promise
    ) -> None:
        """At any operation (by default every third): the next save makes up for it."""
        n = 0
        while True:
            n += sized(3, 1)
            out = tmp_path / f"run-{n}"
            failing = Failing("ENOSPC", n, lasting=False)
            # The removal is seen at the fourth save, after step 12.
            with (
                self._after(9, lambda out=out: shutil.rmtree(out)),
                save_failing(4, failing, lasting=False) as operations,
            ):
                small.fit(out=out, **RUN)
            where = f"operation {n}, {failing.failed}"
            assert differences(everything(out), clean["everything"]) == [], where
            assert not leftovers(out), where
            assert not (out / "run.lock").exists(), where
            shutil.rmtree(out)
            if "fsync" in operations.names[:n]:  # of the log: it is all there again
                break
        assert n > 5
        promise("a removed folder that cannot be made anew at once", n, "made at the next save")

    def test_another_run_in_its_place_is_not_touched(
        self, small: SmallRun, tmp_path: Path, clean: dict[str, Any]
    ) -> None:
        other, out = tmp_path / "other", tmp_path / "run"
        small.fit(out=other, **{**RUN, "seed": 5})

        def contents() -> dict[str, bytes]:
            return {
                str(path.relative_to(out)): path.read_bytes()
                for path in out.rglob("*")
                if path.is_file()
            }

        found: list[dict[str, bytes]] = []

        def replace() -> None:
            shutil.rmtree(out)
            other.rename(out)
            found.append(contents())

        with (
            self._after(9, replace),
            pytest.raises(TrainingError, match="was removed during its run, and now holds anot"),
        ):
            small.fit(out=out, **RUN)
        assert contents() == found[0]


class TestTheLogAlone:
    """Oracle: the log of a run that was left alone."""

    @pytest.mark.parametrize("how", ["removed", "moved"])
    def test_is_made_anew_with_all_its_rows(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        take = Loop._take

        def taking(self: Loop, fed: Any) -> None:
            take(self, fed)
            if self.state.step == 7:
                log = tmp_path / "run" / "log.jsonl"
                log.rename(tmp_path / "away") if how == "moved" else log.unlink()

        monkeypatch.setattr(Loop, "_take", taking)
        small.fit(out=tmp_path / "run", epochs=2)
        steps = [row["step"] for row in read_log(tmp_path / "run", "loss")]
        assert steps == list(range(1, 11))


def test_checkpoints_that_lead_to_what_is_not_there_yet(small: SmallRun, tmp_path: Path) -> None:
    """Oracle: the place that the link names, such as a scratch disk that was cleaned."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    small.fit(out=tmp_path / "run", epochs=1)
    assert (tmp_path / "scratch" / "step-5" / "manifest.json").is_file()
