"""Runs with values drawn at random, as if they had been trained, for the tests of exchange."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spafit import glue
from spafit.bert import BertForSequenceClassification
from spafit.cli.trained import Trained
from spafit.plans import Plan, Stratum
from spafit.strata import adapt
from spafit.tasks.table import GlueTask
from spafit.tasks.task import Task
from spafit.techniques import Technique
from spafit.text.tokenization import load_tokenizer
from spafit.weights.adapter_files import save_adapter
from spafit.weights.pretrained import load_pretrained

L = 4  # of the tiny base
TEXTS = ["a cat sleeps", "the old teacher likes the children, the student sees a dog", "dog"]
PAIRS = ["the cat", "a teacher sees the old dog", "children"]


def three(*tables: Mapping[str, Sequence[Technique]], **settings: Any) -> Plan:
    """Return a plan of a frozen layer, and of one stratum a table in those above it."""
    cut = [1 + (L - 1) * number // len(tables) for number in range(len(tables) + 1)]
    strata = [
        Stratum(f"part {number}", first, end - 1, table)
        for number, (first, end, table) in enumerate(zip(cut, cut[1:], tables, strict=False))
    ]
    return Plan("mine", L, [Stratum("still", 0, 0), *strata], **settings)


def shaken(model: BertForSequenceClassification, by: float = 0.1) -> BertForSequenceClassification:
    """Move all that trains, as training would."""
    generator = torch.Generator().manual_seed(7)
    assert model.adaptation is not None
    with torch.no_grad():
        for name in model.adaptation.trainable:
            parameter = model.get_parameter(name)
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def a_run(folder: Path, base: Path, plan: Plan | str, task: Task | str = "mnli") -> Trained:
    """Write the folder of a run, and load it as the command line does."""
    task = glue.get_task(task) if isinstance(task, str) else task
    model = load_pretrained(base, num_labels=task.num_labels)
    adapt(model, plan, seed=3)
    shaken(model)
    definition = None if isinstance(task, GlueTask) else task.to_json_dict()
    assert model.adaptation is not None
    model.adaptation.task, model.adaptation.definition = task.name, definition
    model.adaptation.labels = tuple(reversed(task.labels))  # not the task's order
    folder.mkdir(parents=True)
    save_adapter(model, folder / "adapter.safetensors")
    record = {
        "task": task.name,
        **({} if definition is None else {"definition": definition}),
        "status": "finished",
        "settings": {"max_length": 17, "precision": "float32", "device": "cpu"},
        "about": {"model": str(base)},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return Trained(folder, None, mapped=None)


def batch_of(base: Path) -> dict[str, torch.Tensor]:
    """Return a padded batch of pairs, as keywords."""
    return dict(load_tokenizer(base)(TEXTS, PAIRS))


def logits_of(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return logits (B, C) of spafit's or of transformers' model."""
    with torch.no_grad():
        output = model.eval()(**batch)
    logits: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return logits


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference."""
    assert found.shape == expected.shape
    return float((found.detach() - expected.detach()).abs().max())
