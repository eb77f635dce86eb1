"""What a config.json says of the classifier beside it: of which kind it is, and what its rows are.

A classifier's shape tells neither. BERT's tokens, sentences and answers of a multiple choice are
all classified by a ``classifier.weight`` (C, D), and files order the labels as they like.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from spafit.config import read_json
from spafit.errors import WeightsError, listed, one_line

# Classes without a classifier: the file was trained further by a class that config.json omits.
_WITHOUT_CLASSIFIER = frozenset(
    "BertModel BertForPreTraining BertForMaskedLM BertLMHeadModel BertForNextSentencePrediction"
    "".split()
)
_OF_SENTENCES = re.compile(r"(?!.*multi_?label)\w*ForSequenceClassification", re.IGNORECASE)

# What transformers writes where it was told no name.
_NO_NAME = re.compile(r"LABEL_\d+")


def read_entries(folder: Path) -> dict[str, Any]:
    """Return the entries of a folder's config.json; none if there is no such file.

    Raises
    ------
    WeightsError
        If it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        entries = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {one_line(str(error), 600)}") from None
    if not isinstance(entries, dict):
        raise WeightsError(f"{path} must hold a JSON object, found {type(entries).__name__}")
    return entries


def other_kind(entries: dict[str, Any], num_labels: int) -> str:
    """Return why the file's classifier is not one of sentences into one class each, or a score.

    Parameters
    ----------
    entries : dict
        Of the config.json.
    num_labels : int
        C, the classifier's rows.

    Returns
    -------
    str
        Empty if nothing says that it is of another kind.
    """
    architectures = entries.get("architectures") or []
    for each in architectures if isinstance(architectures, list) else [architectures]:
        if str(each) not in _WITHOUT_CLASSIFIER and not _OF_SENTENCES.fullmatch(str(each)):
            return (
                f"config.json's architectures name {one_line(str(each), 80)}, no "
                "BertForSequenceClassification, so the file's classifier is of another kind"
            )
    problem = entries.get("problem_type")
    if problem == "multi_label_classification" or (problem == "regression" and num_labels > 1):
        return f"config.json's problem_type is {problem}: the file's classifier is of another kind"
    return ""


def label_names_of(entries: dict[str, Any], num_labels: int) -> tuple[tuple[str, ...] | None, str]:
    """Return the names that a config.json gives a classifier's rows.

    Parameters
    ----------
    entries, num_labels
        As for :func:`other_kind`.

    Returns
    -------
    (tuple of str or None, str)
        The names in the order of the rows, None if they are not known; and the same in words.
    """
    if num_labels == 1:
        return None, "a score"
    names = _in_order(entries.get("id2label"), num_labels)
    ids = entries.get("label2id")
    if isinstance(ids, dict):
        others = _in_order({str(row): name for name, row in ids.items()}, num_labels)
        if names is not None and others is not None and plain(names) != plain(others):
            return None, "the order of its labels is unknown: id2label and label2id do not agree"
        names = others if names is None else names
    if names is None:
        return None, "the order of its labels is unknown, because config.json does not name them"
    return names, f"its labels are {listed(names, ', ')}, in this order, by config.json"


def _in_order(id2label: object, num_labels: int) -> tuple[str, ...] | None:
    """Return the names of all rows in order, if they are different names and no placeholders."""
    if not isinstance(id2label, dict):
        return None
    rows = [id2label.get(str(row)) for row in range(num_labels)]
    names = tuple(str(name) for name in rows if type(name) in (str, int))
    are_all = len(id2label) == len(names) == len(set(plain(names))) == num_labels
    return names if are_all and not any(map(_NO_NAME.fullmatch, names)) else None


def plain(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return label names as they are compared: letters and digits alone, in lower case.

    "non-entailment" is compared as "not_entailment".
    """
    spelled = [re.sub("^no[nt]?(?![a-z])", "not", name.casefold()) for name in names]
    return tuple("".join(filter(str.isalnum, name)) for name in spelled)
