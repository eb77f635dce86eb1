"""The folders of checkpoints: complete and verified, or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spafit.errors import CheckpointError
from spafit.runs import checkpoint as module
from spafit.runs.checkpoint import Checkpoints

TENSORS = {"a": torch.arange(7.0), "b": torch.zeros(3, 0), "c": torch.tensor([1], dtype=torch.int8)}


def save(
    checkpoints: Checkpoints,
    step: int,
    best: int | None = None,
    values: dict[str, Any] | None = None,
) -> Path:
    files = {"x.safetensors": (TENSORS, {"k": "v"})}
    return checkpoints.save(step, files, values or {"n": step}, best)


class TestSaving:
    """Oracle: the files, by json, hashlib and the safetensors library."""

    def test_the_manifest_names_every_file(self, tmp_path: Path) -> None:
        path = save(Checkpoints(tmp_path / "checkpoints"), 12)
        assert path == tmp_path / "checkpoints" / "step-12"
        manifest = json.loads((path / "manifest.json").read_text())
        assert (manifest["format"], manifest["step"]) == (1, 12)
        assert sorted(manifest["files"]) == ["state.json", "x.safetensors"]
        for name, record in manifest["files"].items():
            content = (path / name).read_bytes()
            assert record["nbytes"] == len(content)
            assert record["sha256"] == hashlib.sha256(content).hexdigest()
        assert sorted(each.name for each in path.iterdir()) == [
            *("manifest.json", "state.json", "x.safetensors")
        ]
        assert json.loads((path / "state.json").read_text()) == {"n": 12}
        found = load_file(path / "x.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())

    def test_it_is_read_back(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        save(checkpoints, 3)
        save(checkpoints, 20)
        newest, faults = checkpoints.newest()
        assert newest is not None
        assert (newest.step, newest.values, faults) == (20, {"n": 20}, [])
        found = newest.tensors("x.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())

    def test_there_is_none(self, tmp_path: Path) -> None:
        assert Checkpoints(tmp_path / "nowhere").newest() == (None, [])

    def test_the_manifest_comes_last_and_the_name_after_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[str] = []

        def spy(owner: Any, name: str, said: Callable[..., str]) -> None:
            function = getattr(owner, name)

            def spying(*arguments: Any) -> Any:
                done.append(said(*arguments))
                return function(*arguments)

            monkeypatch.setattr(owner, name, spying)

        spy(module, "write_file", lambda path, pieces: path.name)
        spy(module, "_verify", lambda path, step: "verify")
        spy(Path, "rename", lambda path, to: f"rename to {to.name}")
        save(Checkpoints(tmp_path), 5)
        assert done == [
            *("x.safetensors", "state.json", "manifest.json", "verify", "rename to step-5")
        ]

    def test_one_that_does_not_verify_is_not_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is read back is not what was written: a disk that lies. The older one stays."""
        checkpoints = Checkpoints(tmp_path)
        save(checkpoints, 5)
        write = module.write_file

        def lying(path: Path, pieces: Any) -> Any:
            record = write(path, pieces)
            if path.name == "x.safetensors":
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)
            return record

        monkeypatch.setattr(module, "write_file", lying)
        with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged: "):
            save(checkpoints, 6)
        assert checkpoints.steps() == [5]
        assert [path.name for path in tmp_path.iterdir()] == ["step-5"]

    def test_a_step_that_is_saved_again(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path)
        save(checkpoints, 5)
        save(checkpoints, 5, values={"n": "again"})
        assert checkpoints.read(5).values == {"n": "again"}
        assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


class TestKeeping:
    """Oracle: the names of the folders."""

    @pytest.mark.parametrize(
        ("keep", "best", "expected"),
        [
            (2, None, [9, 12]),
            (2, 3, [3, 9, 12]),
            (2, 9, [9, 12]),
            (3, 3, [3, 6, 9, 12]),
            (3, None, [6, 9, 12]),
            (99, 3, [3, 6, 9, 12]),
        ],
    )
    def test_the_last_ones_and_the_best(
        self, tmp_path: Path, keep: int, best: int | None, expected: list[int]
    ) -> None:
        checkpoints = Checkpoints(tmp_path, keep)
        for step in (3, 6, 9, 12):
            save(checkpoints, step, best)
        assert checkpoints.steps() == expected

    def test_a_later_one_that_was_not_taken_goes_after_the_next_save(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path)
        for step in (3, 6, 9):
            save(checkpoints, step)
        (tmp_path / "step-9" / "state.json").write_text("{")
        newest, faults = checkpoints.newest()
        assert newest is not None
        assert newest.step == 6
        assert len(faults) == 1
        save(checkpoints, 7)
        assert checkpoints.steps() == [6, 7]

    def test_leftovers_are_swept_and_nothing_else(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path)
        save(checkpoints, 3)
        for name in ("step-6.tmp-12", "step-3.tmp-99-old", "step-x", "mine", "step-06"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text("")
        checkpoints.sweep()
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["mine", "step-06", "step-3", "step-x"]

    def test_clear(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        save(checkpoints, 3)
        checkpoints.clear()
        assert not (tmp_path / "checkpoints").exists()
        save(checkpoints, 3)
        (tmp_path / "checkpoints" / "mine").write_text("")
        checkpoints.clear()
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["mine"]


class TestRefusals:
    """Oracle: the damage that was done."""

    @pytest.mark.parametrize(
        "manifest",
        [
            "",
            "[]",
            "{}",
            '{"format": 1, "step": 3}',
            '{"format": 1, "step": 3, "files": []}',
            '{"format": 1, "step": 3, "files": {}}',
            '{"format": 1, "step": 4, "files": {"state.json": {"nbytes": 1, "sha256": "0"}}}',
            '{"format": 2, "step": 3, "files": {"state.json": {"nbytes": 1, "sha256": "0"}}}',
            '{"format": 1, "step": 3, "files": {"state.json": {"nbytes": 1}}}',
            '{"format": 1, "step": 3, "files": {"state.json": 1}}',
            '{"format": 1, "step": 3, "files": {"state.json": {"nbytes": 1, "sha256": 5}}}',
            '{"format": 1, "step": 3, "files": {"state.json": {"nbytes": "1", "sha256": "0"}}}',
            '{"format": 1, "format": 1, "step": 3, "files": {}}',
            "[" * 100_000,
        ],
    )
    def test_manifests(self, tmp_path: Path, manifest: str) -> None:
        checkpoints = Checkpoints(tmp_path)
        save(checkpoints, 3)
        (tmp_path / "step-3" / "manifest.json").write_text(manifest)
        with pytest.raises(CheckpointError, match=r"step-3/(manifest|state)\.json"):
            checkpoints.read(3)

    @pytest.mark.parametrize(
        "name", ["../x.safetensors", "/etc/passwd", "a/b", "", "a\0b", "\ud800"]
    )
    def test_a_name_that_leads_elsewhere(self, tmp_path: Path, name: str) -> None:
        checkpoints = Checkpoints(tmp_path)
        save(checkpoints, 3)
        path = tmp_path / "step-3" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["files"][name] = manifest["files"].pop("x.safetensors")
        path.write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=r"not a plain file name"):
            checkpoints.read(3)

    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").write_text("")
        with pytest.raises(CheckpointError, match=r"checkpoints.*(directory|exists)"):
            save(Checkpoints(tmp_path / "checkpoints"), 3)

    def test_values_that_are_no_json(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            save(Checkpoints(tmp_path), 3, values={"n": float("nan")})
        assert list(tmp_path.iterdir()) == []
