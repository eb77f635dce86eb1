"""A run as a plain BERT for transformers: merged weights, config.json, the tokenizer's files."""

from __future__ import annotations

from pathlib import Path

from spafit.cli.trained import Trained
from spafit.errors import PlanError
from spafit.training.inference import scale_of
from spafit.trunk.merging import merged_state_dict
from spafit.weights.safefile import save_tensors
from weights_tools.formats.beside import labels_in_order, write_beside


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
    notes = ["truncation=True cuts texts as in training; without it long ones are refused"]
    return notes + score_note(trained)


def score_note(trained: Trained) -> list[str]:
    """Return how a score is had from the logit, if it is not the logit itself."""
    center, spread = scale_of(trained.runs[0].model, trained.task)
    if labels_in_order(trained) or (center, spread) == (0.0, 1.0):
        return []
    return [f"the score is {center} + {spread} times the logit"]
