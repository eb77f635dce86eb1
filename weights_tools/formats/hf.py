"""A run as a plain BERT for transformers: merged weights, config.json, the tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path

from spafit.cli.trained import Trained
from spafit.errors import PlanError, WeightsError
from spafit.files.replacing import replacing
from spafit.strata import merged_state_dict
from spafit.training.inference import scale_of
from spafit.weights.safefile import save_tensors
from weights_tools.formats.beside import labels_in_order, write_beside
from weights_tools.formats.foreign import read_object


def export(trained: Trained, folder: str | Path) -> list[str]:
    """Write a run as model.safetensors, config.json and the tokenizer's files.

    ``AutoModelForSequenceClassification``, ``AutoTokenizer`` and
    ``pipeline("text-classification")`` of transformers load the folder.

    Parameters
    ----------
    trained : Trained
        The run, which is not changed.
    folder : str or Path
        It must exist.

    Returns
    -------
    list of str
        What a user of the files has to know.

    Raises
    ------
    PlanError
        If something in the run's plan has no merged form; it is named.
    WeightsError
        If a file cannot be written.
    """
    folder = Path(folder)
    run = trained.runs[0]
    try:
        state = merged_state_dict(run.model)
    except PlanError as error:
        raise PlanError(f"{error}; or give --format adapters, which holds bottlenecks") from None
    save_tensors(folder / "model.safetensors", state, {"format": "pt"})
    write_beside(trained, folder)
    # What truncation=True cuts off is then what spafit cuts off.
    path = folder / "tokenizer_config.json"
    entries = {**read_object(path), "model_max_length": run.record["settings"]["max_length"]}
    with replacing(path, WeightsError) as temporary:
        temporary.write_text(f"{json.dumps(entries, indent=2)}\n", encoding="utf-8")
    notes = ["truncation=True cuts texts as in training; without it long ones are refused"]
    return notes + score_note(trained)


def score_note(trained: Trained) -> list[str]:
    """Return how a score is had from the logit, if it is not the logit itself."""
    center, spread = scale_of(trained.runs[0].model, trained.task)
    if labels_in_order(trained) or (center, spread) == (0.0, 1.0):
        return []
    return [f"the score is {center} + {spread} times the logit"]
