"""Kept hidden states: reading returns what was stored, or reports it missing.

The oracle throughout is the stored tensors: :func:`states` draws those of an example from its
number alone, so that every process knows what must be read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import environment
from torch import Tensor

from spafit.errors import CheckpointError, ConfigError, DataError, TrainingError
from spafit.text.tokenization import Encodings
from spafit.training.prefix import file as prefix_file
from spafit.training.prefix.cache import PrefixCache, PrefixKey

LENGTHS = [5, 3, 9, 2, 7, 11, 4]
D = 6
PLENTY = 10**9
TAIL_BYTES = 48
ALL = range(len(LENGTHS))


def make_encodings(lengths: Iterable[int] = LENGTHS, seed: int = 0) -> Encodings:
    draw = random.Random(seed)
    ids = [[draw.randrange(30000) for _ in range(length)] for length in lengths]
    types = [[int(2 * place > len(row)) for place in range(len(row))] for row in ids]
    return Encodings(ids, types, 0)


def make_key(**changes: Any) -> PrefixKey:
    key = PrefixKey(
        prefix_fingerprint="ab" * 32,
        depth=5,
        tokenizer_fingerprint="cd" * 32,
        hidden_size=D,
        dtype="float32",
        precision="float32",
        computed_on="here",
    )
    return dataclasses.replace(key, **changes)


def states(
    rows: Iterable[int], lengths: list[int] = LENGTHS, width: int = D, writer: int = 0
) -> Tensor:
    """Return one writer's hidden states of some examples, with ordinary and odd values."""
    pieces = [torch.empty(0, width)]
    for row in rows:
        generator = torch.Generator().manual_seed(1000 * writer + row)
        piece = torch.randn(lengths[row], width, generator=generator)
        piece[0, 0], piece[-1, -1] = -0.0, 1e-42  # a sign and a subnormal number are kept as well
        pieces.append(piece)
    return torch.cat(pieces)


def open_cache(folder: Path | None, limit: int = PLENTY, **changes: Any) -> PrefixCache:
    return PrefixCache(make_encodings(), make_key(**changes), folder=folder, limit_bytes=limit)


def filled(folder: Path, rows: Iterable[int] = ALL, **changes: Any) -> Path:
    """Keep some examples, and give the file."""
    with open_cache(folder, **changes) as cache:
        cache.store(list(rows), states(rows).to(torch.float32))
    assert cache.path is not None
    return cache.path


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return (
        found.dtype == expected.dtype == torch.float32
        and found.shape == expected.shape
        and bool((found.view(torch.int32) == expected.view(torch.int32)).all())
    )


def check_right_or_missing(cache: PrefixCache) -> list[int]:
    """Whatever became of a file: an example is what was stored, or has to be computed; which."""
    missing = cache.missing(ALL)
    kept = [row for row in ALL if row not in missing]
    assert same_bits(cache.read(kept), states(kept))
    return missing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "kept"


class TestStoreAndRead:
    """In memory and on disk alike."""

    def test_float32_comes_back_bit_for_bit_in_any_order(self, place: Path | None) -> None:
        with open_cache(place) as cache:
            assert cache.missing([4, 1, 4, 0]) == [4, 1, 0]
            cache.store([4, 1], states([4, 1]))
            assert cache.missing(ALL) == [0, 2, 3, 5, 6]
            assert same_bits(cache.read([1, 4, 1]), states([1, 4, 1]))
            cache.store([6, 0, 5, 2, 3], states([6, 0, 5, 2, 3]))
            assert cache.missing(ALL) == []
            assert same_bits(cache.read(ALL), states(ALL))
            assert cache.notes == []

    def test_half_is_the_nearest_half(self, place: Path | None) -> None:
        values = states(ALL)
        with open_cache(place, dtype="half") as cache:
            cache.store(ALL, values)
            found = cache.read(ALL)
        assert found.dtype == torch.float32
        # Half a unit in the last of 11 binary places, or of the smallest subnormal number.
        assert bool(((found - values).abs() <= values.abs() * 2.0**-11 + 2.0**-25).all())
        assert bool((found != values).any())

    def test_half_takes_half_the_room(self, tmp_path: Path) -> None:
        tokens = sum(LENGTHS)
        assert open_cache(None).nbytes == tokens * D * 4
        assert open_cache(None, dtype="half").nbytes == tokens * D * 2
        full, half = filled(tmp_path).stat().st_size, filled(tmp_path, dtype="half").stat().st_size
        assert full - half == pytest.approx(tokens * D * 2, abs=2 * len(LENGTHS))
        for dtype, size in (("float32", full), ("half", half)):
            assert size <= open_cache(tmp_path, dtype=dtype).nbytes <= size + 11 * len(LENGTHS)

    def test_takes_what_a_model_gives(self, place: Path | None) -> None:
        values = states([2, 6])
        with open_cache(place) as cache:
            cache.store([2, 6], values.clone().requires_grad_())
            assert same_bits(cache.read([2, 6]), values)
            cache.store([2, 6], values.T.contiguous().T)
            assert same_bits(cache.read([2, 6]), values)
            cache.store([2, 6], values.bfloat16())
            assert same_bits(cache.read([2, 6]), values.bfloat16().float())

    def test_what_is_read_is_the_callers_own(self, place: Path | None) -> None:
        with open_cache(place) as cache:
            cache.store([0], values := states([0]))
            cache.read([0]).zero_()
            values.zero_()
            assert same_bits(cache.read([0]), states([0]))

    def test_a_second_store_replaces_the_first(self, place: Path | None) -> None:
        with open_cache(place) as cache:
            for writer in (1, 2):
                cache.store([3, 0], states([3, 0], writer=writer))
                cache.save()
                assert same_bits(cache.read([0, 3]), states([0, 3], writer=writer))

    def test_no_rows_and_no_examples(self, place: Path | None) -> None:
        for encodings in (make_encodings(), make_encodings([])):
            with PrefixCache(encodings, make_key(), folder=place, limit_bytes=PLENTY) as cache:
                assert cache.missing([]) == []
                cache.store([], torch.empty(0, D))
                assert cache.read([]).shape == (0, D)

    @pytest.mark.parametrize("rows", [[-1], [0, len(LENGTHS)], ["0"], [1.0], [None]])
    def test_odd_rows(self, place: Path | None, rows: list[Any]) -> None:
        with open_cache(place) as cache:
            for use in (cache.missing, cache.read, lambda rows: cache.store(rows, states([0]))):
                with pytest.raises(DataError, match="rows are"):
                    use(rows)

    def test_reading_what_is_not_kept(self, place: Path | None) -> None:
        with open_cache(place) as cache:
            cache.store([1], states([1]))
            with pytest.raises(DataError, match=r"example 2 .*missing"):
                cache.read([1, 2])

    @pytest.mark.parametrize("shape", [(7, D), (9, D), (8, D + 1), (8 * D,), (1, 8, D)])
    def test_other_shapes(self, place: Path | None, shape: tuple[int, ...]) -> None:
        with open_cache(place) as cache:
            with pytest.raises(DataError, match=re.escape(f"(8, {D}), found {shape}")):
                cache.store([0, 1], torch.zeros(shape))
            assert cache.missing([0, 1]) == [0, 1]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", ["float32", "half"])
    def test_nan_and_infinity_are_refused(
        self, place: Path | None, value: float, dtype: str
    ) -> None:
        values = states([0, 1])
        values[6, 2] = value
        with open_cache(place, dtype=dtype) as cache:
            with pytest.raises(TrainingError, match="NaN or infinite"):
                cache.store([0, 1], values)
            assert cache.missing([0, 1]) == [0, 1]

    def test_what_half_or_float32_cannot_hold(self, place: Path | None) -> None:
        with open_cache(place, dtype="half") as cache:
            cache.store([0], torch.full((5, D), -65504.0))
            with pytest.raises(ConfigError, match=r"too large for half.*float32"):
                cache.store([0], torch.full((5, D), -65536.0))
        with open_cache(place) as cache, pytest.raises(ConfigError, match=r"torch\.float64"):
            cache.store([0], torch.zeros(5, D, dtype=torch.float64))

    def test_closed(self, place: Path | None) -> None:
        cache = open_cache(place)
        cache.store([0], states([0]))
        cache.close()
        cache.close()
        for use in (cache.missing, cache.read, lambda rows: cache.store(rows, states([0]))):
            with pytest.raises(CheckpointError, match="closed"):
                use([0])

    def test_an_unknown_type(self) -> None:
        with pytest.raises(ConfigError, match="float32 or half, found 'float16'"):
            make_key(dtype="float16")

    def test_reading_is_quick(self, place: Path | None) -> None:
        """Far above what it takes (0.3 ms), far below what work by token would take."""
        lengths = [72] * 40
        key = make_key(hidden_size=1024)
        with PrefixCache(make_encodings(lengths), key, folder=place, limit_bytes=PLENTY) as cache:
            cache.store(range(40), torch.randn(72 * 40, 1024))
            times = []
            for _ in range(5):
                start = time.perf_counter()
                cache.read(range(3, 35, 2))
                times.append(time.perf_counter() - start)
        assert min(times) < 0.03


class TestFiles:
    """What one run keeps, the next one finds."""

    def test_is_found_again(self, tmp_path: Path) -> None:
        path = filled(tmp_path)
        assert names(tmp_path) == [path.name]
        before = path.stat().st_ino
        with open_cache(tmp_path) as cache:
            assert cache.path == path
            assert check_right_or_missing(cache) == []
            assert cache.notes == []
            assert names(tmp_path) == [path.name]
        assert path.stat().st_ino == before

    def test_a_part_is_kept_and_completed(self, tmp_path: Path) -> None:
        filled(tmp_path, [5, 2])
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == [0, 1, 3, 4, 6]
            cache.store([0, 6], states([0, 6]))
            assert check_right_or_missing(cache) == [1, 3, 4]
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == [1, 3, 4]
            cache.store([1, 3, 4], states([1, 3, 4]))
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == []
            assert cache.notes == []
        assert len(names(tmp_path)) == 1

    def test_save_keeps_without_closing(self, tmp_path: Path) -> None:
        first = open_cache(tmp_path)
        first.save()
        assert first.path is not None
        assert not first.path.exists()
        first.store([1, 3], states([1, 3]))
        first.save()
        assert names(tmp_path) == [first.path.name]
        with open_cache(tmp_path) as second:
            assert check_right_or_missing(second) == [0, 2, 4, 5, 6]
        assert check_right_or_missing(first) == [0, 2, 4, 5, 6]
        before = first.path.stat().st_ino
        first.save()
        assert first.path.stat().st_ino == before
        first.store([0], states([0]))
        assert check_right_or_missing(first) == [2, 4, 5, 6]
        first.close()
        assert check_right_or_missing(open_cache(tmp_path)) == [2, 4, 5, 6]

    def test_nothing_stored_leaves_nothing(self, tmp_path: Path) -> None:
        with open_cache(tmp_path) as cache:
            assert cache.missing(ALL) == list(ALL)
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        "changes",
        [
            {"prefix_fingerprint": "ac" * 32},
            {"depth": 4},
            {"tokenizer_fingerprint": "ce" * 32},
            {"hidden_size": 2 * D},
            {"dtype": "half"},
            {"precision": "bf16"},
            {"computed_on": "there"},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_another_key_is_another_file(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        assert {field.name for field in dataclasses.fields(PrefixKey)} >= changes.keys()
        path = filled(tmp_path)
        with open_cache(tmp_path, **changes) as other:
            assert other.path != path
            assert other.missing(ALL) == list(ALL)
            assert other.path is not None
        # Nor is it taken where it lies under the other's name.
        shutil.copy(path, other.path)
        with open_cache(tmp_path, **changes) as other:
            assert other.missing(ALL) == list(ALL)
            assert len(other.notes) == 1

    @pytest.mark.parametrize("change", ["id", "type", "order", "lengths", "fewer", "swap"])
    def test_other_tokens_are_another_file(self, tmp_path: Path, change: str) -> None:
        path = filled(tmp_path)
        other = make_encodings()
        if change == "id":
            other.input_ids[3][1] += 1
        elif change == "type":
            other.token_type_ids[6][0] ^= 1
        elif change == "order":
            other.input_ids[0], other.input_ids[1] = other.input_ids[1], other.input_ids[0]
        elif change == "lengths":  # the same ids one after the other, cut elsewhere
            other.input_ids[1].insert(0, other.input_ids[0].pop())
            other.token_type_ids[1].insert(0, other.token_type_ids[0].pop())
        elif change == "fewer":
            del other.input_ids[-1], other.token_type_ids[-1]
        else:
            other = Encodings(other.token_type_ids, other.input_ids, 0)
        cache = PrefixCache(other, make_key(), folder=tmp_path, limit_bytes=PLENTY)
        assert cache.path is not None
        assert cache.path != path
        shutil.copy(path, cache.path)
        cache = PrefixCache(other, make_key(), folder=tmp_path, limit_bytes=PLENTY)
        assert cache.missing(range(len(other))) == list(range(len(other)))

    def test_another_format_is_another_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = filled(tmp_path)
        monkeypatch.setattr(prefix_file, "FORMAT", prefix_file.FORMAT + 1)
        with open_cache(tmp_path) as cache:
            assert cache.path is not None
            assert cache.path != path
        shutil.copy(path, cache.path)
        with open_cache(tmp_path) as cache:
            assert cache.missing(ALL) == list(ALL)

    def test_padding_and_truncation_counts_do_not_matter(self, tmp_path: Path) -> None:
        filled(tmp_path)
        other = dataclasses.replace(make_encodings(), cut=(0, 1, 2), pad_id=9)
        with PrefixCache(other, make_key(), folder=tmp_path, limit_bytes=PLENTY) as cache:
            assert check_right_or_missing(cache) == []

    def test_the_data_are_little_endian_and_lie_by_example(self, tmp_path: Path) -> None:
        content = filled(tmp_path).read_bytes()
        values = states(ALL).reshape(-1).tolist()
        assert content.startswith(struct.pack(f"<{len(values)}f", *values))
        index = json.loads(content[len(values) * 4 : -TAIL_BYTES])
        assert index["lengths"] == LENGTHS
        assert index["key"] == dataclasses.asdict(make_key())

    def test_modes_follow_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            path = filled(tmp_path / "made")
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_a_linked_folder(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        path = filled(tmp_path / "link")
        assert names(tmp_path / "real") == [path.name]
        with open_cache(tmp_path / "real") as cache:
            assert check_right_or_missing(cache) == []

    def test_a_complete_file_needs_nothing_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        filled(tmp_path)

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "utime", refuse)
        monkeypatch.setattr(prefix_file, "create", refuse)
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == []


class TestDamage:
    """Found, never used, rebuilt, and reported once."""

    def check_damaged(self, folder: Path, at_least: int = 1) -> None:
        with open_cache(folder) as cache:
            missing = check_right_or_missing(cache)
            assert len(missing) >= at_least
            assert len(cache.notes) == 1
            assert str(cache.path) in cache.notes[0]
            cache.store(missing, states(missing))
            assert check_right_or_missing(cache) == []
        with open_cache(folder) as cache:
            assert check_right_or_missing(cache) == []
            assert cache.notes == []

    def test_a_flipped_bit_anywhere(self, tmp_path: Path) -> None:
        path = filled(tmp_path)
        content = path.read_bytes()
        data_bytes = sum(LENGTHS) * D * 4
        owners = [row for row in ALL for _ in range(LENGTHS[row] * D * 4)]
        draw = random.Random(5)
        for place in [*range(0, data_bytes, 7), *range(data_bytes, len(content))]:
            damaged = bytearray(content)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with open_cache(tmp_path) as cache:
                missing = check_right_or_missing(cache)
            assert missing == ([owners[place]] if place < data_bytes else list(ALL)), place
            assert len(cache.notes) == 1

    def test_reading_checks_as_well(self, tmp_path: Path) -> None:
        path = filled(tmp_path)
        damaged = bytearray(path.read_bytes())
        damaged[0] ^= 1
        path.write_bytes(damaged)
        with open_cache(tmp_path) as cache:
            assert same_bits(cache.read([1, 2]), states([1, 2]))
            with pytest.raises(DataError, match="example 0"):
                cache.read([0])

    def test_damage_is_said_once_and_mended(self, tmp_path: Path) -> None:
        path = filled(tmp_path)
        damaged = bytearray(path.read_bytes())
        damaged[0] ^= 1
        damaged[7 * D * 4] ^= 128
        path.write_bytes(damaged)
        self.check_damaged(tmp_path, at_least=2)

    def test_what_is_copied_to_a_completed_file_is_checked(self, tmp_path: Path) -> None:
        path = filled(tmp_path, [0, 1])
        damaged = bytearray(path.read_bytes())
        damaged[0] ^= 1
        path.write_bytes(damaged)
        with open_cache(tmp_path) as cache:
            cache.store([4], states([4]))
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == [0, 2, 3, 5, 6]

    def test_cut_short_or_longer(self, tmp_path: Path) -> None:
        path = filled(tmp_path)
        content = path.read_bytes()
        for length in [*range(0, len(content), 11), len(content) - 1, len(content) - TAIL_BYTES]:
            path.write_bytes(content[:length])
            with open_cache(tmp_path) as cache:
                assert check_right_or_missing(cache) == list(ALL)
        for more in (b"\0", content[-TAIL_BYTES:], content):
            path.write_bytes(content + more)
            with open_cache(tmp_path) as cache:
                assert check_right_or_missing(cache) == list(ALL)
        path.write_bytes(content[:-100])
        self.check_damaged(tmp_path)

    def test_cut_short_while_it_is_open(self, tmp_path: Path) -> None:
        """Touching what is mapped beyond the end would kill this very process."""
        lengths = [100] * 50
        for committed in (True, False):
            folder = tmp_path / str(committed)
            encodings = make_encodings(lengths)
            cache = PrefixCache(encodings, make_key(), folder=folder, limit_bytes=PLENTY)
            cache.store(range(50), states(range(50), lengths))
            if committed:
                cache.save()
            assert cache.missing(range(50)) == []
            (path,) = folder.iterdir()
            os.truncate(path, 5000)
            assert cache.missing(range(20, 30)) == list(range(20, 30))
            with pytest.raises(DataError):
                cache.read([40])
            cache.close()
            with PrefixCache(encodings, make_key(), folder=folder, limit_bytes=PLENTY) as cache:
                cache.missing(range(50))

    def rewrite(self, path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        """Write another index, protected as it should be."""
        content = path.read_bytes()
        data_bytes = sum(LENGTHS) * D * 4
        changed = change(json.loads(content[data_bytes:-TAIL_BYTES]))
        index = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        tail = struct.pack("<Q", len(index)) + hashlib.sha256(index).digest() + b"spafitp1"
        path.write_bytes(content[:data_bytes] + index + tail)

    def test_an_index_written_by_hand_is_taken(self, tmp_path: Path) -> None:
        """So that the next test fails for what it says."""
        self.rewrite(filled(tmp_path), lambda index: index)
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == []

    @pytest.mark.parametrize(
        "change",
        [
            lambda index: json.dumps(index).encode()[:-1] + b',"format":1}',
            lambda index: json.dumps(index).encode()[:-1] + b',"crc32":[]}',
            lambda index: {**index, "lengths": [3, 5, *LENGTHS[2:]]},
            lambda index: {**index, "lengths": LENGTHS[:-1]},
            lambda index: {**index, "format": 2},
            lambda index: {**index, "more": 1},
            lambda index: {**index, "tokens": "0" * 64},
            lambda index: {**index, "key": {**index["key"], "depth": 6}},
            lambda index: {name: index[name] for name in index if name != "crc32"},
            lambda index: {**index, "crc32": index["crc32"][:-1]},
            lambda index: {**index, "crc32": [*index["crc32"], 1]},
            lambda index: {**index, "crc32": [-1, *index["crc32"][1:]]},
            lambda index: {**index, "crc32": [2**32, *index["crc32"][1:]]},
            lambda index: {**index, "crc32": [True, *index["crc32"][1:]]},
            lambda index: {**index, "crc32": ["1", *index["crc32"][1:]]},
            lambda index: {**index, "crc32": {}},
            lambda _: [],
            lambda _: None,
            lambda _: b"",
            lambda _: b"\xff",
            lambda _: b"[" * 100_000,
        ],
    )
    def test_an_index_that_does_not_fit(
        self, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
    ) -> None:
        self.rewrite(filled(tmp_path), change)
        self.check_damaged(tmp_path, at_least=len(LENGTHS))

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        path = filled(tmp_path)
        path.unlink()
        path.mkdir()
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == list(ALL)
            assert len(cache.notes) == 1

    def test_a_bad_checksum_is_of_its_example_only(self, tmp_path: Path) -> None:
        def change(index: dict[str, Any]) -> dict[str, Any]:
            index["crc32"][2] ^= 1
            return index

        self.rewrite(filled(tmp_path), change)
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == [2]


class TestRoom:
    """A limit on all caches of a folder, and the disk's own."""

    def test_memory(self) -> None:
        needed = sum(LENGTHS) * D * 4
        open_cache(None, limit=needed)
        with pytest.raises(ConfigError, match=rf"{needed} bytes, .* {needed - 1}; .*half"):
            open_cache(None, limit=needed - 1)
        open_cache(None, limit=needed - 1, dtype="half")
        with pytest.raises(ConfigError) as caught:
            open_cache(None, limit=1, dtype="half")
        assert "half" not in str(caught.value)

    def test_disk(self, tmp_path: Path) -> None:
        needed = open_cache(tmp_path).nbytes
        with open_cache(tmp_path, limit=needed) as cache:
            cache.store(ALL, states(ALL))
        assert cache.path is not None
        assert cache.path.stat().st_size <= needed
        with pytest.raises(ConfigError, match=rf"{needed} bytes, .* {needed - 1};"):
            open_cache(tmp_path, limit=needed - 1)
        assert cache.path.exists()

    def test_the_least_recently_used_makes_room(self, tmp_path: Path) -> None:
        paths = [filled(tmp_path, depth=depth) for depth in range(3)]
        for age, path in zip((20, 30, 10), paths, strict=True):
            os.utime(path, (time.time() - age,) * 2)
        open_cache(tmp_path, depth=1).close()  # used just now
        (tmp_path / "notes.txt").write_text("not a cache" * 1000)
        (tmp_path / "x.prefix").write_text("nor this")
        needed = open_cache(None).nbytes + 1000
        with open_cache(tmp_path, limit=3 * needed, depth=7) as cache:
            assert [path.exists() for path in paths] == [False, True, True]
            assert cache.notes == [f"{paths[0]} was removed to make room"]
            cache.store(ALL, states(ALL))
        paths.append(filled(tmp_path, depth=8))
        with open_cache(tmp_path, limit=2 * needed, depth=9):
            assert [path.exists() for path in paths] == [False, False, False, True]
        assert (tmp_path / "notes.txt").exists()
        assert (tmp_path / "x.prefix").exists()

    def test_nothing_is_removed_where_it_fits_or_cannot_fit(self, tmp_path: Path) -> None:
        path = filled(tmp_path)
        needed = open_cache(tmp_path, depth=1).nbytes
        with open_cache(tmp_path, limit=path.stat().st_size + needed, depth=1):
            assert path.exists()
        with pytest.raises(ConfigError):
            open_cache(tmp_path, limit=needed - 1, depth=1)
        assert path.exists()

    def test_its_own_file_does_not_count(self, tmp_path: Path) -> None:
        filled(tmp_path, [1])
        needed = open_cache(tmp_path).nbytes
        with open_cache(tmp_path, limit=needed) as cache, open_cache(tmp_path, limit=needed):
            assert cache.missing([1, 2]) == [2]
            assert cache.notes == []

    def test_a_removed_file_serves_whoever_has_it_open(self, tmp_path: Path) -> None:
        path = filled(tmp_path)
        with open_cache(tmp_path) as reader:
            with open_cache(tmp_path, limit=reader.nbytes, depth=1):
                assert not path.exists()
            assert check_right_or_missing(reader) == []

    def test_what_others_are_writing_counts(self, tmp_path: Path) -> None:
        with open_cache(tmp_path) as writer:
            needed = writer.nbytes
            with pytest.raises(ConfigError, match=rf"{needed} bytes.* limit is {needed + 9}"):
                open_cache(tmp_path, limit=needed + 9, depth=6)
            open_cache(tmp_path, limit=2 * needed, depth=6).close()
            writer.store(ALL, states(ALL))
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == []

    def test_the_disk_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = filled(tmp_path)
        needed = open_cache(tmp_path, depth=2).nbytes
        usage = shutil.disk_usage(tmp_path)
        free = needed - 1
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        with pytest.raises(ConfigError, match=rf"{needed} bytes, the disk has {free} free"):
            open_cache(tmp_path, depth=2)
        assert kept.exists()
        free = needed
        open_cache(tmp_path, depth=2).close()
        free = needed - kept.stat().st_size  # what makes room leaves it free
        with open_cache(tmp_path, depth=2, limit=needed):
            assert not kept.exists()

    def test_a_folder_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(CheckpointError, match=f"{folder} cannot be written: .*memory"):
                open_cache(folder)
        if os.geteuid() != 0:
            (tmp_path / "locked").mkdir(mode=0o555)
            with pytest.raises(CheckpointError, match="locked cannot be written"):
                open_cache(tmp_path / "locked")

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        path = filled(tmp_path / "kept")
        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.raises(CheckpointError, match="kept cannot be written: Permission denied"):
            open_cache(tmp_path / "kept", limit=path.stat().st_size + 100, depth=2)


class TestWritersThatFail:
    """A file is there in full or not at all."""

    @contextmanager
    def small_files(self, size: int) -> Iterator[None]:
        """Let no file of this process grow beyond some bytes: as good as a full disk.

        Inside the block only: pytest may be writing to a file too.
        """
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def test_the_disk_fills_up(self, tmp_path: Path) -> None:
        cache = open_cache(tmp_path)
        cache.store([0, 1], states([0, 1]))
        with self.small_files(8 * D * 4 + 5):
            for row in (2, 3):
                cache.store([1, row], states([1, row]))
            (note,) = cache.notes
            assert re.match(f"{tmp_path} cannot be written.*room.*held in memory", note)
            assert check_right_or_missing(cache) == [4, 5, 6]
            with pytest.raises(CheckpointError, match=f"{tmp_path} cannot be written.*room"):
                cache.close()
        assert names(tmp_path) == []

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_saving_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        path = filled(tmp_path, [1, 2])

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(*((os, "fsync", fail) if step == "fsync" else (Path, "replace", fail)))
            cache = open_cache(tmp_path)
            cache.store([3], states([3]))
            with pytest.raises(CheckpointError, match="No space left"):
                cache.save()
            assert check_right_or_missing(cache) == [0, 4, 5, 6]  # and the run can go on
            with pytest.raises(CheckpointError, match="No space left"):
                cache.close()
            # Where a run fails for another reason, that one is told.
            with pytest.raises(KeyboardInterrupt), open_cache(tmp_path) as cache:
                cache.store([3], states([3]))
                raise KeyboardInterrupt
            assert "No space left" in cache.notes[-1]
        assert names(tmp_path) == [path.name]
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == [0, 3, 4, 5, 6]

    def test_an_interrupted_run_keeps_what_it_has(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), open_cache(tmp_path) as cache:
            cache.store([3], states([3]))
            raise KeyboardInterrupt
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == [0, 1, 2, 4, 5, 6]

    def test_all_is_on_the_disk_before_the_file_has_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[str, int]] = []
        fsync, replace = os.fsync, Path.replace

        def spy_fsync(descriptor: int) -> None:
            seen.append(("fsync", os.fstat(descriptor).st_size))
            fsync(descriptor)

        def spy_replace(self: Path, target: Path) -> Path:
            seen.append(("replace", self.stat().st_size))
            return replace(self, target)

        monkeypatch.setattr(os, "fsync", spy_fsync)
        monkeypatch.setattr(Path, "replace", spy_replace)
        size = filled(tmp_path).stat().st_size
        assert seen == [("fsync", size), ("replace", size)]

    def test_leftovers_of_the_dead_are_swept(self, tmp_path: Path) -> None:
        dead = tmp_path / f"{'0' * 64}.tmp-1-0123abcd"  # process 1 lives, and never wrote this
        dead.write_bytes(b"x" * 100)
        (tmp_path / "mine.tmp-1-0123abcd").write_text("not a cache")
        with open_cache(tmp_path, depth=1) as alive:
            (temporary,) = (name for name in names(tmp_path) if f"tmp-{os.getpid()}-" in name)
            filled(tmp_path)
            assert temporary in names(tmp_path)
            assert not dead.exists()
            alive.store(ALL, states(ALL))
        assert (tmp_path / "mine.tmp-1-0123abcd").exists()
        with open_cache(tmp_path, depth=1) as cache:
            assert check_right_or_missing(cache) == []

    def test_a_file_swept_before_it_was_locked_is_begun_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock, sweeps = prefix_file.lock, []

        def swept_first(file: int, *, wait: bool) -> bool | None:
            if wait and not sweeps:
                (leftover,) = tmp_path.iterdir()
                sweeps.append(leftover.unlink())
            return lock(file, wait=wait)

        monkeypatch.setattr(prefix_file, "lock", swept_first)
        filled(tmp_path)
        assert len(sweeps) == 1
        assert check_right_or_missing(open_cache(tmp_path)) == []

    def test_a_file_system_without_locks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
        with open_cache(tmp_path, depth=1) as alive:
            filled(tmp_path)
            alive.store([0], states([0]))
        assert len(names(tmp_path)) == 2

    def test_two_writers_at_once(self, tmp_path: Path) -> None:
        one, two = open_cache(tmp_path), open_cache(tmp_path)
        one.store([0, 1], states([0, 1], writer=1))
        two.store([1, 2], states([1, 2], writer=2))
        one.save()
        two.save()
        assert same_bits(one.read([0, 1]), states([0, 1], writer=1))
        assert same_bits(two.read([1, 2]), states([1, 2], writer=2))
        with open_cache(tmp_path) as third:
            assert third.missing(ALL) == [0, 3, 4, 5, 6]
            assert same_bits(third.read([1, 2]), states([1, 2], writer=2))
            assert third.notes == []
        assert len(names(tmp_path)) == 1
        one.close()
        two.close()

    def test_killed_at_any_moment(self, tmp_path: Path) -> None:
        run_here("kill_writers", tmp_path)
        # And what another process kept is found in this one.
        with open_cache(tmp_path) as cache:
            assert check_right_or_missing(cache) == []
            assert cache.notes == []

    def test_two_processes_write_and_one_reads(self, tmp_path: Path) -> None:
        run_here("read_among_writers", tmp_path)


def run_here(name: str, folder: Path) -> None:
    """Run a function of this module in a process of its own, which may fork: it has no threads."""
    code = f"import sys, {__name__} as here; here.{name}(here.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(
        command,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def forked(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the writer ended by itself"


def kill_writers(folder: Path) -> None:
    """Kill writers that fill, save, complete and start again; look at what is left of each."""
    draw = random.Random(3)
    outcomes = set()

    def write_for_ever() -> None:
        while True:
            with open_cache(folder) as cache:
                for row in draw.sample(ALL, len(ALL)):
                    cache.store([row], states([row]))
                    if draw.random() < 0.3:
                        cache.save()
            assert cache.path is not None
            cache.path.unlink()

    for _ in range(40):
        draw.random()
        pid = forked(write_for_ever)
        time.sleep(draw.uniform(0.002, 0.03))
        kill(pid)
        left = names(folder) if folder.exists() else []
        with open_cache(folder) as cache:
            missing = check_right_or_missing(cache)
            assert cache.notes == []
        outcomes.add((len(missing), any("tmp-" in name for name in left)))
        assert not any("tmp-" in name for name in names(folder))
    assert len(outcomes) > 3, f"always killed at the same moment: {outcomes}"
    with open_cache(folder) as cache:
        missing = cache.missing(ALL)
        cache.store(missing, states(missing))


def read_among_writers(folder: Path) -> None:
    """Two processes replace a file again and again; each reading is whole, and of one of them."""
    expected = [states(ALL, writer=writer) for writer in (0, 1)]

    def write_for_ever(writer: int) -> None:
        while True:
            with open_cache(folder) as cache:
                cache.store(ALL, expected[writer])

    with open_cache(folder) as cache:
        cache.store(ALL, expected[0])
    pids = [forked(lambda writer=writer: write_for_ever(writer)) for writer in (0, 1)]
    seen, end = set(), time.monotonic() + 20
    while len(seen) < 4 and time.monotonic() < end:
        with open_cache(folder) as cache:
            assert cache.missing(ALL) == []
            assert cache.notes == []
            found = cache.read(ALL)
            (writer,) = (number for number in (0, 1) if same_bits(found, expected[number]))
            seen.add((writer, len(seen) // 2) if (writer, 0) in seen else (writer, 0))
    for pid in pids:
        kill(pid)
    assert {writer for writer, _ in seen} == {0, 1}
