"""Which label each output of a model's head stands for, by the names of the labels."""

from __future__ import annotations

import warnings

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
            raise DataError(
                f"the adapter is damaged: it says that it was trained for {own.display}, for the "
                f"labels {', '.join(names) or 'of a score'}, but {own.display} has "
                f"{', '.join(own.labels) or 'a score'}; take the file as it was written"
            )
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


def _task_of(
    model: BertForSequenceClassification, dataset: Dataset, names: tuple[str, ...] | None
) -> Task:
    """Return the task of a model whose labels have these names, for texts that have none."""
    shape, adaptation = dataset.task, model.adaptation
    known: Task | None = None
    if adaptation is not None and adaptation.labels is not None:
        if adaptation.definition is not None:
            known = Task.from_json_dict(adaptation.definition)
        else:
            known = TASKS.get(adaptation.task or "")
    if known is not None and known.pair != shape.pair:
        raise DataError(
            f"{dataset.source} has {'pairs of texts' if shape.pair else 'single texts'}, and the "
            f"model was trained for {known.display}, which has "
            f"{'pairs of texts' if known.pair else 'single texts'}"
        )
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
