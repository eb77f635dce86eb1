"""What a model forgot: with its adapter off, and with it on.

Off, it must be its base, bit for bit (:func:`adapter_off`). On, its frozen features may have lost
what a linear probe could read off them before (:func:`probe_scores`; Kumar et al., 2022, arXiv
2202.10054, ask it of fine-tuning), and its last states what predicts a masked token
(:mod:`~spafit.experiments.inspect.masked`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError
from spafit.experiments.probe.layers import probe
from spafit.experiments.probe.states import layer_states
from spafit.strata import adapters_disabled, fingerprint
from spafit.tasks.task import Dataset
from spafit.text.tokenization import Encodings, Tokenizer
from spafit.training.inference import encode

_BATCH = 32


@dataclass(frozen=True)
class Off:
    """A model with its adapter off, against its base.

    Attributes
    ----------
    base, off : str
        The fingerprints of the base, and of the model with its adapter off.
    states, logits : bool
        Whether the hidden states after every layer, and the logits, are the base's bit for bit.
    texts : int
        Of how many texts.
    """

    base: str
    off: str
    states: bool
    logits: bool
    texts: int

    @property
    def is_identical(self) -> bool:
        """Whether all is the base's, bit for bit."""
        return self.base == self.off and self.states and self.logits


def adapter_off(
    model: BertForSequenceClassification, base: BertForSequenceClassification, encodings: Encodings
) -> Off | None:
    """Compare a model whose adapter is off with its base, loaded beside it.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model, trained, on the base's device.
    base : BertForSequenceClassification
        Its base, with the head that ``model`` had before it was adapted.
    encodings : Encodings
        The texts whose hidden states and logits are compared.

    Returns
    -------
    Off or None
        None if it cannot be switched off, because its plan trains whole pre-trained modules.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(adapters_disabled(model))
        except PlanError:
            return None
        states = logits = True
        rows = range(len(encodings))
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            *of_base, logits_of_base = _states(base, encodings, some)
            *of_model, logits_of_model = _states(model, encodings, some)
            states &= all(map(torch.equal, of_base, of_model))
            logits &= torch.equal(logits_of_base, logits_of_model)
        return Off(fingerprint(base), fingerprint(model), states, logits, len(encodings))


def probe_scores(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    tasks: Mapping[str, tuple[Dataset, Dataset]],
    seeds: Sequence[int],
    *,
    quiet: bool = True,
) -> dict[tuple[str, str], tuple[float, ...]]:
    """Score linear probes on a model's frozen features: the states of its last layer.

    A seed draws the same rows for every model (:func:`spafit.experiments.probe.layers.probe`), so
    that the scores of two models can be compared seed by seed.

    Parameters
    ----------
    model : BertForSequenceClassification
        Adapted or not, on its device.
    tokenizer : Tokenizer
        The model's.
    tasks : mapping of str to (Dataset, Dataset)
        Labelled rows by task: the probe is fitted on the first, and scored on the second.
    seeds : sequence of int
        Different ones.
    quiet : bool
        Whether to show no progress, as without a terminal.

    Returns
    -------
    dict of (str, str) to tuple of float
        By task and kind of state (:data:`~spafit.experiments.probe.states.STATES`): the task's
        first metric for each seed.
    """
    found = {}
    for name, (train, dev) in tasks.items():
        states = {}
        for split, rows in (("train", train), ("dev", dev)):
            every = layer_states(model, encode(model, tokenizer, rows, None), quiet=quiet)
            states[split] = {kind: each[-1:].clone() for kind, each in every.items()}
        for kind, one in probe(states, train, dev, seeds, quiet=quiet).items():
            found[name, kind] = tuple(map(float, one.scores[one.metric][0]))
    return found


def _states(
    model: BertForSequenceClassification, encodings: Encodings, rows: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Yield the hidden states after every layer of all tokens, and the logits, in its own form."""
    batch = encodings.batch(rows).to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield from model.bert(*batch, output_hidden_states=True).hidden_states
            yield model(*batch)
    finally:
        model.train(was_training)
