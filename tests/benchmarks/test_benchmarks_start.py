"""The benchmark of what it costs to start runs whole processes, and checks what they print.

Oracle: processes whose time and output are known.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import start
from benchmarks.harness import report
from benchmarks.harness.timing import WrongResultError

SLEEP = ("-c", "import time; time.sleep(0.3)")


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "PROCESSES", {("-c", "pass"): (0, ""), SLEEP: (0, "")})
    start.main(["--repeats", "2", "--out", str(tmp_path / "start")])
    _, sleeping = report.read_rows(tmp_path / "start.csv")
    assert sleeping["contender"] == "python -c 'import time; time.sleep(0.3)'"
    assert sleeping["rounds"] == "2"
    assert float(sleeping["time_ms_min"]) >= 300


@pytest.mark.parametrize("expected", [(1, "usage"), (0, "no such word")])
def test_another_answer_is_refused(
    monkeypatch: pytest.MonkeyPatch, expected: tuple[int, str]
) -> None:
    arguments = ("-c", "print('usage')")
    monkeypatch.setattr(start, "PROCESSES", {arguments: expected})
    with pytest.raises(WrongResultError, match="exit code 0, usage"):
        start.process(arguments).run(start.Rows((0,), 0))
