"""The engines that other people run BERT by, in a process of its own; :mod:`benchmarks.inference`.

    PYTHONPATH=PACKAGES:. python -m benchmarks.contenders.engines FOLDER THREADS

FOLDER has model.onnx, and ``setup.json`` with the rows, the size of a batch, and perhaps other rows
as a sample to calibrate by. Each engine gets the rows sorted by length, in batches padded to their
longest, and answers with their logits and its own time. What is made of the graph once (int8) stays
in FOLDER.

- onnxruntime: all of its graph optimisations. int8: its dynamic quantization, a scale for each
  column of a matrix.
- OpenVINO: float32 and bf16 by its hint of the precision. int8: nncf's post-training quantization
  for transformers, calibrated on 32 rows of the sample; what is not int8 is in the precision that
  OpenVINO chooses.
- CTranslate2: its encoder, and the head by numpy.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors.numpy import load_file

from benchmarks.inference import SORTED, Predict, predictor
from spafit.text.tokenization import Batch, Encodings
from weights_tools.formats.onnx import ONNX

#: From ids, mask and segments, each int64 (B, T), to logits (B, C).
Engine = Callable[[dict[str, Any]], Any]

#: What OpenVINO's int8 is made of the graph.
OPENVINO_INT8 = ("openvino-int8.xml", "openvino-int8.bin")

_CALIBRATED_ON = 32


def main(arguments: Sequence[str], questions: TextIO, answers: TextIO) -> None:
    """Answer questions until they end."""
    folder, threads = Path(arguments[0]), int(arguments[1])
    torch.set_num_threads(threads)
    setup = json.loads((folder / "setup.json").read_text(encoding="utf-8"))
    encodings, sample = (
        Encodings(ids, types, pad_id=0)
        for ids, types in (setup["rows"], setup.get("sample", setup["rows"]))
    )
    predict: dict[str, Predict] = {}
    left_out = {}
    for name in setup["engines"]:
        try:
            engine = ENGINES[name](folder, threads, sample)
        except Exception as error:  # an engine that is not there, or does not take this model
            left_out[name] = f"{type(error).__name__}: {error}"
            continue
        predict[name] = predictor(_on(engine, encodings), SORTED, encodings, setup["batch_size"])
    versions = {name: metadata.version(name.split(",")[0].lower()) for name in predict}
    print(json.dumps({"versions": versions, "left_out": left_out}), file=answers, flush=True)
    for line in questions:
        asked = json.loads(line)
        time.sleep(asked["rest_s"])
        found, times_ms = predict[asked["engine"]](asked["rows"])
        answer: dict[str, Any] = {"times_ms": times_ms}
        if asked["check"]:
            answer["logits"] = found.tolist()
        print(json.dumps(answer), file=answers, flush=True)


def _on(engine: Engine, encodings: Encodings) -> Callable[[Sequence[int]], torch.Tensor]:
    """Return a function from row numbers to what an engine says of them."""

    def logits(numbers: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.array(engine(_arrays(encodings.batch(numbers)))))

    return logits


def _arrays(batch: Batch) -> dict[str, Any]:
    return {name: each.numpy() for name, each in batch._asdict().items()}


def onnxruntime(path: str) -> Callable[..., Engine]:
    """Return what makes an engine of a graph."""

    def make(folder: Path, threads: int, _: Encodings) -> Engine:
        runtime = importlib.import_module("onnxruntime")
        if not (folder / path).exists():
            from benchmarks.onnx_int8 import quantize

            quantize(folder)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        session = runtime.InferenceSession(
            str(folder / path), options, providers=["CPUExecutionProvider"]
        )
        return lambda batch: session.run(None, batch)[0]

    return make


def openvino(precision: str) -> Callable[..., Engine]:
    """Return what makes an engine of a precision."""

    def make(folder: Path, threads: int, sample: Encodings) -> Engine:
        ov = importlib.import_module("openvino")
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        path = folder / ONNX
        if precision == "int8":
            path = folder / OPENVINO_INT8[0]
            if not path.exists():
                ov.save_model(_calibrated(ov.Core().read_model(folder / ONNX), sample), path)
        else:
            settings["INFERENCE_PRECISION_HINT"] = precision
        compiled = ov.Core().compile_model(ov.Core().read_model(path), "CPU", settings)
        request = compiled.create_infer_request()
        return lambda batch: request.infer(batch)[0]

    return make


def _calibrated(model: Any, sample: Encodings) -> Any:
    """Return the model in int8, its scales found on some rows."""
    nncf = importlib.import_module("nncf")
    step = max(1, len(sample) // _CALIBRATED_ON)
    rows = range(0, len(sample), step)[:_CALIBRATED_ON]
    data = nncf.Dataset([_arrays(sample.batch([row])) for row in rows])
    return nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))


def ctranslate2(precision: str) -> Callable[..., Engine]:
    """Return what makes an engine of a precision."""

    def make(folder: Path, threads: int, _: Encodings) -> Engine:
        library = importlib.import_module("ctranslate2")
        if not (folder / "ctranslate2").exists():
            converter = library.converters.TransformersConverter(str(folder / "transformers"))
            converter.convert(str(folder / "ctranslate2"))
        encoder = library.Encoder(
            str(folder / "ctranslate2"), compute_type=precision, intra_threads=threads
        )
        head = load_file(folder / "head.safetensors")

        def logits(batch: dict[str, Any]) -> Any:
            lengths = batch["attention_mask"].sum(1)
            view = library.StorageView.from_array
            found = encoder.forward_batch(
                view(batch["input_ids"].astype(np.int32)),
                view(lengths.astype(np.int32)),
                batch["token_type_ids"].tolist(),
            )
            return np.array(found.pooler_output) @ head["weight"].T + head["bias"]

        return logits

    return make


ENGINES = {
    "onnxruntime, float32": onnxruntime(ONNX),
    "onnxruntime, int8": onnxruntime("model-int8.onnx"),
    "OpenVINO, float32": openvino("f32"),
    "OpenVINO, bf16": openvino("bf16"),
    "OpenVINO, int8": openvino("int8"),
    "CTranslate2, float32": ctranslate2("float32"),
}


if __name__ == "__main__":
    to_parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries say is no answer
    main(sys.argv[1:], sys.stdin, to_parent)
