"""A whole training run of real weights: ``spafit train`` against transformers' Trainer with PEFT.

    python -m benchmarks.train_run --task mrpc --rows 640 --epochs 2 --repeats 5
    python -m benchmarks.train_run --task cola --rows 1600 --epochs 2 --repeats 5 --kept-prefix
    python -m benchmarks.train_run --task rte --rows 320 --epochs 2 --repeats 5 --bf16

MiniLM by SPAFIT-1-3-II. Whole processes, from their start to their end: imports, loading,
tokenizing, every step, an evaluation on dev after each epoch, and saving. They take turns. Both pad
or pack their batches as they do by default; the Trainer evaluates in batches of 64. The two sides
draw order, dropout and head themselves, so their scores are similar, not equal; the rows include
those of the last round. Before anything is timed the two models are compared on one batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contenders.baseline import lora_config, padded_logits, peft_twin
from benchmarks.contenders.models import TOLERANCES, Training, packed_logits
from benchmarks.harness.arguments import add_run_arguments, set_threads
from benchmarks.harness.lengths import DATA
from benchmarks.harness.report import place, write_results
from benchmarks.harness.timing import Rows, check_results, rotated, timings
from spafit.adapters import LoRALinear
from spafit.bert import BertForSequenceClassification
from spafit.runs.record import RUN, read_run
from spafit.strata import adapt
from spafit.tasks import glue
from spafit.tasks.glue import Dataset
from spafit.text.tokenization import Encodings, load_tokenizer
from spafit.training.inference import encode
from spafit.training.optimisation import epoch_order, make_optimizer
from spafit.training.settings import TrainConfig
from spafit.weights.hub import local_folder
from spafit.weights.pretrained import load_pretrained

PEFT, SPAFIT, SPAFIT_KEPT = "transformers + PEFT", "spafit", "spafit, prefix kept"
PEFT_BF16, SPAFIT_BF16 = f"{PEFT}, bf16", f"{SPAFIT}, bf16"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parsed = _parsed(arguments)
    set_threads(parsed)

    train, dev = (glue.load(parsed.task, split, parsed.data) for split in ("train", "dev"))
    train = dataclasses.replace(train, examples=train.examples[: parsed.rows])
    tokenizer = load_tokenizer(parsed.model)
    config = TrainConfig(
        seed=parsed.seed,
        epochs=parsed.epochs,
        batch_size=parsed.batch_size,
        learning_rate=parsed.learning_rate,
        precision="float32",
        device="cpu",
        quiet=True,
    )

    def fresh_model() -> BertForSequenceClassification:
        model = load_pretrained(parsed.model, num_labels=train.task.num_labels, seed=parsed.seed)
        adapt(model, parsed.method, seed=parsed.seed)
        return model

    encodings = encode(fresh_model(), tokenizer, train, None)
    check_first_batch(fresh_model(), encodings, train, config)
    names = [PEFT, SPAFIT]
    names += [SPAFIT_KEPT] if parsed.kept_prefix else []
    names += [PEFT_BF16, SPAFIT_BF16] if parsed.bf16 else []
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    scores: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place_of_runs:
        root = Path(place_of_runs)
        write_data(parsed.data, root / "data", train)
        settings = settings_of_trainer(fresh_model(), config)
        processes = processes_of(root, parsed, config, settings)
        for number in range(parsed.repeats):
            for name in rotated(names, number):
                began = time.perf_counter()
                printed = process(processes[name])
                times_ms[name].append(1000 * (time.perf_counter() - began))
                if name in (PEFT, PEFT_BF16):
                    scores[name] = json.loads(printed.splitlines()[-1])
                else:
                    scores[name] = read_run(root / "run" / RUN)["result"]["metrics"]
                print(f"{name}: {times_ms[name][-1] / 1000:.1f} s, dev {scores[name]}", flush=True)

    numbers, tokens = range(len(train)), sum(encodings.lengths)
    whole_run = Rows(tuple(numbers) * config.epochs, tokens * config.epochs)
    about = {
        "task": parsed.task,
        "lengths": "data",
        "method": parsed.method,
        "model": "MiniLM" if parsed.model == "minilm" else Path(parsed.model).name,
        "batch_size": parsed.batch_size,
        "epochs": parsed.epochs,
        "train_rows": len(train),
        "dev_rows": len(dev),
        "seed": parsed.seed,
    }
    first = train.task.metrics[0]
    rows = [
        {
            **about,
            **timing.columns(),
            "dev_score": scores[timing.name][first],
            "metric": first,
            **place(torch.device("cpu"), "bf16" if timing.name.endswith("bf16") else "float32"),
        }
        for timing in timings(times_ms, [whole_run] * parsed.repeats)
    ]
    title = f"Training run: MiniLM, {parsed.method}, {train.task.display}, {len(train)} rows"
    write_results(parsed.out, rows, f"{title}, {parsed.epochs} epochs")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_run_arguments(parser, out="train_run")
    parser.add_argument("--task", choices=("cola", "mrpc", "rte"), default="cola")
    parser.add_argument("--data", type=Path, default=DATA, help="GLUE's root")
    parser.add_argument("--model", default="minilm", help="folder, or hub name")
    parser.add_argument("--method", default="SPAFIT-1-3-II")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rows", type=int, help="train on the first ones alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kept-prefix", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="have both sides train in it too")
    return parser.parse_args(arguments)


def processes_of(
    root: Path, parsed: argparse.Namespace, config: TrainConfig, settings: dict[str, Any]
) -> dict[str, list[str]]:
    """Return Python's arguments for each contender, on the data that lie in ``root``."""
    data = str(root / "data")
    of_trainer = {
        **settings,
        "task": parsed.task,
        "data": data,
        "model": str(local_folder(parsed.model)),
        "out": str(root / "trainer"),
    }
    for precision in ("float32", "bf16"):
        told = json.dumps({**of_trainer, "precision": precision})
        (root / f"{precision}.json").write_text(told, encoding="utf-8")
    train_by = [
        *("-m", "spafit", "train", "--task", parsed.task, "--data", data),
        *("--model", parsed.model, "--method", parsed.method, "--epochs", str(config.epochs)),
        *("--batch-size", str(config.batch_size), "--seeds", str(config.seed), "--quiet"),
        *("--learning-rate", str(config.learning_rate), "--overwrite"),
        *("--out", str(root / "run")),
    ]
    return {
        PEFT: ["-m", "benchmarks.contenders.trainer_run", str(root / "float32.json")],
        SPAFIT: train_by,
        SPAFIT_KEPT: [*train_by, "--cache-prefix", "memory", "--no-dropout-in-group-1"],
        PEFT_BF16: ["-m", "benchmarks.contenders.trainer_run", str(root / "bf16.json")],
        SPAFIT_BF16: [*train_by, "--precision", "bf16"],
    }


def check_first_batch(
    model: BertForSequenceClassification, encodings: Encodings, train: Dataset, config: TrainConfig
) -> None:
    """Raise a WrongResultError if the two sides differ in the first batch, dropout off."""
    assert config.batch_size is not None
    numbers = epoch_order(len(train), config.seed, 1)[: config.batch_size].tolist()
    rows = Rows(tuple(numbers), sum(encodings.lengths[row] for row in numbers))
    targets = torch.tensor([train.task.labels.index(str(label)) for label in train.labels])
    twin = peft_twin(model)
    sides = [
        Training(PEFT, twin, padded_logits(twin, encodings), _optimizer(twin, config), targets),
        Training(
            SPAFIT,
            model,
            packed_logits(model, encodings),
            make_optimizer(model, learning_rate=1e-3, weight_decay=0.0),
            targets,
        ),
    ]
    baseline, candidate = (side.contender() for side in sides)
    check_results(baseline, [candidate], rows, TOLERANCES["float32"])


def write_data(root: Path, folder: Path, train: Dataset) -> None:
    """Write the task's files of GLUE to a folder, with the first rows of train alone."""
    task = train.task
    (folder / task.display).mkdir(parents=True)
    lines = (root / task.display / "train.tsv").read_bytes().splitlines(keepends=True)
    headers = len(lines) - len(glue.load(task, "train", root))
    cut = folder / task.display / "train.tsv"
    cut.write_bytes(b"".join(lines[: headers + len(train)]))
    shutil.copy(root / task.display / "dev.tsv", folder / task.display)
    assert glue.load(task, "train", folder).examples == train.examples


def settings_of_trainer(
    model: BertForSequenceClassification, config: TrainConfig
) -> dict[str, Any]:
    """Return what :mod:`~benchmarks.contenders.trainer_run` needs to train the same."""
    assert model.adaptation is not None
    lora = {name: each for name, each in model.named_modules() if isinstance(each, LoRALinear)}
    found = lora_config(lora)
    delta = ".bias_delta.delta"
    trained = model.adaptation.trainable
    return {
        "lora": list(lora),
        "r": found.r,
        "alpha": found.lora_alpha,
        "biases": [name.replace(delta, ".bias") for name in trained if name.endswith(delta)],
        "trainable": sum(model.get_parameter(name).numel() for name in trained),
        "seed": config.seed,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "warmup": config.warmup,
        "max_grad_norm": config.max_grad_norm,
    }


def process(arguments: Sequence[str]) -> str:
    """Run Python with these arguments and this process's threads; return what it prints."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    ran = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **threads}
    )
    if ran.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{ran.stderr[-2000:]}")
    return ran.stdout


def _optimizer(twin: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with the same groups as spafit's: matrices decay, vectors do not."""
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate or 0.0)


if __name__ == "__main__":
    main()
