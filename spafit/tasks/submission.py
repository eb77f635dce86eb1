"""Write submission files in GLUE's exact format.

One TSV file per task: the header ``index<TAB>prediction``, then one row per test example, with the
index counted from 0 in each file. GLUE's server expects the files of all tasks in one zip.
"""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

from spafit.errors import DataError, counted
from spafit.files.replacing import replacing
from spafit.tasks.glue import Dataset
from spafit.tasks.table import SCORE_RANGE, TASKS, GlueTask, get_task
from spafit.tasks.task import Label, Task

HEADER = "index\tprediction"
ZIP = "submission.zip"


def write_submission(
    folder: str | Path,
    task: str | Task,
    predictions: Sequence[Label],
    *,
    dataset: Dataset | None = None,
) -> Path:
    """Write the submission file of one task and return its path.

    Parameters
    ----------
    folder : str or Path
        Where to write the file; created if missing. A file of an earlier run is replaced.
    task : str or Task
        The task, or its name.
    predictions : sequence of str or float
        For each row of the whole test file, in its order: the label's name, or the score.
    dataset : Dataset, optional
        The data that was predicted; if given, it is checked to be the task's whole test split.

    Raises
    ------
    DataError
        If the number of predictions is not that of the task's test file (GLUE refuses such a file),
        a prediction is not a label of the task, ``dataset`` is not the task's whole test split, or
        the file cannot be written.
    """
    task, folder = get_task(task), Path(folder)
    if dataset is not None:
        _check_dataset(task, dataset)
    if len(predictions) != task.test.rows:
        raise DataError(
            f"{task.submission} needs {task.test.rows} predictions, one for each row of "
            f"{task.test.file}, found {len(predictions)}; predict the whole test file"
        )
    rows = [f"{index}\t{_value(task, index, p)}" for index, p in enumerate(predictions)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be created: {error.strerror}; name another one") from None
    path = folder / task.submission
    with replacing(path, DataError) as temporary:
        temporary.write_bytes("\n".join([HEADER, *rows, ""]).encode())
    return path


def _check_dataset(task: GlueTask, dataset: Dataset) -> None:
    if dataset.task.name != task.name or dataset.split != "test":
        raise DataError(
            f"{task.submission} needs the test split of {task.display}, found the "
            f"{dataset.split} split of {dataset.task.display} ({dataset.source})"
        )
    if dataset.bad_rows:
        raise DataError(
            f"{dataset.source} was read without {counted(dataset.bad_rows, 'bad row')}, so its "
            "predictions would have the wrong indices; correct the file and read all of it"
        )


def _value(task: GlueTask, index: int, prediction: Label) -> str:
    """Return one prediction as it is written in the task's submission file."""
    if not task.is_regression:
        if prediction not in task.labels:
            raise DataError(
                f"prediction {index} for {task.display} is {prediction!r}; "
                f"expected one of {', '.join(task.labels)}"
            )
        return task.spelling[task.labels.index(str(prediction))]
    if isinstance(prediction, str) or not math.isfinite(prediction):
        raise DataError(
            f"prediction {index} for {task.display} is {prediction!r}, expected a finite number"
        )
    low, high = SCORE_RANGE
    # max(low, x), in this order, also turns -0.0 into 0.0.
    return f"{min(max(low, prediction), high):.3f}"


def missing_submissions(folder: str | Path) -> tuple[str, ...]:
    """Return the names of the submission files that ``folder`` lacks; GLUE's server needs all."""
    return tuple(
        task.submission for task in TASKS.values() if not (Path(folder) / task.submission).is_file()
    )


def zip_submission(folder: str | Path) -> Path:
    """Zip a folder's submission files into ``submission.zip`` in that folder; return its path.

    Only files with the table's names are included; their headers, numbers of rows, indices and
    values are checked. Equal files give an equal zip. ``missing_submissions`` lists the files that
    GLUE's server would still need.

    Raises
    ------
    DataError
        If there is no submission file, one is not in GLUE's format, or the zip cannot be written.
    """
    folder = Path(folder)
    present = [task for task in TASKS.values() if (folder / task.submission).is_file()]
    if not present:
        raise DataError(f"{folder} holds no submission file such as RTE.tsv; write them first")
    path = folder / ZIP
    with (
        replacing(path, DataError) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for task in present:
            data = (folder / task.submission).read_bytes()
            _check_form(task, folder / task.submission, data)
            # ZipInfo's default date is fixed (1980), so equal files give an equal zip.
            entry = zipfile.ZipInfo(task.submission)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return path


def _check_form(task: GlueTask, path: Path, data: bytes) -> None:
    lines = data.decode("utf-8", errors="replace").split("\n")
    rows = lines[1:-1]
    if lines[0] != HEADER or lines[-1] != "" or len(rows) != task.test.rows:
        raise DataError(
            f"{path} is not in GLUE's form: expected the header {HEADER!r} and {task.test.rows} "
            f"rows, found {lines[0][:40]!r} and {len(rows)} rows; write it again"
        )
    for index, row in enumerate(rows):
        number, _, value = row.partition("\t")
        if number != str(index) or not _is_value(task, value):
            raise DataError(
                f"{path}, line {index + 2}: expected index {index} and a prediction of "
                f"{task.display}, found {row[:40]!r}; write the file again"
            )


def _is_value(task: GlueTask, value: str) -> bool:
    if not task.is_regression:
        return value in task.spelling
    low, high = SCORE_RANGE
    try:
        return low <= float(value) <= high
    except ValueError:
        return False
