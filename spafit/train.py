"""Fine-tune an adapted model: one flat loop.

The settings that are not given are the SPAFIT paper's (AdamW, learning rate 6e-5 for the
parameter-efficient methods and 2e-5 for full fine-tuning, weight decay 0.01, 10 epochs, batches of
16 or 8), and where the paper is silent those of the Hugging Face training code that it used: linear
decay to 0 without warm-up, gradient norm clipped at 1, no decay of biases and LayerNorms.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spafit import metrics
from spafit.adapter_files import save_adapter
from spafit.bert import BertForSequenceClassification
from spafit.errors import DataError, PlanError, TrainingError
from spafit.feed import Feed
from spafit.fingerprint import fingerprint
from spafit.glue import Dataset
from spafit.inference import decode, encode, label_names, predict_logits
from spafit.kept_prefix import KeptPrefix, keep_prefix
from spafit.kernels import choices
from spafit.kernels.products import library_on
from spafit.memory import keep_freed_memory
from spafit.optimisation import learning_rate_factor
from spafit.progress import Progress
from spafit.run_folder import RunFolder, peak_memory_mib
from spafit.steps import Readings, make_step
from spafit.strata import frozen_stored_in, layers_of_group, summarise
from spafit.tokenization import Tokenizer
from spafit.train_config import TrainConfig, complete

# fp16 skips a few steps at its start, until the loss is scaled to fit; a run of these is no start.
_MOST_SICK = 25


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes
    ----------
    metrics : dict of str to float
        Of the best evaluation on dev, by the task's first metric; of equal ones the earliest.
    majority : dict of str to float
        What always predicting the commonest class scores on dev.
    best_epoch : int
        The epoch of the best evaluation, from 1.
    best_step : int
        Its step, from 1.
    history : tuple of dict
        Every evaluation: step, epoch, metrics.
    losses : tuple of float
        The training loss of every step.
    trainable, percent : int, float
        Numbers that train, and their share of the model's.
    examples_per_s : float
        In training, evaluations not counted.
    peak_memory_mib : float
        Of the GPU, or of the process.
    seconds : float
        In all.
    truncated : dict of str to int
        Examples cut to the maximum length, of "train" and "dev".
    files : tuple of Path
        What was written.
    """

    metrics: dict[str, float]
    majority: dict[str, float]
    best_epoch: int
    best_step: int
    history: tuple[dict[str, Any], ...]
    losses: tuple[float, ...]
    trainable: int
    percent: float
    examples_per_s: float
    peak_memory_mib: float
    seconds: float
    truncated: dict[str, int]
    files: tuple[Path, ...]


def fit(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    train: Dataset,
    dev: Dataset,
    config: TrainConfig | None = None,
    *,
    about: dict[str, Any] | None = None,
) -> Result:
    """Fine-tune what a plan has declared, keep the best on dev, and say what came of it.

    Parameters
    ----------
    model : BertForSequenceClassification
        Adapted (:func:`spafit.adapt`). It is left on the run's device in evaluation mode, with the
        best trained values.
    tokenizer : Tokenizer
        The model's.
    train, dev : Dataset
        Labelled examples of one task.
    config : TrainConfig, optional
        The settings; the default is the paper's.
    about : dict, optional
        More for the run's record, such as the name of the model.

    Returns
    -------
    Result

    Raises
    ------
    PlanError
        If the model was not adapted.
    DataError
        If the data have no labels, belong to different tasks, or do not fit the head.
    TrainingError
        If the loss is NaN or infinite.
    CheckpointError, ConfigError
        If the run folder or the settings are at fault.
    """
    config = TrainConfig() if config is None else config
    adaptation = model.adaptation
    if adaptation is None:
        raise PlanError("the model was not adapted; call spafit.adapt(model, plan) first")
    task = train.task
    if dev.task.labels != task.labels:
        raise DataError(f"train is {task.display} and dev {dev.task.display}: not the same labels")
    for dataset in (train, dev):
        if len(dataset) == 0 or None in dataset.labels:
            raise DataError(f"{dataset.source} has no labels to learn from or score against")
    names = label_names(model, train)
    config = complete(config, model, train)
    assert config.batch_size is not None and config.learning_rate is not None
    device = torch.device(config.device)
    arithmetic = config.precision

    encoded = {
        "train": encode(model, tokenizer, train, config.max_length),
        "dev": encode(model, tokenizer, dev, config.max_length),
    }
    truncated = {name: encodings.truncated for name, encodings in encoded.items()}
    targets = _targets(train, names)
    majority = metrics.majority(task, dev.labels)
    summary = summarise(model)
    record = _record(model, tokenizer, train, dev, config, truncated, about or {})
    run = None
    if config.out is not None:
        run = RunFolder(config.out, record, overwrite=config.overwrite)
    adaptation.task, adaptation.labels = task.name, names

    start = time.perf_counter()
    with run or nullcontext(), _seeded(config.seed, device), ExitStack() as opened:
        if device.type == "cuda":  # graphs and events are those of the current device
            opened.enter_context(torch.cuda.device(device))
        if config.frozen_weights == "half":
            half = torch.bfloat16 if arithmetic == "bf16" else torch.float16
            opened.enter_context(frozen_stored_in(model, half))
        model.to(device)
        if device.type == "cpu":
            keep_freed_memory()
        opened.enter_context(_recomputing(model, config.recompute))
        prefixes: dict[str, KeptPrefix] = {}
        if config.cache_prefix != "off":
            prefixes = {
                name: opened.enter_context(
                    keep_prefix(
                        model,
                        tokenizer,
                        encodings,
                        record["base_fingerprint"],
                        where=config.cache_prefix,
                        dtype=config.cache_dtype,
                        limit_gib=config.cache_limit_gib,
                        arithmetic=f"{arithmetic}, {config.frozen_weights} weights",
                    )
                )
                for name, encodings in encoded.items()
            }
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        feed = Feed(
            encoded["train"],
            targets,
            device,
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            epochs=config.epochs,
            seed=config.seed,
            arithmetic=arithmetic,
            prefix=prefixes.get("train"),
            bucketed=config.step in ("captured", "compiled"),
        )
        total_steps = feed.steps_an_epoch * config.epochs
        losses: list[float] = []
        history: list[dict[str, Any]] = []
        best: dict[str, torch.Tensor] = {}
        training_s = 0.0
        sick = 0  # steps in a row that were skipped, for their gradient was not finite

        with Progress(total_steps, quiet=config.quiet) as progress:

            def say(note: str) -> None:
                progress.line(note)
                if run is not None:
                    run.log({"note": note})

            def into_training() -> None:
                model.train()
                if not config.frozen_dropout:
                    model.bert.freeze_dropout()

            take_step = make_step(model, config, say)
            opened.callback(take_step.close)
            readings: Readings[tuple[int, int, int, float]] = Readings(device)
            into_training()
            since = time.perf_counter()
            for step, fed in enumerate(feed, start=1):
                factor = learning_rate_factor(step - 1, total_steps, config.warmup)
                learning_rate = config.learning_rate * factor
                readings.add(
                    (step, fed.epoch, fed.examples, learning_rate),
                    take_step(fed.parts, learning_rate),
                )
                is_due = step % (config.eval_every or feed.steps_an_epoch) == 0
                is_due = is_due or step == total_steps
                for read, loss, grad_norm in readings.ready(wait=is_due):
                    number, epoch, examples, rate = read
                    if not math.isfinite(loss):
                        raise TrainingError(
                            f"the loss at step {number} (epoch {epoch}) is {loss}; try a lower "
                            f"learning rate than {config.learning_rate:g}, or precision float32"
                        )
                    step_s, since = time.perf_counter() - since, time.perf_counter()
                    training_s += step_s
                    losses.append(loss)
                    sick = 0 if math.isfinite(grad_norm) else sick + 1
                    progress.step(number, epoch, loss, examples / step_s)
                    if run is not None:
                        run.log(
                            {
                                "step": number,
                                "epoch": epoch,
                                "loss": loss,
                                "learning_rate": rate,
                                "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                                "step_time_ms": 1000 * step_s,
                            }
                        )
                    if sick == _MOST_SICK:
                        raise TrainingError(
                            f"the gradients of {sick} steps in a row were not finite, so that "
                            "nothing was learnt from them; try a lower learning rate than "
                            f"{config.learning_rate:g}, or precision float32"
                        )
                if not is_due:
                    continue

                logits_dev = predict_logits(
                    model, encoded["dev"], precision=arithmetic, prefix=prefixes.get("dev")
                )
                if not np.isfinite(logits_dev).all():
                    raise TrainingError(f"the logits on dev after step {step} are not finite")
                for prefix in prefixes.values():  # what a cache found damaged, or made room for
                    while prefix.cache.notes:
                        say(prefix.cache.notes.pop(0))
                scores = metrics.compute(task, decode(logits_dev, names), dev.labels)
                first = task.metrics[0]
                is_best = not history or scores[first] > max(h["metrics"][first] for h in history)
                history.append({"step": step, "epoch": fed.epoch, "metrics": scores})
                progress.line(_evaluation_line(history[-1], majority, is_best))
                if run is not None:
                    run.log({"step": step, "epoch": fed.epoch, "evaluation": scores})
                if is_best:
                    best = {
                        name: model.get_parameter(name).detach().to("cpu", copy=True)
                        for name in adaptation.trainable
                    }
                    if run is not None:
                        save_adapter(model, run.adapter)
                into_training()
                since = time.perf_counter()

        with torch.no_grad():
            for name, tensor in best.items():
                model.get_parameter(name).copy_(tensor)
        model.eval()
        first = task.metrics[0]
        top = max(history, key=lambda evaluation: evaluation["metrics"][first])
        result = Result(
            metrics=top["metrics"],
            majority=majority,
            best_epoch=top["epoch"],
            best_step=top["step"],
            history=tuple(history),
            losses=tuple(losses),
            trainable=summary.trainable,
            percent=summary.percent,
            examples_per_s=len(train) * config.epochs / training_s,
            peak_memory_mib=peak_memory_mib(device),
            seconds=time.perf_counter() - start,
            truncated=truncated,
            files=() if run is None else run.files,
        )
        if run is not None:
            if chosen := choices.made():  # another choice of kernels rounds otherwise
                run.record["kernels"] = chosen
            run.record["result"] = _jsonable(result, without=("losses", "files"))
    return result


def _record(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    train: Dataset,
    dev: Dataset,
    config: TrainConfig,
    truncated: dict[str, int],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Say what a run starts from: enough to repeat it, and to know whether it was repeated."""
    adaptation = model.adaptation
    assert adaptation is not None
    summary = summarise(model)
    data = {
        name: {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "rows": len(dataset),
            "bad_rows": dataset.bad_rows,
            "truncated": truncated[name],
        }
        for name, dataset in (("train", train), ("dev", dev))
    }
    return {
        "task": train.task.name,
        "method": adaptation.plan.name,
        "about": about,
        "settings": _jsonable(config),
        "plan": json.loads(adaptation.plan.to_json()),
        "data": data,
        "base_fingerprint": adaptation.base_fingerprint or fingerprint(model),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "trainable": summary.trainable,
        "pretrained": summary.pretrained,
        "dropout_in_group_1": config.frozen_dropout,
        "products": library_on(torch.device(config.device)),
    }


def _targets(dataset: Dataset, names: tuple[str, ...]) -> torch.Tensor:
    """Class numbers (n,) by the order of ``names``, or scores."""
    if not names:
        return torch.tensor(dataset.labels, dtype=torch.float32)
    return torch.tensor([names.index(str(label)) for label in dataset.labels])


@contextmanager
def _recomputing(model: BertForSequenceClassification, groups: tuple[int, ...]) -> Iterator[None]:
    """Have the layers of some groups computed again in backward, inside the block."""
    encoder, before = model.bert.encoder, model.bert.encoder.recomputed
    encoder.recomputed = {layer for group in groups for layer in layers_of_group(model, group)}
    try:
        yield
    finally:
        encoder.recomputed = before


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block, and give the caller's random state back after it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would seed every GPU, and only this one's state is given back.
        torch.default_generator.manual_seed(seed)
        for gpu in devices:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def _evaluation_line(evaluation: dict[str, Any], majority: dict[str, float], is_best: bool) -> str:
    scores = ", ".join(
        f"{name} {score:.4f} (majority {majority[name]:.4f})"
        for name, score in evaluation["metrics"].items()
    )
    best = ", best so far" if is_best else ""
    return f"epoch {evaluation['epoch']}, step {evaluation['step']}: dev {scores}{best}"


def _jsonable(settings: TrainConfig | Result, without: tuple[str, ...] = ()) -> dict[str, Any]:
    entries = dataclasses.asdict(settings)
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in entries.items()
        if name not in without
    }
