"""Faults that the system itself produces: limits, modes, a full disk; and links and file modes."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.interruptions import differences, everything
from support.small_runs import SmallRun
from support.tortured_runs import (
    Uninterrupted,
    Zygote,
    arguments,
    leftovers,
    newest_sound,
    record_of,
)

from spafit.errors import CheckpointError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")

RUN = {"epochs": 4, "save_every": 4, "eval_every": 7}


@pytest.fixture(scope="module")
def clean(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same for a run in this process."""
    out = tmp_path_factory.mktemp("clean") / "run"
    small.fit(out=out, **RUN)
    return everything(out)


@pytest.fixture
def bound() -> dict[str, bool]:
    """Return the tampering that makes a trainer one whom the modes of files bind."""
    if os.geteuid() != 0:
        return {}
    if sys.platform != "linux":
        pytest.skip("root may write everywhere")
    return {"without_privileges": True}


class TestLimits:
    """Oracle: the exit code, the message, and an uninterrupted run."""

    def test_a_limit_on_the_size_of_files(
        self, zygote: Zygote, root: Path, tmp_path: Path, uninterrupted: Uninterrupted
    ) -> None:
        """The adapter is within it, the optimizer's state is not."""
        out = tmp_path / "run"
        trainer = zygote.train(arguments(root, out), file_size=20_000)
        assert trainer.wait() == 1, trainer.said()
        said = trainer.said().strip().splitlines()[-1]
        assert said.startswith(f"spafit: the checkpoint of step 7 cannot be written to {out}")
        assert "File too large; " in said
        assert " bytes are needed, " in said
        assert said.endswith(f"saved is the best adapter, {out}/adapter.safetensors")
        assert "the checkpoint of step 4 cannot be written" in (out / "log.jsonl").read_text()
        assert record_of(out)["status"] == "failed"
        assert not leftovers(out)
        trainer = zygote.train(arguments(root, out))
        assert trainer.wait() == 0, trainer.said()
        assert differences(everything(out), uninterrupted.everything) == []

    def test_a_full_disk(
        self, zygote: Zygote, root: Path, tmp_path: Path, uninterrupted: Uninterrupted
    ) -> None:
        """A disk of 200 kB, which one checkpoint fits on, and not two."""
        disk, copy = tmp_path / "disk", tmp_path / "copy"
        disk.mkdir()
        mount = f"mount -t tmpfs -o size=200k none {disk}"
        in_it = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        can = shutil.which("unshare") is not None
        if not can or subprocess.run([*in_it, mount], check=False).returncode:
            pytest.skip("a small disk cannot be mounted here (unshare --mount)")
        script = f'{mount} && "$@"; code=$?; cp -a {disk}/run {copy}; exit $code'
        command = [sys.executable, "-m", "spafit", *arguments(root, disk / "run")]
        done = subprocess.run(
            [*in_it, script, "sh", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stderr
        said = done.stderr.strip().splitlines()[-1]
        assert "No space left on device; " in said
        assert " bytes are needed, " in said
        newest = newest_sound(copy)
        assert newest >= 4
        assert f"saved is the checkpoint of step {newest}, from which the same command" in said
        assert not leftovers(copy)
        trainer = zygote.train(arguments(root, copy))
        assert trainer.wait() == 0, trainer.said()
        assert differences(everything(copy), uninterrupted.everything) == []


class TestModes:
    """Oracle: the exit code, the message, and the files."""

    def test_a_read_only_folder(
        self, zygote: Zygote, root: Path, tmp_path: Path, bound: dict[str, bool]
    ) -> None:
        folder = tmp_path / "folder"
        folder.mkdir(mode=0o555)
        for out in (folder, folder / "new"):
            trainer = zygote.train(arguments(root, out), **bound)
            assert trainer.wait() == 2, trainer.said()
            said = trainer.said().strip().splitlines()[-1]
            assert said.startswith(f"spafit: {out} cannot be written: Permission denied")
        assert list(folder.iterdir()) == []

    def test_one_that_becomes_read_only(
        self,
        zygote: Zygote,
        root: Path,
        tmp_path: Path,
        bound: dict[str, bool],
        uninterrupted: Uninterrupted,
    ) -> None:
        out, mark = tmp_path / "run", tmp_path / "mark"
        held = {"mark": str(mark), "from": 11}
        trainer = zygote.train(arguments(root, out), held_steps=held, **bound)
        assert trainer.until(mark.exists), trainer.said()
        before = {path: path.read_bytes() for path in out.glob("checkpoints/*/*")}
        (out / "checkpoints").chmod(0o555)
        mark.unlink()
        assert trainer.wait() == 1, trainer.said()
        said = trainer.said().strip().splitlines()[-1]
        assert "Permission denied" in said
        assert (
            "saved is the checkpoint of step 8, from which the same command resumes the run" in said
        )
        assert newest_sound(out) == 8
        assert {path: path.read_bytes() for path in out.glob("checkpoints/*/*")} == before
        (out / "checkpoints").chmod(0o755)
        trainer = zygote.train(arguments(root, out), **bound)
        assert trainer.wait() == 0, trainer.said()
        assert differences(everything(out), uninterrupted.everything) == []

    @pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
    def test_every_file_and_folder_is_as_the_umask_says(
        self, small: SmallRun, tmp_path: Path, mask: int
    ) -> None:
        out = tmp_path / "a" / "run"
        before = os.umask(mask)
        try:
            small.fit(out=out, **RUN)
        finally:
            os.umask(before)
        paths = [out, *out.rglob("*")]
        assert len(paths) > 12
        for path in paths:
            expected = (0o777 if path.is_dir() else 0o666) & ~mask
            assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(expected), path


class TestLinks:
    """Oracle: the links, which stay links, and a run without any."""

    @pytest.fixture(params=["the same disk", "another disk"])
    def elsewhere(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
        if request.param == "the same disk":
            (tmp_path / "elsewhere").mkdir()
            yield tmp_path / "elsewhere"
            return
        memory = Path("/dev/shm")
        if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no other file system at /dev/shm")
        with tempfile.TemporaryDirectory(dir=memory) as name:
            yield Path(name)

    def test_all_of_a_run(
        self, small: SmallRun, tmp_path: Path, elsewhere: Path, clean: dict[str, Any]
    ) -> None:
        """Folder, checkpoints, adapter, log and record; the files need not be there yet."""
        (elsewhere / "run").mkdir()
        (elsewhere / "kept").mkdir()
        out = tmp_path / "run"
        out.symlink_to(elsewhere / "run")
        for name, place in (
            ("checkpoints", "kept"),
            ("adapter.safetensors", "best.bin"),
            ("log.jsonl", "rows.txt"),
            ("run.json", "record.txt"),
        ):
            (out / name).symlink_to(elsewhere / place)
        for _ in range(2):
            small.fit(out=out, **RUN)
            assert out.is_symlink()
            for name in ("checkpoints", "log.jsonl", "run.json"):
                assert (out / name).is_symlink(), name
            assert differences(everything(out), clean) == []
        assert (out / "adapter.safetensors").is_symlink()
        assert (elsewhere / "best.bin").is_file()
        names = {path.name for path in elsewhere.iterdir()}
        assert names == {"run", "kept", "best.bin", "rows.txt", "record.txt"}
        assert len(list((elsewhere / "kept").iterdir())) >= 2

    def test_what_a_kill_leaves_beside_a_links_target_is_removed(
        self, small: SmallRun, tmp_path: Path
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "adapter.safetensors").symlink_to(tmp_path / "elsewhere" / "best.bin")
        for name in (".best.bin.0123abcd.part", ".other.bin.0123abcd.part", ".best.bin.part"):
            (tmp_path / "elsewhere" / name).write_text("")
        small.fit(out=tmp_path / "run", **RUN)
        names = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
        assert names == [".best.bin.part", ".other.bin.0123abcd.part", "best.bin"]

    def test_a_log_that_cannot_hold_anything(self, small: SmallRun, tmp_path: Path) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("there is no /dev/full here")
        out = tmp_path / "run"
        out.mkdir()
        (out / "log.jsonl").symlink_to("/dev/full")
        with pytest.raises(CheckpointError, match=f"{out} cannot be written: ") as caught:
            small.fit(out=out, **RUN)
        assert "\n" not in str(caught.value)
        assert not (out / "run.lock").exists()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
