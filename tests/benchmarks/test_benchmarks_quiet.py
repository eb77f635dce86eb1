"""What speaks against a measurement, and the short set's own lines.

Oracles: rows and counts made by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support import REPOSITORY

from benchmarks import __main__ as short_set
from benchmarks.harness import quiet, report

Row = dict[str, str | int | float]


def row(ratios: str, load: str = "0.01", threads: int = 2) -> Row:
    """Return a row from "minimum low-quartile median high-quartile maximum"."""
    keys = ("ratio_min", "ratio_low_quartile", "ratio", "ratio_high_quartile", "ratio_max")
    values = dict(zip(keys, map(float, ratios.split()), strict=True))
    return {"contender": "spafit", **values, "other_load": load, "threads": threads}


class TestWarnings:
    """Oracle: rows on both sides of each limit."""

    @pytest.mark.parametrize(
        ("ratios", "warned"),
        [
            ("1 1 1 1 1", False),
            ("1.9 4 5 5.9 5.6", False),
            ("1.9 4 5 6.1 5.6", True),  # 42 % of the median
            ("2 4 5 5.5 6", False),
            ("1.9 4 5 5.5 6", True),  # 6 / 1.9 is more than 3
        ],
    )
    def test_rounds_that_differ(self, ratios: str, warned: bool) -> None:
        found = quiet.warnings([row("1 1 1 1 1"), row(ratios)])
        assert len(found) == warned
        if warned:
            assert found[0].startswith("spafit: the rounds differ much, 1.90 to ")

    @pytest.mark.parametrize(
        ("load", "threads", "warned"),
        [("0.10", 4, False), ("0.11", 4, True), ("1.05", 3, False), ("1.15", 3, True),
         ("unknown", 4, False)],
    )  # fmt: skip
    def test_other_programs(
        self, load: str, threads: int, warned: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        found = quiet.warnings([row("1 1 1 1 1", "0.02", threads), row("1 1 1 1 1", load, threads)])
        assert len(found) == warned
        assert not warned or f"kept {load} of 4 cores busy" in found[0]

    def test_rows_without_rounds(self) -> None:
        assert quiet.warnings([{"kind": "gaps", "threads": 2, "other_load": "0.00"}]) == []


def test_a_load_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for load, written in ((None, "unknown"), (0.456, "0.46")):
        monkeypatch.setattr("spafit.machine.busy.other_load", lambda load=load: load)
        assert quiet.other_load() == written


def test_a_row_holds_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/x.py", "--task", "two words"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="benchmarks.x"))
    found = report.place(torch.device("cpu"), "float32")
    assert found["command"] == "python -m benchmarks.x --task 'two words'"
    assert found["other_load"] == "unknown" or float(found["other_load"]) >= 0
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert report.command() == "x.py --task 'two words'"
    places = ["--data", "../glue", "--out=/somewhere/out", "/somewhere/runs/rte"]
    monkeypatch.setattr("sys.argv", ["/somewhere/x.py", *places])
    assert report.command() == "x.py --data ../glue --out=out rte"


def test_no_recorded_command_names_a_place_of_a_machine() -> None:
    for path in (REPOSITORY / "benchmarks" / "results").glob("*.csv"):
        for row in report.read_rows(path):
            assert not re.search(r"[\s=']/", row.get("command") or ""), path.name


def test_rows_of_before_load_and_command_were_recorded(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("task,loss\nrte,0.5\n")
    new: Row = {"task": "cola", "loss": 0.25, "other_load": "0.01", "command": "python -m x"}
    assert report.append_rows(path, [new]) == [
        {"task": "rte", "loss": "0.5", "other_load": "", "command": ""},
        {"task": "cola", "loss": "0.25", "other_load": "0.01", "command": "python -m x"},
    ]


class TestShortSet:
    """Oracle: small modules in place of the benchmarks."""

    def test_what_it_prints(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        script = f"""
import sys, time
from benchmarks.harness.report import write_results
print("waiting", flush=True)
time.sleep(0.3)
write_results(__import__("pathlib").Path(sys.argv[-1]), [{row("1 1 5 9 9")!r}], "a title")
"""
        (tmp_path / "noisy.py").write_text(script)
        (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
        commands = {
            "one": ["noisy", "--out", str(tmp_path / "one")],
            "two": ["broken", "--out", str(tmp_path / "two")],
        }
        root = str(Path(report.__file__).parents[1])
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
        monkeypatch.setattr(short_set, "commands_of", lambda _: commands)
        monkeypatch.setattr(short_set, "EVERY_S", 0.05)
        with pytest.raises(SystemExit, match="failed: two"):
            short_set.main(["--out", str(tmp_path)])
        printed = capfd.readouterr().out
        assert "python -m noisy --out" in printed
        assert "[1 of 2, one: 0 s so far]" in printed
        before, end = printed.rsplit("Done after ", 1)
        assert "Warning: spafit: the rounds differ much, 1.00 to 9.00 times" in before
        assert "Warning: one: spafit: the rounds differ much, 1.00 to 9.00 times" in end
        for ending in ("csv", "md", "png"):
            assert f"\n  {tmp_path / 'one'}.{ending}\n" in end
        assert "two." not in end
