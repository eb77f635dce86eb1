"""Fine-tune an adapted model, with a record of the run and checkpoints.

The computation is defined in one flat loop by :mod:`spafit.training.plain`: read that first.

The default settings are those of the SPAFIT paper's appendix A.2: AdamW, weight decay 0.01, 10
epochs, batches of 16, or 8 for MNLI, QNLI and QQP, and of the learning rates that it tried (2e-3,
6e-3, 2e-5 and 6e-5) the best ones, 6e-5 for PEFT methods and 2e-5 for full fine-tuning. What the
paper does not state is as in the Hugging Face training code that it used: linear decay of the
learning rate to 0 without warm-up, gradient norm clipped at 1, no weight decay on biases and
LayerNorms.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, ConfigError, DataError, PlanError, listed
from spafit.kernels.gpu import choices
from spafit.kernels.products import library_on
from spafit.machine.memory import forget_peak_memory, keep_freed_memory
from spafit.machine.precision import autocast
from spafit.machine.random_states import seeded
from spafit.runs.folder import RunFolder
from spafit.runs.identity import RENAMED
from spafit.runs.journal import Journal
from spafit.runs.progress import Progress
from spafit.runs.record import RUN, read_run
from spafit.runs.stopping import StopRequests
from spafit.strata import fingerprint, frozen_in_half, layers_of_group, summarise
from spafit.tasks import scoring
from spafit.tasks.label_order import label_names
from spafit.tasks.table import GlueTask
from spafit.tasks.task import Dataset, Task
from spafit.text.tokenization import Tokenizer
from spafit.training.batches import Feed
from spafit.training.inference import encode
from spafit.training.loop import Loop, Scored, values_that_train
from spafit.training.make_step import make_step
from spafit.training.optimisation import loss_function, trained_parameters
from spafit.training.phases import Keep, Phases
from spafit.training.prefix.kept import KeptPrefix, keep_prefixes
from spafit.training.prefix.shared import SharedPrefix
from spafit.training.processes.group import processes
from spafit.training.processes.together import SharedSaver, Together
from spafit.training.result import Result
from spafit.training.saving import Saver
from spafit.training.settings import TrainConfig, class_weights, complete
from spafit.training.state import TrainingState, restore
from spafit.training.step import Loss, TrainingStep
from spafit.weights.safefile import tensor_file


@torch.inference_mode(False)  # with gradients, whatever mode the caller is in
def fit(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    train: Dataset,
    dev: Dataset,
    config: TrainConfig | None = None,
    *,
    loss: Loss | None = None,
    about: dict[str, Any] | None = None,
    shared: SharedPrefix | None = None,
) -> Result:
    """Fine-tune the parameters that a plan declares, keep the best on dev, and return the result.

    The computation is that of :func:`spafit.training.plain.fit`, one flat loop: with the model in
    the reference form (:func:`spafit.set_impl`) losses and weights are the same bit for bit on a
    CPU; in the fast forms they are the same to rounding if there is no dropout.

    With ``config.out`` the run is saved there while it trains. SIGTERM, SIGINT, SIGHUP and SIGUSR1
    then stop it after the current step, and the same call resumes it: on the same machine it ends
    with the same numbers, bit for bit, as if it had not been stopped. A finished run returns its
    result.

    Processes that torchrun has started, or that have a process group
    (``torch.distributed.init_process_group``), train one run together: each calls this with the
    same arguments, and gets the same result; the first alone writes and shows anything
    (:mod:`spafit.training.processes.together`).

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
    loss : callable, optional
        Your own loss: takes the logits (B, C), in float32 or wider, and the targets (B,), which are
        class numbers in the order of ``model.adaptation.labels``, or scores on the task's scale;
        returns the loss of each example, (B,). The mean over a batch is minimised.
    about : dict, optional
        Additional entries for the run's record, such as the name of the model.
    shared : SharedPrefix, optional
        The output of group 1 that this run shares with others, such as those of other seeds,
        learning rates, or methods with the same group 1: it is computed once for all of them.
        This needs ``dropout_in_group_1=False``, and ``cache_prefix="auto"`` is then in memory.

    Returns
    -------
    Result

    Raises
    ------
    PlanError
        If the model was not adapted, its adapters are disabled at the moment, or it was made under
        ``torch.inference_mode``; if nothing trains, or something that the plan does not declare.
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
    with processes() as group:
        together = None if group is None else Together(group)
        config = TrainConfig() if config is None else config
        return _fit(model, tokenizer, train, dev, config, loss, about or {}, together, shared)


def _fit(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    train: Dataset,
    dev: Dataset,
    config: TrainConfig,
    loss: Loss | None,
    about: dict[str, Any],
    together: Together | None,
    shared: SharedPrefix | None,
) -> Result:
    """Train alone, or this process's share of what many train together."""
    dev = dataclasses.replace(dev, task=dev.task.with_metric(config.metric))
    names = _check(model, train, dev)
    config = _as_begun(config)
    if together is not None:
        config = together.settings(config)
    # What nobody asked for is no reason to refuse a run.
    must_keep = shared is not None or not config.cache_prefix.startswith("auto")
    config = complete(config, model, train, shares=shared is not None)
    summed_loss = _summed_loss(loss, config, names)
    feed, scored = _encode(model, tokenizer, train, dev, config, names)
    truncated = _truncated(feed, scored)
    record = _record(model, tokenizer, train, dev, config, truncated, names, about)
    if loss is not None:
        record["loss"] = f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__name__)}"
    if together is not None:
        record["processes"] = together.group.count
        together.require_same({**record, "start": _digest(values_that_train(model))}, config)
        together.divide(feed)
    with ExitStack() as opened:
        stop = StopRequests() if together is None else together.stop
        has_folder = config.out is not None if together is None else together.has_folder
        # Caught until run.json is written; without a folder there is nothing that could be saved.
        if has_folder:
            opened.enter_context(stop)
        run = _open_folder(model, config, record, feed.total_steps)
        if run is not None:
            opened.push(run)  # it is begun when nothing can be refused any more
        assert model.adaptation is not None
        model.adaptation.task, model.adaptation.labels = train.task.name, names
        model.adaptation.definition = _definition(train.task)
        opened.enter_context(_set_up(model, config))
        if together is not None:
            together.draw_apart(feed.device)
        progress = opened.enter_context(Progress(feed.total_steps, quiet=config.quiet))
        journal = Journal(progress, None if run is None else run.log)
        take_step = make_step(model, config, journal.say, summed_loss)
        opened.callback(take_step.close)
        keep = _keep(model, tokenizer, feed, scored, config, journal, shared)
        with closing(Phases(take_step, feed, keep, must_keep, journal.say)) as phases:
            phases.enter(0)  # refuses what does not fit in memory
            state, saver = _begin(run, take_step, feed, dev, config, journal, together)
            progress.begin(state.step)
            Loop(
                config, take_step, feed, scored, phases, state, journal, saver, stop, together
            ).run()
        result = _result(model, state, feed, scored, () if run is None else run.files)
        if run is not None:
            if chosen := choices.made():  # another choice of kernels rounds otherwise
                run.record["kernels"] = chosen
            run.record["result"] = _jsonable(result, without=("losses", "files"))
    return result


def _check(model: BertForSequenceClassification, train: Dataset, dev: Dataset) -> tuple[str, ...]:
    """Refuse what cannot be trained; return the names of the labels in the order of the logits."""
    trained_parameters(model)  # refuses what could not be saved
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise PlanError(
                f"{name} was made under torch.inference_mode, so that no gradient can pass it; "
                "load and adapt the model outside of it"
            )
    for dataset in (train, dev):
        if len(dataset) == 0 or None in dataset.labels:
            raise DataError(f"{dataset.source} has no labels to learn from or score against")
    if dev.task.labels != train.task.labels:
        here, there = set(train.task.labels), set(dev.task.labels)
        alone = (("train", here - there), ("dev", there - here))
        differing = [f"{name} alone has {listed(sorted(s), ', ')}" for name, s in alone if s]
        raise DataError(
            f"train is {train.task.display} and dev {dev.task.display}: not the same labels, for "
            f"{' and '.join(differing) or 'their order differs'}; read dev by the task of train: "
            "spafit.dataset(dev, task=train.task)"
        )
    return label_names(model, train)


def _as_begun(config: TrainConfig) -> TrainConfig:
    """Go on with dropout in group 1 where the run was begun with it, and nothing else is asked for.

    Older versions also began a plan that trains the head alone so.
    """
    if config.dropout_in_group_1 is not None or config.out is None or config.overwrite:
        return config
    try:
        settings = read_run(Path(config.out) / RUN).get("settings")
    except CheckpointError:  # there is none, or it is damaged, which is reported later
        return config
    if isinstance(settings, dict):
        older = {new: settings.get(old) for old, new in RENAMED.items()}
        if {**older, **settings}.get("dropout_in_group_1") is True:
            return dataclasses.replace(config, dropout_in_group_1=True)
    return config


def _encode(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    train: Dataset,
    dev: Dataset,
    config: TrainConfig,
    names: tuple[str, ...],
) -> tuple[Feed, Scored]:
    """Tokenize the examples: those to train on, in batches, and those to evaluate on."""
    assert config.batch_size is not None and config.order_seed is not None
    feed = Feed(
        encode(model, tokenizer, train, config.max_length),
        targets_of(train, names),
        torch.device(config.device),
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        epochs=config.epochs,
        seed=config.order_seed,
        precision=config.precision,
        bucketed=config.step in ("captured", "compiled"),
        padded=config.step == "eager" and not model.bert.packed,
    )
    encodings = encode(model, tokenizer, dev, config.max_length)
    majority = scoring.majority(dev.task, dev.labels)
    return feed, Scored(dev, encodings, names, train.task.scale, majority)


def _open_folder(
    model: BertForSequenceClassification,
    config: TrainConfig,
    record: dict[str, Any],
    total_steps: int,
) -> RunFolder | None:
    """Lock the run folder and read what is in it; return None if the run has no folder."""
    if config.out is None:
        return None
    return RunFolder(
        config.out,
        {**record, "start": _digest(values_that_train(model))},
        overwrite=config.overwrite,
        keep=config.keep_checkpoints,
        total_steps=total_steps,
    )


@contextmanager
def _set_up(model: BertForSequenceClassification, config: TrainConfig) -> Iterator[None]:
    """Move a model to its device, and apply the settings of how it computes inside the block.

    They are the seed, the precision, the type of frozen matrices and the recomputed layers.
    """
    device = torch.device(config.device)
    assert config.dropout_seed is not None
    with ExitStack() as opened:
        # In the precision that is recorded, whatever autocast the caller is in: backward too.
        opened.enter_context(autocast("float32", device))
        opened.enter_context(seeded(config.dropout_seed, device))
        if device.type == "cuda":  # graphs and events are those of the current device
            opened.enter_context(torch.cuda.device(device))
        if device.type == "cpu":  # a GPU gets the frozen matrices in half precision
            model.to(device)
        if config.frozen_weights == "half":
            half = torch.bfloat16 if config.precision == "bf16" else torch.float16
            opened.enter_context(frozen_in_half(model, half, device))
        model.to(device)
        if device.type == "cpu":
            keep_freed_memory()
            forget_peak_memory()
        elif device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        encoder, before = model.bert.encoder, model.bert.encoder.recomputed
        encoder.recomputed = {
            layer for group in config.recompute for layer in layers_of_group(model, group)
        }
        try:
            yield
        finally:
            encoder.recomputed = before


def _keep(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    feed: Feed,
    scored: Scored,
    config: TrainConfig,
    journal: Journal,
    shared: SharedPrefix | None,
) -> Keep:
    """Return what opens the caches for the output of the layers that are frozen at the moment."""

    def keep(is_pretrained: bool) -> AbstractContextManager[dict[str, KeptPrefix]]:
        where = config.cache_prefix if model.bert.frozen_depth else "off"
        return keep_prefixes(
            model,
            tokenizer,
            {"train": feed.encodings, "dev": scored.encodings},
            # No other run can use what layers give that were trained in this one.
            where="memory" if where == "disk" and not is_pretrained else where,
            dtype=config.cache_dtype,
            limit_gib=config.cache_limit_gib,
            precision=f"{config.precision}, {config.frozen_weights} weights",
            say=journal.say,
            shared=shared if is_pretrained else None,
        )

    return keep


def _begin(
    run: RunFolder | None,
    take_step: TrainingStep,
    feed: Feed,
    dev: Dataset,
    config: TrainConfig,
    journal: Journal,
    together: Together | None,
) -> tuple[TrainingState, Saver | None]:
    """Begin a run or resume it; return its state, and the saver if it has a folder."""
    state = TrainingState()
    if run is None and (together is None or not together.has_folder):
        return state, None
    checkpoint = None if run is None else run.checkpoint
    if together is not None:
        checkpoint = together.sent(checkpoint, feed.device)
    if checkpoint is not None:
        state = restore(checkpoint, take_step.model, take_step)
        feed.accumulation = max(config.accumulation, state.accumulation)
        is_done = state.step == feed.total_steps or state.gives_up(config.early_stopping)
        what = "finished already" if is_done else "resumed"
        where = config.out if run is None else run.path
        journal.say(f"{where}: {what} after step {state.step}")
    if run is not None:
        run.begin()
    for note in () if run is None else run.notes:
        journal.say(note)
    if together is not None:
        every = config.save_every
        return state, SharedSaver(together, run, take_step, dev, every, state, journal.say)
    assert run is not None
    return state, Saver(run, take_step, dev, config.save_every, state, journal.say)


def _result(
    model: BertForSequenceClassification,
    state: TrainingState,
    feed: Feed,
    scored: Scored,
    files: tuple[Path, ...],
) -> Result:
    """Restore the model's best values, and return the result of the run."""
    with torch.no_grad():
        for name, tensor in state.best.items():
            model.get_parameter(name).copy_(tensor)
    model.eval()
    summary = summarise(model)
    top = next(each for each in state.history if each["step"] == state.best_step)
    return Result(
        metrics=top["metrics"],
        majority=scored.majority,
        best_epoch=top["epoch"],
        best_step=top["step"],
        history=tuple(state.history),
        losses=tuple(state.losses),
        trainable=summary.trainable,
        percent=summary.percent,
        examples_per_s=len(feed.encodings) * state.step / feed.steps_an_epoch / state.training_s,
        peak_memory_mib=state.peak_memory_mib,
        seconds=state.seconds,
        truncated=_truncated(feed, scored),
        files=files,
        skipped=len(state.skips),
    )


def _truncated(feed: Feed, scored: Scored) -> dict[str, int]:
    return {"train": feed.encodings.truncated, "dev": scored.encodings.truncated}


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
    """Return what a run starts from: enough to repeat it, and to recognise a repetition."""
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
        **({} if (definition := _definition(train.task)) is None else {"definition": definition}),
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


def _definition(task: Task) -> dict[str, Any] | None:
    """Return the definition of a task of the user's own; GLUE's are known by their names."""
    return None if isinstance(task, GlueTask) else task.to_json_dict()


def _summed_loss(own: Loss | None, config: TrainConfig, names: tuple[str, ...]) -> Loss | None:
    """Return the loss of a run, summed over the examples; None is the plain one."""
    weights = class_weights(config, names)
    if own is None:
        if weights is None and not config.label_smoothing:
            return None
        if weights is not None:
            weights = weights.to(config.device)
        return functools.partial(
            loss_function, class_weights=weights, label_smoothing=config.label_smoothing
        )
    if weights is not None or config.label_smoothing:
        raise ConfigError("a loss of your own has its own class weights and label smoothing")

    def summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        each = own(logits, targets)
        if not isinstance(each, torch.Tensor) or each.shape != targets.shape:
            found = tuple(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__
            raise ConfigError(
                f"the loss must return one value for each example, {tuple(targets.shape)}, found "
                f'{found}; a loss of torch does so with reduction="none"'
            )
        return each.sum()

    return summed


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for piece in tensor_file(tensors, {}):
        digest.update(piece)
    return digest.hexdigest()


def targets_of(dataset: Dataset, names: tuple[str, ...]) -> torch.Tensor:
    """Return class numbers (n,) in the order of ``names``, or regression scores (n,)."""
    if not names:
        center, spread = dataset.task.scale
        scores = [(float(label or 0.0) - center) / spread for label in dataset.labels]
        return torch.tensor(scores, dtype=torch.float32)
    return torch.tensor([names.index(str(label)) for label in dataset.labels])


def _jsonable(settings: TrainConfig | Result, without: tuple[str, ...] = ()) -> dict[str, Any]:
    entries = dataclasses.asdict(settings)
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in entries.items()
        if name not in without
    }
