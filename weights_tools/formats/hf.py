"""A run as a plain BERT for transformers: merged weights, config.json, the tokenizer's files."""

from __future__ import annotations

from pathlib import Path

from spafit.cli.trained import Trained
from spafit.errors import PlanError
from spafit.trunk.merging import merged_state_dict
from spafit.weights.safefile import save_tensors
from weights_tools.formats.beside import score_note, write_beside


def export(trained: Trained, folder: str | Path) -> list[str]:
    """Write a run as model.safetensors, config.json and the tokenizer's files.

    ``AutoModelForSequenceClassification``, ``AutoTokenizer`` and
    ``pipeline("text-classification")`` of transformers load the folder.

    What it takes, returns and refuses is said in :mod:`weights_tools.formats`.
    """
    folder = Path(folder)
    run = trained.runs[0]
    try:
        state = merged_state_dict(run.model)
    except PlanError as error:
        raise PlanError(f"{error}; or give --format adapters, which holds bottlenecks") from None
    save_tensors(folder / "model.safetensors", state, {"format": "pt"})
    write_beside(trained, folder)
    notes = ["truncation=True cuts texts as in training; without it long ones are refused"]
    return notes + score_note(trained)
