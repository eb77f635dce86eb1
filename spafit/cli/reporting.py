"""The work of ``spafit report``: compare runs, and predict GLUE's test sets with the best."""

from __future__ import annotations

import sys
from pathlib import Path

from spafit.cli.predicting import tasks_submitted, write_submission_files
from spafit.cli.trained import Trained
from spafit.config import BertConfig
from spafit.errors import ConfigError, SpafitError, one_line
from spafit.experiments.report.found import Run
from spafit.experiments.report.tables import make_report
from spafit.experiments.report.text import markdown
from spafit.experiments.report.write import write_report
from spafit.files.replacing import refuse_place
from spafit.machine.terminal import fitted
from spafit.tasks import glue
from spafit.tasks.submission import ZIP, missing_submissions, zip_submission
from spafit.tasks.table import TASKS
from spafit.weights.hub import local_folder


def run_report(
    folder: Path,
    out: Path | None,
    submission: Path | None,
    *,
    against: str | None,
    data: Path | None,
    model: str | None,
) -> int:
    """Print the report in Markdown, write its files, and GLUE's submission if it is asked for.

    Returns
    -------
    int
        1 if a submission was asked for and is not complete, else 0.
    """
    if submission is None and (data is not None or model is not None):
        raise ConfigError("--data and --model are for --submission; a report reads neither")
    out = folder if out is None else out
    for place in (out, submission):
        if place is not None:
            refuse_place(place, is_folder=True)
    report = make_report(folder, against)
    if submission is not None:
        _refuse_wrong_sources(report.best, data, model)
    print(fitted(markdown(report), {}))
    for path in write_report(report, out):
        print(f"written: {path}")
    if submission is None:
        return 0
    return _submit(report.best, submission, data, model)


def _refuse_wrong_sources(best: dict[str, Run], data: Path | None, model: str | None) -> None:
    """Refuse data that have no test set of the tasks, and a model that is not there."""
    if data is not None and not any(glue.has_file(task, "test", data) for task in best):
        tasks = ", ".join(TASKS[task].display for task in best) or "a task with a finished run"
        raise ConfigError(f"--data: {data} has no test set of {tasks}; name GLUE's root")
    if model is not None:
        BertConfig.from_json(local_folder(model, files=("config.json",)))


def _submit(best: dict[str, Run], submission: Path, data: Path | None, model: str | None) -> int:
    """Write the file of each task, and the zip only if all are there: GLUE's server takes no less.

    A file that is in the folder already is taken where no run here writes it, so that what is
    lacking can be put there; where one should and fails, there is no zip of its older answers.
    """
    if (submission / ZIP).exists():
        (submission / ZIP).unlink()
        print(f"removed: {submission / ZIP}, of an earlier call")
    failed: list[str] = []
    without_run: list[str] = []
    for name, task in TASKS.items():
        if task.train is None:  # by the run of MNLI
            continue
        if name not in best:
            print(f"{task.display}: no finished run with an adapter", file=sys.stderr)
            without_run += tasks_submitted(name)
            continue
        run = best[name]
        metric = task.metrics[0]
        print(f"{task.display}: {run.name}, {run.method}, dev {metric} {run.metrics[metric]:.4f}")
        try:
            trained = Trained(run.folder, model, None)
            folder = data or Path(trained.recorded("data", "--data"))
            failed += write_submission_files(trained, folder, submission)
        except SpafitError as error:
            failed += tasks_submitted(name)
            print(f"{task.display} left out: {one_line(str(error), 600)}", file=sys.stderr)
    missing = missing_submissions(submission)
    older = [file for file in map(_file, failed) if file not in missing]
    if missing or older:
        why = [f"{submission} lacks {', '.join(missing)}"] * bool(missing)
        why += [f"predictions failed that would replace {', '.join(older)}"] * bool(older)
        print(
            f"no zip is written, because GLUE's server takes all {len(TASKS)} files or none; "
            f"{'; '.join(why)}",
            file=sys.stderr,
        )
        return 1
    if without_run:
        files = ", ".join(map(_file, without_run))
        print(f"of no run here, as they were in {submission}: {files}")
    print(f"written: {zip_submission(submission)}")
    return 0


def _file(task: str) -> str:
    return TASKS[task].submission
