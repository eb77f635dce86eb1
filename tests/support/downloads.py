"""Checks of the disk after a download, and the servers for the downloads."""

from __future__ import annotations

import hashlib
import io
import random
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spafit.tasks.download import Original, Source, download_glue
from support.fake_hub import FakeHub
from support.file_server import FileServer

RTE = {
    "RTE/train.tsv": b"index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
    "RTE/dev.tsv": b"index\tsentence1\tsentence2\tlabel\n0\tC.\tD.\tnot_entailment\n",
    "RTE/test.tsv": b"index\tsentence1\tsentence2\n0\tE.\tF.\n" + random.Random(1).randbytes(9_001),
}


URL_PATH = "/glue/data/RTE.zip"


def make_zip(members: dict[str, bytes] | Sequence[tuple[zipfile.ZipInfo | str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, data)
    return buffer.getvalue()


def source_of(body: bytes, *, form: str = "zip", name: str = "RTE.zip") -> Source:
    original = Original(f"glue/data/{name}", len(body), hashlib.sha256(body).hexdigest())
    return Source(form, (original,))  # type: ignore[arg-type]


class Case:
    """One call's folders, and the call itself without its pauses."""

    def __init__(self, server: FileServer, tmp_path: Path) -> None:
        self.server = server
        self.root = tmp_path
        self.folder = tmp_path / "data"
        self.originals = tmp_path / "originals"
        self.seen: list[tuple[str, int, int]] = []

    def fetch(self, body: bytes, *, sent: bytes | None = None, timeout_s: float = 10.0,
              attempts: int = 3) -> tuple[Path, ...]:  # fmt: skip
        """Fetch RTE from a table that expects ``body``, from a server that sends ``sent``."""
        self.server.files[URL_PATH] = body if sent is None else sent
        return download_glue(
            ["rte"], self.folder, originals=self.originals, base_url=self.server.url,
            sources={"RTE": source_of(body)}, timeout_s=timeout_s, attempts=attempts, pause_s=0.01,
            progress=lambda *seen: self.seen.append(seen),
        )  # fmt: skip

    def files(self) -> list[str]:
        """All files and links below the test's folder."""
        return sorted(
            str(path.relative_to(self.root))
            for path in self.root.rglob("*")
            if path.is_symlink() or not path.is_dir()
        )

    UNPACKED = ("data/RTE/dev.tsv", "data/RTE/test.tsv", "data/RTE/train.tsv")


Promise = Callable[[str, int, str], None]
PROMISE = "faulty downloads"

GOOD = [*Case.UNPACKED, "originals/RTE.zip"]
BODY = make_zip(RTE)


def below(root: Path) -> list[str]:
    """Name everything below a folder but folders, and locks of other libraries."""
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path.suffix != ".lock"
    )


def serving(server: FileServer | FakeHub) -> Iterator[FileServer | FakeHub]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.silence.set()
        server.release.set()
        server.shutdown()
        thread.join()


def require_nothing_false(case: Case) -> None:
    assert set(case.files()) <= {"originals/RTE.zip.part"}


def require_all(case: Case) -> None:
    assert case.files() == GOOD
    assert (case.originals / "RTE.zip").read_bytes() == BODY
    for name, data in RTE.items():
        assert (case.folder / name).read_bytes() == data


def require_model(tmp_path: Path, folder: Path, tiny: Path) -> None:
    """Expect the model's files, each in the cache once, and the pins."""
    names = sorted(path.name for path in tiny.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (tiny / name).read_bytes()
    blobs = [path.name for path in folder.parents[1].glob("blobs/*")]
    assert len(blobs) == len({(tiny / name).read_bytes() for name in names})
    assert not [name for name in blobs if not name.isalnum()]
    assert [path.name for path in (tmp_path / "spafit").iterdir()] == ["pins.json"]
