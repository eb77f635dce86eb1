"""What lies beside an exported model: its sizes and labels, and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spafit.cli.trained import Trained
from spafit.errors import WeightsError
from spafit.files.replacing import replacing
from spafit.training.inference import scale_of
from weights_tools.formats.foreign import read_object


def write_beside(trained: Trained, folder: Path) -> None:
    """Write config.json, with the names of the labels, and the tokenizer's files.

    Parameters
    ----------
    trained : Trained
        The run.
    folder : Path
        Made if it does not exist.

    Raises
    ------
    WeightsError
        If a file cannot be written.
    """
    run = trained.runs[0]
    run.tokenizer.save(folder)
    labels = labels_in_order(trained)
    kind = "single_label_classification" if labels else "regression"
    names = labels or ("score",)
    entries = {
        "architectures": ["BertForSequenceClassification"],
        **run.model.config.to_json_dict(),
        "problem_type": kind,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    _write(folder / "config.json", entries)
    # What truncation=True cuts off is then what spafit cuts off.
    path = folder / "tokenizer_config.json"
    longest = run.record["settings"]["max_length"]
    _write(path, {**read_object(path), "model_max_length": longest})


def _write(path: Path, entries: dict[str, Any]) -> None:
    with replacing(path, WeightsError) as temporary:
        content = json.dumps(entries, indent=2, ensure_ascii=False)
        temporary.write_text(f"{content}\n", encoding="utf-8")


def labels_in_order(trained: Trained) -> tuple[str, ...]:
    """Return the names of the labels in the order of the logits; none for a score."""
    adaptation = trained.runs[0].model.adaptation
    assert adaptation is not None
    return trained.task.labels if adaptation.labels is None else adaptation.labels


def score_note(trained: Trained) -> list[str]:
    """Return how a score is had from the logit, if it is not the logit itself."""
    center, spread = scale_of(trained.runs[0].model, trained.task)
    if labels_in_order(trained) or (center, spread) == (0.0, 1.0):
        return []
    return [f"the score is {center} + {spread} times the logit"]
