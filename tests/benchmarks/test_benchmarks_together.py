"""Seeds that share the output of their frozen layers are timed, if their numbers are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support.small_runs import N_DEV, N, write_glue

from benchmarks import together
from benchmarks.harness import report
from benchmarks.harness.timing import WrongResultError
from spafit.training.fit import fit


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Callable[[], Path]:
    """Measure two seeds, one epoch each; give the table."""
    write_glue(tmp_path / "glue")
    arguments = (
        f"--data {tmp_path / 'glue'} --model {tiny} --method SPAFIT-0-1-II --seeds 4 0 "
        f"--epochs 1 --rows 13 --repeats 1 --out {tmp_path / 'x'}"
    )

    def measure() -> Path:
        together.main(arguments.split())
        return tmp_path / "x.csv"

    return measure


def test_from_end_to_end(run: Callable[[], Path], computed: list[int]) -> None:
    """Oracle: the examples that group 1 is computed of for what is kept, checked and timed."""
    rows = report.read_rows(run())
    assert sum(computed) == 2 * (2 + 1 + 1) * (13 + N_DEV) and N > 13
    assert [row["contender"] for row in rows] == list(together.CACHES)
    for row in rows:
        assert (row["train_rows"], row["seed"], row["layers"]) == ("13", "4 0", "1 of 4 frozen")
        for kind in ("time", "cpu"):
            assert float(row[f"median_{kind}_ms"]) > 0
    assert rows[0]["cpu_ratio"] == rows[0]["ratio"] == "1"


@pytest.mark.parametrize("wrong", [together.COMPUTED, together.TOGETHER])
def test_other_numbers_are_not_timed(
    run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def other(model: Any, *rest: Any, shared: Any) -> Any:
        name = together.TOGETHER if shared is not None else together.KEPT
        if rest[-1].cache_prefix == "off":
            name = together.COMPUTED
        if name == wrong:
            model.bert.encoder.layer[0].output.dense.weight.data[0, 0] += 0.3
        return fit(model, *rest, shared=shared)

    monkeypatch.setattr(together, "fit", other)
    with pytest.raises(WrongResultError, match=f"^{wrong}: losses of seed 4 differs"):
        run()
