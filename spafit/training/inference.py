"""Predict examples, and score the predictions by the names of their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError, DataError, TrainingError
from spafit.machine.memory import is_out_of_memory, keep_freed_memory, shortage
from spafit.machine.precision import autocast, resolve_precision
from spafit.tasks import scoring
from spafit.tasks.label_order import label_names
from spafit.tasks.task import Dataset, Label, Task
from spafit.text.tokenization import Encodings, Tokenizer
from spafit.training.prefix.kept import KeptPrefix


class AbandonedError(Exception):
    """A prediction was stopped early, at the caller's request."""


@dataclass(frozen=True)
class Predictions:
    """The predictions of a model for each example, in the order of the data.

    Attributes
    ----------
    logits : numpy.ndarray of float32, (n, C)
        The head's output.
    labels : list of str or list of float
        The name of the label with the largest logit, or the score.
    truncated : int
        How many examples were truncated to the maximum length.
    names : tuple of str
        The names of the labels in the order of the logits; empty for scores.
    """

    logits: NDArray[np.float32]
    labels: Sequence[Label]
    truncated: int
    names: tuple[str, ...] = ()

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """The probability of each label, (n, C): the softmax of the logits, in float64."""
        return softmax(self.logits)


def predict(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    dataset: Dataset,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    precision: str = "auto",
) -> Predictions:
    """Predict every example of a data set, labelled or not.

    Parameters
    ----------
    model : BertForSequenceClassification
        It runs on its device in evaluation mode, and its mode is restored afterwards.
    tokenizer : Tokenizer
        The model's.
    dataset : Dataset
        The examples.
    max_length : int, optional
        Tokens to which an example is truncated; None is the model's maximum.
    batch_size : int
        Examples at a time. Examples of similar length are batched together, which changes results
        only by rounding.
    precision : {"auto", "float32", "tf32", "bf16", "fp16"}
        Of matrix products (see :func:`~spafit.machine.precision.resolve_precision`).

    Returns
    -------
    Predictions

    Raises
    ------
    DataError
        If the labels that the model was trained for are not those of the task.
    ConfigError
        If a setting is out of range, or the tokenizer is not this model's.
    TrainingError
        If a logit is NaN or infinite, or there is not enough memory for a single example.
    """
    names = label_names(model, dataset)
    encodings = encode(model, tokenizer, dataset, max_length)
    logits = predict_logits(model, encodings, batch_size=batch_size, precision=precision)
    sick = int((~np.isfinite(logits).all(axis=1)).sum())
    if sick:
        raise TrainingError(
            f"the logits of {sick} of {len(dataset)} examples of {dataset.source} are not finite; "
            "try precision float32"
        )
    labels = decode(logits, names, scale_of(model, dataset.task))
    return Predictions(logits, labels, encodings.truncated, names)


def evaluate(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    dataset: Dataset,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    precision: str = "auto",
) -> dict[str, float]:
    """Score a model on labelled examples by all metrics of the task; arguments as :func:`predict`.

    Raises
    ------
    DataError
        If an example has no label.
    """
    if None in dataset.labels:
        raise DataError(f"{dataset.source} has no labels to score against; predict it instead")
    predictions = predict(
        model,
        tokenizer,
        dataset,
        max_length=max_length,
        batch_size=batch_size,
        precision=precision,
    )
    probabilities = probabilities_of(predictions.logits, predictions.names, dataset.task)
    return scoring.compute(dataset.task, predictions.labels, dataset.labels, probabilities)


def scale_of(model: BertForSequenceClassification, task: Task) -> tuple[float, float]:
    """Return the scale of the scores that a model was trained on (see :class:`Task`)."""
    definition = None if model.adaptation is None else model.adaptation.definition
    return task.scale if definition is None else Task.from_json_dict(definition).scale


def decode(
    logits: NDArray[np.float32],
    names: tuple[str, ...],
    scale: tuple[float, float] = (0.0, 1.0),
) -> list[Label]:
    """Return the name of each row's largest logit (n, C), or its score if there are no names."""
    if not names:
        center, spread = scale
        return [center + spread * float(score) for score in logits[:, 0]]
    return [names[index] for index in logits.argmax(axis=1)]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the softmax of each row (n, C), in float64."""
    exps = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(exps / exps.sum(axis=1, keepdims=True))


def probabilities_of(
    logits: NDArray[np.float32], names: tuple[str, ...], task: Task
) -> NDArray[np.float64] | None:
    """Return the probabilities (n, C) in the order of the task's labels; None for scores."""
    if not names:
        return None
    return softmax(logits)[:, [names.index(name) for name in task.labels]]


def encode(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    dataset: Dataset,
    max_length: int | None,
) -> Encodings:
    """Tokenize a data set for a model.

    Raises
    ------
    ConfigError
        If ``max_length`` exceeds the model's positions, or the tokenizer has more entries than the
        model's embeddings.
    """
    longest = model.config.max_position_embeddings
    if max_length is not None and max_length > longest:
        raise ConfigError(f"max_length = {max_length} exceeds the model's {longest} positions")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model's embeddings have "
            f"{model.config.vocab_size}; load the tokenizer of this model"
        )
    length = longest if max_length is None else max_length
    return tokenizer.encode(dataset.texts_a, dataset.texts_b, max_length=length)


def predict_logits(
    model: BertForSequenceClassification,
    encodings: Encodings,
    *,
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    prefix: KeptPrefix | None = None,
    abandoned: Callable[[], bool] = lambda: False,
) -> NDArray[np.float32]:
    """Return the logits (n, C) of encoded examples in their order, or of some ``rows`` in theirs.

    With ``prefix`` only the layers after group 1 are computed. The reference form
    (:func:`spafit.set_impl`) gets padded batches, all others packed ones.

    If there is not enough memory for a batch, it and those after it are halved. ``abandoned`` is
    called before every batch.

    Raises
    ------
    AbandonedError
        If ``abandoned()`` is true.
    TrainingError
        If there is not enough memory for a single example.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be a whole number of at least 1: {batch_size!r}")
    device = model.classifier.weight.device
    precision = resolve_precision(precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    order = encodings.by_length(range(len(encodings)) if rows is None else rows)
    is_padded = prefix is None and not model.bert.packed
    found = []
    was_training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            autocast(precision, device),
            # Triton launches on the current device.
            torch.cuda.device_of(model.classifier.weight),  # type: ignore[no-untyped-call]
        ):
            start = 0
            while start < len(order):
                if abandoned():
                    raise AbandonedError
                some = order[start : start + batch_size]
                try:
                    if is_padded:
                        logits = model(*encodings.batch(some).to(device))
                    else:
                        batch = encodings.packed(some)
                        if device.type == "cuda":
                            batch = batch.pinned()
                        batch = batch.to(device)
                        kept = None if prefix is None else prefix(some, batch)
                        logits = model.forward_packed(batch, kept)
                    found.append(logits.float())
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(some) == 1:
                        raise TrainingError(
                            f"not enough memory for one example at a time ({shortage(error)}); "
                            "truncate the texts more (max_length; --max-length of spafit train)"
                        ) from error
                    batch_size = len(some) // 2
                else:
                    start += len(some)
    finally:
        model.train(was_training)
    every = np.empty((len(encodings), model.num_labels), dtype=np.float32)
    if found:
        every[order] = torch.cat(found).cpu().numpy()  # the one place that waits for a GPU
    return every if rows is None else every[rows]
