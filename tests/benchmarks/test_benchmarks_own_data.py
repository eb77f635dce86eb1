"""Scores on a file of one's own, as the run's own record has them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import hashlib

from benchmarks import own_data
from benchmarks.harness import report
from spafit import cli
from weights_tools.tiny import make_tiny


def test_a_row_is_what_spafit_train_records(tmp_path: Path) -> None:
    """Oracle: the run folder of the same command."""
    weights = str(make_tiny(tmp_path / "weights", num_hidden_layers=6))
    data = tmp_path / "pets.csv"
    rows = [f'"the {a} sat, {n} times",{a}' for n in range(12) for a in ("cat", "dog", "dog")]
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    options = ["--epochs", "2", "--learning-rate", "1e-3", "--quiet"]
    own_data.main(
        [str(data), "--model", weights, "--seeds", "3", "--out", str(tmp_path / "x"), *options]
    )
    train = ["train", "--data", str(data), "--model", weights, "--method", "SPAFIT-1-3-II"]
    assert cli.main([*train, "--seeds", "3", "--out", str(tmp_path / "run"), *options]) == 0
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    found = report.read_rows(tmp_path / "x.csv")
    assert {row["metric"] for row in found} == set(result["metrics"])
    for row in found:
        assert float(row["score"]) == pytest.approx(result["metrics"][row["metric"]], rel=1e-3)
        majority = result["majority"][row["metric"]]
        assert float(row["commonest_class"]) == pytest.approx(majority, rel=1e-3)
        assert row["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
        assert (row["epochs"], row["seed"], row["options"]) == ("2", "3", " ".join(options))


def test_scores_and_majority_are_not_mixed_up(tmp_path: Path) -> None:
    """Oracle: a record made by hand."""
    (tmp_path / "x.csv").touch()
    parsed = argparse.Namespace(data=tmp_path / "x.csv", method="bitfit", model="minilm")
    result = {"metrics": {"accuracy": 0.9}, "majority": {"accuracy": 0.4}}
    record = {
        "result": {**result, "best_epoch": 2, "seconds": 3.5},
        "settings": {"epochs": 5, "batch_size": 16, "learning_rate": 1e-3},
    }
    [row] = own_data.rows_of(record, parsed, ["--quiet"], 7)
    assert (row["metric"], row["score"], row["commonest_class"]) == ("accuracy", 0.9, 0.4)
    assert (row["seed"], row["best_epoch"], row["time_s"], row["epochs"]) == (7, 2, 3.5, 5)


def test_what_spafit_train_refuses_ends_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        own_data.main([str(tmp_path / "none.csv"), "--model", str(tmp_path)])
    assert ended.value.code == 2
