"""Serving several tasks on one base: spafit against the same server around transformers + PEFT.

    python -m benchmarks.serving --model minilm --tasks 9
    python -m benchmarks.serving --callers 1 8 --asked 1

Contenders, each a server of its own (:mod:`examples/serve.py`), asked in turns over loopback:

- PEFT, the rows that wait together batched by task, padded to the longest, its adapter switched on
  for each (the baseline)
- PEFT, each request by itself
- spafit, which computes the layers below the first LoRA once

Each caller sends one text at a time and waits for the answers of all the tasks that it asked; the
texts are rows of a GLUE task. A row is a text for one task. The adapters are LoRA above layer N1
(no biases: PEFT takes a second adapter with biases for none) with random values; before anything is
timed the servers' answers are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import spafit
from benchmarks.contenders.baseline import lora_config, peft_twin
from benchmarks.harness.arguments import add_run_arguments, set_threads
from benchmarks.harness.lengths import DATA, TASKS
from benchmarks.harness.report import place, write_results
from benchmarks.harness.timing import WrongResultError, rotated
from spafit.adapters import LoRALinear
from spafit.training.inference import Predictions

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
serve: Any = importlib.import_module("serve")

PEFT, APART, SPAFIT = "PEFT, by task", "PEFT, by request", "spafit"
NAMES = ("no", "yes")
TOLERANCE = 1e-4


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_run_arguments(parser, out="serving")
    parser.add_argument("--model", default="minilm", help="folder of weights, or minilm (minilm)")
    parser.add_argument("--task", choices=TASKS, default="rte", help="whose texts are sent (rte)")
    parser.add_argument("--data", type=Path, default=DATA, help="GLUE's root")
    parser.add_argument("--tasks", type=int, default=9, help="adapters on the base (9)")
    parser.add_argument("--asked", type=int, help="tasks that a request asks for (all)")
    parser.add_argument("--frozen", type=int, help="layers below the first LoRA (a fifth)")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=320, help="of all callers, a round (320)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parsed = parser.parse_args(arguments)
    set_threads(parsed)
    asked = parsed.asked or parsed.tasks

    dev = spafit.glue.load(parsed.task, "dev", parsed.data)
    texts = [[each.text_a, each.text_b] if dev.task.pair else each.text_a for each in dev]
    found: dict[tuple[str, int], list[tuple[list[float], float]]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = write_adapters(folder, parsed.model, parsed.tasks, parsed.frozen, parsed.seed)
        ports = {
            name: stack.enter_context(served(name, parsed.model, runs))
            for name in (PEFT, APART, SPAFIT)
        }
        names = [run.name for run in runs]
        check({name: ask(connect(port), texts[:8], names) for name, port in ports.items()})
        for number in range(parsed.repeats):
            for callers in parsed.callers:
                for name in rotated(list(ports), number):
                    draw = random.Random(number)
                    requests = [
                        ([draw.choice(texts)], draw.sample(names, asked))
                        for _ in range(parsed.requests)
                    ]
                    timed = call(ports[name], requests, callers)
                    found.setdefault((name, callers), []).append(timed)
    settings = {"model": parsed.model, "task": parsed.task, "seed": parsed.seed}
    where = place(torch.device("cpu"), "float32")
    rows = [
        {
            **settings,
            "contender": name,
            "tasks": parsed.tasks,
            "asked": asked,
            "callers": callers,
            "requests": parsed.requests * parsed.repeats,
            **summary(rounds, asked * parsed.requests),
            **where,
        }
        for (name, callers), rounds in found.items()
    ]
    write_results(parsed.out, rows, f"Serving {parsed.tasks} tasks")


def summary(rounds: Sequence[tuple[list[float], float]], rows: int) -> dict[str, float]:
    """Return percentiles of the latency of all requests, and the median of rounds of the rate."""
    latency = np.concatenate([each for each, _ in rounds])
    rates = [rows / seconds for _, seconds in rounds]
    return {
        "p50_ms": 1000 * float(np.percentile(latency, 50)),
        "p99_ms": 1000 * float(np.percentile(latency, 99)),
        "rows_per_s": float(np.median(rates)),
        "rows_per_s_min": min(rates),
        "rows_per_s_max": max(rates),
    }


def write_adapters(
    folder: Path, base: str | Path, count: int, frozen: int | None, seed: int
) -> list[Path]:
    """Write a folder for each task, with an adapter of random LoRA matrices and a head."""
    model = spafit.load_pretrained(base)
    L = model.config.num_hidden_layers
    first = L // 5 if frozen is None else frozen
    maps = ("attention.self.query", "attention.self.key", "attention.self.value")
    lora = {each: [spafit.LoRA(8, 16.0)] for each in (*maps, "attention.output.dense")}
    strata = [spafit.Stratum("LoRA", first, L - 1, lora)]
    if first:
        strata.insert(0, spafit.Stratum("frozen", 0, first - 1))
    generator = torch.Generator().manual_seed(seed)
    runs = []
    for number in range(count):
        run = folder / f"task-{number}"
        run.mkdir()
        spafit.adapt(model, spafit.Plan("LoRA", L, strata), name=run.name, num_labels=len(NAMES))
        with torch.no_grad():
            for parameter in (each for each in model.parameters() if each.requires_grad):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        assert model.adaptation is not None
        model.adaptation.task, model.adaptation.labels = run.name, NAMES
        spafit.save_adapter(model, run / "adapter.safetensors")
        spafit.remove_adapter(model, run.name)
        runs.append(run)
    return runs


def peft_of(model: spafit.BertForSequenceClassification) -> Any:
    """Return PEFT's model with all adapters of a spafit model, of LoRA and heads of one size."""
    twin: Any = None
    for name in model.adaptations:
        spafit.use(model, name)
        lora = {path: each for path, each in model.named_modules() if isinstance(each, LoRALinear)}
        if twin is None:  # the first is called "default"
            twin = peft_twin(model)
            continue
        twin.add_adapter(name, lora_config(lora))
        values: dict[str, nn.Parameter] = dict(twin.named_parameters())
        with torch.no_grad():
            for path, each in lora.items():
                for key in ("lora_A", "lora_B"):
                    values[f"base_model.model.{path}.{key}.{name}.weight"].copy_(
                        each.get_parameter(key)
                    )
            for key in ("weight", "bias"):
                head = f"base_model.model.classifier.modules_to_save.{name}.{key}"
                values[head].copy_(model.classifier.get_parameter(key))
    spafit.use(model, None)
    return twin.eval()


class PeftTasks(serve.Tasks):  # type: ignore[misc]
    """The server of examples/serve.py around transformers + PEFT."""

    def setup(self, device: str) -> None:
        """Load the base and all adapters."""
        super().setup(device)
        self.first = next(iter(self.model.adaptations))
        self.twin = peft_of(self.model)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Any]) -> list[Any]:
        """Answer each task's texts as one padded batch."""
        tasks = [each.tasks for each in questions for _ in each.texts]
        texts = [text for each in questions for text in each.texts]
        rows: dict[str, list[int]] = {}
        for row, names in enumerate(tasks):
            for name in names:
                rows.setdefault(name, []).append(row)
        answers: list[dict[str, Any]] = [{} for _ in texts]
        for name, some in rows.items():
            self.twin.set_adapter("default" if name == self.first else name)
            of = [
                texts[row] if isinstance(texts[row], tuple) else (texts[row], None) for row in some
            ]
            firsts, seconds = zip(*of, strict=True)
            batch = self.tokenizer(firsts, seconds, self.model.config.max_position_embeddings)
            logits = self.twin(**batch._asdict()).logits
            labels = [NAMES[place] for place in logits.argmax(1).tolist()]
            found = iter(self.rows(Predictions(logits.numpy(), labels, 0, NAMES)))
            for row in some:
                answers[row][name] = next(found)
        every = iter(answers)
        return [[next(every) for _ in each.texts] for each in questions]


class PeftApart(PeftTasks):
    """The same, each request by itself."""

    def predict(self, questions: Sequence[Any]) -> list[Any]:
        """Answer one question after the other."""
        return [super(PeftApart, self).predict([each])[0] for each in questions]


APIS = {PEFT: PeftTasks, APART: PeftApart, SPAFIT: serve.Tasks}


@contextlib.contextmanager
def served(name: str, base: str | Path, runs: Sequence[Path]) -> Iterator[int]:
    """Start the server of a contender in processes of its own; yield its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    code = (
        "import sys; from benchmarks import serving; name, base, port, *runs = sys.argv[1:]; "
        "serving.serve.run(serving.APIS[name](base, runs), int(port))"
    )
    command = [sys.executable, "-c", code, name, str(base), str(port), *map(str, runs)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env={**os.environ, **threads})
    try:
        end = time.monotonic() + 120
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server of {name} did not start")
            with contextlib.suppress(OSError):
                connection = connect(port)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def connect(port: int) -> http.client.HTTPConnection:
    """Return a connection of a caller."""
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


def ask(
    connection: http.client.HTTPConnection, texts: Sequence[Any], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """Ask a server, and return its answers for each text."""
    body = json.dumps({"texts": list(texts), "tasks": list(tasks)})
    connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"the server answered {answer.status}: {text[:200]!r}")
    return list(json.loads(text))


def call(
    port: int, requests: Sequence[tuple[Sequence[Any], Sequence[str]]], callers: int
) -> tuple[list[float], float]:
    """Send requests by so many callers at once; return the seconds of each, and of all."""
    waiting, taken = iter(requests), threading.Lock()
    latency: list[float] = []

    def caller() -> None:
        connection = connect(port)
        while True:
            with taken:
                request = next(waiting, None)
            if request is None:
                return
            began = time.perf_counter()
            ask(connection, *request)
            latency.append(time.perf_counter() - began)

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if len(latency) < len(requests):
        raise RuntimeError(f"{len(requests) - len(latency)} of {len(requests)} had no answer")
    return latency, seconds


def check(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raise a WrongResultError if a server's probabilities are not the baseline's."""
    expected, *others = answers.values()
    for name, found in zip(list(answers)[1:], others, strict=True):
        for one, other in zip(expected, found, strict=True):
            for task, each in one.items():
                for label, sure in each["probabilities"].items():
                    if abs(sure - other[task]["probabilities"][label]) > TOLERANCE:
                        raise WrongResultError(f"{name} has another answer for {task} than {PEFT}")


if __name__ == "__main__":
    main()
