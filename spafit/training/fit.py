"""Fine-tune an adapted model, with a record and checkpoints.

What is computed is defined, in one flat loop, by :mod:`spafit.training.plain`: read that first.

The settings that are not given are the SPAFIT paper's (A.2: AdamW, weight decay 0.01, 10 epochs,
batches of 16, or 8 for MNLI, QNLI and QQP; of the learning rates 2e-3, 6e-3, 2e-5 and 6e-5 those
that it found best, 6e-5 for PEFT methods and 2e-5 for full fine-tuning), and where the paper is
silent those of the Hugging Face training code that it used: linear decay to 0 without warm-up,
gradient norm clipped at 1, no decay of biases and LayerNorms.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError, DataError
from spafit.kernels.gpu import choices
from spafit.kernels.products import library_on
from spafit.machine.memory import keep_freed_memory
from spafit.machine.precision import autocast
from spafit.machine.random_states import seeded
from spafit.runs.folder import RunFolder
from spafit.runs.progress import Progress
from spafit.runs.stopping import StopRequests
from spafit.strata import fingerprint, frozen_stored_in, layers_of_group, summarise
from spafit.tasks import metrics
from spafit.tasks.glue import Dataset
from spafit.text.tokenization import Tokenizer
from spafit.training.batches import Feed
from spafit.training.inference import encode, label_names
from spafit.training.loop import Loop, Scored, values_that_train
from spafit.training.make_step import make_step
from spafit.training.optimisation import trained_parameters
from spafit.training.prefix.kept import keep_prefixes
from spafit.training.saving import Saver
from spafit.training.settings import TrainConfig, complete
from spafit.training.state import TrainingState, restore
from spafit.weights.safefile import tensor_file


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
    skipped : int
        Steps whose loss or gradient was NaN or infinite, and from which nothing was learnt.
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
    skipped: int = 0


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

    The computation is that of :func:`spafit.training.plain.fit`, one flat loop: with the model in
    the reference form (:func:`spafit.set_impl`) losses and weights are the same bit for bit on a
    CPU, else to rounding where there is no dropout.

    With ``config.out`` the run is saved there as it goes on. SIGTERM, SIGINT, SIGHUP and SIGUSR1
    then end it after the step in hand, and the same call goes on from there: on the same machine to
    the same numbers, bit for bit, as if it had never been stopped. A run that is finished gives its
    result.

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
        If the model was not adapted, nothing trains, or something trains that the plan does not
        declare.
    DataError
        If the data have no labels, belong to different tasks, or do not fit the head.
    TrainingError
        If the run cannot go on: 25 losses or gradients in a row are NaN or infinite, memory does
        not suffice for a single example, or it could not be saved twice in a row.
    StoppedError
        If a signal asked for a stop, and the run is saved.
    CheckpointError, ConfigError
        If the settings are at fault, or the run folder: it cannot be written, is in use, or holds
        another run.
    """
    config = TrainConfig() if config is None else config
    trained_parameters(model)  # refuses what could not be saved
    adaptation = model.adaptation
    assert adaptation is not None
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
    record = _record(model, tokenizer, train, dev, config, truncated, names, about or {})
    total_steps = math.ceil(len(train) / config.batch_size) * config.epochs
    with ExitStack() as opened:
        # Caught until run.json is written; without a folder there is nothing that could be saved.
        stop = StopRequests() if config.out is None else opened.enter_context(StopRequests())
        run = None
        if config.out is not None:
            run = RunFolder(
                config.out,
                {**record, "start": _digest(values_that_train(model))},
                overwrite=config.overwrite,
                keep=config.keep_checkpoints,
                total_steps=total_steps,
            )
            opened.push(run)  # it is begun further down, where nothing can be refused any more
        # In the precision that is recorded, whatever autocast the caller is in: backward too.
        opened.enter_context(autocast("float32", device))
        adaptation.task, adaptation.labels = task.name, names
        opened.enter_context(seeded(config.seed, device))
        if device.type == "cuda":  # graphs and events are those of the current device
            opened.enter_context(torch.cuda.device(device))
        if config.frozen_weights == "half":
            half = torch.bfloat16 if arithmetic == "bf16" else torch.float16
            opened.enter_context(frozen_stored_in(model, half))
        model.to(device)
        if device.type == "cpu":
            keep_freed_memory()
        opened.enter_context(_recomputing(model, config.recompute))
        progress = opened.enter_context(Progress(total_steps, quiet=config.quiet))

        def say(note: str) -> None:
            progress.line(note)
            if run is not None:
                run.log.write({"note": note})

        prefixes = opened.enter_context(
            keep_prefixes(
                model,
                tokenizer,
                encoded,
                where=config.cache_prefix,
                dtype=config.cache_dtype,
                limit_gib=config.cache_limit_gib,
                arithmetic=f"{arithmetic}, {config.frozen_weights} weights",
                say=say,
            )
        )
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
            padded=config.step == "eager" and not prefixes and not model.bert.packed,
        )
        take_step = make_step(model, config, say)
        opened.callback(take_step.close)
        state, saver = TrainingState(), None
        if run is not None:
            if run.checkpoint is not None:
                state = restore(run.checkpoint, model, take_step)
                is_done = state.step == total_steps
                what = "finished already" if is_done else "taken up again"
                say(f"{run.path}: {what} after step {state.step}")
            run.begin()
            for note in run.notes:
                say(note)
            saver = Saver(run, model, take_step, config.save_every, state, say)
        progress.begin(state.step)
        feed.accumulation = max(config.accumulation, state.accumulation)
        loop = Loop(
            model=model,
            take_step=take_step,
            feed=feed,
            dev=Scored(dev, encoded["dev"], names, majority),
            config=config,
            state=state,
            prefixes=prefixes,
            progress=progress,
            run=run,
            saver=saver,
            stop=stop,
            say=say,
        )
        loop.run()

        with torch.no_grad():
            for name, tensor in state.best.items():
                model.get_parameter(name).copy_(tensor)
        model.eval()
        top = next(each for each in state.history if each["step"] == state.best_step)
        result = Result(
            metrics=top["metrics"],
            majority=majority,
            best_epoch=top["epoch"],
            best_step=top["step"],
            history=tuple(state.history),
            losses=tuple(state.losses),
            trainable=summary.trainable,
            percent=summary.percent,
            examples_per_s=len(train) * config.epochs / state.training_s,
            peak_memory_mib=state.peak_memory_mib,
            seconds=state.seconds,
            truncated=truncated,
            files=() if run is None else run.files,
            skipped=len(state.skips),
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
    names: tuple[str, ...],
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
    try:
        json.dumps(about, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"about must be what JSON can hold: {error}") from None
    trained = trained_parameters(model)
    frozen = [name for name in adaptation.trainable if name not in trained]
    return {
        "task": train.task.name,
        "method": adaptation.plan.name,
        "about": about,
        "settings": _jsonable(config),
        "plan": json.loads(adaptation.plan.to_json()),
        "data": data,
        "base_fingerprint": adaptation.base_fingerprint or fingerprint(model),
        "base_config": model.config.to_json_dict(),
        "labels": list(names),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "trainable": summary.trainable,
        **({"frozen_by_user": frozen} if frozen else {}),
        "pretrained": summary.pretrained,
        "dropout_in_group_1": config.dropout_in_group_1,
        "products": library_on(torch.device(config.device)),
    }


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for piece in tensor_file(tensors, {}):
        digest.update(piece)
    return digest.hexdigest()


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


def _jsonable(settings: TrainConfig | Result, without: tuple[str, ...] = ()) -> dict[str, Any]:
    entries = dataclasses.asdict(settings)
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in entries.items()
        if name not in without
    }
