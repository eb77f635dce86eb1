"""Fine-tune on RTE by transformers' Trainer: python examples/trainer.py FOLDER DATA OUT."""

import sys

import torch
from transformers import Trainer, TrainingArguments

import spafit


def fine_tune(folder, data, out, **settings):
    model = spafit.load_pretrained(folder, num_labels=2)
    tokenizer = spafit.load_tokenizer(folder)
    spafit.adapt(model, "SPAFIT-20%-40%-II")
    train, dev = (spafit.glue.load("rte", split, data) for split in ("train", "dev"))
    names = train.task.labels

    def collate(rows):
        batch = tokenizer([row.text_a for row in rows], [row.text_b for row in rows], 128)
        return {**batch, "labels": torch.tensor([names.index(row.label) for row in rows])}

    def accuracy(found):
        return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}

    usual = {"per_device_train_batch_size": 16, "report_to": "none"}
    keep_best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    each_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    arguments = TrainingArguments(out, **{**usual, **keep_best, **each_epoch, **settings})
    wrapped = spafit.interop.for_trainer(model, names)
    sets = {"train_dataset": train.examples, "eval_dataset": dev.examples}
    sets["optimizers"] = (torch.optim.AdamW(spafit.parameter_groups(model, 5e-4)), None)
    trainer = Trainer(wrapped, arguments, collate, **sets, compute_metrics=accuracy)
    trainer.train()
    wrapped.save_pretrained(out)  # OUT/adapter.safetensors
    return trainer


if __name__ == "__main__":
    fine_tune(*sys.argv[1:])
