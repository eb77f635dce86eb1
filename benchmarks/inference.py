"""Inference on the rows of dev: spafit against transformers, and against other engines.

    python -m benchmarks.inference --task rte
    python -m benchmarks.inference --task rte --rows 48 --repeats 5 --engines PACKAGES
    python -m benchmarks.inference --task sst-2 --rows 50 --batch-size 1 --engines PACKAGES

Contenders, in turns, from row numbers to logits. Without ``--engines``:

- transformers + PEFT, batches in the order of the file, padded to their longest (the baseline)
- the same, with all rows sorted by length first
- spafit's merged model, the same batches in the order of the file, and sorted, which is what
  ``spafit.predict`` does; in the precision asked for

With it, all on merged weights and on rows sorted by length, each with the largest difference of a
logit from the baseline's:

- transformers in float32 (the baseline) and under bf16 autocast, and both by torch.compile
- those of :mod:`benchmarks.contenders.engines`, in a process of their own; what it needs is
  installed into the folder PACKAGES, if there is no such folder yet
- spafit in float32 and bf16

A round is all rows once, batch after batch; p50_ms and p99_ms are of a batch, with batches of 1 the
latency of one text. Every contender rests for 50 ms before its turn, while the threads of the one
before it go to sleep. What is made of the graph once stays in PACKAGES/graphs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.contenders.baseline import Logits, padded_logits, peft_twin
from benchmarks.contenders.models import (
    DTYPES,
    SHAPES,
    TOLERANCES,
    adapted_model,
    in_order,
    packed_logits,
)
from benchmarks.harness.arguments import add_model_arguments, device_of, method_of, settings_of
from benchmarks.harness.child_process import ChildProcess
from benchmarks.harness.lengths import load_rows
from benchmarks.harness.report import Row, place, results, write_results
from benchmarks.harness.timing import Contender, Rows, compare
from spafit.bert import BertForSequenceClassification
from spafit.machine.memory import keep_freed_memory
from spafit.text.tokenization import Encodings
from spafit.trunk.flat import FlatModel

FILE_ORDER, SORTED = "in file order", "sorted by length"
ENGINES = (
    *("onnxruntime, float32", "onnxruntime, int8"),
    *("OpenVINO, float32", "OpenVINO, bf16", "OpenVINO, int8", "CTranslate2, float32"),
)
TORCH = (
    *("transformers, float32", "transformers, bf16 autocast"),
    *("transformers, float32, compiled", "transformers, bf16 autocast, compiled"),
)
OURS = ("spafit, float32", "spafit, bf16")

_REQUIREMENTS = Path(__file__).parent / "requirements-engines.txt"
_REST_S = 0.05

#: Row numbers -> their logits (n, C), and the milliseconds of each batch.
Predict = Callable[[Sequence[int]], tuple[Tensor, list[float]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_model_arguments(parser, out="inference")
    parser.add_argument("--rows", type=int, default=277, help="the first ones of dev (277)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument(
        "--engines", type=Path, metavar="PACKAGES", help="their folder, which is made if need be"
    )
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help="with --engines: all but the baseline"
    )
    parsed = parser.parse_args(arguments)
    device = device_of(parsed)
    if device.type != "cpu" and parsed.engines:
        parser.error("--engines is for a CPU")
    if parsed.engines:
        install(parsed.engines)
    keep_freed_memory()  # both sides then have what spafit.predict alone would ask for

    data = load_rows(parsed.task, "dev", parsed.data, parsed.vocab)
    [rows] = data.first(parsed.rows, parsed.rows)
    model = adapted_model(SHAPES[parsed.model_shape], method_of(parsed), parsed.seed, device)
    sides = _with_engines if parsed.engines else _without_engines
    with sides(model, data.encodings, parsed) as contenders:
        baseline, *candidates = contenders
        timings = compare(
            baseline,
            candidates,
            [rows],
            warmup=0,  # the check has run all rows
            repeats=parsed.repeats,
            tolerance=TOLERANCES[parsed.dtype],
        )
        right = baseline.check(rows)["logits"].double()
        differences = [
            float((each.check(rows)["logits"].double() - right).abs().max()) for each in contenders
        ]
    settings = {
        **settings_of(parsed, data.source),
        "split": f"dev, {len(rows.numbers)} rows",
        "method": method_of(parsed),
        "layers": SHAPES[parsed.model_shape].num_hidden_layers,
    }
    found = results(settings, timings, place(device, parsed.dtype))
    if parsed.engines:
        found = [
            {**row, **_latency(each.run), "largest_difference": difference}
            for row, each, difference in zip(found, contenders, differences, strict=True)
        ]
    title = f"Inference: {parsed.model_shape}, {method_of(parsed)}, {parsed.task.upper()} dev"
    write_results(parsed.out, found, f"{title}, batches of {parsed.batch_size}")


def install(packages: Path) -> None:
    """Install the engines into a folder of their own, unless it is there."""
    if not packages.exists():
        print(f"installing the engines into {packages} ...", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
        subprocess.run([*pip, "-r", str(_REQUIREMENTS)], check=True)


class Run:
    """A contender's work, which keeps the time of each batch.

    Attributes
    ----------
    times_ms : list of list of float
        Of each call.
    """

    def __init__(self, times_of: Callable[[Rows], list[float]]) -> None:
        self._times_of = times_of
        self.times_ms: list[list[float]] = []

    def __call__(self, rows: Rows) -> float:
        """Return the milliseconds of all batches."""
        self.times_ms.append(self._times_of(rows))
        return sum(self.times_ms[-1])


def _latency(run: object) -> Row:
    assert isinstance(run, Run)
    half, most = np.quantile(np.concatenate(run.times_ms), [0.5, 0.99]).tolist()
    return {"p50_ms": half, "p99_ms": most}


@contextmanager
def _without_engines(
    model: BertForSequenceClassification, encodings: Encodings, parsed: argparse.Namespace
) -> Iterator[list[Contender]]:
    """Yield spafit and transformers with PEFT."""
    theirs = padded_logits(peft_twin(model), encodings, parsed.dtype)
    ours = flat_logits(model, encodings, parsed.dtype)
    yield [
        predicting(f"{name}, {order}", logits, order, encodings, parsed.batch_size)
        for name, logits in (("transformers + PEFT", theirs), ("spafit", ours))
        for order in (FILE_ORDER, SORTED)
    ]


@contextmanager
def _with_engines(
    model: BertForSequenceClassification, encodings: Encodings, parsed: argparse.Namespace
) -> Iterator[list[Contender]]:
    """Yield transformers, the engines that could be made, and spafit."""
    chosen = [*TORCH, *ENGINES, *OURS] if parsed.contenders is None else parsed.contenders
    if unknown := {*chosen} - {*TORCH, *ENGINES, *OURS}:
        raise SystemExit(f"there is no contender {', '.join(sorted(unknown))}")
    twin: Any = peft_twin(model)
    twin = twin.merge_and_unload()
    folder = parsed.engines / "graphs" / f"{parsed.model_shape}-{method_of(parsed)}-{parsed.seed}"
    engines = [name for name in ENGINES if name in chosen]
    _write(model, twin, encodings, folder, engines, parsed)
    arguments = [str(folder.resolve()), str(torch.get_num_threads())]
    with closing(ChildProcess("benchmarks.contenders.engines", arguments, parsed.engines)) as child:
        for name, why in child.ready["left_out"].items():
            print(f"{name} left out: {why:.300}", flush=True)
        compiled = torch.compile(twin, dynamic=True)
        logits: dict[str, Logits] = {}
        for name, side in zip(TORCH, (twin, twin, compiled, compiled), strict=True):
            precision = "bf16" if "bf16" in name else "float32"
            logits[name] = padded_logits(side, encodings, precision)
        found = [
            predicting(name, logits[name], SORTED, encodings, parsed.batch_size)
            for name in TORCH
            if name == TORCH[0] or name in chosen
        ]
        found += [
            _asking(child, name, version) for name, version in child.ready["versions"].items()
        ]
        for name in [each for each in OURS if each in chosen]:
            ours = flat_logits(model, encodings, name.rpartition(" ")[2])
            found.append(predicting(name, ours, SORTED, encodings, parsed.batch_size))
        yield found


def _write(
    model: BertForSequenceClassification,
    twin: nn.Module,
    encodings: Encodings,
    folder: Path,
    engines: Sequence[str],
    parsed: argparse.Namespace,
) -> None:
    """Write what :mod:`~benchmarks.contenders.engines` reads; graph and weights only once."""
    from weights_tools.formats.onnx import ONNX, write_graphs

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ONNX).exists():
        write_graphs(model, folder)
    theirs: Any = twin
    if not (folder / "transformers").exists():
        theirs.bert.save_pretrained(folder / "transformers")
        for path in parsed.vocab.iterdir():
            (folder / "transformers" / path.name).write_bytes(path.read_bytes())
        head = theirs.classifier.state_dict()
        save_file({name: each.clone() for name, each in head.items()}, folder / "head.safetensors")
    setup = {
        "rows": [encodings.input_ids, encodings.token_type_ids],
        "batch_size": parsed.batch_size,
        "engines": engines,
    }
    (folder / "setup.json").write_text(json.dumps(setup), encoding="utf-8")


def _asking(child: ChildProcess, name: str, version: str) -> Contender:
    """Return an engine of the other process as a contender; its time is that process's own."""

    def ask(rows: Rows, check: bool) -> dict[str, Any]:
        question = {"engine": name, "rows": rows.numbers, "check": check, "rest_s": _REST_S}
        return child.ask(question)

    library, _, precision = name.partition(", ")
    return Contender(
        f"{library} {version}, {precision}",
        Run(lambda rows: list(ask(rows, check=False)["times_ms"])),
        cache(lambda rows: {"logits": torch.tensor(ask(rows, check=True)["logits"])}),
        tolerance=_tolerance(precision),
        has_own_clock=True,
    )


def flat_logits(
    model: BertForSequenceClassification, encodings: Encodings, precision: str
) -> Logits:
    """Return spafit's merged forward pass on packed batches; on a GPU the model's own."""
    if model.device.type != "cpu":
        return packed_logits(model, encodings, precision)
    flat = FlatModel(model, DTYPES[precision])

    def logits(numbers: Sequence[int]) -> Tensor:
        order = encodings.by_length(numbers)
        return in_order(flat(encodings.packed(order)), order, numbers)

    return logits


def predicting(
    name: str, logits: Logits, order: str, encodings: Encodings, batch_size: int
) -> Contender:
    """Return a contender that predicts all rows it is given, in batches."""
    predict = predictor(logits, order, encodings, batch_size)

    def times_of(rows: Rows) -> list[float]:
        time.sleep(_REST_S)
        return predict(rows.numbers)[1]

    return Contender(
        name,
        Run(times_of),
        cache(lambda rows: {"logits": predict(rows.numbers)[0]}),
        tolerance=_tolerance(name),
        has_own_clock=True,
    )


def _tolerance(name: str) -> float | None:
    """Return how far logits may be off: what int8 loses is a result, not a mistake."""
    return 1.0 if "int8" in name else TOLERANCES["bf16"] if "bf16" in name else None


def predictor(logits: Logits, order: str, encodings: Encodings, batch_size: int) -> Predict:
    """Return what predicts rows in one order or another, in batches."""

    @torch.inference_mode()
    def predict(numbers: Sequence[int]) -> tuple[Tensor, list[float]]:
        taken = encodings.by_length(numbers) if order == SORTED else list(numbers)
        found, times_ms = [], []
        for start in range(0, len(taken), batch_size):
            began = time.perf_counter()
            found.append(logits(taken[start : start + batch_size]).float().cpu())
            times_ms.append(1000 * (time.perf_counter() - began))
        return in_order(torch.cat(found), taken, numbers), times_ms

    return predict


if __name__ == "__main__":
    main()
