"""Fine-tune on RTE by accelerate: python examples/accelerate_loop.py FOLDER DATA OUT."""

import sys

import torch
from accelerate import Accelerator

import spafit


def fine_tune(folder, data, out, epochs=3, batch_size=16):
    model = spafit.load_pretrained(folder, num_labels=2)
    tokenizer = spafit.load_tokenizer(folder)
    spafit.adapt(model, "SPAFIT-20%-40%-II")
    train = spafit.glue.load("rte", "train", data)
    names = train.task.labels

    def collate(rows):
        batch = tokenizer([row.text_a for row in rows], [row.text_b for row in rows], 128)
        return {**batch, "labels": torch.tensor([names.index(row.label) for row in rows])}

    loader = torch.utils.data.DataLoader(train.examples, batch_size, True, collate_fn=collate)
    wrapped = spafit.interop.for_trainer(model, names)
    trained = [each for each in wrapped.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(spafit.parameter_groups(model, 5e-4))
    accelerator = Accelerator()
    prepared, optimizer, loader = accelerator.prepare(wrapped, optimizer, loader)
    prepared.train()
    for _ in range(epochs):
        for batch in loader:
            accelerator.backward(prepared(**batch).loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    wrapped.save_pretrained(out)  # OUT/adapter.safetensors
    return accelerator, wrapped


if __name__ == "__main__":
    fine_tune(*sys.argv[1:])
