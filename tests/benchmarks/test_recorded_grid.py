"""Grids for the record: the report follows from the records that lie beside it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from support.written_runs import write_run

from benchmarks.arguments import RESULTS
from benchmarks.recorded_grid import RUNS, main
from spafit.experiments.report.tables import make_report
from spafit.experiments.report.write import write_report

RECORDED = sorted(path.parent for path in RESULTS.glob("*/report.md"))


def report_of(packed: Path, folder: Path) -> dict[str, bytes]:
    """Unpack the records, and return the files of their report."""
    with tarfile.open(packed) as file:
        file.extractall(folder, filter="data")
    written = write_report(make_report(folder / packed.parent.name), folder)
    return {path.name: path.read_bytes() for path in written}


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda path: path.name)
def test_the_recorded_report_is_that_of_its_records(recorded: Path, tmp_path: Path) -> None:
    for name, content in report_of(recorded / RUNS, tmp_path).items():
        assert (recorded / name).read_bytes() == content


def test_what_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finished runs without their weights, and no folder of the machine that they ran on."""
    runs, results = tmp_path / "small", tmp_path / "results"
    settings = {"out": str(runs / "cola"), "rate_decay": 1.0}
    write_run(runs / "cola", 0.25, task="cola", settings=settings, answers=[("acceptable",) * 2])
    write_run(runs / "rte", 0.5, status="running")
    (runs / "grid.json").write_text("{}")
    main([str(runs), "--results", str(results)])
    with tarfile.open(results / "small" / RUNS) as file:
        names = [each.name.removeprefix("small/") for each in file]
        assert names == ["grid.json", "cola/run.json", "cola/dev.tsv", "cola/log.jsonl"]
        record = json.load(file.extractfile("small/cola/run.json"))  # type: ignore[arg-type]
    assert record["settings"]["out"] == "cola"
    again = report_of(results / "small" / RUNS, tmp_path / "again")
    for name in ("report.csv", "report.tex"):  # the others name what is not reported
        assert (results / "small" / name).read_bytes() == again[name]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing"), "--results", str(results)])
    assert "is not there" in capsys.readouterr().err
