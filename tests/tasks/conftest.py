"""Fixtures shared by the tests of tasks: GLUE's real files, and servers to download from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from support.downloads import Case, serving
from support.fake_hub import FakeHub
from support.file_server import FileServer


@pytest.fixture(scope="session")
def glue_root(shared_data: Path) -> Path:
    """The folder of GLUE's real files."""
    return shared_data / "glue"


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nobody wait between attempts, nor ask a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server of files, on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FileServer() as server:
        yield from serving(server)


@pytest.fixture
def case(server: FileServer, tmp_path: Path) -> Case:
    """A download from that server."""
    return Case(server, tmp_path)


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A server that imitates the hub and has one model, and empty caches."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "spafit"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    with FakeHub({path.name: path.read_bytes() for path in tiny.iterdir()}) as fake:
        yield from serving(fake)
