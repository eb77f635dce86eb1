"""Hostile weight files: each case by name, and what is promised for it.

The table of cases. Those without a class here are in test_hostile_paths.py (P) and in
test_hostile_adapters.py (H), or in test_safefile.py (S) and test_adapter_files.py (A).

- headers: 100 MB claimed, 100 MB written, 400,000 empty tensors, the most tensors that fit, lists
  in lists, sizes of 4000 digits, zero times too much, 65 dimensions, names that leave the line; not
  JSON, duplicate keys, unknown types, Git LFS, pickles and web pages (S)
- places: overlap, hole, past the end, behind the data, by every way in; each one alone (S)
- values: NaN and infinities in every kind of tensor in F16, BF16, F32 and F64, and in float8
- P, files: a folder, pipe, device, loop of links, no permission, shrinking, failing reads, empty
- P, an index: that names itself, lacks a shard, has one twice, is a pipe, is huge; leads out (S)
- H, configurations: that disagree with the weights; deep, 50 MB, no JSON, NaN, 10**12 wide, 10**7
  layers, doubled keys, a pipe, a folder
- H, adapters: plans of other modules, techniques, ranks, a million strata; shapes of more bytes,
  names of other modules; metadata missing, huge, no texts; another base, head and depth (A)
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.declared_files import C
from support.hostile_cases import WAYS, bounded, refusal, write, write_model
from support.hostile_headers import Draft, Pairs, Raw, entry

from spafit.bert import BertForSequenceClassification
from spafit.errors import WeightsError
from spafit.weights import safefile
from spafit.weights.pretrained import load_pretrained
from spafit.weights.safefile import MAX_HEADER_BYTES, SafeFile
from weights_tools.inspect import table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def base(folder: Path) -> BertForSequenceClassification:
    return load_pretrained(folder, num_labels=C, mapped=False)


class TestHeaders:
    """A header may claim or hold anything: refused, or read, in bounded time and memory."""

    def test_of_100_megabytes_that_are_claimed(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", 10**8) + b"{}")
        refusal(lambda: SafeFile(path), "says that its header takes 100000000 bytes")

    def test_of_100_megabytes_that_are_there(self, tmp_path: Path) -> None:
        """Not a byte of it is read."""
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", 10**8))
        os.truncate(path, 10**8 + 8)
        with bounded(1, 20):
            refusal(lambda: SafeFile(path), "says that its header takes 100000000 bytes")

    def test_of_the_most_bytes_that_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES))
        os.truncate(path, MAX_HEADER_BYTES + 8)
        with bounded(2, 100):
            refusal(lambda: SafeFile(path), "header that cannot be used")

    def test_of_400_000_empty_tensors(self, tmp_path: Path) -> None:
        entries = ",".join(
            f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(400_000)
        )
        path = write(tmp_path / "x.safetensors", f"{{{entries}}}".encode())
        with bounded(1, 20):
            refusal(lambda: SafeFile(path), "more than the 16777216 that are accepted")

    def test_of_the_most_empty_tensors(
        self,
        tmp_path: Path,
        sized: Callable[[int, int], int],
        promise: Callable[[str, int, str], None],
    ) -> None:
        """290,000 of them, and 60,000 in the quick set, are read in seconds."""
        count = sized(60_000, 290_000)
        entries = ",".join(
            f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count)
        )
        path = write(tmp_path / "x.safetensors", f"{{{entries}}}".encode())
        with bounded(60, 600), SafeFile(path) as file:
            assert len(file.tensors) == count
            assert file.read(f"{count - 1}").shape == (0,)
        promise("empty tensors in one file", count, "read in a minute and 600 MB")

    @pytest.mark.parametrize("item", [pytest.param(b"[]", marks=pytest.mark.full), b'"a"'])
    def test_of_millions_of_values(self, tmp_path: Path, item: bytes) -> None:
        count = MAX_HEADER_BYTES // (len(item) + 1) - 4
        path = write(tmp_path / "x.safetensors", b'{"a":[' + b",".join([item] * count) + b"]}")
        with bounded(60, 700):
            refusal(lambda: SafeFile(path), "a must have exactly dtype, shape and data_offsets")

    def test_of_millions_of_doubled_keys(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.safetensors", b'{"a":0' + b',"a":0,"b":1' * 1_000_000 + b"}")
        with bounded(60, 500):
            refusal(lambda: SafeFile(path), "holds twice: a, b")

    @pytest.mark.parametrize("depth", [100, 900, 950, 985, 1000, 100_000, 8_000_000])
    def test_of_lists_in_lists(self, tmp_path: Path, depth: int) -> None:
        nested = b"[" * depth + b"]" * depth
        path = write(tmp_path / "x.safetensors", b'{"a":' + nested + b"}")
        with bounded(5, 300):
            refusal(lambda: SafeFile(path), "exactly dtype|nested too deeply|accepted")

    @pytest.mark.parametrize("place", ["shape", "start", "end"])
    def test_of_numbers_with_thousands_of_digits(self, tmp_path: Path, place: str) -> None:
        """Their product is never taken: 4,000 such sizes would take hours."""
        huge = Raw("9" * 4000)
        one = entry("F32", [1], [0, 4])
        if place == "shape":
            one[1][1] = [huge] * 4000
        else:
            one[2][1][place == "end"] = huge
        path = write(tmp_path / "x.safetensors", Pairs([["a", one]]), bytes(4))
        with bounded(5, 300):
            refusal(
                lambda: SafeFile(path), "a has an impossible shape|a has impossible data_offsets"
            )

    @pytest.mark.parametrize(
        "shape", [[0, 2**62, 2**62], [2**63, 0], [0, 2**200], [0] * 65, [1] * 65, [2**32] * 3]
    )
    def test_of_shapes_that_torch_cannot_count(self, tmp_path: Path, shape: list[int]) -> None:
        """Empty or not."""
        nbytes = 1 if shape == [1] * 65 else 0
        header = Pairs([["a", entry("U8", shape, [0, nbytes])]])
        path = write(tmp_path / "x.safetensors", header, bytes(nbytes))
        refusal(lambda: SafeFile(path), "a has an impossible shape")

    @pytest.mark.parametrize("shape", [[1] * 64, [0] * 64, [2**62, 0], [0, 2**31, 2**31]])
    def test_of_the_widest_shapes_that_it_can(self, tmp_path: Path, shape: list[int]) -> None:
        nbytes = 4 * math.prod(shape)
        header = Pairs([["a", entry("F32", shape, [0, nbytes])]])
        path = write(tmp_path / "x.safetensors", header, bytes(nbytes))
        with SafeFile(path) as file:
            assert list(file.read("a").shape) == list(file.view("a").shape) == shape

    @pytest.mark.parametrize(
        "name", ["a\nb", "\x1b[2J", "x" * 10**6, "\u2028" * 1000, Raw('"\\ud800"'), "", "\u202e"]
    )
    @pytest.mark.parametrize("wrong", [entry("F31", [1], [0, 4]), entry("F32", [9], [0, 4]), 7])
    def test_of_names_that_leave_the_line(self, tmp_path: Path, name: str, wrong: Any) -> None:
        """A message says what is wrong in one line, whatever the name."""
        path = write(tmp_path / "x.safetensors", Pairs([[name, wrong]]), bytes(4))
        message = refusal(lambda: SafeFile(path), r"x\.safetensors: ")
        assert "unknown type" in message or "takes 36" in message or "exactly dtype" in message


class TestTable:
    """What ``inspect`` prints is a line for each tensor, whatever its name."""

    @pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 10**5, Raw('"\\ud800"')])
    def test_of_names_that_leave_the_line(self, tmp_path: Path, name: str) -> None:
        header = Pairs([[name, entry("U8", [2], [0, 2])], ["b", entry("U8", [3], [2, 5])]])
        path = write(tmp_path / "x.safetensors", header, bytes(5))
        with SafeFile(path) as file:
            lines = table(file.tensors.values()).splitlines()
        assert all(line.isprintable() and len(line) < 500 for line in lines)
        assert len(lines) == 3 + 1 + 4


class TestPlaces:
    """Offsets that overlap, leave holes or end elsewhere are refused by every way in."""

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        ("start", "end", "match"),
        [
            (-4, -4, "overlaps the tensor before it"),
            (4, 0, "takes .* bytes, its data_offsets give|impossible data_offsets"),
            (4, 4, "leaves a gap|overlaps"),
            (10**6, 10**6, "leaves a gap"),
            (0, 4, "takes .* bytes, its data_offsets give"),
        ],
    )
    def test_one_tensor_is_moved(
        self,
        folder: Path,
        base: BertForSequenceClassification,
        way: str,
        start: int,
        end: int,
        match: str,
    ) -> None:
        path = folder / "model.safetensors"
        draft = Draft.of(path.read_bytes())
        offsets = sorted(draft.entries(), key=lambda pair: pair[1][2][1])[7][1][2][1]
        offsets[0] += start
        offsets[1] += end
        path.write_bytes(draft.raw())
        refusal(lambda: WAYS[way](path, base), match)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("change", ["cut", "lengthened"])
    def test_the_data_end_elsewhere(
        self, folder: Path, base: BertForSequenceClassification, way: str, change: str
    ) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] if change == "cut" else raw + b"\0")
        refusal(lambda: WAYS[way](path, base), "truncated|belong to no tensor")


KINDS = (
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.position_embeddings.weight",
    "bert.embeddings.LayerNorm.weight",
    "bert.encoder.layer.0.attention.self.query.weight",
    "bert.encoder.layer.0.attention.output.LayerNorm.bias",
    "bert.encoder.layer.1.output.dense.weight",
    "bert.encoder.layer.1.intermediate.dense.bias",
    "bert.pooler.dense.weight",
    "classifier.weight",
    "classifier.bias",
)


class TestValues:
    """One NaN or infinity anywhere in what is loaded is refused by name, read or mapped."""

    @pytest.mark.parametrize("name", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_in_every_kind_of_tensor(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
    ) -> None:
        path = folder / "model.safetensors"
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
        sound = tensors[name].clone()
        for value in (math.nan, math.inf, -math.inf):
            for place in (0, sound.numel() - 1):
                spoilt = sound.clone()
                spoilt.view(-1)[place] = value
                path.unlink()
                save_file({**tensors, name: spoilt}, path)
                for mapped, least in ((True, 1), (False, 2**20)):
                    monkeypatch.setattr(safefile, "_LEAST_MAPPED_BYTES", least)
                    what = f"{name} holds NaN or infinite values: 1 of {sound.numel()}"
                    with pytest.raises(WeightsError, match=what):
                        load_pretrained(folder, num_labels=C, mapped=mapped, dtype=torch.float32)

    @pytest.mark.parametrize(
        ("dtype", "bits"),
        [(torch.float8_e4m3fn, 0x7F), (torch.float8_e4m3fn, 0xFF)]
        + [(torch.float8_e5m2, bits) for bits in (0x7C, 0xFC, 0x7D, 0xFF)],
    )
    def test_in_eight_bits(self, tmp_path: Path, dtype: torch.dtype, bits: int) -> None:
        sound = torch.arange(6, dtype=torch.uint8).view(2, 3)
        save_file({"a": sound.view(dtype)}, tmp_path / "a.safetensors")
        with SafeFile(tmp_path / "a.safetensors") as file:
            assert torch.equal(file.read("a").view(torch.uint8), sound)
        sound[1, 2] = bits
        save_file({"a": sound.view(dtype)}, tmp_path / "b.safetensors")
        with SafeFile(tmp_path / "b.safetensors") as file:
            refusal(lambda: file.read("a"), "a holds NaN or infinite values: 1 of 6")
