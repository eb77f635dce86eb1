"""The data of a command: a GLUE task's folder, or a file of your own with its columns."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spafit.errors import ConfigError, DataError, counted, one_line
from spafit.tasks import glue, own
from spafit.tasks.own_files import TableForm
from spafit.tasks.reading import kind_of
from spafit.tasks.task import Dataset, Task


@dataclass(frozen=True)
class DataOptions:
    """The options of ``spafit train``, ``probe`` and ``search`` that name the data.

    Attributes
    ----------
    task : str or None
        A GLUE task; or, with a file of your own, the name that the task gets.
    data, dev : Path, Path or None
        GLUE's folder; or the files to train on and to evaluate on.
    text, text2, label : str or None
        The columns of a file of your own.
    regression : bool
        Whether labels are scores.
    form : TableForm
        How text files are written.
    dev_share, split_seed : float, int or None
        How train and dev are split where there is no file for dev; None: a fifth, and seed 0.
    max_bad_rows : int
        How many malformed rows may be left out of each file.
    """

    task: str | None
    data: Path
    dev: Path | None = None
    text: str | None = None
    text2: str | None = None
    label: str | None = None
    regression: bool = False
    form: TableForm = dataclasses.field(default_factory=TableForm)
    dev_share: float | None = None
    split_seed: int | None = None
    max_bad_rows: int = 0

    def __post_init__(self) -> None:
        if self.max_bad_rows < 0:
            raise ConfigError(
                f"--max-bad-rows must be a whole number of at least 0: {self.max_bad_rows}"
            )
        for option, value in self._of_split.items():
            if self.dev is not None and value is not None:
                raise ConfigError(f"{option} is for rows that are split off; --dev names a file")

    @property
    def _of_split(self) -> dict[str, object]:
        return {"--dev-share": self.dev_share, "--split-seed": self.split_seed}

    @property
    def _share_and_seed(self) -> tuple[float, int]:
        return 0.2 if self.dev_share is None else self.dev_share, self.split_seed or 0

    @property
    def is_own(self) -> bool:
        """Return whether the data is a file of your own."""
        return not self.data.is_dir() and (self.task is None or self.data.exists())

    @property
    def task_name(self) -> str:
        """Name of the task, before anything is read."""
        if self.is_own:
            return own.task_name(self.task or self.data.stem)
        return glue.get_task(self._glue_task()).name

    def _glue_task(self) -> str:
        if self.task is None:
            raise ConfigError(
                f"{self.data} is a folder: name its GLUE task with --task, or name a file of your "
                "own (CSV, TSV, JSONL, parquet) with --data"
            )
        given: dict[str, object] = {"--dev": self.dev, "--text": self.text, "--text2": self.text2}
        given |= {"--label": self.label, "--regression": self.regression or None}
        given |= {**self._of_split, **_of_form(self.form)}
        for option, value in given.items():
            if value is not None:
                raise ConfigError(f"{option} is for a file of your own, and --data is a folder")
        return self.task

    def load(self) -> tuple[Dataset, Dataset]:
        """Read train and dev, and print what a user should know of them before training."""
        if not self.is_own:
            task = self._glue_task()
            train = glue.load(task, "train", self.data, max_bad_rows=self.max_bad_rows)
            dev = glue.load(task, "dev", self.data, max_bad_rows=self.max_bad_rows)
            for dataset in (train, dev):
                report_bad_rows(dataset)
            return train, dev
        train = own.dataset(
            self.data,
            text=self.text,
            text2=self.text2,
            label=self.label or "label",
            regression=self.regression,
            name=self.task,
            form=self.form,
            labelled=True,
            max_bad_rows=self.max_bad_rows,
        )
        if self.dev is None:
            train, dev = own.split(train, *self._share_and_seed)
        else:
            dev = own.dataset(
                self.dev,
                task=train.task,
                form=self.form,
                labelled=True,
                max_bad_rows=self.max_bad_rows,
            )
            train = dataclasses.replace(train, split="train")
            dev = dataclasses.replace(dev, split="dev")
        print(own.describe(train, dev))
        return train, dev

    def about(self) -> dict[str, Any]:
        """Return what the record of a run says of the data."""
        if not self.is_own:
            return {"data": str(self.data.resolve())}
        split = dict(zip(("dev_share", "split_seed"), self._share_and_seed, strict=True))
        return {
            "data": str(self.data.resolve()),
            **(split if self.dev is None else {"dev": str(self.dev.resolve())}),
            "delimiter": self.form.delimiter,
            "quoted": self.form.quoted,
            "encoding": self.form.encoding,
        }


def refuse_wrong_place(task: str | None, data: Path | None) -> None:
    """Refuse data that is not there, and a task that does not go with it.

    GLUE's tasks need its folder, and any other name a file of your own.
    """
    own_file = "for data of your own name its file with --data"
    if data is None and task is None:
        raise ConfigError(f"name a task of GLUE with --task, such as rte; {own_file}")
    if data is not None and (kind := kind_of(data)) in ("nothing", "a link to nothing"):
        raise DataError(
            f"there is {kind} at {data} (--data); name GLUE's folder for a task of GLUE, or a "
            "file of your own, for which --task is but a name and may be left out"
        )
    if task is None:
        return
    try:
        known = glue.get_task(task)
    except DataError as error:
        if data is None or data.is_dir():
            raise DataError(f"{error}; {own_file}") from None
    else:
        if data is not None and kind_of(data) == "a file":
            raise DataError(
                f"--task {task} is {known.display} of GLUE, whose folder --data names; for a file "
                "of your own give another name, or leave --task out"
            )


def own_dataset(
    task: Task, record: dict[str, Any], split: str, form: TableForm, max_bad_rows: int
) -> Dataset:
    """Read again what a run was trained or evaluated on, and check that it is the same."""
    about = record["about"]
    has_dev = isinstance(about.get("dev"), str)
    path = about.get("dev" if split == "dev" and has_dev else "data")
    if not isinstance(path, str):
        raise ConfigError("the run's record has no data; give --data")
    found = own.dataset(Path(path), task=task, form=form, labelled=True, max_bad_rows=max_bad_rows)
    if not has_dev:
        share, seed = about.get("dev_share"), about.get("split_seed")
        if not isinstance(share, float) or not isinstance(seed, int):
            raise ConfigError("the run's record does not say how its data was split; give --data")
        found = own.split(found, share, seed)[0 if split == "train" else 1]
    recorded = record.get("data", {}).get(split, {}).get("sha256")
    if recorded is not None and recorded != found.sha256:
        raise DataError(
            f"{found.source} has changed since the run was trained; name the rows to score with "
            "--data"
        )
    return dataclasses.replace(found, split=split)


def _of_form(form: TableForm) -> dict[str, object]:
    """Return the options that say how a table is written, None where they say what is usual."""
    return {
        "--delimiter": form.delimiter,
        "--unquoted": None if form.quoted else True,
        "--encoding": None if form.encoding == "utf-8" else form.encoding,
    }


def refuse_form(task: Task, form: TableForm) -> None:
    """Refuse what was said of how a table is written, of a file in GLUE's own form."""
    for option, value in _of_form(form).items():
        if value is not None:
            raise ConfigError(
                f"{option} is for a file of your own; those of {task.display} are in UTF-8, with a "
                "TAB between fields and none of them quoted"
            )


def report_encoding(source: str, encoding: str) -> None:
    """Say in which encoding a file was read, if not in UTF-8."""
    if encoding != "utf-8":
        print(one_line(f"{source}: read as {encoding} (--encoding)", 1000), file=sys.stderr)


def report_bad_rows(dataset: Dataset) -> None:
    """Say how many rows of a file were left out."""
    if dataset.bad_rows:
        text = f"{dataset.source}: {counted(dataset.bad_rows, 'malformed row')} left out"
        print(one_line(text, 1000), file=sys.stderr)
