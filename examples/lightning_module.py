"""Fine-tune on RTE by Lightning: python examples/lightning_module.py FOLDER DATA OUT."""

import sys

import pytorch_lightning as lightning
import torch

import spafit


class FineTuning(lightning.LightningModule):  # its checkpoints hold what trains alone
    def __init__(self, model, labels):
        super().__init__()
        self.model = spafit.interop.for_trainer(model, labels)

    def training_step(self, batch, number):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(spafit.parameter_groups(self.model.model, 5e-4))


def fine_tune(folder, data, out, batch_size=16, **settings):
    model = spafit.load_pretrained(folder, num_labels=2)
    spafit.adapt(model, "SPAFIT-20%-40%-II")
    tokenizer, train = spafit.load_tokenizer(folder), spafit.glue.load("rte", "train", data)

    def collate(rows):
        batch = tokenizer([r.text_a for r in rows], [r.text_b for r in rows], 128)
        return {**batch, "labels": torch.tensor([train.task.labels.index(r.label) for r in rows])}

    loader = torch.utils.data.DataLoader(train.examples, batch_size, True, collate_fn=collate)
    tuning = FineTuning(model.train(), train.task.labels)
    lightning.Trainer(**{"max_epochs": 3, "default_root_dir": out, **settings}).fit(tuning, loader)
    tuning.model.save_pretrained(out)  # OUT/adapter.safetensors
    return tuning


if __name__ == "__main__":
    fine_tune(*sys.argv[1:])
