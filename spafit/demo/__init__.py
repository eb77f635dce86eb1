"""``spafit demo``: a small real BERT fine-tuned on a task that the package generates."""
