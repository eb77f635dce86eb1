"""Grids for the record: the report follows from the records that lie beside it."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import pytest
from support.written_runs import write_run

from benchmarks.harness.arguments import RESULTS
from benchmarks.recorded_grid import RUNS, main
from spafit.experiments.report.found import COSTS
from spafit.experiments.report.tables import make_report
from spafit.experiments.report.write import write_report

RECORDED = sorted(path.parent for path in RESULTS.glob("*/report.md"))
AGAINST = {"ablations": "SPAFIT-1-3-II (r 64)", "rank": "SPAFIT-1-3-II (r 64, alpha 128)"}


def report_of(packed: Path, folder: Path) -> dict[str, bytes]:
    """Unpack the records, and return the files of their report."""
    with tarfile.open(packed) as file:
        file.extractall(folder, filter="data")
    name = packed.parent.name
    written = write_report(make_report(folder / name, AGAINST.get(name)), folder)
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
    error = {"status": "failed", "error": "DivergedError: the loss is nan"}
    write_run(runs / "choice", 0.5, cell={"purpose": "choice"}, **error)
    (runs / "damaged").mkdir()
    (runs / "damaged" / "run.json").write_text("{")
    main([str(runs), "--results", str(results)])
    with tarfile.open(results / "small" / RUNS) as file:
        names = [each.name.removeprefix("small/") for each in file]
        of_finished = ["cola/run.json", "cola/dev.tsv", "cola/log.jsonl"]
        assert names == ["grid.json", "choice/run.json", *of_finished]
        record = json.load(file.extractfile("small/cola/run.json"))  # type: ignore[arg-type]
    assert record["settings"]["out"] == "cola"
    assert "left out: rte: running" in capsys.readouterr().out
    again = report_of(results / "small" / RUNS, tmp_path / "again")
    assert again == {name: (results / "small" / name).read_bytes() for name in again}
    (runs / "cola" / "log.jsonl").unlink()
    with pytest.raises(SystemExit):
        main([str(runs), "--results", str(results)])
    assert "cola/log.jsonl is not there; remove the run" in capsys.readouterr().err
    (tmp_path / "only" / "half").mkdir(parents=True)
    (runs / "rte").rename(tmp_path / "only" / "half" / "run")
    for name, message in (("nothing", "is not there"), ("only", "has no finished run")):
        with pytest.raises(SystemExit):
            main([str(tmp_path / name), "--results", str(results)])
        assert message in capsys.readouterr().err


def test_without_costs(tmp_path: Path) -> None:
    """Of the same runs: all but time and memory, in the records and in their report."""
    runs, results = tmp_path / "small", tmp_path / "results"
    for seed in (0, 1):
        answers = [("acceptable",) * 2]
        write_run(runs / str(seed), 0.25, task="cola", seed=seed, answers=answers)
    found = {}
    for name, option in (("with", []), ("without", ["--without", *COSTS])):
        main([str(runs), "--results", str(results / name), *option])
        found[name] = report_of(results / name / "small" / RUNS, tmp_path / name)
        assert found[name].keys() == {"report.md", "report.csv", "report.tex", "report.html"}
        for file, content in found[name].items():
            assert (results / name / "small" / file).read_bytes() == content
    record, stripped = (
        json.loads((tmp_path / name / "small" / "1" / "run.json").read_text()) for name in found
    )
    for cost in COSTS:
        del record["result"][cost]
    assert stripped == record
    before, rest = found["with"]["report.md"].decode().split("\n## Time and memory\n")
    assert rest and found["without"]["report.md"].decode() == before
    assert b"Agreement" in found["without"]["report.html"]
    assert not re.search(b"Time|Memory|MiB", found["without"]["report.html"])
    main([str(runs), "--results", str(results / "times"), "--without", "peak_memory_mib"])
    heads = "| method | seconds a run | examples/s in training |"
    assert heads in re.sub(" +", " ", (results / "times/small/report.md").read_text())
