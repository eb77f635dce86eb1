"""Train by transformers' Trainer and PEFT alone: the other side of :mod:`benchmarks.train_run`.

    python -m benchmarks.contenders.trainer_run SETTINGS.json

The task's files are read by :mod:`spafit.tasks`, which needs no torch; the best scores are printed
as JSON. The adapter is saved at the end alone, which is less than a run of spafit saves.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from spafit.tasks import glue, scoring


def main(settings: dict[str, Any]) -> None:
    """Train, save, and print the scores of the best epoch."""
    transformers.set_seed(settings["seed"])
    task = glue.get_task(settings["task"])
    sets = {split: glue.load(task, split, settings["data"]) for split in ("train", "dev")}
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])

    def encoded(split: str) -> list[dict[str, Any]]:
        data = sets[split]
        texts = list(data.texts_a), None if data.texts_b is None else list(data.texts_b)
        columns = dict(tokenizer(*texts, truncation=True, max_length=512))
        columns["labels"] = [task.labels.index(str(label)) for label in data.labels]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def scores(found: Any) -> dict[str, float]:
        answers = [task.labels[number] for number in np.argmax(found.predictions, axis=1)]
        return scoring.compute(task, answers, sets["dev"].labels)

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        settings["model"], num_labels=task.num_labels, dtype=torch.float32
    )
    model.requires_grad_(False)
    lora = peft.LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        target_modules="|".join(map(re.escape, settings["lora"])),  # matched against whole names
        modules_to_save=["classifier"],
    )
    twin = peft.get_peft_model(model, lora)
    for name in settings["biases"]:  # PEFT has no stratum of biases
        place, _, bias = f"base_model.model.{name}".rpartition(".")
        module = twin.get_submodule(place)
        getattr(module, "base_layer", module).get_parameter(bias).requires_grad_(True)
    trainable = sum(each.numel() for each in twin.parameters() if each.requires_grad)
    assert trainable == settings["trainable"], (trainable, settings["trainable"])

    trainer = transformers.Trainer(
        model=twin,
        args=arguments_of_trainer(settings, settings["out"], len(sets["train"])),
        train_dataset=encoded("train"),
        eval_dataset=encoded("dev"),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=scores,
    )
    trainer.train()
    twin.save_pretrained(settings["out"])
    first = f"eval_{task.metrics[0]}"
    found = [each for each in trainer.state.log_history if first in each]
    best = max(found, key=lambda each: each[first])
    print(json.dumps({name: best[f"eval_{name}"] for name in task.metrics}))


def arguments_of_trainer(
    settings: dict[str, Any], out: str, rows: int
) -> transformers.TrainingArguments:
    """Return what the Trainer is told to train this many rows as spafit does with its settings."""
    steps = math.ceil(rows / settings["batch_size"]) * settings["epochs"]
    return transformers.TrainingArguments(
        output_dir=out,
        seed=settings["seed"],
        bf16=settings["precision"] == "bf16",
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=64,
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        warmup_steps=math.ceil(settings["warmup"] * steps),
        max_grad_norm=settings["max_grad_norm"],
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
