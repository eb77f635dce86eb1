"""What a config.json says of the classifier beside it: of which kind it is, and what its rows are.

A classifier's shape tells neither. BERT's tokens, sentences and answers of a multiple choice are
all classified by a ``classifier.weight`` (C, D), and files order the labels as they like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
_POOLER = re.compile(r"(^|\.)pooler\.")
_DIGITS = re.compile("[0-9]{1,9}")

# What comes before or after a classifier that is not one of sentences by the pooler's output.
_BETWEEN = re.compile(
    r"(^|[._])(crf|(bi)?(lstm|gru|rnn)|(text)?cnn|conv\dd?|tcn)([._]|$)", re.IGNORECASE
)


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


def reads_otherwise(names: Iterable[str]) -> str:
    """Return why a file's classifier is not one of sentences, by the file's other tensors.

    Parameters
    ----------
    names : iterable of str
        All names in the file.

    Returns
    -------
    str
        Empty if nothing says so.
    """
    names = list(names)
    between = next(filter(_BETWEEN.search, names), None)
    if between is not None:
        return f"the file has {one_line(between, 80)}: its classifier is of another kind"
    if not any(_POOLER.search(name) for name in names):
        return (
            "the file has no pooler, so its classifier reads other hidden states, as one of tokens "
            "does"
        )
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
    id2label, label2id = entries.get("id2label"), entries.get("label2id")
    if isinstance(label2id, dict):
        pairs = [(row, name) for name, row in label2id.items()]
    else:
        pairs = _numbered(label2id)
    names, others = _in_order(_numbered(id2label), num_labels), _in_order(pairs, num_labels)
    if names is not None and others is not None and plain(names) != plain(others):
        return None, "the order of its labels is unknown: id2label and label2id do not agree"
    names = others if names is None else names
    if names is not None:
        return names, f"its labels are {listed(names, ', ')}, in this order, by config.json"
    for key, found, rows in (
        ("id2label", id2label, _numbered(id2label)),
        ("label2id", label2id, pairs),
    ):
        if found and not (rows and all(_is_no_name(name) for _, name in rows)):
            return None, (
                f"the order of its labels is unknown, because config.json's {key} does not give "
                f"each of the {num_labels} rows a name of its own: {one_line(repr(found), 120)}"
            )
    return None, "the order of its labels is unknown, because config.json does not name them"


def _numbered(id2label: object) -> list[tuple[object, object]]:
    """Return the pairs of row and name of an object, or of a list in the order of the rows."""
    if isinstance(id2label, dict):
        return list(id2label.items())
    return list(enumerate(id2label)) if isinstance(id2label, list) else []


def _in_order(pairs: list[tuple[object, object]], num_labels: int) -> tuple[str, ...] | None:
    """Return the names of all rows in order, if they are different names and no placeholders.

    A row is a number, or its digits.
    """
    rows = {
        int(str(row)): str(name)
        for row, name in pairs
        if type(row) in (str, int) and _DIGITS.fullmatch(str(row)) and type(name) in (str, int)
    }
    names = tuple(rows[row] for row in range(num_labels) if row in rows)
    are_all = len(pairs) == len(rows) == len(names) == len(set(plain(names))) == num_labels
    return names if are_all and not any(map(_is_no_name, names)) else None


def _is_no_name(name: object) -> bool:
    return isinstance(name, str) and _NO_NAME.fullmatch(name) is not None


def plain(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return label names as they are compared: letters and digits alone, in lower case.

    "non-entailment" is compared as "not_entailment".
    """
    spelled = [re.sub("^no[nt]?(?![a-z])", "not", name.casefold()) for name in names]
    return tuple("".join(filter(str.isalnum, name)) for name in spelled)
