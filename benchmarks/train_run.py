"""A whole training run of real weights: ``spafit.fit`` against a plain loop of transformers + PEFT.

    python -m benchmarks.train_run --task cola --epochs 3 --kept-prefix
    python -m benchmarks.train_run --task rte --rows 320 --epochs 1

MiniLM by SPAFIT-1-3-II. From texts to the scores of the last epoch: tokenizing, every step, and an
evaluation on dev after each epoch. The loop trains on the same batches in the same order, padded to
their longest, and evaluates in batches of 64 sorted by length. Building the models is not timed.
The two sides draw different dropout masks, so their scores are similar, not equal; the rows include
them. With one run each a ratio has no spread: use ``--repeats`` to get one.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.arguments import add_run_arguments, set_threads
from benchmarks.baseline import padded_logits, peft_twin
from benchmarks.contenders import MAX_GRAD_NORM, TOLERANCES, Training, packed_logits
from benchmarks.harness import Rows, check_results, rotated, timings
from benchmarks.lengths import DATA, MAX_LENGTH
from benchmarks.report import place, write_results
from spafit.bert import BertForSequenceClassification
from spafit.strata import adapt
from spafit.tasks import glue, scoring
from spafit.tasks.glue import Dataset
from spafit.text.tokenization import Encodings, Tokenizer, load_tokenizer
from spafit.training.fit import fit
from spafit.training.inference import decode, encode
from spafit.training.optimisation import epoch_order, learning_rate_factor, make_optimizer
from spafit.training.settings import TrainConfig
from spafit.weights.pretrained import load_pretrained

PEFT, SPAFIT, SPAFIT_KEPT = "transformers + PEFT", "spafit", "spafit, prefix kept"
#: What keeping the prefix changes in the settings: dropout is off in group 1.
KEPT: dict[str, Any] = {"cache_prefix": "memory", "dropout_in_group_1": False}
_DEV_BATCH = 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_run_arguments(parser, out="train_run")
    parser.add_argument("--task", choices=("cola", "rte"), default="cola")
    parser.add_argument("--data", type=Path, default=DATA, help="GLUE's root")
    parser.add_argument("--model", default="minilm", help="folder, or hub name")
    parser.add_argument("--method", default="SPAFIT-1-3-II")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rows", type=int, help="train on the first ones alone")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kept-prefix", action="store_true")
    parsed = parser.parse_args(arguments)
    set_threads(parsed)

    train, dev = (glue.load(parsed.task, split, parsed.data) for split in ("train", "dev"))
    train = dataclasses.replace(train, examples=train.examples[: parsed.rows])
    folder = parsed.model
    tokenizer = load_tokenizer(folder)
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
        model = load_pretrained(folder, num_labels=train.task.num_labels, seed=parsed.seed)
        adapt(model, parsed.method, seed=parsed.seed)
        return model

    encodings = encode(fresh_model(), tokenizer, train, None)
    check_first_batch(fresh_model(), encodings, train, config)
    names = [PEFT, SPAFIT, *([SPAFIT_KEPT] if parsed.kept_prefix else [])]
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    scores: dict[str, dict[str, float]] = {}
    for number in range(parsed.repeats):
        for name in rotated(names, number):
            model: Any = fresh_model()
            if name == PEFT:
                model = peft_twin(model)
            settings = dataclasses.replace(config, **(KEPT if name == SPAFIT_KEPT else {}))
            began = time.perf_counter()
            if name == PEFT:
                scores[name] = fit_peft(model, tokenizer, train, dev, settings)
            else:
                result = fit(model, tokenizer, train, dev, settings)
                scores[name] = dict(result.history[-1]["metrics"])
            times_ms[name].append(1000 * (time.perf_counter() - began))
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
            **place(torch.device("cpu"), "float32"),
        }
        for timing in timings(times_ms, [whole_run] * parsed.repeats)
    ]
    title = f"Training run: MiniLM, {parsed.method}, {train.task.display}, {len(train)} rows"
    write_results(parsed.out, rows, f"{title}, {parsed.epochs} epochs")


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


def fit_peft(
    twin: nn.Module, tokenizer: Tokenizer, train: Dataset, dev: Dataset, config: TrainConfig
) -> dict[str, float]:
    """Train as ``spafit.fit`` does, in plain PyTorch; return the scores of the last epoch."""
    assert config.batch_size is not None and config.learning_rate is not None
    torch.manual_seed(config.seed)
    names = train.task.labels
    scores: dict[str, float] = {}
    encoded = {
        dataset.split: tokenizer.encode(dataset.texts_a, dataset.texts_b, max_length=MAX_LENGTH)
        for dataset in (train, dev)
    }
    targets = torch.tensor([names.index(str(label)) for label in train.labels])
    logits = padded_logits(twin, encoded["train"])
    dev_logits = padded_logits(twin, encoded["dev"])
    optimizer = _optimizer(twin, config)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    steps_an_epoch = math.ceil(len(train) / config.batch_size)
    total_steps = steps_an_epoch * config.epochs
    step = 0
    for epoch in range(1, config.epochs + 1):
        twin.train()
        order = epoch_order(len(train), config.seed, epoch).tolist()
        for start in range(0, len(train), config.batch_size):
            rows = order[start : start + config.batch_size]
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * learning_rate_factor(step, total_steps, 0.0)
            loss = F.cross_entropy(logits(rows), targets[rows])
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        twin.eval()
        order = encoded["dev"].by_length(range(len(dev)))
        found = np.empty((len(dev), len(names)), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(dev), _DEV_BATCH):
                rows = order[start : start + _DEV_BATCH]
                found[rows] = dev_logits(rows).numpy()
        scores = scoring.compute(dev.task, decode(found, names), dev.labels)
    return scores


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
