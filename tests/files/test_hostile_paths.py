"""Other things at the path of a weight file, and hostile index files.

The table of all cases is in test_hostile_weights.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.declared_files import C
from support.hostile_cases import WAYS, bounded, refusal, write, write_model
from support.hostile_headers import Pairs, entry

from spafit.bert import BertForSequenceClassification
from spafit.errors import WeightsError
from spafit.weights import safefile
from spafit.weights.pretrained import load_pretrained
from spafit.weights.safe_folder import SafeFolder
from spafit.weights.safefile import SafeFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def base(folder: Path) -> BertForSequenceClassification:
    return load_pretrained(folder, num_labels=C, mapped=False)


class TestFiles:
    """What is no plain file that can be read is refused at once, whatever stands under its name."""

    @pytest.fixture(params=["SafeFile", "read_adapter_header", "load_adapter"])
    def opened(
        self, request: pytest.FixtureRequest, base: BertForSequenceClassification
    ) -> Callable[[Path], Any]:
        way = WAYS[request.param]
        return lambda path: way(path, base)

    def test_a_folder(self, opened: Callable[[Path], Any], tmp_path: Path) -> None:
        refusal(lambda: opened(tmp_path), "cannot be opened")

    def test_a_pipe(self, opened: Callable[[Path], Any], tmp_path: Path) -> None:
        """It is not waited for a writer."""
        os.mkfifo(tmp_path / "pipe")
        refusal(lambda: opened(tmp_path / "pipe"), "pipe cannot be opened: it is no regular file")

    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/urandom", "/dev/full"])
    def test_a_device(self, opened: Callable[[Path], Any], device: str) -> None:
        if not Path(device).exists():
            pytest.skip(f"this system has no {device}")
        refusal(lambda: opened(Path(device)), f"{device} cannot be opened: it is no regular file")

    def test_a_loop_of_links(self, opened: Callable[[Path], Any], tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        refusal(lambda: opened(tmp_path / "a"), "a cannot be opened: .*links")

    @pytest.mark.parametrize("name", ["x" * 300, "x\0y"])
    def test_an_impossible_name(
        self, opened: Callable[[Path], Any], tmp_path: Path, name: str
    ) -> None:
        with pytest.raises(WeightsError, match=r"cannot be opened: .*(too long|null)"):
            opened(tmp_path / name)

    def test_an_empty_file(self, opened: Callable[[Path], Any], tmp_path: Path) -> None:
        (tmp_path / "x").touch()
        refusal(lambda: opened(tmp_path / "x"), "x: is truncated: 0 bytes")

    def test_no_permission(
        self, opened: Callable[[Path], Any], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = folder / "model.safetensors"
        if os.geteuid() == 0:  # who may read everything
            monkeypatch.setattr(os, "open", refuse_to(PermissionError(13, "Permission denied")))
        path.chmod(0)
        refusal(lambda: opened(path), "cannot be opened: Permission denied")

    def test_a_folder_that_may_not_be_searched(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Path, "stat", refuse_to(PermissionError(13, "Permission denied")))
        with pytest.raises(WeightsError):
            SafeFolder(tmp_path)

    @pytest.mark.parametrize("kept", [0, 8, 30])
    def test_it_shrinks_before_its_header_is_read(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, kept: int
    ) -> None:
        path = folder / "model.safetensors"
        genuine = os.fstat

        def measured(descriptor: int) -> os.stat_result:
            found = genuine(descriptor)
            os.truncate(path, kept)
            return found

        monkeypatch.setattr(safefile.os, "fstat", measured)
        refusal(lambda: SafeFile(path), "is truncated|header that cannot be used")

    def test_it_shrinks_before_it_is_mapped(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(safefile, "_LEAST_MAPPED_BYTES", 1)
        path = folder / "model.safetensors"
        with SafeFile(path) as file:
            os.truncate(path, path.stat().st_size - 1)
            last = list(file.tensors)[-1]
            refusal(lambda: file.view(last), f"ended while {last} was read")

    def test_a_read_that_fails(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As from a disk that is damaged, or a network that is gone."""
        path = folder / "model.safetensors"
        with SafeFile(path) as file, monkeypatch.context() as patch:
            patch.setattr(file, "_file", FailingFile(file._file))
            refusal(lambda: file.read("classifier.bias"), "cannot be read: Input/output error")
        with monkeypatch.context() as patch:
            opened = safefile.open_regular
            patch.setattr(safefile, "open_regular", lambda path: FailingFile(opened(path)))
            refusal(lambda: SafeFile(path), "cannot be read: Input/output error")

    def test_it_cannot_be_mapped(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on file systems that map nothing: it is read."""
        monkeypatch.setattr(safefile, "_LEAST_MAPPED_BYTES", 1)
        monkeypatch.setattr(safefile, "safe_open", refuse_to(OSError(19, "No such device")))
        expected = load_file(folder / "model.safetensors")
        for name, tensor in load_pretrained(folder, num_labels=C).state_dict().items():
            assert torch.equal(tensor, expected[name])

    def test_a_tensor_of_more_bytes_than_there_is_memory(self, tmp_path: Path) -> None:
        """The file is really as long, though it takes no room on the disk."""
        size = 2**43
        path = write(tmp_path / "x.safetensors", Pairs([["a", entry("U8", [size], [0, size])]]))
        try:
            os.truncate(path, path.stat().st_size + size)
        except OSError:
            pytest.skip("this file system has no files of 8 TiB")
        with SafeFile(path) as file:
            refusal(
                lambda: file.read("a"),
                "8796093022208 bytes in a, for which there is not enough memory",
            )


class FailingFile:
    """An open file whose reads fail."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        raise OSError(5, "Input/output error")

    def readinto(self, memory: Any) -> int:
        raise OSError(5, "Input/output error")


def refuse_to(error: OSError) -> Callable[..., Any]:
    """Make a function that only raises."""

    def call(*arguments: Any, **settings: Any) -> Any:
        raise error

    return call


class TestIndexes:
    """An index may be anything: what it says and what the files hold must be one, or neither is."""

    INDEX = "model.safetensors.index.json"

    @pytest.fixture
    def shards(self, folder: Path) -> Path:
        """Cut the model into two files with an index."""
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {name: f"{1 + (i % 3) // 2}.safetensors" for i, name in enumerate(sorted(tensors))}
        for shard in ("1.safetensors", "2.safetensors"):
            part = {name: tensors[name] for name in places if places[name] == shard}
            save_file(part, folder / shard)
        self.write(folder, places)
        return folder

    def write(self, folder: Path, places: dict[str, Any]) -> None:
        (folder / self.INDEX).write_text(json.dumps({"weight_map": places}))

    def places(self, folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / self.INDEX).read_text())["weight_map"]
        return found

    def refused(self, folder: Path, match: str) -> str:
        refusal(lambda: SafeFolder(folder), match)
        return refusal(lambda: load_pretrained(folder, num_labels=C), match)

    def test_that_is_sound(self, shards: Path) -> None:
        load_pretrained(shards, num_labels=C)

    def test_that_names_itself(self, shards: Path) -> None:
        self.write(shards, dict.fromkeys(self.places(shards), self.INDEX))
        self.refused(shards, "is not the plain name of a")
        renamed = shards / "model.safetensors"
        (shards / self.INDEX).rename(renamed)
        self.refused(shards, "is truncated|more than the 16777216")

    def test_whose_shard_is_missing(self, shards: Path) -> None:
        (shards / "2.safetensors").unlink()
        self.refused(shards, r"2\.safetensors cannot be opened: No such file")

    def test_with_a_shard_twice(self, shards: Path) -> None:
        """Under two names."""
        (shards / "3.safetensors").hardlink_to(shards / "1.safetensors")
        self.write(shards, {**self.places(shards), "x": "3.safetensors"})
        self.refused(shards, r"is in both .*1\.safetensors and .*3\.safetensors")

    @pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop"])
    def test_whose_shard_is_no_file(self, shards: Path, kind: str) -> None:
        path = shards / "2.safetensors"
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero" if kind == "device" else path.name)
        self.refused(shards, r"2\.safetensors cannot be opened")

    def test_that_is_a_pipe(self, shards: Path) -> None:
        (shards / self.INDEX).unlink()
        os.mkfifo(shards / self.INDEX)
        self.refused(shards, "holds neither")

    def test_of_50_megabytes(self, shards: Path) -> None:
        (shards / self.INDEX).write_bytes(b" " * 50_000_000)
        with bounded(2, 100):
            self.refused(shards, "takes more than the 16777216 bytes that are accepted")

    @pytest.mark.parametrize("shard", ["a\nb.safetensors", "x" * 300 + ".safetensors"])
    def test_of_names_that_leave_the_line(self, shards: Path, shard: str) -> None:
        self.write(shards, {**self.places(shards), "x\ny": shard})
        assert "x\\ny" in self.refused(shards, "plain name")

    def test_that_agrees_on_nothing(self, shards: Path) -> None:
        """The first faults are named, the others counted."""
        self.write(shards, {f"{i}": "1.safetensors" for i in range(5000)})
        self.refused(shards, "do not agree: 0: index .* and [0-9]+ more; fetch all again")
