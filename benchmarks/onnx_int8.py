"""What a run's score loses in bf16, in ONNX, and in int8 by onnxruntime's own dynamic quantization.

    python -m benchmarks.onnx_int8 runs/rte runs/mrpc --data DATA

Rows are the run itself, in float32 and in bf16, its ONNX graph, and that graph with the matrices in
int8 (a scale for each column): the score on dev, what the commonest class would score, on which
share of the rows the answer is the run's, the largest difference of a logit, and the size of the
file.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.arguments import RESULTS, set_threads
from benchmarks.lengths import DATA
from benchmarks.report import place, write_results
from spafit import glue
from spafit.cli.trained import Trained
from spafit.tasks import own, scoring
from spafit.tasks.table import GlueTask
from spafit.tasks.task import Dataset
from spafit.training.inference import decode, encode, predict, probabilities_of, scale_of
from weights_tools.formats.onnx import ONNX, export

INT8 = "model-int8.onnx"
FILES = {"ONNX": ONNX, "ONNX, int8": INT8}
BATCH = 32


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, quantize, score and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="the folders of runs")
    parser.add_argument("--model", help="the base model, if it lies elsewhere now")
    parser.add_argument("--data", type=Path, default=DATA, help="GLUE's root, or a file of dev")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_int8", help="without an ending")
    parsed = parser.parse_args(arguments)
    set_threads(parsed)
    rows = []
    for run in parsed.runs:
        trained = Trained(run, parsed.model, mapped=None)
        if isinstance(trained.task, GlueTask):
            dev = glue.load(trained.task.name, "dev", parsed.data)
        else:
            dev = own.dataset(parsed.data, task=trained.task, labelled=True)
        with tempfile.TemporaryDirectory() as folder:
            export(trained, folder)
            quantize(Path(folder))
            rows += compare(trained, dev, Path(folder))
    write_results(parsed.out, rows, "bf16, ONNX and int8")


def quantize(folder: Path) -> None:
    """Write the graph with its matrices in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        folder / ONNX, folder / INT8, weight_type=QuantType.QInt8, per_channel=True
    )  # the products' other operand gets its scale when it is there: no calibration


def compare(trained: Trained, dev: Dataset, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each form and metric."""
    [run] = trained.runs
    settings = run.record["settings"]
    found, rounded = (
        predict(
            run.model, run.tokenizer, dev, max_length=settings["max_length"], precision=precision
        )
        for precision in ("float32", "bf16")
    )
    forms = {name: logits_of(folder / file, trained, dev) for name, file in FILES.items()}
    forms = {"spafit": found.logits, "spafit, bf16": rounded.logits, **forms}
    majority = scoring.majority(dev.task, dev.labels)
    rows: list[dict[str, Any]] = []
    for name, logits in forms.items():
        labels = decode(logits, found.names, scale_of(run.model, dev.task))
        probabilities = probabilities_of(logits, found.names, dev.task)
        scores = scoring.compute(dev.task, labels, dev.labels, probabilities)
        first = rows[: len(scores)]
        size = (folder / FILES[name]).stat().st_size / 2**20 if name in FILES else ""
        for number, (metric, score) in enumerate(scores.items()):
            rows.append(
                {
                    "form": name,
                    "metric": metric,
                    "score": score,
                    "lost": first[number]["score"] - score if first else 0.0,
                    "commonest_class": majority[metric],
                    "same_answers": float(np.mean(np.array(labels) == np.array(found.labels))),
                    "largest_difference": float(np.abs(logits - found.logits).max()),
                    "size_mib": size,
                    "task": dev.task.name,
                    "method": run.record["method"],
                    "seed": settings["seed"],
                    "model": str(run.record["about"].get("model")),
                    "dev_rows": len(dev),
                    "onnxruntime": metadata.version("onnxruntime"),
                    **place(torch.device("cpu"), "float32"),
                }
            )
    return rows


def logits_of(path: Path, trained: Trained, dev: Dataset) -> NDArray[np.float32]:
    """Return the logits (n, C) that onnxruntime computes, in the order of the data."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    [run] = trained.runs
    max_length = run.record["settings"]["max_length"]
    encodings = encode(run.model, run.tokenizer, dev, max_length)
    order = encodings.by_length(range(len(dev)))
    logits = np.zeros((len(dev), run.model.num_labels), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        batch = encodings.batch(some)._asdict()
        [logits[some]] = session.run(None, {name: each.numpy() for name, each in batch.items()})
    return logits


if __name__ == "__main__":
    main()
