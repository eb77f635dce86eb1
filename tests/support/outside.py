"""A writable folder in a tree that must not change, and names that lead out of the folder.

Beside the folder are a secret, another folder, and links. They are compared before and after, byte
for byte.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

Promise = Callable[[str, int, str], None]
PROMISE = ("names that climb out", 1, "0 files outside")


def tree(root: Path, *left_out: Path) -> dict[str, tuple[object, ...]]:
    """Describe everything below a folder: kind, mode and content; links are not followed."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if Path(folder, name) not in left_out]
        for name in (*names, *files):
            path = Path(folder, name)
            about = path.lstat()
            content: object = None
            if path.is_symlink():
                content = path.readlink()
            elif stat.S_ISREG(about.st_mode):
                content = path.read_bytes()
            found[str(path.relative_to(root))] = (stat.S_IFMT(about.st_mode), content)
    return found


class Place:
    """A folder that may be written, amid a tree that may not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inside = root / "a" / "b" / "inside"
        self.outside = root / "a" / "outside"
        self.inside.mkdir(parents=True)
        self.outside.mkdir()
        (self.outside / "secret").write_text("secret")
        (self.outside / "dev.tsv").write_text("mine")
        (root / "a" / "link").symlink_to(self.outside)
        (root / "secret").write_text("another")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Expect all but ``inside`` to be as before."""
        working = Path.cwd()
        os.chdir(self.inside)  # where a relative name would lead
        before = tree(self.root, self.inside)
        try:
            yield
        finally:
            os.chdir(working)
            assert tree(self.root, self.inside) == before


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


CLIMBING = {
    "up": "../../outside/new",
    "up from a folder": "RTE/../../../outside/new",
    "up to what is there": "../../outside/secret",
    "absolute": "{root}/a/outside/new",
    "absolute twice": "//{root}/a/outside/new",
    "drive": "C:new",
    "drive and root": "C:\\new",
    "backslashes": "..\\..\\outside\\new",
    "backslashes from a folder": "RTE\\..\\..\\outside\\new",
    "share": "\\\\host\\share\\new",
    "home": "~/new",
    "through a link": "../../link/new",
    "NUL": "RTE/dev.tsv\0../../outside/new",
    "device": "/dev/null",
    "dots": "....//....//outside/new",
    "percent": "%2e%2e/%2e%2e/outside/new",
    "full-width": "\uff0e\uff0e/\uff0e\uff0e/outside/new",
    "stream": "RTE/dev.tsv:new",
}
