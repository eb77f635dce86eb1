"""The servers that benchmarks/serving.py measures give the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("litserve")

from benchmarks import serving
from benchmarks.harness import report, timing
from weights_tools.tiny import make_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("base") / "tiny")


def test_pefts_answers_are_spafits(base: Path, tmp_path: Path) -> None:
    """Oracle: each other; the adapters' answers differ among themselves."""
    runs = serving.write_adapters(tmp_path, base, 3, 1, seed=0)
    names = [run.name for run in runs]
    texts: list[Any] = ["the cat sees", "old dog", ("a child", "the student sleeps quickly")]
    asked = [(texts[:2], names[::-1]), (texts[2:], names[1:2]), (texts[1:], names)]
    found = []
    for api in serving.APIS.values():
        served = api(base, runs)
        served.setup("cpu")
        questions = [serving.serve.Question(texts=some, tasks=tasks) for some, tasks in asked]
        found.append(served.predict(questions))
    for answers in zip(*found, strict=True):
        serving.check(dict(zip(serving.APIS, answers, strict=True)))
    assert [list(row) for row in found[0][0]] == [names[::-1]] * 2
    first = [each["probabilities"]["yes"] for each in found[0][0][0].values()]
    assert len({round(sure, 4) for sure in first}) == 3
    with pytest.raises(timing.WrongResultError, match="spafit has another answer for task-2"):
        serving.check({serving.PEFT: found[0][0], serving.SPAFIT: found[0][0][::-1]})


def test_the_summary() -> None:
    """Oracle: by hand."""
    rounds = [([0.001 * n for n in range(1, 102)], 2.0), ([0.051], 1.0)]
    found = serving.summary(rounds, 6)
    assert found["p50_ms"] == pytest.approx(51)
    assert found["p99_ms"] == pytest.approx(99.99, abs=0.02)
    assert [found[f"rows_per_s{end}"] for end in ("", "_min", "_max")] == [4.5, 3.0, 6.0]


@pytest.mark.server
def test_over_loopback(base: Path, tmp_path: Path) -> None:
    (tmp_path / "WNLI").mkdir()
    rows = "".join(f"{row}\tthe cat sees\tdog {row}\t1\n" for row in range(9))
    (tmp_path / "WNLI" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    words = f"--model {base} --data {tmp_path} --task wnli --tasks 2 --callers 1 3 --requests 6"
    out = tmp_path / "out"
    serving.main([*words.split(), "--repeats", "1", "--threads", "1", "--out", str(out)])
    found = report.read_rows(out.with_suffix(".csv"))
    assert [(row["contender"], row["callers"]) for row in found] == [
        (name, callers) for callers in ("1", "3") for name in serving.APIS
    ]
    assert all(0 < float(row["p50_ms"]) <= float(row["p99_ms"]) for row in found)
