"""The commands of the command line: each calls the package and prints the results."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import ConfigError, DataError
from spafit.files.replacing import refuse_place, replacing
from spafit.machine.precision import resolve_device, resolve_precision
from spafit.methods import plan as make_plan
from spafit.plans import Plan
from spafit.runs.record import ADAPTER, read_record, refuse_other_run
from spafit.strata import adapt
from spafit.tasks import glue, metrics
from spafit.tasks.download import download_glue, glue_cache
from spafit.tasks.glue import Dataset
from spafit.tasks.submission import missing_submissions, write_submission, zip_submission
from spafit.tasks.table import Label
from spafit.text.tokenization import Tokenizer, load_tokenizer
from spafit.training.fit import fit
from spafit.training.inference import evaluate, predict
from spafit.training.result import Result, result_screen, spread_screen
from spafit.training.settings import TrainConfig
from spafit.weights.adapter_files import load_adapter, read_adapter_header
from spafit.weights.hub import local_folder, pinned_revision
from spafit.weights.pretrained import load_pretrained, load_report

_MNLI_FAMILY = ("mnli", "mnli-mm", "ax")  # one model predicts all three


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The options that turn a method's name into a plan (see :func:`spafit.plan`)."""

    method: str
    r: int | None
    alpha: float | None
    lora_dropout: float | None
    bias: str | None
    numbering: str | None

    def make(self, num_layers: int) -> Plan:
        """Return the plan for a model of L layers."""
        return make_plan(
            self.method,
            num_layers,
            r=self.r,
            alpha=self.alpha,
            lora_dropout=self.lora_dropout,
            bias=self.bias,
            numbering=self.numbering,
        )


def run_plan(options: PlanOptions, model: str | None, num_labels: int, save: Path | None) -> None:
    """Print what trains, for a model built without weights."""
    if save is not None:
        refuse_place(save)
    config = BertConfig()  # bert-large-cased
    if model is not None:
        config = BertConfig.from_json(local_folder(model, files=("config.json",)))
    with torch.device("meta"):
        shadow = BertForSequenceClassification(config, num_labels)
    plan = options.make(config.num_hidden_layers)
    print(adapt(shadow, plan))
    if save is not None:
        with replacing(save, ConfigError) as temporary:
            temporary.write_text(plan.to_json() + "\n", encoding="utf-8")
        print(f"written: {save}")


def run_train(
    task: str,
    plan: PlanOptions,
    model: str,
    revision: str | None,
    data: Path,
    seeds: list[int],
    config: TrainConfig,
    max_bad_rows: int,
    split_special_tokens: bool = False,
) -> None:
    """Fine-tune for one seed or several, and print one screen for each."""
    if max_bad_rows < 0:
        raise ConfigError(f"--max-bad-rows must be a whole number of at least 0: {max_bad_rows}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds has a duplicate: {' '.join(map(str, seeds))}")
    configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
    if config.out is not None and len(seeds) > 1:
        configs = [
            dataclasses.replace(each, out=Path(config.out) / f"seed-{each.seed}")
            for each in configs
        ]
    for each in configs:
        if each.out is not None:
            refuse_place(Path(each.out), is_folder=True)
        if each.out is not None and not each.overwrite:
            # Check all of them now, before hours of training.
            refuse_other_run(each.out, glue.get_task(task).name, each.seed)
    train = glue.load(task, "train", data, max_bad_rows=max_bad_rows)
    dev = glue.load(task, "dev", data, max_bad_rows=max_bad_rows)
    for dataset in (train, dev):
        if dataset.bad_rows:
            print(f"{dataset.source}: {dataset.bad_rows} malformed rows left out", file=sys.stderr)
    tokenizer = load_tokenizer(
        model, revision=revision, split_special_tokens=split_special_tokens or None
    )
    results: list[Result] = []
    for seed, seeded in zip(seeds, configs, strict=True):
        network = load_pretrained(
            model, num_labels=train.task.num_labels, revision=revision, seed=seed
        )
        summary = adapt(network, plan.make(network.config.num_hidden_layers), seed=seed)
        if seed == seeds[0]:
            print(load_report(network))
            print(summary)
        about = {
            "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
            "revision": revision,
            "commit": pinned_revision(model, revision),
            "data": str(data.resolve()),
            "split_special_tokens": tokenizer.split_special_tokens,
        }
        results.append(fit(network, tokenizer, train, dev, seeded, about=about))
        print(result_screen(results[-1], summary, train.task.display))
    if len(results) > 1:
        print(spread_screen(results, seeds))


def run_eval(run: Path, data: Path | None, split: str, model: str | None) -> None:
    """Score a run's adapter on a labelled split."""
    network, tokenizer, record = _load_run(run, model)
    folder = Path(_recorded(record, "data", "--data")) if data is None else data
    names = [record["task"]] if record["task"] != "mnli" else ["mnli", "mnli-mm"]
    for name in names:
        try:
            dataset = glue.load(name, split, folder)
        except DataError as error:
            if name == names[0]:
                raise
            print(f"{name} left out: {error}", file=sys.stderr)
            continue
        scores = evaluate(
            network,
            tokenizer,
            dataset,
            max_length=record["settings"]["max_length"],
            precision=record["settings"]["precision"],
        )
        majority = metrics.majority(dataset.task, dataset.labels)
        for metric, score in scores.items():
            print(
                f"{dataset.task.display} {split} ({len(dataset)} examples): {metric} {score:.4f}"
                f"   (always the commonest class: {majority[metric]:.4f})"
            )


def run_predict(
    run: Path,
    input_file: Path | None,
    output: Path | None,
    submission: Path | None,
    data: Path | None,
    model: str | None,
) -> None:
    """Predict a file, or write the submission file of the run's task."""
    if output is not None:
        refuse_place(output)
        _refuse_to_replace(output, input_file)
    if submission is not None:
        refuse_place(submission, is_folder=True)
    network, tokenizer, record = _load_run(run, model)

    def labels_of(dataset: Dataset) -> Sequence[Label]:
        return predict(
            network,
            tokenizer,
            dataset,
            max_length=record["settings"]["max_length"],
            precision=record["settings"]["precision"],
        ).labels

    if input_file is not None:
        _predict_file(glue.read_file(record["task"], input_file), labels_of, output)
    else:
        assert submission is not None
        folder = Path(_recorded(record, "data", "--data")) if data is None else data
        _predict_submission(record["task"], folder, labels_of, submission)


def _predict_file(
    dataset: Dataset, labels_of: Callable[[Dataset], Sequence[Label]], output: Path | None
) -> None:
    """Write a table of predictions to a file or to standard output."""
    rows = [
        f"{example.index}\t{label}"
        for example, label in zip(dataset.examples, labels_of(dataset), strict=True)
    ]
    text = "\n".join(["index\tprediction", *rows]) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    with replacing(output, ConfigError) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written: {output} ({len(rows)} predictions)")


def _predict_submission(
    task: str,
    folder: Path,
    labels_of: Callable[[Dataset], Sequence[Label]],
    submission: Path,
) -> None:
    """Write the submission files of a task and of the tasks that use the same model."""
    names = _MNLI_FAMILY if task == "mnli" else (task,)
    for name in names:
        try:
            dataset = glue.load(name, "test", folder)
        except DataError as error:
            if name == names[0]:
                raise
            print(f"{name} left out: {error}", file=sys.stderr)
            continue
        _refuse_to_replace(submission / dataset.task.submission, Path(dataset.source))
        path = write_submission(submission, name, labels_of(dataset), dataset=dataset)
        print(f"written: {path} ({len(dataset)} predictions)")
    print(f"written: {zip_submission(submission)}")
    missing = missing_submissions(submission)
    if missing:
        print(f"still missing for GLUE's server: {', '.join(missing)}")


def run_download(what: str, names: list[str], folder: Path | None) -> None:
    """Download a model or GLUE's files once; afterwards everything works offline."""
    if what == "model":
        if folder is not None:
            raise ConfigError("--folder is for glue; models go to the hub's cache (HF_HOME)")
        for name in names:
            if Path(name).expanduser().is_dir():
                raise ConfigError(f"{name} is a local folder already; name a model")
        for name in names or ["google-bert/bert-large-cased"]:
            place, commit = local_folder(name), pinned_revision(name)
            print(f"{name} at commit {commit}: {place}" if commit else f"{name}: {place}")
        return
    tasks = names or [task.name for task in glue.TASKS.values()]
    place = glue_cache() if folder is None else folder
    refuse_place(place, is_folder=True)
    shown: dict[str, int] = {}

    def show(name: str, done: int, total: int) -> None:
        percent = 100 * done // max(1, total)
        if percent // 10 > shown.get(name, -1):
            shown[name] = percent // 10
            print(f"{name}: {done:,} of {total:,} bytes", file=sys.stderr)

    for path in download_glue(tasks, place, progress=show):
        print(f"written: {path}")


def _refuse_to_replace(output: Path, source: Path | None) -> None:
    """Refuse to overwrite the data with its predictions."""
    if source is not None and source.exists() and output.exists() and output.samefile(source):
        raise ConfigError(f"{output} is the data itself; name another file for the predictions")


def _load_run(
    run: Path, model: str | None
) -> tuple[BertForSequenceClassification, Tokenizer, dict[str, Any]]:
    """Load a run's base model and its adapter."""
    record = read_record(run)
    name = model or _recorded(record, "model", "--model")
    revision = None if model else record["about"].get("revision")
    header = read_adapter_header(run / ADAPTER)
    network = load_pretrained(name, num_labels=header.num_labels, revision=revision)
    load_adapter(network, run / ADAPTER)
    _place(network, record["settings"])
    tokenizer = load_tokenizer(name, revision=revision, split_special_tokens=_splits(record))
    return network, tokenizer, record


def _place(network: BertForSequenceClassification, settings: dict[str, Any]) -> None:
    """Move a model to the run's device; if that is not available, report it and choose another."""
    try:
        device = resolve_device(settings["device"])
        resolve_precision(settings["precision"], device)
    except ConfigError as error:
        device = resolve_device("auto")
        settings["precision"] = resolve_precision("auto", device)
        print(f"using {settings['precision']} on {device}: {error}", file=sys.stderr)
    network.to(device)


def _splits(record: dict[str, Any]) -> bool:
    """Return whether a run's tokenizer split special tokens; False in older records."""
    value = record["about"].get("split_special_tokens", False)
    if not isinstance(value, bool):
        raise ConfigError(
            f"the run's record is damaged: split_special_tokens is {value!r:.80}, expected true or "
            "false; correct run.json, or train again"
        )
    return value


def _recorded(record: dict[str, Any], key: str, option: str) -> str:
    value = record.get("about", {}).get(key)
    if not isinstance(value, str):
        raise ConfigError(f"the run's record has no {key}; give {option}")
    return value
