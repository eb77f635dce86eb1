"""Downloads with faults of the server, the network, the disk, or a killed process.

GLUE's files and the hub's go through the same faults. After each: completed files have the right
bytes, the folders have nothing else except a ``.part``, the error is one line that says what to do,
and the next call, to a working server, gets everything.
"""

from __future__ import annotations

import errno
import io
import os
import random
from pathlib import Path
from typing import Any

import pytest
from support.downloads import (
    BODY,
    PROMISE,
    Case,
    Promise,
    below,
    require_all,
    require_model,
    require_nothing_false,
    serving,
)
from support.fake_hub import NAME, FakeHub
from support.file_server import FileServer

from spafit.errors import SpafitError, WeightsError
from spafit.files import http_file
from spafit.files.transfers import PartFile
from spafit.tasks.download import DownloadError
from spafit.weights.hub import local_folder, pinned_revision

# How each fault ends when it happens once, and GLUE's file may be tried three times. refused: an
# error; mended: the file arrives all the same. (For the hub huggingface_hub's client decides it.)
FAULTS = {
    "half": "mended",
    "half as whole": "refused",
    "half without length": "mended",
    "without length": "mended",
    "longer": "refused",
    "longer without length": "mended",
    "endless": "refused",
    "flipped": "refused",
    "silent": "mended",
    "silent half": "mended",
    "reset": "mended",
    "reset half": "mended",
    "loop": "mended",
    "to file:///etc/passwd": "refused",
    "to ftp://127.0.0.1:9/x": "refused",
    "to data:text/plain,hello": "refused",
    "to http://127.0.0.1:9/x": "mended",
    "to http://[bad": "mended",
    "to //": "mended",
    "html": "refused",
    "html as a file": "refused",
    "gzip": "refused",
    "gzip by name": "refused",
    "other part": "mended",
    "less": "refused",
    "garbage": "mended",
    "204": "refused",
    "304": "refused",
    "403": "refused",
    "404": "refused",
    "408": "mended",
    "416": "mended",
    "429": "mended",
    "429 after 1": "mended",
    "500": "mended",
    "503 after 1": "mended",
}


def require_one_line(message: str) -> None:
    assert message.isprintable(), message
    assert len(message) < 900, message
    assert any(
        mend in message
        for mend in ("un it again", "by other means", "mirror", "open the address", "try again",
                     "check the network", "there is no such folder here", "make room")
    ), message  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_pauses")


class TestGlue:
    """Oracle: the bytes that the server was given, and what lies on the disk afterwards."""

    @pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
    @pytest.mark.parametrize("fault", FAULTS)
    def test_once(self, case: Case, promise: Promise, fault: str, resumed: bool) -> None:
        if resumed:
            case.originals.mkdir()
            (case.originals / "RTE.zip.part").write_bytes(BODY[:1000])
        case.server.faults = [fault]
        try:
            case.fetch(BODY, timeout_s=0.2)
            found = "mended"
        except DownloadError as error:
            found = "refused"
            require_one_line(str(error))
            require_nothing_false(case)
            case.fetch(BODY)
        assert found == FAULTS[fault]
        require_all(case)
        promise(PROMISE, 1, "0 cached as good")

    @pytest.mark.parametrize("fault", [f for f in FAULTS if "without length" not in f])
    def test_always(self, case: Case, promise: Promise, fault: str) -> None:
        case.server.faults = [fault] * 30
        with pytest.raises(DownloadError) as caught:
            case.fetch(BODY, timeout_s=0.2, attempts=2)
        require_one_line(str(caught.value))
        assert case.server.url in str(caught.value)
        require_nothing_false(case)
        case.server.faults = []
        case.fetch(BODY)
        require_all(case)
        promise(PROMISE, 1, "0 cached as good")

    def test_a_part_of_another_file(self, case: Case, promise: Promise) -> None:
        """Of another hash, shorter, as long or longer: never taken, never for ever in the way."""
        for size in (1, 100, len(BODY) - 1, len(BODY), len(BODY) + 1, 2 * len(BODY)):
            part = case.originals / "RTE.zip.part"
            part.parent.mkdir(exist_ok=True)
            (case.originals / "RTE.zip").unlink(missing_ok=True)
            part.write_bytes(random.Random(size).randbytes(size))
            try:
                case.fetch(BODY)
            except DownloadError as error:
                assert "it was deleted. Run it again" in str(error)
                assert not part.exists()
                case.fetch(BODY)
            require_all(case)
            promise(PROMISE, 1, "0 cached as good")

    @pytest.mark.parametrize(
        ("asked", "waited"),
        [("7", 7), ("0", 0.02), ("-5", 0.02), ("nonsense", 0.02), ("9" * 5000, 60), ("61", 60),
         ("Fri, 31 Dec 2999 23:59:59 GMT", 60), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.02)],
    )  # fmt: skip
    def test_how_long_is_waited(
        self, case: Case, monkeypatch: pytest.MonkeyPatch, asked: str, waited: float
    ) -> None:
        pauses: list[float] = []
        monkeypatch.setattr("time.sleep", pauses.append)
        case.server.faults = ["500", f"503 after {asked}"]
        case.fetch(BODY)
        assert pauses == [0.01, waited]
        assert waited <= http_file.LONGEST_PAUSE_S

    def test_redirects_to_another_host_are_followed(self, case: Case, server: FileServer) -> None:
        """To http and https: the hash decides what is good, not the host."""
        with FileServer() as other:
            for _ in serving(other):
                other.files["/elsewhere"] = BODY
                server.faults = [f"to {other.url}/elsewhere"]
                case.fetch(BODY)
                require_all(case)
                assert other.requests == [("/elsewhere", None)]

    def test_no_way_back_from_https(self) -> None:
        request = http_file.urllib.request.Request("https://host/file")
        redirects = http_file._Redirects()
        for address in ("http://host/file", "HTTP://host/file"):
            with pytest.raises(DownloadError, match=f"redirects to '{address}'"):
                redirects.redirect_request(request, io.BytesIO(), 302, "", {}, address)
        assert redirects.redirect_request(request, io.BytesIO(), 302, "", {}, "https://b/file")

    def test_a_full_disk(
        self, case: Case, monkeypatch: pytest.MonkeyPatch, promise: Promise
    ) -> None:
        fill_after(monkeypatch, 3000)
        with pytest.raises(DownloadError, match=r"cannot store RTE: .*No space left.*make room"):
            case.fetch(BODY)
        require_nothing_false(case)
        monkeypatch.undo()
        case.fetch(BODY)
        require_all(case)
        promise(PROMISE, 1, "0 cached as good")

    def test_a_full_disk_while_unpacking(
        self, case: Case, monkeypatch: pytest.MonkeyPatch, promise: Promise
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("shutil.copyfileobj", full)
        with pytest.raises(DownloadError, match=r"cannot store RTE: .*No space left.*make room"):
            case.fetch(BODY)
        assert case.files() == ["originals/RTE.zip"]
        assert list(case.folder.iterdir()) == []
        monkeypatch.undo()
        case.fetch(BODY)
        require_all(case)
        promise(PROMISE, 1, "0 cached as good")


def fill_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the disk be full once a file that is being fetched has so many bytes."""
    write = PartFile.write

    def limited(file: PartFile, data: bytes) -> int:
        room = max(0, count - file.tell())
        if len(data) > room:
            write(file, data[:room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    monkeypatch.setattr(PartFile, "write", limited)


class Full(io.BufferedWriter):
    """A file for which the disk is full after 9,000 bytes."""

    def write(self, data: Any) -> int:
        if len(data) > 9000:
            super().write(data[:9000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


class TestHub:
    """Oracle: the files that the server has, and what lies in the cache afterwards."""

    @pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
    @pytest.mark.parametrize("fault", FAULTS)
    def test_once(
        self, hub: FakeHub, tiny: Path, tmp_path: Path, promise: Promise, fault: str, name: str
    ) -> None:
        hub.faults[name] = [fault]
        try:
            folder = local_folder(NAME, endpoint=hub.endpoint)
        except WeightsError as error:
            require_one_line(str(error))
            self.require_not_kept(tmp_path, tiny, name)
            folder = local_folder(NAME, endpoint=hub.endpoint)
        require_model(tmp_path, folder, tiny)
        promise(PROMISE, 1, "0 cached as good")

    @pytest.mark.parametrize("fault", [f for f in FAULTS if f not in ("without length", "gzip")])
    def test_always(
        self, hub: FakeHub, tiny: Path, tmp_path: Path, promise: Promise, fault: str
    ) -> None:
        name = "model.safetensors"
        hub.faults[name] = [fault] * 99
        with pytest.raises(WeightsError) as caught:
            local_folder(NAME, endpoint=hub.endpoint)
        require_one_line(str(caught.value))
        assert f"{name} of {NAME}" in str(caught.value)
        self.require_not_kept(tmp_path, tiny, name)
        hub.faults.clear()
        require_model(tmp_path, local_folder(NAME, endpoint=hub.endpoint), tiny)
        promise(PROMISE, 1, "0 cached as good")

    @staticmethod
    def require_not_kept(tmp_path: Path, tiny: Path, name: str) -> None:
        """Expect nothing under the file's name, and no blob but those of whole other files."""
        assert pinned_revision(NAME) is None
        assert not list((tmp_path / "hf").rglob(f"snapshots/*/{name}"))
        good = {path.read_bytes() for path in tiny.iterdir() if path.name != name}
        for blob in (tmp_path / "hf").rglob("blobs/*"):
            assert blob.read_bytes() in good, blob

    def test_what_another_process_left(
        self, hub: FakeHub, tiny: Path, tmp_path: Path, promise: Promise
    ) -> None:
        content = (tiny / "model.safetensors").read_bytes()
        folder = local_folder(NAME, endpoint=hub.endpoint)
        blob = (folder / "model.safetensors").resolve()
        for size in (1, 5000, len(content) - 1, len(content), len(content) + 1):
            blob.unlink()
            left = folder.parents[1] / ".spafit-left"
            left.mkdir()
            (left / "model.safetensors").write_bytes(random.Random(size).randbytes(size))
            assert local_folder(NAME, endpoint=hub.endpoint) == folder
            require_model(tmp_path, folder, tiny)
            assert not left.exists()
            promise(PROMISE, 1, "0 cached as good")

    def test_a_full_disk(
        self,
        hub: FakeHub,
        tiny: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        promise: Promise,
    ) -> None:
        with monkeypatch.context() as patch:
            genuine = Path.open

            def opened(path: Path, mode: str = "r", **more: Any) -> Any:
                if path.suffix == ".incomplete" and path.parent.exists():
                    return Full(io.FileIO(path, "w"))
                return genuine(path, mode, **more)

            patch.setattr(Path, "open", opened)
            message = r"cannot store model.safetensors .*No space left.*make room.*HF_HOME"
            with pytest.raises(WeightsError, match=message):
                local_folder(NAME, endpoint=hub.endpoint)
        self.require_not_kept(tmp_path, tiny, "model.safetensors")
        require_model(tmp_path, local_folder(NAME, endpoint=hub.endpoint), tiny)
        promise(PROMISE, 1, "0 cached as good")

    @pytest.mark.parametrize("status", [302, 401, 404, 429, 503])
    def test_the_question_what_a_name_is(self, hub: FakeHub, tmp_path: Path, status: int) -> None:
        hub.status = status
        with pytest.raises(WeightsError) as caught:
            local_folder(NAME, endpoint=hub.endpoint)
        require_one_line(str(caught.value))
        assert below(tmp_path) == []


def test_every_error_is_of_the_package() -> None:
    assert issubclass(DownloadError, SpafitError)
