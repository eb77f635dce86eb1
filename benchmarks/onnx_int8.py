"""What a run's score loses in bf16, in ONNX, and in int8 by the engines' own quantization.

    python -m benchmarks.onnx_int8 runs/rte runs/mrpc --data DATA --engines PACKAGES

Rows are the run itself, in float32 and in bf16, its ONNX graph, that graph with the matrices in
int8 (onnxruntime's dynamic quantization, a scale for each column), and, with ``--engines``,
OpenVINO's int8 of it, calibrated on rows of train (:mod:`benchmarks.contenders.engines`): the score
on dev, what the commonest class would score, on which share of the rows the answer is the run's,
the largest difference of a logit, and the size of the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders.engines import OPENVINO_INT8
from benchmarks.harness.arguments import RESULTS, set_threads
from benchmarks.harness.child_process import ChildProcess
from benchmarks.harness.lengths import DATA
from benchmarks.harness.report import place, write_results
from benchmarks.inference import install
from spafit import glue
from spafit.cli.trained import Trained
from spafit.tasks import own, scoring
from spafit.tasks.table import GlueTask
from spafit.tasks.task import Dataset
from spafit.text.tokenization import Encodings
from spafit.training.inference import decode, encode, predict, probabilities_of, scale_of
from weights_tools.formats.onnx import ONNX, export

GRAPH, SMALL, OPENVINO = "ONNX", "ONNX, int8", "OpenVINO, int8"
INT8 = "model-int8.onnx"
FILES = {GRAPH: (ONNX,), SMALL: (INT8,), OPENVINO: OPENVINO_INT8}
BATCH = 32

#: (n, C), in the order of the data.
Logits = NDArray[np.float32]


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, quantize, score and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="the folders of runs")
    parser.add_argument("--model", help="the base model, if it lies elsewhere now")
    parser.add_argument("--data", type=Path, default=DATA, help="GLUE's root, or a file of dev")
    parser.add_argument("--engines", type=Path, metavar="PACKAGES", help="OpenVINO too (GLUE only)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_int8", help="without an ending")
    parsed = parser.parse_args(arguments)
    set_threads(parsed)
    if parsed.engines:
        install(parsed.engines)
    rows = []
    for run in parsed.runs:
        trained = Trained(run, parsed.model, mapped=None)
        if isinstance(trained.task, GlueTask):
            dev = glue.load(trained.task.name, "dev", parsed.data)
        else:
            dev = own.dataset(parsed.data, task=trained.task, labelled=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            export(trained, folder)
            quantize(folder)
            others = {}
            if parsed.engines:
                train = glue.load(trained.task.name, "train", parsed.data)
                others[OPENVINO] = by_openvino(folder, trained, dev, train, parsed.engines)
            rows += compare(trained, dev, folder, others)
    write_results(parsed.out, rows, "bf16, ONNX and int8")


def quantize(folder: Path) -> None:
    """Write the graph with its matrices in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        folder / ONNX, folder / INT8, weight_type=QuantType.QInt8, per_channel=True
    )  # the products' other operand gets its scale when it is there: no calibration


def compare(
    trained: Trained,
    dev: Dataset,
    folder: Path,
    others: Mapping[str, Logits] | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each form, the others among them, and metric."""
    [run] = trained.runs
    settings = run.record["settings"]
    found, rounded = (
        predict(
            run.model, run.tokenizer, dev, max_length=settings["max_length"], precision=precision
        )
        for precision in ("float32", "bf16")
    )
    forms = {"spafit": found.logits, "spafit, bf16": rounded.logits}
    forms |= {name: logits_of(folder / FILES[name][0], trained, dev) for name in (GRAPH, SMALL)}
    forms |= others or {}
    majority = scoring.majority(dev.task, dev.labels)
    rows: list[dict[str, Any]] = []
    for name, logits in forms.items():
        labels = decode(logits, found.names, scale_of(run.model, dev.task))
        probabilities = probabilities_of(logits, found.names, dev.task)
        scores = scoring.compute(dev.task, labels, dev.labels, probabilities)
        first = rows[: len(scores)]
        sizes = [(folder / file).stat().st_size / 2**20 for file in FILES.get(name, ())]
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
                    "size_mib": sum(sizes) or "",
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


def by_openvino(
    folder: Path, trained: Trained, dev: Dataset, train: Dataset, packages: Path
) -> Logits:
    """Return the logits that OpenVINO computes in int8, calibrated on some rows of train."""
    encoded = [_encoded(trained, dataset) for dataset in (dev, train)]
    rows, sample = ([its.input_ids, its.token_type_ids] for its in encoded)
    setup = {"rows": rows, "sample": sample, "batch_size": BATCH, "engines": [OPENVINO]}
    (folder / "setup.json").write_text(json.dumps(setup), encoding="utf-8")
    arguments = [str(folder), str(torch.get_num_threads())]
    with closing(ChildProcess("benchmarks.contenders.engines", arguments, packages)) as child:
        for why in child.ready["left_out"].values():
            raise SystemExit(f"{OPENVINO}: {why:.300}")
        every = list(range(len(dev)))
        answer = child.ask({"engine": OPENVINO, "rows": every, "check": True, "rest_s": 0})
    return np.array(answer["logits"], dtype=np.float32)


def logits_of(path: Path, trained: Trained, dev: Dataset) -> Logits:
    """Return the logits that onnxruntime computes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    encodings = _encoded(trained, dev)
    order = encodings.by_length(range(len(dev)))
    logits = np.zeros((len(dev), trained.runs[0].model.num_labels), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        batch = encodings.batch(some)._asdict()
        [logits[some]] = session.run(None, {name: each.numpy() for name, each in batch.items()})
    return logits


def _encoded(trained: Trained, dataset: Dataset) -> Encodings:
    [run] = trained.runs
    return encode(run.model, run.tokenizer, dataset, run.record["settings"]["max_length"])


if __name__ == "__main__":
    main()
