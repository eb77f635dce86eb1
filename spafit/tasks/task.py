"""What a task is: its text fields, its labels in order, its metrics; and a data set of one.

GLUE's tasks are listed in ``table.py``. One of your own needs no more than this::

    task = spafit.Task("tickets", ("text",), ("billing", "login"), ("macro_f1", "accuracy"))

A label is stored by its name ("acceptable"), never by its number, because the numbers differ
between files, models and submissions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from spafit.errors import DataError, has_controls
from spafit.tasks.metrics import METRICS

Label = str | float
"""A label: its name for classification, a score for regression."""


@dataclass(frozen=True)
class Task:
    """What a model is trained for: texts to read, labels to tell apart, metrics to score by.

    Attributes
    ----------
    name : str
        Such as "rte" or "tickets".
    fields : tuple of str
        Names of the text fields in files and records: one, or two for a pair of texts.
    labels : tuple of str
        Label names in order: the position is the number of the class. Empty for regression.
    metrics : tuple of str
        Names of the metrics (:data:`spafit.tasks.metrics.METRICS`); the best epoch is chosen by
        the first.
    label_field : str
        Name of the label's field.
    scale : tuple of (float, float)
        Of a regression task: the model is trained on (score - scale[0]) / scale[1], so that scores
        of any range can be learnt; predictions are in the range of the scores.
    display : str
        Name as it is shown: "RTE" for "rte". By default the name itself.
    paper_batch_size : int
        Examples per step where no batch size is asked for.

    Raises
    ------
    DataError
        If a name is missing, is given twice, cannot be printed, or is no metric of such a task.
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    label_field: str = field(default="label", kw_only=True)
    scale: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)
    display: str = field(default="", kw_only=True)
    paper_batch_size: int = field(default=16, kw_only=True)

    def __post_init__(self) -> None:
        for key in ("fields", "labels", "metrics"):
            value = getattr(self, key)
            names = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, key, names)
            for name in names:
                if not is_name(name):
                    raise DataError(
                        f"{key} of the task {self.name!r:.80} must be texts that can be printed, "
                        f"found {name!r:.80}"
                    )
            if len(set(names)) < len(names):
                raise DataError(f"{key} of the task {self.name!r:.80} has a name twice: {names}")
        if not (is_name(self.name) and is_name(self.label_field)):
            raise DataError(f"{self.name!r:.80}, {self.label_field!r:.80}: not names of a task")
        object.__setattr__(self, "display", self.display or self.name)
        if len(self.fields) not in (1, 2):
            raise DataError(f"{self.name} needs one text field or two, found {self.fields}")
        if len(self.labels) == 1:
            raise DataError(
                f"{self.name} has the one label {self.labels[0]!r:.80}; there is nothing to tell "
                "apart with fewer than two, and no labels at all mean regression"
            )
        center, spread = self.scale
        if not (math.isfinite(center) and 0 < spread < math.inf):
            raise DataError(f"scale of {self.name} must be (a number, a positive one)")
        if not self.metrics:
            raise DataError(f"{self.name} needs a metric at least")
        for name in self.metrics:
            self.check_metric(name)

    def check_metric(self, name: str) -> None:
        """Raise a DataError if a metric cannot score this task."""
        metric = METRICS.get(name)
        fitting = [each for each, one in METRICS.items() if one.fits(len(self.labels))]
        if metric is None or not metric.fits(len(self.labels)):
            why = "is no metric" if metric is None else f"does not fit {self._kind}"
            if metric is not None and metric.is_binary and len(self.labels) > 2:
                why = f"is defined for two labels; {self.name} has {len(self.labels)}"
            raise DataError(f"{name!r:.80} {why}; {self.name} can have {', '.join(fitting)}")

    @property
    def _kind(self) -> str:
        return "a task with labels" if self.labels else "a task of scores"

    @property
    def is_regression(self) -> bool:
        """Return whether the label is a score."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """C, the number of outputs of the classifier: 1 for regression."""
        return len(self.labels) or 1

    @property
    def pair(self) -> bool:
        """Return whether an example has two texts."""
        return len(self.fields) == 2

    def with_metric(self, name: str | None) -> Task:
        """Return the task with this metric as its first, by which the best epoch is chosen."""
        if name is None or name == self.metrics[0]:
            return self
        self.check_metric(name)
        others = tuple(each for each in self.metrics if each != name)
        return dataclasses.replace(self, metrics=(name, *others))

    def to_json_dict(self) -> dict[str, Any]:
        """Return the definition as JSON can hold it, for the record of a run."""
        return {each.name: _plain(getattr(self, each.name)) for each in dataclasses.fields(Task)}

    @staticmethod
    def from_json_dict(definition: Any) -> Task:
        """Return the task of :meth:`to_json_dict`.

        Raises
        ------
        DataError
            If the definition is damaged.
        """
        try:
            return Task(**{key: _tuple(value) for key, value in definition.items()})
        except (TypeError, AttributeError, ValueError):
            raise DataError(f"the definition of a task is damaged: {definition!r:.200}") from None


class UnlabelledTask(Task):
    """The task of texts without labels: a model predicts them by the task that it was trained for.

    Until then it is like a task of scores.
    """


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def is_name(value: object) -> bool:
    """Return whether a value is a text that can stand in a table of predictions."""
    return isinstance(value, str) and bool(value.strip()) and not has_controls(value)


@dataclass(frozen=True)
class Example:
    """One row of a data set."""

    index: int
    """Number of the row in its file, from 0; malformed rows are counted too."""
    text_a: str
    text_b: str | None
    label: Label | None
    """Name of the label, or score; None if the file has none."""
    carried: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What identifies the row in its file, such as its index or id, by the name of the column."""


@dataclass(frozen=True)
class Dataset:
    """The rows of one file, in its order; it can be iterated, indexed and sliced."""

    task: Task
    split: str
    """"train", "dev", "test", or "input" for a file read without a split."""
    examples: tuple[Example, ...]
    source: str
    """Path of the file."""
    bad_rows: int = 0
    """Number of malformed rows left out, never more than the caller allowed."""
    sha256: str = ""
    """SHA-256 of the file's bytes, in hexadecimal, for the record of a run. Computed from the
    examples if it is not given."""
    encoding: str = "utf-8"
    """The encoding of the file, if it is a text."""

    def __post_init__(self) -> None:
        if not self.sha256:
            object.__setattr__(self, "sha256", _digest(self.examples))

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Example | Dataset:
        """Return one example, or a data set of some of them for a slice."""
        if isinstance(index, slice):
            return dataclasses.replace(self, examples=self.examples[index], sha256="")
        return self.examples[index]

    def from_all_over(self, n: int) -> Dataset:
        """Return ``n`` examples at equal distances, some of them again if there are fewer."""
        rows = [k * len(self) // n for k in range(n)]
        return dataclasses.replace(
            self, examples=tuple(self.examples[row] for row in rows), sha256=""
        )

    @property
    def texts_a(self) -> list[str]:
        """First text of each example."""
        return [example.text_a for example in self.examples]

    @property
    def texts_b(self) -> list[str] | None:
        """Second text of each example; None for a task with one text."""
        if not self.task.pair:
            return None
        return [example.text_b or "" for example in self.examples]

    @property
    def labels(self) -> list[Label | None]:
        """Label of each example: a name, a score, or None."""
        return [example.label for example in self.examples]


def _digest(examples: tuple[Example, ...]) -> str:
    """Return the SHA-256 of texts and labels, one JSON array a line."""
    digest = hashlib.sha256()
    for example in examples:
        row = [example.text_a, example.text_b, example.label]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
