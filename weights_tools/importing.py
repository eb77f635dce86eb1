"""Take an adapter of PEFT or AdapterHub over, as a run folder for spafit (``import``)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError, WeightsError, listed, one_line
from spafit.runs.record import ADAPTER, RUN, write_run
from spafit.strata import adapt, fingerprint, summarise
from spafit.tasks import glue
from spafit.tasks.table import GlueTask
from spafit.tasks.task import Task
from spafit.text.tokenization import load_tokenizer
from spafit.training.result import plan_screen
from spafit.version import __version__
from spafit.weights.adapter_files import save_adapter
from spafit.weights.heads import plain
from spafit.weights.hub import pinned_revision
from spafit.weights.pretrained import load_pretrained
from weights_tools.exporting import made
from weights_tools.formats import adapters, peft_read
from weights_tools.formats.foreign import Foreign, read_object
from weights_tools.formats.peft_settings import CONFIG

EPILOG = """\
examples:
  python -m weights_tools import peft-mrpc runs/mrpc --model FOLDER --task mrpc
  python -m weights_tools import mine runs/mine --model minilm --labels billing bug
then:
  spafit predict runs/mine --text "a text"
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command."""
    parser = verbs.add_parser(
        "import",
        help="take an adapter of PEFT or AdapterHub over",
        description="Read an adapter that PEFT or the library adapters (AdapterHub) saved, put it "
        "on its base, and write it as a run folder, for spafit predict, spafit eval and "
        "spafit.load_adapter. What spafit does not compute is refused by name; what was ignored is "
        "said. Without a task that the labels belong to, only the adapter file is written.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="with an adapter_config.json")
    parser.add_argument("out", metavar="OUT", help="to be made; empty if it exists")
    parser.add_argument(
        "--model", metavar="M", required=True, help="the base: a folder or a hub name"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--task", metavar="TASK", help="of GLUE; its labels are the head's rows")
    kind.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="of a task of your own, in the head's order"
    )
    kind.add_argument("--regression", action="store_true", help="the head's one row is a score")
    parser.add_argument(
        "--pair", action="store_true", help="a task of your own with two texts (text and text2)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read, put on the base, write, and print the plan and what is to be known."""
    out = Path(options.out)
    foreign = read(Path(options.folder))
    task = _task(options, foreign)
    if task is not None:
        _order(task, foreign)  # refused before anything is loaded
    with made(out):
        model, notes = put_on(foreign, options.model)
        assert model.adaptation is not None
        model.adaptation.labels = foreign.labels if task is None else _order(task, foreign)
        if task is not None:
            model.adaptation.task = task.name
            model.adaptation.definition = _definition(task)
        save_adapter(model, out / ADAPTER)
        if task is not None:
            _write_record(out, model, options.model, task, foreign)
    print(plan_screen(summarise(model)))
    if foreign.base:
        print(f"note: its base is called {one_line(foreign.base)} there")
    for note in notes:
        print(f"note: {note}")
    if task is None:
        print(
            f"written: {out / ADAPTER}, for spafit.load_adapter; for spafit predict name its task "
            "(--task, --labels or --regression)"
        )
        return 0
    print(f"written: {out}, a run folder for spafit predict and eval")
    return 0


def read(folder: Path) -> Foreign:
    """Read an adapter's folder, of PEFT or of the library adapters.

    Raises
    ------
    WeightsError
        If it is neither, cannot be trusted, or asks for what spafit does not compute.
    """
    entries = read_object(folder / CONFIG)
    if "peft_type" in entries:
        return peft_read.read(folder)
    if isinstance(entries.get("config"), dict):
        return adapters.read(folder)
    raise WeightsError(
        f"{folder / CONFIG} is neither PEFT's (it has no peft_type) nor AdapterHub's (no config)"
    )


def put_on(foreign: Foreign, base: str) -> tuple[BertForSequenceClassification, list[str]]:
    """Load the base and put a foreign adapter on it.

    Parameters
    ----------
    foreign : Foreign
        From :func:`read`.
    base : str
        A folder or a hub name.

    Returns
    -------
    (BertForSequenceClassification, list of str)
        The adapted model, and what became of what is no value.

    Raises
    ------
    WeightsError, PlanError
        If they do not fit.
    """
    model = load_pretrained(base, num_labels=foreign.num_labels)
    found = foreign.onto(model)
    adapt(model, found.plan)
    with torch.no_grad():
        for name, value in found.values.items():
            model.get_parameter(name).copy_(value)
    return model, found.notes


def _task(options: argparse.Namespace, foreign: Foreign) -> Task | None:
    """Return the task that is named, else the one of an export of ours; None if neither is."""
    rows = foreign.num_labels
    if options.pair and not (options.labels or options.regression):
        raise ConfigError("--pair belongs to a task of your own: give --labels or --regression")
    if options.task:
        task: Task = glue.get_task(options.task)
    elif options.labels or options.regression:
        fields = ("text", "text2") if options.pair else ("text",)
        metrics = ("pearson", "spearman") if options.regression else ("accuracy", "macro_f1")
        name = Path(options.folder).resolve().name
        task = Task(name, fields, tuple(options.labels or ()), metrics)
    elif foreign.task.get("definition") is not None:
        task = Task.from_json_dict(foreign.task["definition"])
    elif foreign.labels is not None and isinstance(foreign.task.get("task"), str):
        task = glue.get_task(foreign.task["task"])
    else:
        return None
    if task.num_labels != rows:
        raise ConfigError(
            f"{task.display} needs a head of {task.num_labels} rows, {options.folder} has one of "
            f"{rows}; name the task that it was trained for"
        )
    return task


def _order(task: Task, foreign: Foreign) -> tuple[str, ...]:
    """Return the task's labels in the order of the head's rows.

    Raises
    ------
    ConfigError
        If the folder names its rows otherwise.
    """
    if foreign.labels is None:
        return task.labels
    by_name = dict(zip(plain(task.labels), task.labels, strict=True))
    names = plain(foreign.labels)
    if set(names) != set(by_name):
        raise ConfigError(
            f"the folder names the rows of its head {listed(foreign.labels, ', ')}, and "
            f"{task.display} has {listed(task.labels or ('a score',), ', ')}; name its own task, "
            "or its --labels"
        )
    return tuple(by_name[name] for name in names)


def _definition(task: Task) -> dict[str, Any] | None:
    """Return the definition of a task that is not one of GLUE's, which are known by name."""
    return None if isinstance(task, GlueTask) else task.to_json_dict()


def _write_record(
    out: Path, model: BertForSequenceClassification, base: str, task: Task, foreign: Foreign
) -> None:
    """Write what spafit predict and eval need to know beside the adapter."""
    adaptation = model.adaptation
    assert adaptation is not None
    tokenizer = load_tokenizer(base)
    longest = model.config.max_position_embeddings
    max_length = foreign.task.get("max_length")
    if type(max_length) is not int or not 8 <= max_length <= longest:
        max_length = longest
    is_folder = Path(base).is_dir()
    record = {
        "task": task.name,
        **({} if adaptation.definition is None else {"definition": adaptation.definition}),
        "labels": list(adaptation.labels or ()),
        "status": "finished",
        "method": adaptation.plan.name,
        "plan": json.loads(adaptation.plan.to_json()),
        "settings": {"max_length": max_length, "precision": "float32", "device": "auto"},
        "about": {
            "model": str(Path(base).resolve()) if is_folder else base,
            "revision": None if is_folder else pinned_revision(base),
        },
        "base_fingerprint": fingerprint(model)
        if adaptation.base_fingerprint is None
        else adaptation.base_fingerprint,
        "base_config": model.config.to_json_dict(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "imported": {"base": foreign.base},
        "versions": {"spafit": __version__},
    }
    write_run(out / RUN, record)
