"""Small training runs, shared by the tests of training, prediction, adapter files and the command.

A random BERT of 4 layers, pairs of up to 9 words each, 25 examples in batches of 6: 5 steps an
epoch, the last of one example.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spafit import glue
from spafit.adapters import LoRALinear
from spafit.bert import BertForSequenceClassification, SelfAttention
from spafit.methods import plan
from spafit.plans import Plan
from spafit.strata import adapt
from spafit.tasks.glue import Dataset, Example
from spafit.text.tokenization import load_tokenizer
from spafit.training.fit import Result, fit
from spafit.training.inference import predict
from spafit.training.optimisation import loss_function
from spafit.training.settings import TrainConfig
from spafit.weights.pretrained import load_pretrained

N, N_DEV, BATCH, STEPS_AN_EPOCH = 25, 11, 6, 5
LEARNING_RATE = 3e-3
WORDS = "cat dog child children student teacher sees see likes sleeps sleep old quickly".split()
METHODS = {
    "spafit": plan("SPAFIT-0-1-II", 4, r=5, alpha=7.0, lora_dropout=0.2),
    "spafit-direct": plan("SPAFIT-0-1-I", 4, r=5, alpha=7.0, bias="direct"),
    "full": plan("full", 4),
}


def make_dataset(task: str, n: int, split: str = "train", seed: int = 0) -> Dataset:
    """Draw texts of 1 to 9 words; labels take turns, and each has words of its own to be known by.

    Scores are drawn, and have nothing to do with the words.
    """
    the_task = glue.get_task(task)
    draw = random.Random(seed)

    def text(words: list[str]) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 9)))

    examples = []
    for index in range(n):
        number = index % the_task.num_labels
        words = WORDS[number :: the_task.num_labels]
        examples.append(
            Example(
                index,
                text(words),
                text(words) if the_task.pair else None,
                round(draw.uniform(0, 5), 3) if the_task.is_regression else the_task.labels[number],
            )
        )
    return Dataset(the_task, split, tuple(examples), f"{task} {split}", 0, f"{seed:064x}")


def without_labels(dataset: Dataset) -> Dataset:
    """Take the labels away."""
    examples = tuple(dataclasses.replace(each, label=None) for each in dataset.examples)
    return dataclasses.replace(dataset, examples=examples)


class SmallRun:
    """What a small run needs: the folder of a tiny model, its tokenizer, and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.train = make_dataset("rte", N, seed=1)
        self.dev = make_dataset("rte", N_DEV, "dev", seed=2)

    def model(
        self,
        method: str | Plan = "spafit",
        *,
        num_labels: int = 2,
        dtype: torch.dtype = torch.float32,
        dropout: bool = True,
    ) -> BertForSequenceClassification:
        """Load the model and adapt it by a plan or a key of ``METHODS``."""
        model = load_pretrained(self.folder, num_labels=num_labels, dtype=dtype)
        adapt(model, METHODS[method] if isinstance(method, str) else method)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p *= dropout
            elif isinstance(module, (SelfAttention, LoRALinear)):
                module.dropout *= dropout
        return model

    def settings(self, **changes: Any) -> TrainConfig:
        """Return the settings of the small run, changed where asked for."""
        usual = {
            "seed": 3,
            "epochs": 4,
            "batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "device": "cpu",
            "quiet": True,
        }
        return TrainConfig(**{**usual, **changes})

    def fit(
        self,
        model: BertForSequenceClassification | None = None,
        *,
        data: tuple[Dataset, Dataset] | None = None,
        about: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Result:
        """Train a model, a fresh one where none is given."""
        model = self.model() if model is None else model
        train, dev = (self.train, self.dev) if data is None else data
        return fit(model, self.tokenizer, train, dev, self.settings(**changes), about=about)


def trained(model: BertForSequenceClassification) -> dict[str, torch.Tensor]:
    """Copy what trains."""
    assert model.adaptation is not None
    names = model.adaptation.trainable
    return {name: model.get_parameter(name).detach().clone() for name in names}


def written(model: BertForSequenceClassification) -> dict[str, torch.Tensor]:
    """Copy what trains, by the names of adapter files: δ is ``bias_delta`` there."""
    return {
        name.replace("bias_delta.delta", "bias_delta"): tensor
        for name, tensor in trained(model).items()
    }


def read_log(folder: Path, key: str) -> list[dict[str, Any]]:
    """Read the rows of log.jsonl that have a key: "loss" or "evaluation"."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def files_below(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder, by their names from there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def loss_failing_from(call: int, value: float = math.nan) -> Callable[..., torch.Tensor]:
    """Return a loss function whose answers from the n-th on are NaN or infinite."""
    calls = iter(range(1, 1000))

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss_function(logits, targets) * (value if next(calls) >= call else 1.0)

    return loss


def write_glue(root: Path, test_rows: int = 3, rows: int = N) -> Path:
    """Write RTE's three files in their original form; the texts are those of ``SmallRun``."""
    folder = root / "RTE"
    folder.mkdir(parents=True)
    for split, n, seed in (("train", rows, 1), ("dev", N_DEV, 2), ("test", test_rows, 3)):
        lines = ["index\tsentence1\tsentence2" + ("\tlabel" if split != "test" else "")]
        for example in make_dataset("rte", n, split, seed).examples:
            fields = [str(example.index), example.text_a, str(example.text_b), str(example.label)]
            lines.append("\t".join(fields if split != "test" else fields[:3]))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def undecided(small: SmallRun, data: Dataset) -> BertForSequenceClassification:
    """Load a model and shift its head so that it predicts every label for some examples."""
    model = load_pretrained(small.folder, num_labels=data.task.num_labels)
    logits = predict(model, small.tokenizer, data).logits
    with torch.no_grad():
        model.classifier.bias.sub_(torch.tensor(np.median(logits, axis=0)))
    if not data.task.is_regression:
        assert set(predict(model, small.tokenizer, data).labels) == set(data.task.labels)
    return model
