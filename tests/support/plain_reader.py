r"""A plain reader of GLUE's files, the oracle of test_fuzzed_data.py.

It is written from the rules in the docstring of ``spafit/tasks/glue.py`` and from GLUE's own table,
and shares no code with the package. ``expected`` returns the rows of a file, or where it is
refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

BOM = b"\xef\xbb\xbf"

_PAIR = "index sentence1 sentence2"
_STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
_MRPC = "#1 ID|#2 ID|#1 String|#2 String"
_MNLI = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
    "sentence1_parse sentence2_parse sentence1 sentence2"
)
_NLI = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
_TWO = {"entailment": "entailment", "not_entailment": "not_entailment"}


@dataclass(frozen=True)
class Form:
    """One file of GLUE: its header, where the texts and the label stand, how labels are spelt."""

    folder: str
    file: str
    header: tuple[str, ...]
    has_header: bool
    text_a: int
    text_b: int | None
    label: int | None


def _form(folder: str, file: str, header: str, *places: int | None, headed: bool = True) -> Form:
    names = header.split("|") if "|" in header else header.split()
    a, b, label = (*places, None)[:3] if len(places) < 3 else places
    assert a is not None
    return Form(folder, file, tuple(names), headed, a, b, label)


# fmt: off
FORMS: dict[str, dict[str, Form]] = {
    "cola": {
        **{s: _form("CoLA", f"{s}.tsv", "source label mark sentence", 3, None, 1, headed=False)
           for s in ("train", "dev")},
        "test": _form("CoLA", "test.tsv", "index sentence", 1, None),
    },
    "sst-2": {
        **{s: _form("SST-2", f"{s}.tsv", "sentence label", 0, None, 1) for s in ("train", "dev")},
        "test": _form("SST-2", "test.tsv", "index sentence", 1, None),
    },
    "mrpc": {
        **{s: _form("MRPC", f"{s}.tsv", "Quality|" + _MRPC, 3, 4, 0) for s in ("train", "dev")},
        "test": _form("MRPC", "test.tsv", "index|" + _MRPC, 3, 4),
    },
    "sts-b": {
        **{s: _form("STS-B", f"{s}.tsv", _STSB + " score", 7, 8, 9) for s in ("train", "dev")},
        "test": _form("STS-B", "test.tsv", _STSB, 7, 8),
    },
    "qqp": {
        **{s: _form("QQP", f"{s}.tsv", "id qid1 qid2 question1 question2 is_duplicate", 3, 4, 5)
           for s in ("train", "dev")},
        "test": _form("QQP", "test.tsv", "id question1 question2", 1, 2),
    },
    "mnli": {
        "train": _form("MNLI", "train.tsv", _MNLI + " label1 gold_label", 8, 9, 11),
        "dev": _form("MNLI", "dev_matched.tsv",
                     _MNLI + " label1 label2 label3 label4 label5 gold_label", 8, 9, 15),
        "test": _form("MNLI", "test_matched.tsv", _MNLI, 8, 9),
    },
    "mnli-mm": {
        "dev": _form("MNLI", "dev_mismatched.tsv",
                     _MNLI + " label1 label2 label3 label4 label5 gold_label", 8, 9, 15),
        "test": _form("MNLI", "test_mismatched.tsv", _MNLI, 8, 9),
    },
    "qnli": {
        **{s: _form("QNLI", f"{s}.tsv", "index question sentence label", 1, 2, 3)
           for s in ("train", "dev")},
        "test": _form("QNLI", "test.tsv", "index question sentence", 1, 2),
    },
    "rte": {
        **{s: _form("RTE", f"{s}.tsv", _PAIR + " label", 1, 2, 3) for s in ("train", "dev")},
        "test": _form("RTE", "test.tsv", _PAIR, 1, 2),
    },
    "wnli": {
        **{s: _form("WNLI", f"{s}.tsv", _PAIR + " label", 1, 2, 3) for s in ("train", "dev")},
        "test": _form("WNLI", "test.tsv", _PAIR, 1, 2),
    },
    "ax": {"test": _form("AX", "AX.tsv", _PAIR, 1, 2)},
}
# How a TSV file spells a label -> its name, in the order of the hub's numbers; empty: a score.
LABELS: dict[str, dict[str, str]] = {
    "cola": {"0": "unacceptable", "1": "acceptable"}, "sst-2": {"0": "negative", "1": "positive"},
    "mrpc": {"0": "not_equivalent", "1": "equivalent"}, "sts-b": {},
    "qqp": {"0": "not_duplicate", "1": "duplicate"}, "mnli": _NLI, "mnli-mm": _NLI, "ax": _NLI,
    "qnli": _TWO, "rte": _TWO, "wnli": {"0": "not_entailment", "1": "entailment"},
}
FIELDS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",), "sst-2": ("sentence",), "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    **dict.fromkeys(("mnli", "mnli-mm", "ax"), ("premise", "hypothesis")),
    **dict.fromkeys(("mrpc", "sts-b", "rte", "wnli"), ("sentence1", "sentence2")),
}
# fmt: on

Row = tuple[int, str, str | None, Any]
"""Index, texts, label."""


@dataclass(frozen=True)
class Expected:
    """What is to become of a file: its rows, or the line at which it is refused."""

    rows: tuple[Row, ...] = ()
    bad_rows: int = 0
    refused: bool = False
    line: int | None = None
    """None where the whole file is at fault."""


class _BadRowError(Exception):
    pass


class _BadFileError(Exception):
    pass


def expected(content: bytes, name: str, split: str | None, max_bad: int, kind: str) -> Expected:
    """Read a file plainly."""
    content = content.removeprefix(BOM)
    lines = content.split(b"\n")
    is_crlf = len(lines) > 1 and lines[0].endswith(b"\r")
    if lines[-1] == b"":
        lines.pop()  # what ended the last line begins none
    if is_crlf:
        lines = [line[:-1] if line.endswith(b"\r") else line for line in lines]
    begin = 0
    if kind == "tsv":
        try:
            first = lines[0].decode() if lines else ""
        except UnicodeDecodeError:
            return Expected(refused=True, line=1)
        form = _form_of(name, split, first)
        if form is None:
            return Expected(refused=True, line=1)
        begin = int(form.has_header)
    rows: list[Row] = []
    bad = 0
    for i, line in enumerate(lines[begin:]):
        number = i + begin + 1
        try:
            text = line.decode()
            if kind == "tsv":
                assert form is not None
                rows.append((i, *_row(name, form, text)))
            else:
                rows.append((i, *_record(name, split in ("train", "dev"), text)))
        except (UnicodeDecodeError, _BadFileError):
            return Expected(refused=True, line=number)
        except _BadRowError:
            bad += 1
            if bad > max_bad:
                return Expected(refused=True, line=number)
    if not rows:
        return Expected(refused=True)
    return Expected(tuple(rows), bad)


def _form_of(name: str, split: str | None, first: str) -> Form | None:
    forms = FORMS[name]
    candidates = (
        [forms[split]] if split else [forms[s] for s in ("dev", "test", "train") if s in forms]
    )
    for form in candidates:
        if form.has_header and first.split("\t") == list(form.header):
            return form
    return next((form for form in candidates if not form.has_header), None)


def _row(name: str, form: Form, text: str) -> tuple[str, str | None, Any]:
    fields = text.split("\t")
    if len(fields) != len(form.header):
        raise _BadRowError
    label: Any = None
    if form.label is not None:
        label = (
            _score(fields[form.label]) if name == "sts-b" else LABELS[name].get(fields[form.label])
        )
        if label is None:
            raise _BadFileError
    return fields[form.text_a], None if form.text_b is None else fields[form.text_b], label


def _score(text: str) -> float | None:
    if not set(text) <= set("0123456789+-.eE"):
        return None
    try:
        score = float(text)
    except ValueError:
        return None
    return score if 0 <= score <= 5 else None


def _record(name: str, needs_label: bool, text: str) -> tuple[str, str | None, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise _BadRowError
        return dict(pairs)

    try:
        record = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise _BadRowError from None
    if type(record) is not dict:
        raise _BadRowError
    texts = [record.get(field) for field in FIELDS[name]]
    for each in texts:
        if type(each) is not str or any(0xD800 <= ord(c) < 0xE000 for c in each):
            raise _BadRowError
    value = record.get("label")
    label: Any = None
    if value is None or (type(value) in (int, float) and value == -1):
        if needs_label:
            raise _BadFileError
    elif name == "sts-b":
        if type(value) not in (int, float) or not 0 <= value <= 5:
            raise _BadFileError
        label = float(value)
    else:
        names = list(LABELS[name].values())
        if type(value) is int and 0 <= value < len(names):
            label = names[value]
        elif type(value) is str and value in names:
            label = value
        else:
            raise _BadFileError
    return texts[0], texts[1] if len(texts) == 2 else None, label
