"""The work of ``spafit eval``: score a run on labelled rows, and show where it is wrong."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

from spafit.cli.own_data import own_dataset, refuse_form, report_bad_rows, report_encoding
from spafit.cli.predicting import (
    form_of,
    identifying,
    identity,
    refuse_to_replace,
    table_writer,
)
from spafit.cli.trained import Trained
from spafit.errors import ConfigError, DataError, counted, one_line
from spafit.files.replacing import replacing
from spafit.machine import terminal
from spafit.tasks import glue, own, scoring
from spafit.tasks.metrics import Floats, Ints, of_each_class
from spafit.tasks.own_files import TableForm, distinct
from spafit.tasks.table import GlueTask
from spafit.tasks.task import Dataset, Label, Task

_SHOWN_MISTAKES = 10
_SHOWN_CONFUSIONS = 10


def evaluate_run(
    trained: Trained,
    data: Path | None,
    split: str,
    *,
    form: TableForm,
    max_bad_rows: int,
    errors: Path | None,
) -> None:
    """Score a run, print the scores and the mistakes, and write all mistakes if asked to."""
    for number, dataset in enumerate(datasets(trained, data, split, form, max_bad_rows)):
        report_encoding(dataset.source, dataset.encoding)
        report_bad_rows(dataset)
        if errors is not None:
            refuse_to_replace(errors, Path(dataset.source))
        labels, probabilities = trained.predict(dataset)
        print(evaluation_screen(dataset, labels, probabilities))
        if errors is not None and number == 0:
            write_mistakes(errors, dataset, labels, probabilities)


def datasets(
    trained: Trained, data: Path | None, split: str, form: TableForm, max_bad_rows: int
) -> list[Dataset]:
    """Read a split of a run's data, or of other data of its task; of MNLI both halves.

    Parameters
    ----------
    trained : Trained
        The run.
    data : Path or None
        GLUE's root, or a file of your own; None is what the run was trained with.
    split : str
        "train" or "dev".
    form, max_bad_rows
        How a file is written, and how many malformed rows may be left out of it.
    """
    task = trained.task
    if data is not None and (data.is_file() or not isinstance(task, GlueTask)):
        return [_of_file(task, data, form, max_bad_rows)]
    if not isinstance(task, GlueTask):
        return [own_dataset(task, trained.record, split, form, max_bad_rows)]
    refuse_form(task, form)
    folder = Path(trained.recorded("data", "--data")) if data is None else data
    names = [task.name] if task.name != "mnli" else ["mnli", "mnli-mm"]
    read = []
    for name in names:
        try:
            found = glue.load(name, split, folder, max_bad_rows=max_bad_rows)
        except DataError as error:
            if name == names[0]:
                raise
            print(f"{name} left out: {one_line(str(error), 600)}", file=sys.stderr)
            continue
        metric = trained.record["settings"].get("metric")
        read.append(dataclasses.replace(found, task=found.task.with_metric(metric)))
    return read


def _of_file(task: Task, path: Path, form: TableForm, max_bad_rows: int) -> Dataset:
    """Read labelled rows of a task from a file, which may be one of GLUE's own."""
    forms = ("dev", "train") if isinstance(task, GlueTask) else ()
    split = next((each for each in forms if glue.has_form(task, each, path)), None)
    if split is None:
        found = own.dataset(path, task=task, form=form, labelled=True, max_bad_rows=max_bad_rows)
    else:
        refuse_form(task, form)
        found = glue.read_file(task, path, split, max_bad_rows=max_bad_rows)
    return dataclasses.replace(found, split=path.name)


def evaluation_screen(
    dataset: Dataset, labels: list[Label], probabilities: Floats | None, width: int | None = None
) -> str:
    """Return the scores of predictions, beside the majority's, and where they are wrong.

    Parameters
    ----------
    dataset : Dataset
        With labels.
    labels : list of str or float
        The predictions.
    probabilities : numpy.ndarray, (n, C), or None
        In the order of the task's labels.
    width : int, optional
        Columns of the screen; by default those of the terminal.
    """
    task, true = dataset.task, dataset.labels
    width = width or terminal.columns(sys.stdout)
    scores = scoring.compute(task, labels, true, probabilities)
    bounds = scoring.intervals(task, labels, true, probabilities)
    majority = scoring.majority(task, true)
    constant = "mean" if task.is_regression else "commonest class"
    of = one_line(f"{task.display} {dataset.split} ({counted(len(dataset), 'example')})", 600)
    lines = []
    for name, score in scores.items():
        low, high = bounds[name]
        shown = f"{of}: {name} {score:.4f}"
        guess = f"(always the {constant}: {majority[name]:.4f})"
        fits = len(f"{shown}   {guess}") <= width
        lines += [f"{shown}   {guess}"] if fits else [shown, f"    {guess}"]
        lines.append(f"    95 % of bootstrap samples: {low:.4f} to {high:.4f}")
    if not task.is_regression:
        k = scoring.confusion_matrix(task, labels, true)
        lines += ["", *_class_table(task.labels, k), "", *_confusions(task.labels, k, width)]
    wrong = scoring.mistakes(task, labels, true, probabilities)
    if wrong:
        farthest = "farthest" if task.is_regression else "most confident"
        lines += ["", f"the {farthest} of {counted(len(wrong), 'mistake')}:"]
    for each in wrong[:_SHOWN_MISTAKES]:
        example = dataset[each.row]
        columns = identifying(example)
        named = zip(columns, identity(example, columns), strict=True)
        where = " ".join(f"{name} {value}" for name, value in named)
        said = f"{_label(each.predicted)}, is {_label(each.true)} ({where})"
        texts = " | ".join(text for text in (example.text_a, example.text_b) if text)
        lines.append(_cut(f"  {each.weight:.3f}  {said}: {' '.join(texts.split())}", width))
    return "\n".join(lines)


def _class_table(names: tuple[str, ...], k: Ints) -> list[str]:
    """Return precision, recall, F1 and support of every class."""
    found = of_each_class(k)
    wide = max(5, *map(len, names))
    lines = [f"{'':>5}{'label':<{wide}}  precision  recall      F1    rows"]
    for number, name in enumerate(names):
        precision, recall, f1 = (found[key][number] for key in ("precision", "recall", "f1"))
        lines.append(
            f"{number:>3}  {name:<{wide}}  {precision:>9.4f}  {recall:.4f}  {f1:.4f}  "
            f"{k[number].sum():>6,}"
        )
    return lines


def _confusions(names: tuple[str, ...], k: Ints, width: int) -> list[str]:
    """Return the confusion matrix, or its largest cells off the diagonal if it is too wide."""
    cell = max(len(f"{k.max():,}"), len(str(len(names)))) + 2
    if 5 + cell * len(names) <= width:
        head = "".join(f"{number:>{cell}}" for number in range(len(names)))
        rows = [
            f"{number:>5}" + "".join(f"{count:>{cell},}" for count in k[number])
            for number in range(len(names))
        ]
        return [
            "true label (rows) and predicted label (columns), by number:",
            f"{'':5}{head}",
            *rows,
        ]
    wrong = k - np.diag(np.diag(k))
    order = np.argsort(wrong, axis=None)[::-1][:_SHOWN_CONFUSIONS]
    lines = ["the commonest confusions:"]
    for place in order:
        true, predicted = divmod(int(place), len(names))
        if wrong[true, predicted]:
            lines.append(
                _cut(
                    f"{wrong[true, predicted]:>7,}  {names[true]} taken for {names[predicted]}",
                    width,
                )
            )
    return lines


def write_mistakes(
    path: Path, dataset: Dataset, labels: list[Label], probabilities: Floats | None
) -> None:
    """Write all wrong predictions as a table, the most confident first."""
    wrong = scoring.mistakes(dataset.task, labels, dataset.labels, probabilities)
    weight = "distance" if dataset.task.is_regression else "probability"
    columns = identifying(dataset[0])
    with (
        replacing(path, ConfigError) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = table_writer(file, form_of(path))
        ours = ["label", "prediction", weight, *dataset.task.fields]
        writer.writerow([*distinct(columns, ours), *ours])
        for each in wrong:
            example = dataset[each.row]
            texts = [example.text_a, example.text_b][: len(dataset.task.fields)]
            said = [each.true, each.predicted, f"{each.weight:.6g}"]
            writer.writerow([*identity(example, columns), *said, *texts])
    print(f"written: {path} ({counted(len(wrong), 'mistake')})")


def _label(label: Label) -> str:
    return label if isinstance(label, str) else f"{label:.3f}"


def _cut(line: str, width: int) -> str:
    """Return a line, which may have texts of a file, fit for a terminal and its width."""
    line = one_line(line, width)
    return line if len(line) <= width else f"{line[: width - 3]}..."
