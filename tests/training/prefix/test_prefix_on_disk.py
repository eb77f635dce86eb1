"""A prefix kept on disk neither stops a run nor changes its results, bit for bit.

Oracle throughout: the same run with its prefix kept in memory, on a machine without faults. Both
compute the prefix in the same groups of examples, so that they agree bit for bit.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.small_runs import N_DEV, N, SmallRun, read_log, trained
from support.sweeps import quick

from spafit.bert import BertModel
from spafit.errors import CheckpointError
from spafit.runs.record import read_record
from spafit.training.fit import Result
from spafit.training.loop import Loop
from spafit.training.prefix import file as prefix_file
from spafit.training.prefix import kept as kept_prefix
from spafit.training.prefix.cache import PrefixCache
from spafit.training.prefix.kept import prefix_key

RUN = {"epochs": 2, "dropout_in_group_1": False}
DISK = {**RUN, "cache_prefix": "disk"}
WHAT = "runs with a prefix on a failing disk"
HELD = "0 ended, 0 of other bits"


@pytest.fixture(autouse=True)
def groups_of_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have 4 groups of train and 2 of dev, so that a disk can fail between them."""
    monkeypatch.setattr(kept_prefix, "_GROUP", 7)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have the cache in a folder of the test's own; gives where the files of prefixes are."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


def bits(small: SmallRun, **settings: Any) -> tuple[Result, torch.Tensor]:
    """Run, and give the result and all that was trained."""
    model = small.model()
    result = small.fit(model, **settings)
    return result, torch.cat([tensor.flatten() for tensor in trained(model).values()])


def assert_same(ours: tuple[Result, torch.Tensor], theirs: tuple[Result, torch.Tensor]) -> None:
    assert ours[0].losses == theirs[0].losses
    assert ours[0].history == theirs[0].history
    assert torch.equal(ours[1], theirs[1])


@pytest.fixture(scope="module")
def in_memory(small: SmallRun) -> tuple[Result, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kept_prefix, "_GROUP", 7)
        return bits(small, cache_prefix="memory", **RUN)


class FailingDisk:
    """Have one operation on the files of prefixes fail, from its n-th call on (from 0)."""

    def __init__(self, folder: Path, step: str, code: int, after: int = 0) -> None:
        self.folder, self.step, self.code, self.left = folder, step, code, after
        self.failures = 0

    def install(self, patched: pytest.MonkeyPatch) -> None:
        write, fsync, replace, unlink = os.write, os.fsync, Path.replace, Path.unlink

        def failing_write(file: int, content: Any) -> int:
            if self.step in ("write", "all") and self._has(file):
                if self._fails():
                    raise OSError(self.code, os.strerror(self.code))
                if self.left == 0:  # the last one is taken in part
                    return write(file, memoryview(content)[: len(content) // 2])
            return write(file, content)

        def failing_fsync(file: int) -> None:
            if self.step in ("fsync", "all") and self._has(file) and self._fails():
                raise OSError(self.code, os.strerror(self.code))
            fsync(file)

        def failing_replace(path: Path, target: Path) -> Path:
            if self.step in ("replace", "all") and path.parent == self.folder and self._fails():
                raise OSError(self.code, os.strerror(self.code))
            return replace(path, target)

        def failing_unlink(path: Path, missing_ok: bool = False) -> None:
            if self.step == "all" and path.parent == self.folder and self._fails():
                raise OSError(self.code, os.strerror(self.code))
            unlink(path, missing_ok=missing_ok)

        patched.setattr(os, "write", failing_write)
        patched.setattr(os, "fsync", failing_fsync)
        patched.setattr(Path, "replace", failing_replace)
        patched.setattr(Path, "unlink", failing_unlink)

    def _has(self, file: int) -> bool:
        if not self.folder.is_dir():
            return False
        about = os.fstat(file)
        return any(os.path.samestat(about, path.stat()) for path in self.folder.iterdir())

    def _fails(self) -> bool:
        self.left -= 1
        self.failures += self.left < 0
        return self.left < 0


FAULTS = [
    *(("write", code, after) for code in ("ENOSPC", "EDQUOT", "EIO") for after in (0, 3, 20)),
    *((step, code, 0) for step in ("fsync", "replace") for code in ("ENOSPC", "EDQUOT", "EIO")),
    ("all", "EROFS", 0),
    ("all", "EROFS", 12),
]
QUICK = [
    *(("write", "ENOSPC", 0), ("write", "EDQUOT", 3), ("write", "EIO", 20)),
    *(("fsync", "EIO", 0), ("replace", "ENOSPC", 0), ("all", "EROFS", 12)),
]


class TestADiskThatFails:
    """Oracle: the run in memory; after it, a run on the mended disk."""

    @pytest.mark.parametrize(
        ("step", "code", "after"),
        quick(FAULTS, QUICK),
    )
    def test_ends_no_run(
        self,
        small: SmallRun,
        folder: Path,
        tmp_path: Path,
        in_memory: tuple[Result, torch.Tensor],
        computed: list[int],
        promise: Callable[[str, int, str], None],
        step: str,
        code: str,
        after: int,
    ) -> None:
        disk = FailingDisk(folder, step, getattr(errno, code), after)
        with pytest.MonkeyPatch.context() as patched:
            disk.install(patched)
            found = bits(small, out=tmp_path / "run", **DISK)
        assert disk.failures
        assert_same(found, in_memory)
        assert sum(computed) == N + N_DEV  # what the disk did not take was not computed again
        assert read_record(tmp_path / "run")["status"] == "finished"
        notes = [row["note"] for row in read_log(tmp_path / "run", "note")]
        reason = os.strerror(getattr(errno, code))
        assert notes
        assert max(map(notes.count, notes)) <= 2  # once of train and once of dev
        assert all(str(folder) in note and reason in note for note in notes)
        held = [note for note in notes if "held in memory from here on" in note]
        assert len(held) <= 2
        assert bool(held) == (step in ("write", "all"))
        if step != "all":  # which can remove nothing either
            assert list(folder.glob("*.tmp-*")) == []
        computed.clear()
        assert_same(bits(small, **DISK), in_memory)
        assert sum(computed) <= N + N_DEV
        assert list(folder.glob("*.tmp-*")) == []  # swept
        computed.clear()
        assert_same(bits(small, **DISK), in_memory)
        assert computed == []
        promise(WHAT, 1, HELD)

    def test_that_fills_up_when_damage_is_found(
        self,
        small: SmallRun,
        folder: Path,
        tmp_path: Path,
        in_memory: tuple[Result, torch.Tensor],
        monkeypatch: pytest.MonkeyPatch,
        promise: Callable[[str, int, str], None],
    ) -> None:
        """Nothing was to be written at the start, and the new file is begun in a later step."""
        small.fit(**DISK)
        for path in folder.iterdir():
            content = bytearray(path.read_bytes())
            content[0] ^= 1
            path.write_bytes(content)
        usage = shutil.disk_usage(folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5))
        assert_same(bits(small, out=tmp_path / "run", **DISK), in_memory)
        notes = [row["note"] for row in read_log(tmp_path / "run", "note")]
        assert sum("the disk has 5 free" in note for note in notes) == 2
        assert sum("damaged" in note for note in notes) == 2
        promise(WHAT, 1, HELD)

    def test_the_run_s_own_error_is_the_one_that_is_raised(
        self, small: SmallRun, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        evaluate = Loop._evaluate

        def then_fail(self: Loop) -> None:
            evaluate(self)
            raise ZeroDivisionError

        monkeypatch.setattr(Loop, "_evaluate", then_fail)
        FailingDisk(folder, "fsync", errno.ENOSPC).install(monkeypatch)
        with pytest.raises(ZeroDivisionError):
            small.fit(out=tmp_path / "run", **DISK)
        notes = [row["note"] for row in read_log(tmp_path / "run", "note")]
        assert len(notes) == 2
        assert all("No space left" in note and "compute the prefix again" in note for note in notes)

    def test_a_folder_that_will_not_do_is_refused_at_the_start(
        self, small: SmallRun, folder: Path, tmp_path: Path, computed: list[int]
    ) -> None:
        folder.parent.mkdir()
        folder.write_text("")
        with pytest.raises(CheckpointError, match=f"{folder} cannot be written"):
            small.fit(out=tmp_path / "run", **DISK)
        assert computed == []
        assert not (tmp_path / "run").exists()

    def test_refused_at_the_second_cache(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first one is closed before anything of the run was written, and says no more."""
        create, calls = prefix_file.create, iter(range(5))

        def fail_second(*arguments: Any) -> Any:
            if next(calls) == 1:
                raise CheckpointError("the second")
            return create(*arguments)

        monkeypatch.setattr(prefix_file, "create", fail_second)
        with pytest.raises(CheckpointError, match="the second"):
            small.fit(out=tmp_path / "run", **DISK)
        assert not (tmp_path / "run").exists()


class TestHeldAside:
    """Oracle: the tensors that were stored."""

    def test_is_read_here_and_never_saved(self, small: SmallRun, tmp_path: Path) -> None:
        encodings = small.tokenizer.encode(["cat", "a dog", "the child sees"], max_length=9)
        key = prefix_key(small.model(), "1" * 64, dtype="float32", precision="float32")
        shapes = [(length, key.hidden_size) for length in encodings.lengths]
        first, second, third = (torch.randn(shape) for shape in shapes)
        place = {"folder": tmp_path / "kept", "limit_bytes": 10**9}
        with PrefixCache(encodings, key, **place) as cache:
            cache.store([1], second)
            cache.store([2, 0], torch.cat([third, first]), keep=False)
            cache.store([1], second + 1, keep=False)  # is kept already
            assert cache.missing(range(3)) == []
            assert torch.equal(cache.read([0, 1, 2]), torch.cat([first, second, third]))
            cache.store([0], first + 2)
            assert torch.equal(cache.read([2, 0]), torch.cat([third, first + 2]))
        with PrefixCache(encodings, key, **place) as cache:
            assert cache.missing(range(3)) == [2]
            assert torch.equal(cache.read([0, 1]), torch.cat([first + 2, second]))
            assert cache.notes == []


class TestBits:
    """Oracle: a run in memory that has enough memory, and the examples that are computed."""

    def test_halved_groups_are_not_kept_for_later_runs(
        self,
        small: SmallRun,
        in_memory: tuple[Result, torch.Tensor],
        computed: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Groups of 25 and 11, and memory for 13: train's is halved, dev's is not."""
        monkeypatch.setattr(kept_prefix, "_GROUP", 32)
        whole = bits(small, cache_prefix="memory", **RUN)
        with monkeypatch.context() as patched:
            prefix = BertModel.prefix

            def greedy(self: BertModel, batch: Any) -> torch.Tensor:
                if len(batch.layout.lengths) > 13:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return prefix(self, batch)

            patched.setattr(BertModel, "prefix", greedy)
            computed.clear()
            halved = bits(small, **DISK)
            assert sorted(computed) == [N_DEV, 12, 13]  # and read in the second epoch
            assert_same(halved, bits(small, cache_prefix="memory", **RUN))
        assert halved[0].losses != whole[0].losses  # else this test would see nothing
        computed.clear()
        assert_same(bits(small, **DISK), whole)
        assert computed == [N]
        computed.clear()
        assert_same(bits(small, **DISK), whole)
        assert computed == []

    def test_another_number_of_threads_is_another_file(
        self, small: SmallRun, computed: list[int], folder: Path
    ) -> None:
        before = torch.get_num_threads()
        disk = {**DISK, "epochs": 1}
        small.fit(**disk)
        try:
            torch.set_num_threads(before + 1)
            computed.clear()
            ours = bits(small, **disk)
            assert sum(computed) == N + N_DEV
            assert_same(ours, bits(small, **{**disk, "cache_prefix": "memory"}))
        finally:
            torch.set_num_threads(before)
        assert len(list(folder.iterdir())) == 4

    @pytest.mark.parametrize(
        ("module", "name", "value"),
        [
            (torch, "__version__", "1.2.3"),
            (torch, "get_num_threads", lambda: 77),
            (torch, "get_float32_matmul_precision", lambda: "medium"),
            (torch.backends.cpu, "get_cpu_capability", lambda: "VSX"),
            (kept_prefix, "processor", lambda: "Z80"),
            (kept_prefix, "library_on", lambda _: "another"),
            (kept_prefix, "__version__", "0.0.0"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_rounding_depends_on_is_in_the_key(
        self,
        small: SmallRun,
        monkeypatch: pytest.MonkeyPatch,
        module: ModuleType,
        name: str,
        value: Any,
    ) -> None:
        model = small.model()
        key = prefix_key(model, "1", dtype="float32", precision="float32")
        assert prefix_key(model, "1", dtype="float32", precision="float32") == key
        monkeypatch.setattr(module, name, value)
        assert prefix_key(model, "1", dtype="float32", precision="float32") != key

    def test_a_gpu_s_name_is_in_the_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
        found = [kept_prefix._rounding(torch.device("cuda", number)) for number in (0, 1)]
        assert "card 0" in found[0]
        assert "card 1" in found[1]
        assert "threads" not in found[0]  # which do not matter there
