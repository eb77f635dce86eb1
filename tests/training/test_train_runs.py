"""Whole runs: repeatable, evaluated when due, recorded, with failures reported."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.small_runs import (
    METHODS,
    N_DEV,
    N,
    SmallRun,
    files_below,
    loss_failing_from,
    make_dataset,
    read_log,
    trained,
    written,
)

import spafit.training.fit
import spafit.training.loop
import spafit.training.step
from spafit.errors import CheckpointError, TrainingError
from spafit.machine.memory import keep_freed_memory
from spafit.machine.versions import peak_memory_mib
from spafit.plans import Plan
from spafit.training.inference import evaluate
from spafit.training.optimisation import learning_rate_factor
from spafit.weights.adapter_files import load_adapter, read_adapter_header
from spafit.weights.pretrained import load_pretrained


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


class TestRepeatable:
    """Oracle: the same run, done again."""

    def test_equal_seeds_give_equal_bits(self, small: SmallRun, tmp_path: Path) -> None:
        results = []
        for name, seed in (("a", 3), ("b", 3), ("c", 4)):
            torch.manual_seed(len(results))  # what went before must not matter
            results.append(small.fit(out=tmp_path / name, seed=seed, epochs=2))
        files = [tmp_path / name / "adapter.safetensors" for name in "abc"]
        assert results[0].losses == results[1].losses
        assert results[0].history == results[1].history
        assert files[0].read_bytes() == files[1].read_bytes()
        assert results[0].losses != results[2].losses
        a, c = header_and_data(files[0]), header_and_data(files[2])
        assert a[0] == c[0]
        assert a[1] != c[1]

    def test_writing_and_looking_change_nothing(self, small: SmallRun, tmp_path: Path) -> None:
        """Neither a run folder, nor more evaluations, nor progress."""
        plain = small.fit(epochs=2)
        watched = small.fit(epochs=2, out=tmp_path, eval_every=1, quiet=False)
        assert plain.losses == watched.losses
        assert plain.files == ()

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_callers_random_state_stays(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch, fails: bool
    ) -> None:
        def states() -> list[object]:
            from_numpy = np.random.get_state()  # noqa: NPY002 - the global one is what is meant
            return [torch.get_rng_state().tolist(), random.getstate(), str(from_numpy)]

        before = states()
        if fails:
            monkeypatch.setattr(spafit.training.step, "loss_function", loss_failing_from(2))
            with pytest.raises(TrainingError):
                small.fit(epochs=6)
        else:
            small.fit(epochs=1)
        assert states() == before


class TestEvaluations:
    """Oracle: arithmetic on 25 examples in batches of 6, and made-up scores."""

    @pytest.mark.parametrize(
        ("eval_every", "expected"),
        [
            (None, [(5, 1), (10, 2)]),
            (4, [(4, 1), (8, 2), (10, 2)]),
            (5, [(5, 1), (10, 2)]),
            (99, [(10, 2)]),
        ],
    )
    def test_when(
        self,
        small: SmallRun,
        tmp_path: Path,
        eval_every: int | None,
        expected: list[tuple[int, int]],
    ) -> None:
        result = small.fit(epochs=2, eval_every=eval_every, out=tmp_path)
        assert [(row["step"], row["epoch"]) for row in result.history] == expected
        assert read_log(tmp_path, "evaluation") == [
            {"step": row["step"], "epoch": row["epoch"], "evaluation": row["metrics"]}
            for row in result.history
        ]

    def test_the_best_score_is_that_of_evaluate(self, small: SmallRun) -> None:
        model = small.model()
        data = (small.train, small.train)
        result = small.fit(model, data=data, epochs=6, learning_rate=1e-2)
        assert len({row["metrics"]["accuracy"] for row in result.history}) > 1
        assert evaluate(model, small.tokenizer, small.train) == result.metrics

    @pytest.mark.parametrize(
        ("scores", "best"),
        [([0.2, 0.7, 0.7, 0.5], 2), ([0.9, 0.1, 0.9, 0.9], 1), ([0.1, 0.2, 0.3, 0.4], 4)],
    )
    def test_best_by_the_first_metric_and_the_earliest_of_equals(
        self,
        small: SmallRun,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        scores: list[float],
        best: int,
    ) -> None:
        """MRPC's first metric is F1; its accuracy is made to say the contrary."""
        model = small.model()
        snapshots: list[dict[str, torch.Tensor]] = []

        def compute(*_: object) -> dict[str, float]:
            snapshots.append(trained(model))
            f1 = scores[len(snapshots) - 1]
            return {"f1": f1, "accuracy": 1 - f1}

        monkeypatch.setattr(
            spafit.training.fit.scoring, "majority", lambda *_: {"f1": 0, "accuracy": 0}
        )
        monkeypatch.setattr(spafit.training.fit.scoring, "compute", compute)
        data = (make_dataset("mrpc", N), make_dataset("mrpc", N_DEV, "dev", seed=5))
        result = small.fit(model, data=data, out=tmp_path)
        assert (result.best_epoch, result.best_step) == (best, 5 * best)
        assert result.metrics == {"f1": scores[best - 1], "accuracy": 1 - scores[best - 1]}
        logged = [row["evaluation"]["f1"] for row in read_log(tmp_path, "evaluation")]
        assert logged == scores
        assert logged.index(max(logged)) == best - 1
        found = trained(model)
        assert [
            number
            for number, snapshot in enumerate(snapshots, start=1)
            if all(torch.equal(found[name], tensor) for name, tensor in snapshot.items())
        ] == [best]
        with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
            expected = written(model)
            assert set(file.keys()) == set(expected)
            assert all(torch.equal(file.get_tensor(name), expected[name]) for name in expected)


class TestFailure:
    """Oracle: the run folder as a reader finds it."""

    @pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
    def test_sick_losses_stop_and_leave_the_best_before_them(
        self,
        small: SmallRun,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        value: float,
        shown: str,
    ) -> None:
        """Those from step 8 on; what was evaluated amid them is not kept in place of that."""
        monkeypatch.setattr(spafit.training.step, "loss_function", loss_failing_from(8, value))
        match = (
            r"25 steps in a row, up to step 32 \(epoch 7\), was NaN or infinite \(the last loss is "
            rf"{shown}\).*; try a lower learning rate than 0\.003"
        )
        with pytest.raises(TrainingError, match=match):
            small.fit(out=tmp_path, epochs=8)
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["status"] == "failed"
        assert record["error"].startswith("DivergedError: the loss or the gradient of 25 steps")
        assert "result" not in record
        rows = read_log(tmp_path, "loss")
        assert [row["step"] for row in rows] == list(range(1, 33))
        assert [row["step"] for row in rows if row["loss"] is not None] == [1, 2, 3, 4, 5, 6, 7]
        assert [row["step"] for row in rows if row.get("skipped")] == list(range(8, 33))
        evaluations = read_log(tmp_path, "evaluation")
        assert [each["step"] for each in evaluations] == [5, 10, 15, 20, 25, 30]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-5"]
        again = load_pretrained(small.folder)
        load_adapter(again, tmp_path / "adapter.safetensors")
        assert evaluate(again, small.tokenizer, small.dev) == evaluations[0]["evaluation"]
        kept = tmp_path / "checkpoints" / "step-5" / "adapter.safetensors"
        assert kept.read_bytes() == (tmp_path / "adapter.safetensors").read_bytes()

    def test_logits_on_dev_that_are_not_finite(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            spafit.training.loop, "predict_logits", lambda *_, **__: np.full((N_DEV, 2), np.nan)
        )
        with pytest.raises(TrainingError, match="logits on dev after step 5 are not finite"):
            small.fit(out=tmp_path, epochs=1)
        assert not (tmp_path / "adapter.safetensors").exists()
        assert not (tmp_path / "checkpoints").exists()

    def test_a_sick_gradient_moves_nothing_and_is_counted(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The loss is finite and its gradient is not: a step would make every parameter NaN."""

        def steep(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return (logits - logits.detach()).abs().sqrt().sum()

        model = small.model()
        before = trained(model)
        monkeypatch.setattr(spafit.training.step, "loss_function", steep)
        with pytest.raises(TrainingError, match="25 steps in a row"):
            small.fit(model, out=tmp_path, epochs=6)
        rows = read_log(tmp_path, "loss")
        assert [row["step"] for row in rows if row["grad_norm"] is None] == list(range(1, 26))
        assert all(torch.equal(before[name], value) for name, value in trained(model).items())

    def test_an_interrupt_is_recorded(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> torch.Tensor:
            raise KeyboardInterrupt

        monkeypatch.setattr(spafit.training.step, "loss_function", interrupt)
        with pytest.raises(KeyboardInterrupt):
            small.fit(out=tmp_path)
        assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"


class TestRunFolder:
    """Oracle: the arguments that went in, and the result that came out."""

    def test_run_json(self, small: SmallRun, tmp_path: Path) -> None:
        out = tmp_path / "deep" / "run"
        changes: dict[str, Any] = {"out": out, "epochs": 2, "max_length": 20}
        result = small.fit(about={"model": "tiny"}, **changes)
        record = json.loads((out / "run.json").read_text())
        assert record["status"] == "finished"
        assert (record["task"], record["method"]) == ("rte", "SPAFIT-0-1-II")
        assert record["about"] == {"model": "tiny"}
        assert Plan.from_json(json.dumps(record["plan"])) == METHODS["spafit"]
        settings = {**dataclasses.asdict(small.settings(**changes)), "recompute": []}
        resolved = {
            **{"precision": "float32", "frozen_weights": "float32", "step": "eager"},
            **{"dropout_in_group_1": True, "cache_prefix": "off"},
            **{"order_seed": small.settings().seed, "dropout_seed": small.settings().seed},
        }
        assert record["settings"] == {**settings, "out": str(out), **resolved}
        assert record["data"] == {
            name: {
                "source": f"rte {name}",
                "sha256": f"{number:064x}",
                "rows": rows,
                "bad_rows": 0,
                "truncated": result.truncated[name],
            }
            for name, number, rows in (("train", 1, N), ("dev", 2, N_DEV))
        }
        lengths = {
            name: small.tokenizer.encode(data.texts_a, data.texts_b, max_length=53).lengths
            for name, data in (("train", small.train), ("dev", small.dev))
        }
        longer = {name: sum(tokens > 20 for tokens in each) for name, each in lengths.items()}
        assert result.truncated == longer
        assert longer["train"] > 0
        header = read_adapter_header(out / "adapter.safetensors")
        assert record["base_fingerprint"] == header.base_fingerprint
        assert (header.task, header.labels) == ("rte", ("entailment", "not_entailment"))
        assert record["tokenizer_fingerprint"] == small.tokenizer.fingerprint
        assert record["versions"]["torch"] == torch.__version__
        assert record["machine"]["cpus"] >= 1
        assert record["result"]["metrics"] == result.metrics
        assert record["result"]["best_step"] == result.best_step
        numbers = sum(tensor.numel() for tensor in trained(small.model()).values())
        assert record["trainable"] == result.trainable == numbers

    def test_log(self, small: SmallRun, tmp_path: Path) -> None:
        result = small.fit(out=tmp_path, epochs=2, warmup=0.2)
        rows = read_log(tmp_path, "loss")
        assert [row["step"] for row in rows] == list(range(1, 11))
        assert [row["epoch"] for row in rows] == [1] * 5 + [2] * 5
        assert tuple(row["loss"] for row in rows) == result.losses
        expected = [3e-3 * learning_rate_factor(step, 10, 0.2) for step in range(10)]
        assert [row["learning_rate"] for row in rows] == expected
        assert all(row["grad_norm"] > 0 and row["step_time_ms"] > 0 for row in rows)

    def test_result(self, small: SmallRun, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        result = small.fit(out=tmp_path, epochs=1)
        names = ["adapter.safetensors", "dev.tsv", "log.jsonl", "run.json"]
        assert [path.name for path in result.files] == names  # and not the notes
        others = ["checkpoints", "notes.txt"]  # and no lock
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, *others])
        labels = [example.label for example in small.dev.examples]
        most = max(labels.count(name) for name in small.dev.task.labels)
        assert result.majority == {"accuracy": pytest.approx(most / N_DEV)}
        step_s = sum(row["step_time_ms"] for row in read_log(tmp_path, "loss")) / 1000
        assert result.examples_per_s == pytest.approx(N / step_s)
        assert result.seconds > step_s
        assert result.peak_memory_mib > 50  # torch alone takes more

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a peak anew")
    def test_its_peak_memory_is_its_own(self, small: SmallRun) -> None:
        """What the process took before, as for an earlier run of a grid, does not count."""
        keep_freed_memory()
        large = torch.ones(300, 2**18)  # 300 MiB
        before = peak_memory_mib(large.device)
        del large
        assert small.fit(epochs=1).peak_memory_mib < before - 200

    def test_another_run_is_refused_unless_told_otherwise(
        self, small: SmallRun, tmp_path: Path
    ) -> None:
        small.fit(out=tmp_path, epochs=2)
        before = files_below(tmp_path)
        match = r"holds another run: {}.* another folder, .* overwrite \(--overwrite\)"
        seed = match.format("seed is 3, asked for is 5")
        with pytest.raises(CheckpointError, match=seed):
            small.fit(out=tmp_path, epochs=1, seed=5)
        method = match.format("method is 'SPAFIT-0-1-II', asked for is 'Full Fine-tuning'")
        with pytest.raises(CheckpointError, match=method):
            small.fit(small.model("full"), out=tmp_path, epochs=2)
        assert files_below(tmp_path) == before
        result = small.fit(out=tmp_path, epochs=1, seed=5, overwrite=True)
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["settings"]["seed"] == 5
        assert "resumed" not in record
        assert len(read_log(tmp_path, "loss")) == len(result.losses) == 5
        after = files_below(tmp_path)
        assert after["adapter.safetensors"] != before["adapter.safetensors"]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-5"]
        assert after.keys() == {name for name in before if "step-10" not in name}

    def test_a_finished_run_gives_its_result_without_a_step(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = small.fit(out=tmp_path, epochs=2)
        before = files_below(tmp_path)

        def refuse(*_: object, **__: object) -> None:
            pytest.fail("a step was taken, or an evaluation made")

        monkeypatch.setattr(spafit.training.step.TrainingStep, "__call__", refuse)
        monkeypatch.setattr(spafit.training.loop, "predict_logits", refuse)
        model = small.model()
        again = small.fit(model, out=tmp_path, epochs=2)
        for field in dataclasses.fields(first):
            if field.name not in ("seconds", "peak_memory_mib"):
                assert getattr(again, field.name) == getattr(first, field.name), field.name
        found = written(model)
        with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
            assert all(torch.equal(file.get_tensor(name), found[name]) for name in found)
        after = files_below(tmp_path)
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == {"run.json", "log.jsonl"}
        assert after["log.jsonl"].startswith(before["log.jsonl"])
        (row,) = after["log.jsonl"][len(before["log.jsonl"]) :].splitlines()
        assert json.loads(row) == {"note": f"{tmp_path}: finished already after step 10"}
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["resumed"] == [{"step": 10, "changed": {}}]


class TestProgress:
    """Oracle: the result's own numbers."""

    def test_lines_where_there_is_no_terminal(
        self, small: SmallRun, capsys: pytest.CaptureFixture[str]
    ) -> None:
        result = small.fit(epochs=2, quiet=False)
        out, err = capsys.readouterr()
        first, second = (row["metrics"]["accuracy"] for row in result.history)
        majority = f"(majority {result.majority['accuracy']:.4f})"
        best = ", best so far" if second > first else ""
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 3
        assert lines[0] == f"epoch 1, step 5: dev accuracy {first:.4f} {majority}, best so far"
        form = r"step 10/10, epoch 2, loss \d\.\d{4}, \d+\.\d examples/s, 0:00 left"
        assert re.fullmatch(form, lines[1])
        assert lines[2] == f"epoch 2, step 10: dev accuracy {second:.4f} {majority}{best}"

    def test_quiet(self, small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
        small.fit(epochs=1)
        assert capsys.readouterr() == ("", "")
