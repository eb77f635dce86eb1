"""The work of ``spafit train``: fine-tune for one seed or several."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import statistics
import warnings
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification
from spafit.cli.own_data import DataOptions
from spafit.cli.shared_options import PlanOptions
from spafit.cli.trained import SUMMARY, members
from spafit.config import BertConfig
from spafit.errors import ConfigError, PlanError, one_line
from spafit.files.replacing import refuse_place, replacing
from spafit.plans import Plan
from spafit.runs.record import ADAPTER, RUN, about_model, refuse_other_run
from spafit.strata import DEFAULT, adapt, remove_adapter
from spafit.summary import Summary
from spafit.tasks.metrics import is_better
from spafit.tasks.task import Task
from spafit.text.tokenization import load_tokenizer
from spafit.training.fit import fit
from spafit.training.prefix.shared import SharedPrefix
from spafit.training.processes.group import Group, processes
from spafit.training.result import Result, plan_screen, result_screen, spread_screen
from spafit.training.settings import TrainConfig, complete
from spafit.trunk.combining import copy_adapter
from spafit.weights.adapter_files import load_adapter, read_adapter_header
from spafit.weights.hub import local_folder
from spafit.weights.pretrained import load_pretrained, load_report


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The options that name the model and say how it is read."""

    model: str
    revision: str | None = None
    split_special_tokens: bool = False
    lowercase: bool | None = None
    mapped: bool | None = None
    start_from: Path | None = None


def run_train(
    data: DataOptions,
    plan: PlanOptions,
    base: ModelOptions,
    seeds: list[int],
    config: TrainConfig,
    init_seed: int | None = None,
    together: bool = False,
) -> None:
    """Fine-tune for one seed or several, and print one screen for each.

    ``together`` shares the output of the frozen layers among the seeds.

    Of many processes that torchrun has started the first alone prints and writes.
    """
    with processes() as group, ExitStack() as opened:
        is_first = group is None or group.is_first
        if not is_first:
            opened.enter_context(redirect_stdout(io.StringIO()))
            opened.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _train(data, plan, base, seeds, config, init_seed, together, group)


def _train(
    data: DataOptions,
    plan: PlanOptions,
    base: ModelOptions,
    seeds: list[int],
    config: TrainConfig,
    init_seed: int | None,
    together: bool,
    group: Group | None,
) -> None:
    is_first = group is None or group.is_first
    configs = _configs(data.task_name, seeds, config, is_first)
    start = None if base.start_from is None else members(base.start_from)[0] / ADAPTER
    made, shadow = _planned(plan, base, start)
    train, dev = data.load()
    dev.task.with_metric(config.metric)  # refuses one of another kind of task
    if group is None:  # refuses what does not go together; of many, fit gives each its device
        complete(config, shadow, train, shares=together)
    tokenizer = load_tokenizer(
        base.model,
        revision=base.revision,
        lowercase=base.lowercase,
        split_special_tokens=base.split_special_tokens or None,
    )
    shared = SharedPrefix() if together else None
    results: list[Result] = []
    for seed, seeded in zip(seeds, configs, strict=True):
        initial = seed if init_seed is None else init_seed
        network, summary = _adapted(base, made, start, train.task, initial)
        if seed == seeds[0]:
            print(load_report(network))
            print(plan_screen(summary, config.epochs))
        about = {
            **about_model(
                base.model,
                revision=base.revision,
                split_special_tokens=tokenizer.split_special_tokens,
                lowercase=base.lowercase,
            ),
            **data.about(),
            "max_bad_rows": data.max_bad_rows,
            **({} if initial == seed else {"init_seed": initial}),
            **({} if start is None else {"started_from": _digest(start)}),
        }
        if config.out is not None and is_first and seed == seeds[0]:
            (Path(config.out) / SUMMARY).unlink(missing_ok=True)  # it is of the runs before
        results.append(fit(network, tokenizer, train, dev, seeded, about=about, shared=shared))
        print(result_screen(results[-1], summary, train.task.display))
        if shared is not None and seed == seeds[0]:
            print(f"\ngroup 1 is computed once for all {len(seeds)} seeds")
    if len(results) > 1:
        print(spread_screen(results, seeds))
        if config.out is not None and is_first:
            path = _write_summary(Path(config.out), results, seeds, train.task.name, plan.method)
            print(f"\nwritten: {path}")


_LEFT_OPEN = (None, "auto", "balanced")
"""The settings whose value depends on model, data or device."""


def _configs(task: str, seeds: list[int], config: TrainConfig, is_first: bool) -> list[TrainConfig]:
    """Return the settings of each seed's run; the first process refuses folders that are taken."""
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds has a duplicate: {' '.join(map(str, seeds))}")
    configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
    if config.out is None:
        return configs
    out = Path(config.out)
    folders = [out] if len(seeds) == 1 else [out / f"seed-{seed}" for seed in seeds]
    configs = [
        dataclasses.replace(each, out=folder) for each, folder in zip(configs, folders, strict=True)
    ]
    if is_first:
        _refuse_mixture(out, several=len(seeds) > 1)
        for each, folder in zip(configs, folders, strict=True):
            refuse_place(folder, is_folder=True)
            if not each.overwrite:
                # Check all of them now, before hours of training.
                given = {key: it for key, it in vars(each).items() if it not in _LEFT_OPEN}
                refuse_other_run(folder, task, given)
    return configs


def _planned(
    options: PlanOptions, base: ModelOptions, start: Path | None
) -> tuple[Plan, BertForSequenceClassification]:
    """Return the plan, and a model without values that is adapted by it; no weights are read.

    Raises
    ------
    PlanError
        If there is no such plan for the model, or it is not that of the adapter to begin with.
    """
    files = ("config.json",)
    config = BertConfig.from_json(local_folder(base.model, revision=base.revision, files=files))
    with torch.device("meta"):
        shadow = BertForSequenceClassification(config, num_labels=2)
    plan = options.make(config.num_hidden_layers)
    adapt(shadow, plan)
    if start is not None and (begun := read_adapter_header(start).plan) != plan:
        raise PlanError(
            f"{start.parent} trained {one_line(begun.name)}, and {one_line(plan.name)} is not the "
            "same plan; give its --method and the options that it was trained with"
        )
    return plan, shadow


def _adapted(
    base: ModelOptions, plan: Plan, start: Path | None, task: Task, seed: int
) -> tuple[BertForSequenceClassification, Summary]:
    """Load the model and adapt it by a plan, beginning with an adapter file if one is given."""
    network = load_pretrained(
        base.model,
        num_labels=task.num_labels,
        revision=base.revision,
        seed=seed,
        mapped=base.mapped,
    )
    if start is None:
        return network, adapt(network, plan, seed=seed)
    return network, _started(network, start, task, seed)


def _started(network: BertForSequenceClassification, path: Path, task: Task, seed: int) -> Summary:
    """Adapt a model, beginning with an adapter file; with its head, if the labels are its."""
    start = load_adapter(network, path, name="start")
    is_same = start.labels is not None and set(start.labels) == set(task.labels)
    num_labels = None if is_same else task.num_labels
    summary = copy_adapter(network, "start", DEFAULT, num_labels=num_labels, seed=seed)
    remove_adapter(network, "start")
    return summary


def _digest(path: Path) -> str:
    """Return the SHA-256 of the adapter with which a run begins."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _refuse_mixture(folder: Path, several: bool) -> None:
    """Refuse a folder of one run for several, and the reverse: `eval` takes it as one of them."""
    if several and (folder / RUN).is_file():
        raise ConfigError(f"{folder} holds one run; give another folder (--out) for several seeds")
    if not several and (folder / SUMMARY).is_file():
        raise ConfigError(
            f"{folder} holds the runs of several seeds; give another folder (--out) for one"
        )


def _write_summary(
    folder: Path, results: list[Result], seeds: list[int], task: str, method: str
) -> Path:
    """Write mean, deviation and best of several seeds' runs into their common folder."""
    first = next(iter(results[0].metrics))
    best = 0
    for number, result in enumerate(results):
        if is_better(first, result.metrics[first], results[best].metrics[first]):
            best = number
    scores: dict[str, Any] = {}
    for name, majority in results[0].majority.items():
        values = [result.metrics[name] for result in results]
        scores[name] = {
            "mean": statistics.mean(values),
            "standard_deviation": statistics.stdev(values),
            "best": values[best],
            "majority": majority,
            "values": values,
        }
    summary = {
        "task": task,
        "method": method,
        "seeds": seeds,
        "runs": [f"seed-{seed}" for seed in seeds],
        "best": f"seed-{seeds[best]}",
        "metrics": scores,
    }
    path = folder / SUMMARY
    with replacing(path, ConfigError) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return path
