"""Interrupted downloads, and two of the same file at once, in real processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.downloads import (
    BODY,
    PROMISE,
    URL_PATH,
    Case,
    Promise,
    below,
    require_all,
    require_model,
)
from support.fake_hub import NAME, FakeHub

from spafit.files.transfers import alone_in, part_of
from spafit.weights.hub import local_folder

pytestmark = pytest.mark.usefixtures("no_pauses")


SCRIPT = """
import json, sys
from pathlib import Path
from spafit.tasks import download
root, url, size, sha256 = json.loads(sys.argv[1])
source = download.Source("zip", (download.Original("glue/data/RTE.zip", size, sha256),))
if "hold" in sys.argv:  # in the middle of unpacking
    extract = download._extract
    def hold(*arguments):
        extract(*arguments)
        print("unpacking", flush=True)
        sys.stdin.read()
    download._extract = hold
download.download_glue(["rte"], Path(root) / "data", originals=Path(root) / "originals",
                       base_url=url, sources={"RTE": source}, attempts=1)
print("done", flush=True)
"""


# In smaller chunks than the client's own, so that half of a small file is on the disk.
MODEL_SCRIPT = """
import sys
import huggingface_hub.constants
from weights_tools.__main__ import main
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096
sys.exit(main())
"""


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def wait_for(condition: Callable[[], object]) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        threading.Event().wait(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks and no SIGKILL on Windows")
class TestProcesses:
    """Oracle: the requests that the server saw, and the files, after real processes."""

    def glue(self, case: Case, *more: str) -> subprocess.Popen[str]:
        case.server.files[URL_PATH] = BODY
        sha256 = hashlib.sha256(BODY).hexdigest()
        job = json.dumps([str(case.root), case.server.url, len(BODY), sha256])
        return start(["-c", SCRIPT, job, *more])

    def test_glue_killed_in_the_middle(self, case: Case, promise: Promise) -> None:
        case.server.faults = ["silent half"]
        process = self.glue(case)
        part = case.originals / "RTE.zip.part"
        wait_for(lambda: part.exists() and part.stat().st_size >= len(BODY) // 2)
        kill(process)
        assert case.files() == ["originals/RTE.zip.part"]
        case.fetch(BODY)
        assert case.server.requests[-1] == (URL_PATH, f"bytes={len(BODY) // 2}-")
        require_all(case)
        promise(PROMISE, 1, "0 cached as good")

    def test_glue_killed_while_it_unpacks(self, case: Case, promise: Promise) -> None:
        process = self.glue(case, "hold")
        assert process.stdout is not None
        assert process.stdout.readline() == "unpacking\n"
        kill(process)
        assert [p for p in case.files() if p.startswith("data/.unpacking-")]
        assert not (case.folder / "RTE").exists()
        case.fetch(BODY)
        require_all(case)
        assert [path.name for path in case.folder.iterdir()] == ["RTE"]
        promise(PROMISE, 1, "0 cached as good")

    def test_glue_twice_at_once(self, case: Case, promise: Promise) -> None:
        """One fetches, the other one waits for it."""
        case.server.faults = ["slow"]
        processes = [self.glue(case) for _ in range(2)]
        wait_for(lambda: case.server.requests)
        threading.Event().wait(1.0)
        case.server.release.set()
        for process in processes:
            assert process.communicate(timeout=60)[0] == "done\n"
            assert process.returncode == 0
        assert case.server.requests == [(URL_PATH, None)]
        require_all(case)
        promise(PROMISE, 2, "0 cached as good")

    def model(self, hub: FakeHub, tmp_path: Path) -> subprocess.Popen[str]:
        return start(
            ["-c", MODEL_SCRIPT, "download", NAME],
            HF_ENDPOINT=hub.endpoint,
            HF_HOME=str(tmp_path / "hf"),
            SPAFIT_CACHE=str(tmp_path / "spafit"),
        )

    def test_model_killed_in_the_middle(
        self, hub: FakeHub, tiny: Path, tmp_path: Path, promise: Promise
    ) -> None:
        hub.faults["model.safetensors"] = ["silent half"] * 9
        process = self.model(hub, tmp_path)
        cache = tmp_path / "hf" / "hub"
        wait_for(lambda: hub.ranges.get("model.safetensors"))
        kill(process)
        (left,) = cache.glob("models--*/.spafit-*")
        assert not list(cache.rglob("snapshots/*/model.safetensors"))
        hub.faults.clear()
        require_model(tmp_path, local_folder(NAME, endpoint=hub.endpoint), tiny)
        assert not left.exists()
        assert not list(cache.rglob("spafit.lock"))
        promise(PROMISE, 1, "0 cached as good")

    def test_model_twice_at_once(
        self, hub: FakeHub, tiny: Path, tmp_path: Path, promise: Promise
    ) -> None:
        hub.faults["model.safetensors"] = ["slow"]
        processes = [self.model(hub, tmp_path) for _ in range(2)]
        wait_for(lambda: hub.ranges.get("model.safetensors"))
        threading.Event().wait(1.0)
        hub.release.set()
        for process in processes:
            _, error = process.communicate(timeout=60)
            assert process.returncode == 0, error
        assert hub.ranges["model.safetensors"] == [None]
        require_model(tmp_path, local_folder(NAME, endpoint=hub.endpoint), tiny)
        promise(PROMISE, 2, "0 cached as good")


class TestParts:
    """Oracle: what a plain file would hold."""

    def test_not_written_beyond_its_size(self, tmp_path: Path) -> None:
        with part_of(tmp_path / "x", 5) as part:
            part.write(b"abc")
            with pytest.raises(Exception, match="more than the expected 5 bytes"):
                part.write(b"def")
            part.write(b"de")
            part.move_to(tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == b"abcde"
        assert below(tmp_path) == ["x"]

    def test_an_empty_one_goes_and_another_stays(self, tmp_path: Path) -> None:
        with part_of(tmp_path / "x", 5):
            assert below(tmp_path) == ["x.part"]
        assert below(tmp_path) == []
        for more, so_far in ((b"ab", b"ab"), (b"cd", b"abcd")):
            with pytest.raises(KeyError), part_of(tmp_path / "x", 5) as part:
                part.write(more)
                raise KeyError
            assert (tmp_path / "x.part").read_bytes() == so_far

    def test_no_link_is_followed_and_nothing_odd_opened(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("mine")
        part = tmp_path / "x.part"
        part.symlink_to(tmp_path / "mine")
        with (
            pytest.raises(OSError, match="link, which is not followed"),
            part_of(tmp_path / "x", 5),
        ):
            pass
        part.unlink()
        os.mkfifo(part)
        with pytest.raises(OSError, match="not a regular file"), part_of(tmp_path / "x", 5):
            pass
        assert (tmp_path / "mine").read_text() == "mine"

    @pytest.mark.parametrize("what", ["part", "folder"])
    def test_one_at_a_time(self, tmp_path: Path, what: str) -> None:
        inside: list[int] = []

        def work(number: int) -> None:
            lock = alone_in(tmp_path) if what == "folder" else part_of(tmp_path / "x", 99)
            with lock:
                inside.append(number)
                threading.Event().wait(0.01)
                inside.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert inside[::2] == inside[1::2]
        assert sorted(inside[::2]) == list(range(7))
