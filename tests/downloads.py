"""What is expected of the disk after a download, and the servers that serve it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from fake_hub import FakeHub
from file_server import FileServer
from test_download import RTE, Case, make_zip

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
