"""The work of ``spafit predict``: write predictions of a file, a stream, texts, or a test split."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, TextIO

from spafit.cli.own_data import refuse_form, report_encoding
from spafit.cli.trained import Predicted, Trained
from spafit.errors import ConfigError, DataError, counted, one_line
from spafit.files.replacing import refuse_place, replacing
from spafit.runs.progress import RowsDone
from spafit.tasks import glue
from spafit.tasks.own_files import TableForm, distinct, read_rows
from spafit.tasks.reading import Rows, name_of
from spafit.tasks.submission import missing_submissions, write_submission, zip_submission
from spafit.tasks.table import GlueTask
from spafit.tasks.task import Dataset, Example, Task

_CHUNK = 4096
"""Rows that are read, sorted by length, predicted and written at a time.

At most three times as many are held, so that memory does not grow with the file.
"""


def predict_rows(
    trained: Trained,
    source: Path | BinaryIO,
    output: Path | None,
    *,
    probabilities: bool,
    form: TableForm,
    max_bad_rows: int,
) -> None:
    """Predict a file or a stream, and write a table to a file or to standard output."""
    for task in trained.tasks.values():
        if task.fields != trained.task.fields:
            raise ConfigError(
                f"{trained.task.display} and {task.display} have their texts in columns of other "
                f"names ({', '.join(trained.task.fields)}; {', '.join(task.fields)}); predict with "
                "one after the other"
            )
    names = _columns(trained.tasks, probabilities)
    rows = _rows(trained.task, source, form, max_bad_rows)
    report_encoding(name_of(source), rows.encoding)
    examples = iter(rows)
    first = next(examples, None)
    if first is None:
        raise DataError(
            f"{name_of(source)} holds no rows of {trained.task.display}; is it the right file, "
            "and complete?"
        )
    every = itertools.chain([first], examples)
    parts = (  # no record has their hash, which is therefore not computed
        Dataset(trained.task, "input", some, name_of(source), sha256="-")
        for some in iter(lambda: tuple(itertools.islice(every, _CHUNK)), ())
    )
    count = 0
    trained.load()
    with (
        _table(output, identifying(first), names, probabilities) as write,
        # On a terminal it would stand between the answers.
        RowsDone(quiet=output is None and sys.stdout.isatty()) as done,
    ):
        for part, predicted in trained.stream(parts, done.add):
            write(part.examples, predicted)
            count += len(part)
    if rows.bad_rows:
        bad = counted(rows.bad_rows, "malformed row")
        print(one_line(f"{name_of(source)}: {bad} left out", 1000), file=sys.stderr)
    if output is not None:
        print(f"written: {output} ({counted(count, 'prediction')})")


def predict_texts(
    trained: Trained, texts: Sequence[str], texts2: Sequence[str], *, probabilities: bool
) -> None:
    """Predict texts given on the command line."""
    if trained.task.pair != bool(texts2):
        needs = "pairs: give --text2" if trained.task.pair else "one text: leave out --text2"
        raise ConfigError(f"{trained.task.display} needs {needs}")
    if texts2 and len(texts2) != len(texts):
        raise ConfigError(f"--text has {counted(len(texts), 'text')}, and --text2 {len(texts2)}")
    seconds: Sequence[str | None] = texts2 or [None] * len(texts)
    examples = tuple(
        Example(row, text, second, None)
        for row, (text, second) in enumerate(zip(texts, seconds, strict=True))
    )
    dataset = Dataset(trained.task, "input", examples, "--text")
    names = _columns(trained.tasks, probabilities)
    trained.load()
    with _table(None, ("row",), names, probabilities) as write:
        for _, predicted in trained.stream([dataset]):
            write(examples, predicted)


def write_submissions(trained: Trained, folder: Path, submission: Path) -> None:
    """Write the submission files of a task and of the tasks that use the same model, and zip."""
    write_submission_files(trained, folder, submission)
    print(f"written: {zip_submission(submission)}")
    missing = missing_submissions(submission)
    if missing:
        print(f"still missing for GLUE's server: {', '.join(missing)}")


def tasks_submitted(task: str) -> tuple[str, ...]:
    """Return the tasks whose test sets a run of a task predicts."""
    return ("mnli", "mnli-mm", "ax") if task == "mnli" else (task,)


def write_submission_files(trained: Trained, folder: Path, submission: Path) -> list[str]:
    """Write the submission files of a task and of the tasks that use the same model.

    Returns
    -------
    list of str
        Those of the other tasks that were left out, because their test set cannot be read.
    """
    if not isinstance(trained.task, GlueTask):
        raise ConfigError(
            f"{trained.task.display} is a task of your own, and --submission is for GLUE's; give "
            "--input"
        )
    refuse_place(submission, is_folder=True)
    left_out = []
    for name in tasks_submitted(trained.task.name):
        there = submission / glue.get_task(name).submission
        try:
            dataset = glue.load(name, "test", folder)
        except DataError as error:
            if name == trained.task.name:
                raise
            older = f", and {there} is of an earlier call" if there.is_file() else ""
            print(f"{name} left out{older}: {one_line(str(error), 600)}", file=sys.stderr)
            left_out.append(name)
            continue
        refuse_to_replace(there, Path(dataset.source))
        labels, _ = trained.predict(dataset)
        path = write_submission(submission, name, labels, dataset=dataset)
        print(f"written: {path} ({counted(len(dataset), 'prediction')})")
    return left_out


def refuse_to_replace(output: Path, source: Path | None) -> None:
    """Refuse to overwrite the data with its predictions."""
    if source is not None and source.exists() and output.exists() and output.samefile(source):
        raise ConfigError(f"{output} is the data itself; name another file for the predictions")


def _rows(task: Task, source: Path | BinaryIO, form: TableForm, max_bad_rows: int) -> Rows:
    """Return the rows of a source, in GLUE's own format if it is one of its tasks.

    Labels are not read: some may be new, and what is predicted does not depend on them.
    """
    if isinstance(task, GlueTask):
        is_table = isinstance(source, Path) and source.suffix.lower() == ".csv"
        if not is_table:
            refuse_form(task, form)
        if not isinstance(source, Path):
            start = source.peek(1)[:1]  # type: ignore[attr-defined]
            ending = ".jsonl" if start == b"{" else ".tsv"
            return glue.read_rows(
                task, source, ending=ending, max_bad_rows=max_bad_rows, read_labels=False
            )
        if not is_table:
            return glue.read_rows(task, source, max_bad_rows=max_bad_rows, read_labels=False)
    return read_rows(task, source, form=form, max_bad_rows=max_bad_rows, read_labels=False)


def identifying(first: Example) -> tuple[str, ...]:
    """Return the columns that identify a row: those that the file carries, or its number."""
    return tuple(first.carried) or ("row",)


def identity(example: Example, columns: tuple[str, ...]) -> list[object]:
    """Return what a row has in the columns that identify it."""
    known = {"row": example.index, **example.carried}
    return [known.get(column, "") for column in columns]


def form_of(output: Path, *others: str) -> str:
    """Return the extension of a table to be written; refuse one of another form."""
    ending = output.suffix.lower()
    known = (".tsv", ".csv", ".txt", *others)
    if ending not in ("", *known):
        raise ConfigError(f"{output} cannot be written as {ending}; end it in {', '.join(known)}")
    return ending


def table_writer(file: TextIO, ending: str) -> Any:
    r"""Return a csv writer whose rows end in \n; a comma is between the fields of ``.csv``.

    A field with a \r is quoted, which the csv module sees to only if \r ends its lines.
    """
    lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
    return csv.writer(lines, delimiter="," if ending == ".csv" else "\t", lineterminator="\r\n")


def _columns(tasks: Mapping[str, Task], probabilities: bool) -> list[str]:
    """Return the columns of predictions; those of a task with a name begin with it."""
    names: list[str] = []
    for name, task in tasks.items():
        if probabilities and task.is_regression:
            raise ConfigError(f"{task.display} has scores, which have no --probabilities")
        names.append(name or "prediction")
        if probabilities:
            names += [f"{name}_p_{label}".removeprefix("_") for label in task.labels]
    return distinct(names)


@contextmanager
def _table(
    output: Path | None, columns: tuple[str, ...], ours: list[str], probabilities: bool
) -> Iterator[Any]:
    """Yield a function that writes rows of predictions, in the form of the output's extension."""
    header = [*distinct(columns, ours), *ours]
    form = "" if output is None else form_of(output, ".jsonl")

    def values(
        examples: Sequence[Example], predicted: Sequence[Predicted]
    ) -> Iterator[list[object]]:
        for row, example in enumerate(examples):
            cells = identity(example, columns)
            for labels, found in predicted:
                cells.append(labels[row])
                if probabilities and found is not None:
                    cells += [float(f"{p:.6g}") for p in found[row]]
            yield cells

    with _opened(output) as file:
        if form == ".jsonl":

            def write(*given: Any) -> None:
                for row in values(*given):
                    record = dict(zip(header, row, strict=True))
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()

        else:
            writer = table_writer(file, form)
            writer.writerow(header)

            def write(*given: Any) -> None:
                writer.writerows(values(*given))
                file.flush()

        yield write


@contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """Open a file that is replaced when it is complete, or standard output."""
    if output is None:
        yield sys.stdout
        return
    with (
        replacing(output, ConfigError) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        yield file
