"""Which label each output of a model's head stands for, by the names of the labels."""

from __future__ import annotations

import warnings

from spafit.adaptation import Adaptation
from spafit.bert import BertForSequenceClassification
from spafit.errors import DataError, listed, one_line
from spafit.tasks.table import TASKS, GlueTask
from spafit.tasks.task import Dataset, Task, UnlabelledTask
from spafit.weights.heads import plain
from spafit.weights.pretrained import LoadReport


def label_names(model: BertForSequenceClassification, dataset: Dataset) -> tuple[str, ...]:
    """Return the label names in the order of the logits; empty for a score.

    A trained model has its own order, and so has a head that was taken from a file with names for
    its rows; otherwise it is the task's. Labels are compared by name, because files and models
    number them differently. A warning says if the names of a file's head are not the task's. Texts
    without labels are taken for those of the model's own task.

    Raises
    ------
    DataError
        If the names are not the task's, or those of the task that the model says it was trained
        for; or the head has a different number of outputs; or texts without labels are pairs where
        the model's task has none, or the reverse, or the model has no task.
    """
    task, adaptation = dataset.task, model.adaptation
    trained = None if adaptation is None else adaptation.labels
    found = getattr(model, "load_report", None)
    report = found if isinstance(found, LoadReport) else None
    in_file = None if report is None else report.labels
    if isinstance(task, UnlabelledTask) and set(dataset.labels) <= {None}:
        task = _task_of(model, dataset, in_file if trained is None else trained)
    names = task.labels if trained is None else trained
    if adaptation is not None and trained is not None and adaptation.definition is None:
        own = TASKS.get(adaptation.task or "", task)
        if own.name != task.name and set(names) != set(own.labels):
            raise _damaged(names, own)
    if set(names) != set(task.labels):
        raise DataError(
            f"the model was trained for the labels {', '.join(names) or 'of a score'}, "
            f"{task.display} has {', '.join(task.labels) or 'a score'}; use a model for this task"
        )
    if model.num_labels != task.num_labels:
        raise DataError(
            f"{task.display} needs a head with {task.num_labels} outputs, this model's has "
            f"{model.num_labels}; load it with num_labels={task.num_labels}"
        )
    # While adapters are disabled, the head is the one that was loaded.
    is_as_loaded = trained is None or (adaptation is not None and adaptation.disabled > 0)
    if not is_as_loaded or report is None or in_file is None:
        return names
    order = _as_task_labels(in_file, task)
    if order is None:
        warnings.warn(
            f"the head from {one_line(str(report.folder))} names its outputs "
            f"{listed(in_file, ', ')}; they are taken for {task.display}'s "
            f"{listed(names, ', ')}, in this order. If both are the same labels, write the latter "
            "names into id2label in a copy of the config.json",
            stacklevel=3,
        )
    return names if order is None else order


def own_labels(adaptation: Adaptation) -> tuple[str, ...]:
    """Return the label names of a trained adapter in the order of its logits; empty for a score.

    Raises
    ------
    DataError
        If it was never trained, or the names are not those of the task that it was trained for.
    """
    names, task = adaptation.labels, own_task(adaptation)
    if names is None:
        raise DataError(
            f"the adapter {adaptation.name!r:.200} has no names for its labels, because it was "
            "never trained; train it first, or load one that was"
        )
    if task is not None and set(names) != set(task.labels):
        raise _damaged(names, task)
    outputs = len(adaptation.head.get_parameter("weight"))
    if outputs != max(len(names), 1):
        raise DataError(
            f"the adapter {adaptation.name!r:.200} has a head with {outputs} outputs, and "
            f"{len(names)} names of labels"
        )
    return names


def own_task(adaptation: Adaptation) -> Task | None:
    """Return the task that an adapter was trained for, if it is known."""
    if adaptation.labels is None:
        return None
    if adaptation.definition is not None:
        return Task.from_json_dict(adaptation.definition)
    return TASKS.get(adaptation.task or "")


def require_shape(task: Task, *, pair: bool, source: str, trained: str = "the model") -> None:
    """Raise a DataError if texts are pairs where a trained task has none, or the reverse."""
    if task.pair != pair:
        raise DataError(
            f"{source} has {'pairs of texts' if pair else 'single texts'}, and {trained} was "
            f"trained for {task.display}, which has "
            f"{'pairs of texts' if task.pair else 'single texts'}"
        )


def _damaged(names: tuple[str, ...], own: Task) -> DataError:
    return DataError(
        f"the adapter is damaged: it says that it was trained for {own.display}, for the labels "
        f"{', '.join(names) or 'of a score'}, but {own.display} has "
        f"{', '.join(own.labels) or 'a score'}; take the file as it was written"
    )


def _task_of(
    model: BertForSequenceClassification, dataset: Dataset, names: tuple[str, ...] | None
) -> Task:
    """Return the task of a model whose labels have these names, for texts that have none."""
    shape, adaptation = dataset.task, model.adaptation
    known = None if adaptation is None else own_task(adaptation)
    if known is not None:
        require_shape(known, pair=shape.pair, source=dataset.source)
    if known is None and names is None and model.num_labels > 1:
        raise DataError(
            f"{dataset.source} has no labels, and the model was not trained for any: name the task "
            "of the texts (task=)"
        )
    if known is None and names:
        known = Task(shape.name, shape.fields, names, ("accuracy",))
    return known or shape


def _as_task_labels(names: tuple[str, ...], task: Task) -> tuple[str, ...] | None:
    """Return the task's labels in the order in which a file names them; None if it does not.

    A file may also name them as the task's data files spell them.
    """
    spellings = (task.labels, task.spelling) if isinstance(task, GlueTask) else (task.labels,)
    for spelling in spellings:
        labels = dict(zip(plain(spelling), task.labels, strict=False))
        order = tuple(labels[name] for name in plain(names) if name in labels)
        if len(order) == len(labels) == len(task.labels):
            return order
    return None
