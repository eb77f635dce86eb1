"""Reading safetensors files strictly, and writing them atomically."""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from spafit.errors import WeightsError
from spafit.files.replacing import replacing
from spafit.weights.safe_folder import SafeFolder
from spafit.weights.safefile import TORCH_DTYPES, SafeFile, save_tensors


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """Write a safetensors file byte by byte; a header that is not bytes is written as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(start: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Draw a tensor of any type; floats are finite."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    high = 2 if dtype == torch.bool else 100
    return torch.randint(0, high, shape, generator=generator).to(dtype)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


def assert_only_weights_error(path: Path) -> None:
    """Read a file in full; whatever it holds, only a WeightsError may come of it."""
    try:
        with SafeFile(path) as file:
            for name in file.tensors:
                file.read(name)
    except WeightsError as error:
        assert str(path) in str(error)


class TestReading:
    """The oracle is the safetensors library: what it wrote, bit for bit."""

    @pytest.mark.parametrize("code", TORCH_DTYPES)
    @pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4)])
    def test_gives_what_the_library_wrote(
        self, tmp_path: Path, code: str, shape: tuple[int, ...]
    ) -> None:
        written = {
            "b": random_tensor(TORCH_DTYPES[code], shape),
            "a": random_tensor(torch.float32, (2, 3), seed=1),
        }
        save_file(written, tmp_path / "x.safetensors", metadata={"format": "pt"})
        with SafeFile(tmp_path / "x.safetensors") as file:
            assert file.metadata == {"format": "pt"}
            assert file.tensors.keys() == written.keys()
            assert file.tensors["b"].dtype == code
            for name, expected in written.items():
                found = file.read(name)
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert bits(found) == bits(expected)

    def test_converts(self, tmp_path: Path) -> None:
        half = random_tensor(torch.float16, (3, 5))
        save_file({"x": half}, tmp_path / "x.safetensors")
        with SafeFile(tmp_path / "x.safetensors") as file:
            assert torch.equal(file.read("x", torch.float32), half.float())
            assert file.read("x", torch.float32).dtype == torch.float32

    def test_a_read_tensor_outlives_the_file(self, tmp_path: Path) -> None:
        expected = random_tensor(torch.float32, (4, 3))
        path = tmp_path / "x.safetensors"
        save_file({"x": expected}, path)
        with SafeFile(path) as file:
            found = file.read("x")
        path.write_bytes(b"")
        found += 1.0  # writable, and nobody else's
        assert torch.equal(found, expected + 1.0)


class TestRefusals:
    """Every file here is wrong in one way; the message must name the file and that way."""

    @pytest.mark.parametrize(
        ("header", "data_bytes", "message"),
        [
            (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
             b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "holds twice: a"),
            (b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', 4,
             "holds twice: dtype"),
            (b"{not json", 0, "header that cannot be used"),
            (b"\xff\xfe{}", 0, "header that cannot be used"),
            (b"[" * 100_000, 0, "header that cannot be used"),
            ([1, 2], 0, "not a JSON object"),
            ({"__metadata__": {"epoch": 3}}, 0, "__metadata__"),
            ({"a": 7}, 0, "exactly dtype, shape and data_offsets"),
            ({"a": {"dtype": "F32", "shape": [1]}}, 4, "exactly dtype, shape and data_offsets"),
            ({"a": {**entry(0, 4, [1]), "extra": 1}}, 4, "exactly dtype, shape and data_offsets"),
            ({"a": entry(0, 4, [1], "F31")}, 4, "unknown type 'F31'"),
            ({"a": entry(0, 4, [1], ["F32"])}, 4, "unknown type"),
            ({"a": entry(0, 4, [-1])}, 4, "impossible shape"),
            ({"a": entry(0, 4, [1.0])}, 4, "impossible shape"),
            ({"a": entry(0, 4, [True])}, 4, "impossible shape"),
            ({"a": entry(-4, 0, [1])}, 4, "impossible data_offsets"),
            ({"a": entry(4, 0, [1])}, 4, "impossible data_offsets"),
            ({"a": entry(0, 4, [2])}, 4, "takes 8 bytes, its data_offsets give 4"),
            ({"a": entry(0, 4, [2**62, 2**62])}, 4, "impossible shape"),
            ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, "b overlaps"),
            ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, 4, "b overlaps"),
            ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, 12, "b leaves a gap"),
            ({"a": entry(4, 8, [1])}, 8, "a leaves a gap"),
            ({"a": entry(0, 8, [2])}, 7, "is truncated"),
            ({"a": entry(0, 8, [2])}, 9, "belong to no tensor"),
        ],
    )  # fmt: skip
    def test_header(self, tmp_path: Path, header: object, data_bytes: int, message: str) -> None:
        path = write_raw(tmp_path / "x.safetensors", header, bytes(data_bytes))
        with pytest.raises(WeightsError, match=r"x\.safetensors: .*; \S+") as caught:
            SafeFile(path)
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "truncated: 0 bytes"),
            (b"\x10\0\0", "truncated: 3 bytes"),
            (struct.pack("<Q", 100) + b"{}", "header ends at byte 108, the file at 10"),
            (struct.pack("<Q", 2**63) + b"{}", "more than the 16777216"),
            (b"PK\x03\x04\x14\0\x08\x08 and so on", "weights_tools convert"),
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "weights_tools convert"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "web page"),
        ],
    )
    def test_not_a_safetensors_file(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(WeightsError) as caught:
            SafeFile(path)
        assert message in str(caught.value)

    def test_a_header_as_long_as_a_pickle_begins_is_read(self, tmp_path: Path) -> None:
        """0x0280 is both a length of 640 bytes and the first two bytes of a pickle."""
        path = write_raw(tmp_path / "x.safetensors", b"{}".ljust(0x0280))
        assert path.read_bytes().startswith(b"\x80\x02")
        with SafeFile(path) as file:
            assert file.tensors == {}

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="cannot be opened: No such file"):
            SafeFile(tmp_path / "none.safetensors")

    def test_a_file_cut_short_while_open(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"x": torch.zeros(100_000)}, path)
        with SafeFile(path) as file:
            os.truncate(path, 1000)
            with pytest.raises(WeightsError, match="ended while x was read"):
                file.read("x")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("place", [0, 1, 511, 1022])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_values_that_are_not_finite(
        self, tmp_path: Path, dtype: torch.dtype, place: int, value: float
    ) -> None:
        tensor = random_tensor(dtype, (11, 93))
        tensor.view(-1)[place] = value
        save_file({"x.weight": tensor}, tmp_path / "x.safetensors")
        found = pytest.raises(WeightsError, match=r"x\.weight holds NaN or infinite values: 1 of")
        with SafeFile(tmp_path / "x.safetensors") as file, found:
            file.read("x.weight")

    def test_they_are_counted(self, tmp_path: Path) -> None:
        tensor = torch.tensor([[1.0, math.nan, math.inf], [0.0, -math.inf, math.nan]])
        save_file({"x.weight": tensor}, tmp_path / "x.safetensors")
        found = pytest.raises(WeightsError, match=r"x\.weight holds NaN or infinite values: 4 of 6")
        with SafeFile(tmp_path / "x.safetensors") as file, found:
            file.read("x.weight")

    def test_values_that_overflow_when_converted(self, tmp_path: Path) -> None:
        save_file({"x": torch.tensor([1.0, 7e4, -7e4])}, tmp_path / "x.safetensors")
        with SafeFile(tmp_path / "x.safetensors") as file:
            assert file.read("x", torch.bfloat16).isfinite().all()
            with pytest.raises(WeightsError, match=r"2 of 3 once converted to torch\.float16"):
                file.read("x", torch.float16)

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_one_changed_byte(self, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
        content = bytearray(
            save({"b.weight": torch.ones(2, 3), "a": torch.arange(5)}, {"format": "pt"})
        )
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
        path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
        path.write_bytes(content)
        assert_only_weights_error(path)

    def test_every_truncation(self, tmp_path: Path) -> None:
        content = save({"b.weight": torch.ones(2, 3), "a": torch.arange(5)}, {"format": "pt"})
        path = tmp_path / "x.safetensors"
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(WeightsError, match="truncated"):
                SafeFile(path)


class TestSeveralFiles:
    """The oracle is one dictionary of tensors, cut into files with an index by hand."""

    TENSORS = {  # noqa: RUF012 - never changed
        "a": random_tensor(torch.float32, (2, 3), seed=1),
        "b": random_tensor(torch.float16, (5,), seed=2),
        "c": random_tensor(torch.float32, (4, 1), seed=3),
    }
    PLACES = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}  # noqa: RUF012

    def write(self, folder: Path, weight_map: object, **moved: str) -> Path:
        places = {**self.PLACES, "c": self.PLACES["a"], **moved}
        for file in sorted(set(places.values())):
            part = {name: self.TENSORS[name] for name in places if places[name] == file}
            save_file(part, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def test_reads_all(self, tmp_path: Path) -> None:
        self.write(tmp_path, {**self.PLACES, "c": self.PLACES["a"]})
        with SafeFolder(tmp_path) as folder:
            assert [file.name for file in folder.files] == sorted(self.PLACES.values())
            assert folder.tensors.keys() == self.TENSORS.keys()
            for name, expected in self.TENSORS.items():
                assert torch.equal(folder.read(name), expected)

    @pytest.mark.parametrize(
        ("weight_map", "message"),
        [
            (PLACES, "c: index None, files model-1-of-2.safetensors"),
            ({**PLACES, "c": PLACES["b"]}, "c: index model-2-of-2.safetensors, files model-1"),
            ({**PLACES, "c": PLACES["a"], "d": PLACES["a"]}, "d: index model-1-of-2.safetensors"),
            ({**PLACES, "c": "model-3.safetensors"}, "cannot be opened"),
            ({**PLACES, "c": "../model-1-of-2.safetensors"}, "plain name"),
            ({**PLACES, "c": "/etc/model.safetensors"}, "plain name"),
            ({**PLACES, "c": "sub\\model.safetensors"}, "plain name"),
            ({**PLACES, "c": "C:model.safetensors"}, "plain name"),
            ({**PLACES, "c": ".."}, "plain name"),
            ({**PLACES, "c": "pytorch_model-1.bin"}, "plain name"),
            ({**PLACES, "c": 3}, "plain name"),
            ({}, "no weight_map"),
            (["a"], "no weight_map"),
        ],
    )
    def test_an_index_that_does_not_fit(
        self, tmp_path: Path, weight_map: object, message: str
    ) -> None:
        self.write(tmp_path, weight_map)
        with pytest.raises(WeightsError) as caught:
            SafeFolder(tmp_path)
        assert message in str(caught.value)

    def test_an_index_with_a_name_twice(self, tmp_path: Path) -> None:
        self.write(tmp_path, {})
        (tmp_path / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
        )
        with pytest.raises(WeightsError, match="holds twice: a"):
            SafeFolder(tmp_path)

    def test_a_tensor_in_two_files(self, tmp_path: Path) -> None:
        self.write(tmp_path, {**self.PLACES, "c": self.PLACES["a"]})
        save_file({name: self.TENSORS[name] for name in "bc"}, tmp_path / self.PLACES["b"])
        with pytest.raises(WeightsError, match=r"c is in both .*1-of-2.* and .*2-of-2"):
            SafeFolder(tmp_path)

    def test_both_forms(self, tmp_path: Path) -> None:
        self.write(tmp_path, {**self.PLACES, "c": self.PLACES["a"]})
        save_file(self.TENSORS, tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match=r"has both model\.safetensors and"):
            SafeFolder(tmp_path)

    def test_neither_form(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="neither"):
            SafeFolder(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(WeightsError, match="python -m weights_tools convert"):
            SafeFolder(tmp_path)
        with pytest.raises(WeightsError, match="is not a folder"):
            SafeFolder(tmp_path / "none")


class TestWriting:
    """The oracle is the safetensors library, reading back what was written."""

    TENSORS = {"a": random_tensor(torch.float32, (2, 3)), "b": torch.arange(5)}  # noqa: RUF012

    def test_the_library_reads_it(self, tmp_path: Path) -> None:
        tied = torch.randn(6, 4)
        tensors = {**self.TENSORS, "tied": tied, "its twin": tied, "turned": tied.T}
        save_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
        found = load_file(tmp_path / "x.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        with SafeFile(tmp_path / "x.safetensors") as file:
            assert file.metadata == {"format": "pt"}

    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
    def test_the_mode_is_the_users(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            save_tensors(tmp_path / "x.safetensors", self.TENSORS, {})
        finally:
            os.umask(before)
        mode = stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode)
        assert mode == 0o666 & ~umask

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        target = tmp_path / "real" / "x.safetensors"
        target.write_bytes(b"old")
        link = tmp_path / "x.safetensors"
        link.symlink_to(target)
        save_tensors(link, self.TENSORS, {})
        assert link.is_symlink()
        assert load_file(target).keys() == self.TENSORS.keys()
        assert [path.name for path in (tmp_path / "real").iterdir()] == ["x.safetensors"]

    def test_a_failure_leaves_the_old_file_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(b"old")
        with pytest.raises(KeyError), replacing(path) as temporary:
            temporary.write_bytes(b"half of the n")
            raise KeyError("a bug, or a full disk")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="cannot be written: No such file"):
            save_tensors(tmp_path / "none" / "x.safetensors", self.TENSORS, {})
