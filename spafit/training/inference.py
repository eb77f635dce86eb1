"""Predict examples, and score the predictions by the names of their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import ConfigError, DataError, TrainingError
from spafit.layout import PackedBatch
from spafit.machine.memory import is_out_of_memory, keep_freed_memory, shortage
from spafit.machine.precision import autocast, resolve_precision
from spafit.strata import named_adapter
from spafit.tasks import scoring
from spafit.tasks.label_order import label_names, own_labels, own_task, require_shape
from spafit.tasks.task import Dataset, Label, Task
from spafit.text.tokenization import Encodings, Tokenizer
from spafit.training.batches import made_ahead
from spafit.training.prefix.kept import KeptPrefix
from spafit.trunk.batches import forward_tasks
from spafit.trunk.flat import FlatModel, why_not_flat

_T = TypeVar("_T")

WORTH_MERGING = 128
"""Examples from which on merging is taken to save more time than it takes."""


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
    predictor = Predictor(
        model,
        tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        precision=precision,
        merges=len(dataset) >= WORTH_MERGING,
    )
    return predictor.predict(dataset)


class Predictor:
    """Predict any number of data sets by a model that does not change meanwhile.

    On a CPU its adapter is merged once, into copies of the matrices that are laid out for products
    (:mod:`spafit.trunk.flat`), in bf16 if that is the precision; the model itself stays as it is.
    One with hooks, a form of its own, or what has no merged form, computes as it stands.

    Parameters
    ----------
    model, tokenizer, max_length, batch_size, precision
        As for :func:`predict`.
    merges : bool
        Whether to merge. The copies take as much memory as the matrices, in bf16 half of it.
    """

    def __init__(
        self,
        model: BertForSequenceClassification,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 64,
        precision: str = "auto",
        merges: bool = True,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size, self.merges = max_length, batch_size, merges
        self.precision = resolve_precision(precision, model.classifier.weight.device)

    @cached_property
    def flat(self) -> FlatModel | None:
        """The merged model, made when it is first needed; None where the model itself is used."""
        if not self.merges or why_not_flat(self.model):
            return None
        return FlatModel(self.model, torch.bfloat16 if self.precision == "bf16" else None)

    def predict(self, dataset: Dataset) -> Predictions:
        """Predict the examples of a data set; errors as of :func:`predict`."""
        return self._predicted(self._encoded(dataset))[1]

    def stream(
        self, datasets: Iterable[Dataset], done: Callable[[int], None] = lambda count: None
    ) -> Iterator[tuple[Dataset, Predictions]]:
        """Yield data sets, such as the parts of a long file, each with its predictions.

        A thread tokenizes the next one while one is predicted; no more are held at a time. ``done``
        is called after every batch with how many examples it had.
        """
        for encoded in made_ahead(datasets, self._encoded, ahead=1):
            yield self._predicted(encoded, done)

    def _encoded(self, dataset: Dataset) -> tuple[Dataset, tuple[str, ...], Encodings]:
        names = label_names(self.model, dataset)
        return dataset, names, encode(self.model, self.tokenizer, dataset, self.max_length)

    def _predicted(
        self,
        encoded: tuple[Dataset, tuple[str, ...], Encodings],
        done: Callable[[int], None] = lambda count: None,
    ) -> tuple[Dataset, Predictions]:
        dataset, names, encodings = encoded
        logits = predict_logits(
            self.model,
            encodings,
            batch_size=self.batch_size,
            precision=self.precision,
            flat=self.flat,
            done=done,
        )
        _require_finite(logits, f"examples of {dataset.source}")
        labels = decode(logits, names, scale_of(self.model, dataset.task))
        return dataset, Predictions(logits, labels, encodings.truncated, names)


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
    """Tokenize a data set for a model; see :func:`encode_texts`."""
    return encode_texts(model, tokenizer, dataset.texts_a, dataset.texts_b, max_length)


def encode_texts(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    texts_a: Sequence[str],
    texts_b: Sequence[str | None] | None,
    max_length: int | None,
) -> Encodings:
    """Tokenize texts for a model; None is the second text of an example that has one.

    Raises
    ------
    ConfigError
        If ``max_length`` exceeds the model's positions, or the tokenizer has more entries than the
        model's embeddings.
    """
    length = longest(model.config, max_length)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model's embeddings have "
            f"{model.config.vocab_size}; load the tokenizer of this model"
        )
    return tokenizer.encode(texts_a, texts_b, max_length=length)


def longest(config: BertConfig, max_length: int | None) -> int:
    """Return the most tokens of an example; None is the model's maximum.

    Raises
    ------
    ConfigError
        If the model has not so many positions.
    """
    positions = config.max_position_embeddings
    if max_length is not None and max_length > positions:
        raise ConfigError(f"max_length = {max_length} exceeds the model's {positions} positions")
    return positions if max_length is None else max_length


def predict_logits(
    model: BertForSequenceClassification,
    encodings: Encodings,
    *,
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    prefix: KeptPrefix | None = None,
    flat: FlatModel | None = None,
    abandoned: Callable[[], bool] = lambda: False,
    done: Callable[[int], None] = lambda count: None,
) -> NDArray[np.float32]:
    """Return the logits (n, C) of encoded examples in their order, or of some ``rows`` in theirs.

    With ``prefix`` only the layers after group 1 are computed; with ``flat``, which is made of the
    model, that computes them in its own precision. The reference form
    (:func:`spafit.set_impl`) gets padded batches, all others packed ones.

    If there is not enough memory for a batch, it and those after it are halved. ``abandoned`` is
    called before every batch, and ``done`` after it with how many examples it had.

    Raises
    ------
    AbandonedError
        If ``abandoned()`` is true.
    TrainingError
        If there is not enough memory for a single example.
    """
    device = model.classifier.weight.device
    order = encodings.by_length(range(len(encodings)) if rows is None else rows)
    is_padded = prefix is None and not model.bert.packed

    def logits_of(some: list[int]) -> torch.Tensor:
        if flat is not None:
            return flat(encodings.packed(some))
        if is_padded:
            logits: torch.Tensor = model(*encodings.batch(some).to(device))
        else:
            batch = _packed(encodings, some, device)
            logits = model.forward_packed(batch, None if prefix is None else prefix(some, batch))
        return logits.float()

    found = _in_batches(
        model,
        order,
        logits_of,
        batch_size=batch_size,
        precision=precision if flat is None else "float32",  # no autocast
        abandoned=abandoned,
        done=done,
    )
    every = np.empty((len(encodings), model.num_labels), dtype=np.float32)
    if found:
        every[order] = torch.cat(found).cpu().numpy()  # the one place that waits for a GPU
    return every if rows is None else every[rows]


def _packed(encodings: Encodings, rows: Sequence[int], device: torch.device) -> PackedBatch:
    """Return some examples as packed tensors on a device."""
    batch = encodings.packed(rows)
    return (batch.pinned() if device.type == "cuda" else batch).to(device)


def _in_batches(
    model: BertForSequenceClassification,
    order: Sequence[int],
    compute: Callable[[list[int]], _T],
    *,
    batch_size: int,
    precision: str,
    abandoned: Callable[[], bool] = lambda: False,
    done: Callable[[int], None] = lambda count: None,
) -> list[_T]:
    """Compute something of examples in evaluation mode, so many at a time, in a given order.

    Memory, ``abandoned`` and ``done`` are as for :func:`predict_logits`.

    Raises
    ------
    AbandonedError, TrainingError
        As :func:`predict_logits`.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be a whole number of at least 1: {batch_size!r}")
    device = model.classifier.weight.device
    precision = resolve_precision(precision, device)
    if device.type == "cpu":
        keep_freed_memory()
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
                some = list(order[start : start + batch_size])
                try:
                    found.append(compute(some))
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
                    done(len(some))
    finally:
        model.train(was_training)
    return found


def _require_finite(logits: NDArray[np.float32], of: str) -> None:
    """Raise a TrainingError if a logit (n, C) is NaN or infinite."""
    sick = int((~np.isfinite(logits).all(axis=1)).sum())
    if sick:
        raise TrainingError(
            f"the logits of {sick} of {len(logits)} {of} are not finite; try precision float32"
        )


def predict_all(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    texts: Sequence[str | tuple[str, str]],
    tasks: Sequence[str] | Sequence[Sequence[str]] | None = None,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, Predictions]:
    """Predict texts by several adapters of one model; what they share is computed once.

    The predictions are those of each adapter by itself, but for rounding
    (:func:`spafit.forward_tasks`).

    Parameters
    ----------
    model : BertForSequenceClassification
        A model with trained adapters. The one in use is in use again afterwards.
    tokenizer : Tokenizer
        The model's.
    texts : sequence of str or (str, str)
        Texts, and pairs of texts for adapters that were trained for pairs.
    tasks : sequence of str, or sequence of sequences of str, optional
        The names of the adapters that predict all texts; or for each text the names of those that
        predict it. None is all adapters of the model, for all texts.
    max_length, batch_size, precision
        As for :func:`predict`.
    done : callable
        Called after every batch with how many texts it had.

    Returns
    -------
    dict of str to Predictions
        For each adapter that is named, the predictions of its texts in their order.

    Raises
    ------
    PlanError
        If the model has no adapter of a name, its adapters are disabled at the moment, or the one
        in use cannot be taken out (:func:`spafit.use`).
    DataError
        If there are no texts, an adapter was never trained, or was trained for pairs and gets a
        single text, or the reverse.
    ConfigError, TrainingError
        As :func:`predict`.
    """
    texts_a, texts_b = _first_and_second(texts)
    rows = _rows_of_each(model, tasks, len(texts_a))
    if model.adaptation is not None:
        model.adaptation.require_enabled()
    names: dict[str, tuple[str, ...]] = {}
    scales: dict[str, tuple[float, float]] = {}
    for name, some in rows.items():
        adapter = named_adapter(model, name)
        names[name], task = own_labels(adapter), own_task(adapter)
        scales[name] = (0.0, 1.0) if task is None else task.scale
        for row in some:
            if task is not None:
                is_pair = texts_b[row] is not None
                require_shape(task, pair=is_pair, source=f"row {row}", trained=f"{name!r:.200}")
    encodings = encode_texts(model, tokenizer, texts_a, texts_b, max_length)
    device = model.classifier.weight.device
    its_rows = {name: set(some) for name, some in rows.items()}
    order = encodings.by_length(sorted(set().union(*its_rows.values())))

    def logits_of(some: list[int]) -> dict[str, torch.Tensor]:
        places = {
            name: [place for place, row in enumerate(some) if row in its]
            for name, its in its_rows.items()
            if not its.isdisjoint(some)
        }
        found = forward_tasks(model, _packed(encodings, some, device), places)
        return {name: logits.float() for name, logits in found.items()}

    parts = _in_batches(
        model, order, logits_of, batch_size=batch_size, precision=precision, done=done
    )
    predictions = {}
    for name, its in its_rows.items():
        computed = torch.cat([part[name] for part in parts if name in part]).cpu().numpy()
        logits = computed[np.argsort([row for row in order if row in its])]
        _require_finite(logits, f"texts by the adapter {name!r:.200}")
        labels = decode(logits, names[name], scales[name])
        truncated = len(its.intersection(encodings.cut))
        predictions[name] = Predictions(logits, labels, truncated, names[name])
    return predictions


def _first_and_second(
    texts: Sequence[str | tuple[str, str]],
) -> tuple[list[str], list[str | None]]:
    """Return the first texts, and the second ones, None where there is none."""
    if isinstance(texts, str):
        raise DataError("expected a sequence of texts, found one text; give [text]")
    texts_a: list[str] = []
    texts_b: list[str | None] = []
    for row, each in enumerate(texts):
        one: Sequence[str] = each if isinstance(each, tuple | list) else (each,)
        if len(one) not in (1, 2):
            raise DataError(f"row {row} has {len(one)} texts, expected one or two")
        if len(one) == 2 and one[1] is None:
            raise DataError(f"row {row} has no second text; give the first one alone")
        texts_a.append(one[0])
        texts_b.append(one[1] if len(one) == 2 else None)
    if not texts_a:
        raise DataError("there are no texts to predict")
    return texts_a, texts_b


def _rows_of_each(
    model: BertForSequenceClassification,
    tasks: Sequence[str] | Sequence[Sequence[str]] | None,
    count: int,
) -> dict[str, list[int]]:
    """Return for each adapter that is named the numbers of its texts, ascending."""
    chosen: list[object] = list(model.adaptations) if tasks is None else list(tasks)
    every = all(isinstance(each, str) for each in chosen)
    rows: dict[str, list[int]] = {}
    for row, names in enumerate([chosen] * count if every else chosen):
        if isinstance(tasks, str) or not _are_names(names):
            raise ConfigError(
                "tasks must be a list of names of adapters, or such a list for each text; found "
                f"{tasks!r:.200}"
            )
        for name in names:
            rows.setdefault(name, []).append(row)
    if not every and len(chosen) != count:
        raise ConfigError(f"{count} texts need a list of adapters each, found {len(chosen)}")
    if not rows:
        raise ConfigError("no adapter is named for any text")
    return rows


def _are_names(names: object) -> TypeGuard[Sequence[str]]:
    return isinstance(names, list | tuple | set) and all(isinstance(each, str) for each in names)
