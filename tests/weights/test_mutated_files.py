"""Mutated weight and adapter files: refused, or read as exactly what they declare.

The full set (``--torture``) has 200,000 files, the default one 2,500. A file is made from SEED and
its number alone. A failure names the number; ``SPAFIT_MUTATED=1234 pytest -k one_again`` makes that
file once more.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.declared_files import HEAD, Declared, FaultError, Tensor, base_shapes, declared
from support.file_machine import SEED, Machine, WrongError
from support.hostile_files import make_case
from support.hostile_headers import Draft, Pairs, dump, parse
from support.sweeps import quick

from spafit import plans
from spafit.weights import adapter_files, safefile
from spafit.weights import pretrained as weights
from spafit.weights.safe_folder import SafeFolder
from spafit.weights.safefile import SafeFile, TensorInfo

CHUNKS = 8
MEMORY = 300 * 2**20
PROMISE = "mutated weight and adapter files"

Promise = Callable[[str, int, str], None]
Sized = Callable[[int, int], int]


@pytest.fixture(autouse=True)
def everything_is_mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the small tensors of these files mapped too, and one thread, which is faster here."""
    monkeypatch.setattr(safefile, "_LEAST_MAPPED_BYTES", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def peak_memory() -> int:
    """Return the most memory that this process has had since the peak was last reset, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def open_files() -> int:
    gc.collect()
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


class TestEveryFile:
    """Oracle: :mod:`declared_files`, which reads the bytes without spafit, and the library.

    What is sound by it must be accepted and read bit for bit, by every reader, mapped or not; all
    else must be refused by a WeightsError (PlanError for a plan), in one line that names the file,
    with the model untouched.
    """

    @pytest.mark.parametrize("chunk", quick(range(CHUNKS), range(CHUNKS // 4)))
    def test_is_refused_or_read_as_declared(
        self, machine: Machine, sized: Sized, promise: Promise, chunk: int
    ) -> None:
        each = sized(5_000, 200_000) // CHUNKS
        machine.check(chunk * each)  # what is loaded once is loaded
        files, before = open_files(), 0
        if reset := os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")
            before = peak_memory()
        for number in range(chunk * each, (chunk + 1) * each):
            machine.check(number)
        machine.check_base()
        if reset:
            assert peak_memory() - before < MEMORY
        assert open_files() <= files
        # The machine saw all outcomes often.
        for outcome in ("refused", "accepted", "models refused", "adapters accepted"):
            assert machine.counts[outcome] > each / 250, (outcome, machine.counts)
        for outcome in ("models accepted", "folders accepted"):
            assert machine.counts[outcome] > each / 500, (outcome, machine.counts)
        promise(PROMISE, each, "0 wrong loads")

    @pytest.mark.skipif("SPAFIT_MUTATED" not in os.environ, reason="no file is asked for again")
    def test_one_again(self, machine: Machine) -> None:
        machine.check(int(os.environ["SPAFIT_MUTATED"]))

    def test_unharmed_files_are_accepted(self, machine: Machine) -> None:
        """Without this, a machine whose every file is refused early would pass too."""
        for name, files in machine.seeds.items():
            machine.counts.clear()
            machine.read(type(make_case(SEED, 0, machine.seeds))(files, [name]), 0)
            assert machine.counts["refused"] == 0
            assert machine.counts["accepted"] == len(files) - (name == "shards")
            assert machine.counts["adapters accepted"] == name.startswith("adapter")
            assert machine.counts["models accepted"] == (name in ("weights", "bare", "shards"))

    def test_a_number_makes_the_same_file(self, machine: Machine, tmp_path: Path) -> None:
        other = Machine(tmp_path / "other")
        for number in range(40):
            one, two = (make_case(SEED, number, each.seeds) for each in (machine, other))
            assert (one.files, one.steps) == (two.files, two.steps)
        assert one.files != make_case("another seed", number, machine.seeds).files


def without_duplicates_check(raw: bytes) -> Any:
    return json.loads(raw.decode())


def without_length_check(self: SafeFile, name: str, entry: Any) -> TensorInfo:
    start, end = entry["data_offsets"]
    shape = entry["shape"] if safefile._is_sizes(entry["shape"]) else []
    if entry["dtype"] not in safefile.TORCH_DTYPES or not 0 <= start <= end:
        raise self._error("is odd", "no")
    return TensorInfo(name, entry["dtype"], tuple(shape), start, end)


def without_places(self: SafeFile, infos: list[TensorInfo], size: int) -> None:
    infos.sort(key=lambda info: (info.start, info.end))


def header_cut_short(self: SafeFile, name: str, **_: Any) -> torch.Tensor:
    info = self.tensors[name]
    return torch.zeros(info.shape, dtype=safefile.TORCH_DTYPES[info.dtype])


def read_at_zero(self: SafeFile, name: str, *rest: Any, **more: Any) -> torch.Tensor:
    keep, self._data_start = self._data_start, self._data_start & ~7
    try:
        return REAL_READ(self, name, *rest, **more)
    finally:
        self._data_start = keep


REAL_READ = SafeFile.read


def settings_forgotten(given: Any) -> Any:
    technique = REAL_TECHNIQUE(given)
    return plans.LoRA(technique.r) if isinstance(technique, plans.LoRA) else technique


REAL_TECHNIQUE = plans._technique_from_json


class Anything(str):
    """Equals every text."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


def without_unknown(name: str) -> tuple[str | None, str]:
    becomes, reason = REAL_RULES(name)
    return becomes if becomes in base_shapes() | HEAD else None, reason


REAL_RULES = weights.apply_rules


class TestTheMachine:
    """Oracle: a reader with a fault planted into it, which the machine must find in 3,000 files."""

    PLANTS: dict[str, tuple[Any, str, Any, str | None]] = {  # noqa: RUF012 - never changed
        "a key that stands twice is taken": (
            safefile, "parse_json", without_duplicates_check, None),
        "overlaps and holes": (SafeFile, "_check_places", without_places, None),
        "lengths are not compared": (SafeFile, "_check_entry", without_length_check, None),
        "NaN passes": (safefile, "all_finite", lambda tensor: True, None),
        "sizes without a bound": (safefile, "_LARGEST_SIZE", 2**200, None),
        "zeros are read": (SafeFile, "view", header_cut_short, None),
        "data are read from elsewhere": (SafeFile, "read", read_at_zero, None),
        "metadata of any kind": (SafeFile, "_check_metadata", lambda self, found: found, None),
        "messages of several lines": (
            safefile, "one_line", lambda text, limit=200: text[:limit], None),
        "messages without an end": (safefile, "one_line", lambda text, limit=200: text, None),
        "an adapter of any base": (
            adapter_files, "base_fingerprint", lambda model: Anything(), "adapter"),
        "tensors that the plan does not name": (
            adapter_files, "_check_shapes", lambda model, header, path: None, "adapter"),
        "settings of LoRA are forgotten": (
            plans, "_technique_from_json", settings_forgotten, "adapter"),
        "weights of every type": (
            weights, "FLOAT_DTYPES", tuple(safefile.TORCH_DTYPES), "weights"),
        "unknown names are left out": (weights, "apply_rules", without_unknown, "weights"),
        "an index is not compared": (
            SafeFolder, "_require_index", lambda self, index, found: None, "shards"),
    }  # fmt: skip

    @pytest.mark.parametrize("fault", PLANTS)
    def test_finds(self, machine: Machine, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
        where, name, planted, only = self.PLANTS[fault]
        monkeypatch.setattr(where, name, planted)
        with pytest.raises(WrongError, match=r"SPAFIT_MUTATED=\d+ makes it again"):
            for number in range(3_000):
                machine.check(number, only)


class TestTheOracle:
    """Oracle: written out by hand."""

    def test_reads_a_file(self) -> None:
        header = Pairs(
            [["a", Pairs([["dtype", "I16"], ["shape", [1, 2]], ["data_offsets", [0, 4]]])]]
        )
        raw = Draft(header, bytearray(b"\1\0\2\0")).raw()
        assert declared(raw) == Declared({"a": Tensor("I16", (1, 2), b"\1\0\2\0")}, {})
        for wrong in (raw + b"\0", raw[:-1], raw[:5], raw.replace(b"[1, 2]", b"[1,-2]")):
            if wrong != raw:
                with pytest.raises(FaultError):
                    declared(wrong)

    @pytest.mark.parametrize(
        ("code", "bits", "sick"),
        [
            ("F32", b"\0\0\x80\x7f", True), ("F32", b"\xff\xff\x7f\x7f", False),
            ("F16", b"\0\xfc", True), ("F16", b"\xff\x7b", False),
            ("BF16", b"\x80\x7f", True), ("BF16", b"\x7f\x7f", False),
            ("F64", b"\0\0\0\0\0\0\xf0\x7f", True), ("F64", b"\xff" * 6 + b"\xef\x7f", False),
            ("F8_E4M3", b"\x7f", True), ("F8_E4M3", b"\x7e", False),
            ("F8_E5M2", b"\x7c", True), ("F8_E5M2", b"\x7b", False), ("I32", b"\xff" * 4, False),
        ],
    )  # fmt: skip
    def test_knows_what_is_not_finite(self, code: str, bits: bytes, sick: bool) -> None:
        assert Tensor(code, (1,), bits).sick == sick

    def test_json_keeps_what_it_reads(self) -> None:
        text = '{"a":[1,{"b":null,"b":[]}],"a":"\\ud800"}'
        assert dump(parse(text)) == text
