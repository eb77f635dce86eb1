"""The benchmark of inference, at a tiny size, its other engines in a thread or made up.

Oracles: each other's logits, and differences worked out by hand.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.in_thread import InThread
from support.tiny_bert import CONFIG

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import inference
from benchmarks.contenders import engines
from benchmarks.contenders.models import SHAPES
from benchmarks.harness import child_process, report
from benchmarks.harness.timing import Rows, WrongResultError
from spafit.text.tokenization import Encodings

SMALL = dataclasses.replace(CONFIG, vocab_size=28_996, max_position_embeddings=512)
COMMAND = (
    "--model-shape tiny --task cola --rows 5 --batch-size 2 --repeats 2 --method SPAFIT-1-3-II "
    "--data /nowhere"
).split()
CHOSEN = ("transformers, bf16 autocast", "onnxruntime, int8", "OpenVINO, bf16", *inference.OURS)


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab" / "vocab.txt").write_text("[PAD]\n")
    return tmp_path / "vocab"


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put the child into a thread, with one engine off by 1/4096 and one missing."""
    twins: list[Any] = []
    monkeypatch.setitem(SHAPES, "tiny", SMALL)
    monkeypatch.setattr(inference, "_REST_S", 0.0)
    monkeypatch.setattr(child_process, "Popen", InThread)
    monkeypatch.setattr("weights_tools.formats.onnx.write_graphs", lambda *_: [])
    build = inference.peft_twin

    def twin(model: Any) -> Any:
        twins.append(build(model))
        return twins[-1]

    def off(*_: object) -> engines.Engine:
        @torch.no_grad()
        def logits(batch: dict[str, Any]) -> Any:
            given = {name: torch.from_numpy(each) for name, each in batch.items()}
            found = twins[-1].base_model.model(**given).logits.numpy()
            return found + np.float32(1 / 4096)

        return logits

    def missing(*_: object) -> engines.Engine:
        raise ModuleNotFoundError("No module named 'openvino'")

    monkeypatch.setattr(inference, "peft_twin", twin)
    monkeypatch.setattr(engines.metadata, "version", lambda name: f"1.0 of {name}")
    monkeypatch.setitem(engines.ENGINES, "onnxruntime, int8", off)
    monkeypatch.setitem(engines.ENGINES, "OpenVINO, bf16", missing)
    return twins


def measured(tmp_path: Path, *more: str) -> list[dict[str, str]]:
    inference.main([*COMMAND, "--out", str(tmp_path / "x"), *more])
    return report.read_rows(tmp_path / "x.csv")


def test_against_transformers(tmp_path: Path) -> None:
    rows = measured(tmp_path)
    assert [row["contender"] for row in rows] == [
        f"{name}, {order}"
        for name in ("transformers + PEFT", "spafit")
        for order in (inference.FILE_ORDER, inference.SORTED)
    ]
    assert {row["rounds"] for row in rows} == {"2"}
    assert rows[0]["ratio"] == "1"
    assert "largest_difference" not in rows[0]


@pytest.mark.parametrize("batch_size", ["2", "1"])
def test_against_engines(
    tmp_path: Path, vocab: Path, capsys: pytest.CaptureFixture[str], batch_size: str
) -> None:
    more = ["--engines", str(tmp_path), "--vocab", str(vocab), "--contenders", *CHOSEN]
    rows = measured(tmp_path, *more, "--batch-size", batch_size)
    assert [row["contender"] for row in rows] == [
        "transformers, float32",
        "transformers, bf16 autocast",
        "onnxruntime 1.0 of onnxruntime, int8",
        "spafit, float32",
        "spafit, bf16",
    ]
    assert "OpenVINO, bf16 left out: ModuleNotFoundError: No module" in capsys.readouterr().out
    assert {row["rounds"] for row in rows} == {"2"}
    base, autocast, off, ours, bf16 = (float(row["largest_difference"]) for row in rows)
    assert (base, off) == (0.0, pytest.approx(1 / 4096, rel=1e-2))
    assert ours < 1e-5 < min(autocast, bf16) < 0.1
    assert all(0 < float(row["p50_ms"]) <= float(row["p99_ms"]) for row in rows)


def test_the_latency_is_that_of_a_batch() -> None:
    times = iter([[1.0, 2.0, 3.0], [5.0, 5.0, 4.0]])
    run = inference.Run(lambda _: next(times))
    assert [run(Rows((0,), 1)) for _ in range(2)] == [6.0, 14.0]
    assert inference._latency(run) == {"p50_ms": 3.5, "p99_ms": 5.0}


def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab: Path
) -> None:
    monkeypatch.setitem(
        engines.ENGINES,
        "onnxruntime, float32",
        lambda *_: lambda batch: np.zeros((len(batch["input_ids"]), 2), np.float32),
    )
    more = ["--engines", str(tmp_path), "--vocab", str(vocab)]
    with pytest.raises(WrongResultError, match="onnxruntime, float32: logits differ"):
        measured(tmp_path, *more, "--contenders", "onnxruntime, float32")
    with pytest.raises(SystemExit, match="there is no contender onnx"):
        measured(tmp_path, *more, "--contenders", "onnx")


class TestEngines:
    """Oracle: what the made-up libraries were asked for."""

    def test_openvino(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        asked: list[Any] = []

        class Core:
            def read_model(self, path: Path) -> str:
                return path.name

            def compile_model(self, *given: Any) -> Core:
                asked.append(given)
                return self

            def create_infer_request(self) -> Core:
                return self

            def infer(self, batch: dict[str, Any]) -> list[Any]:
                return [batch["input_ids"] + 1]

        def save_model(model: object, path: Path) -> None:
            asked.append(model)
            path.write_text("made")

        library, quantizer = ModuleType("openvino"), ModuleType("nncf")
        monkeypatch.setattr(library, "Core", Core, raising=False)
        monkeypatch.setattr(library, "save_model", save_model, raising=False)
        monkeypatch.setattr(quantizer, "Dataset", list, raising=False)
        monkeypatch.setattr(
            quantizer, "ModelType", type("T", (), {"TRANSFORMER": "t"}), raising=False
        )
        monkeypatch.setattr(
            quantizer,
            "quantize",
            lambda model, rows, **settings: (model, len(rows), settings),
            raising=False,
        )
        monkeypatch.setitem(sys.modules, "openvino", library)
        monkeypatch.setitem(sys.modules, "nncf", quantizer)
        rows = Encodings([[1, 2]] * 70, [[0, 0]] * 70, 0)
        hint = {"INFERENCE_NUM_THREADS": 2, "PERFORMANCE_HINT": "LATENCY"}
        engine = engines.openvino("bf16")(tmp_path, 2, rows)
        assert asked == [("model.onnx", "CPU", {**hint, "INFERENCE_PRECISION_HINT": "bf16"})]
        assert engine({"input_ids": np.ones((1, 2))}).tolist() == [[2, 2]]
        for _ in range(2):
            engines.openvino("int8")(tmp_path, 2, rows)
        made = ("model.onnx", 32, {"model_type": "t", "subset_size": 32})
        assert asked[1:] == [made, *[("openvino-int8.xml", "CPU", hint)] * 2]


def test_the_engines_are_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def pip(command: list[str], *, check: bool) -> None:
        assert check
        calls.append(command)
        Path(command[command.index("--target") + 1]).mkdir()

    monkeypatch.setattr(inference.subprocess, "run", pip)
    for _ in range(2):
        inference.install(tmp_path / "packages")
    [command] = calls
    pinned = Path(command[-1]).read_text(encoding="utf-8").splitlines()
    names = {line.split("==")[0] for line in pinned if not line.startswith("#")}
    assert names == {"openvino", "nncf", "ctranslate2"}


def test_a_sample_of_train_calibrates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: logits that count each row's tokens, plus the number of rows in the sample."""
    from benchmarks import onnx_int8

    def engine(folder: Path, threads: int, sample: Encodings) -> engines.Engine:
        return lambda batch: batch["attention_mask"].sum(1, keepdims=True) + float(len(sample))

    monkeypatch.setitem(engines.ENGINES, onnx_int8.OPENVINO, engine)
    rows = {"dev": Encodings([[1], [1, 1, 1], [1, 1]], [[0], [0, 0, 0], [0, 0]], 0)}
    rows["train"] = Encodings([[1]] * 40, [[0]] * 40, 0)
    monkeypatch.setattr(onnx_int8, "_encoded", lambda trained, dataset: rows[dataset])
    found = onnx_int8.by_openvino(tmp_path, None, "dev", "train", tmp_path)  # type: ignore[arg-type]
    assert found.tolist() == [[41.0], [43.0], [42.0]]
