"""Masked-token loss: what BERT was pre-trained for, by the head that a checkpoint may still have.

The head ``cls.predictions`` reads the last hidden state h (D,) of a masked token:

    t = LayerNorm(GELU(W h + c)),    logits = E t + d,    loss = -log softmax(logits)[token]

E (V, D) are the word embeddings of the model that is asked: the decoder is tied to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError, DataError, WeightsError
from spafit.machine.precision import autocast
from spafit.text.added_tokens import MASK
from spafit.text.tokenization import Encodings, Tokenizer
from spafit.weights.hub import local_folder
from spafit.weights.safe_folder import SafeFolder

SHARE = 0.15
"""Share of a text's tokens that are masked, as in pre-training, and at least one; each of them
becomes [MASK]."""

_PREFIX = "cls.predictions."
_BATCH = 32


@dataclass(frozen=True)
class MaskedHead:
    """The head ``cls.predictions`` of a checkpoint, in float32.

    Attributes
    ----------
    W, c : torch.Tensor, (D, D) and (D,)
        Its map.
    gamma, beta : torch.Tensor, (D,)
        Of its LayerNorm.
    d : torch.Tensor, (V,)
        The decoder's bias.
    eps : float
        Of its LayerNorm.
    """

    W: torch.Tensor
    c: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    d: torch.Tensor
    eps: float

    def __call__(self, h: torch.Tensor, E: torch.Tensor) -> torch.Tensor:
        """Return the logits (M, V) of hidden states h (M, D), for word embeddings E (V, D)."""
        t = F.layer_norm(F.gelu(F.linear(h, self.W, self.c)), h.shape[-1:], self.gamma, self.beta,
                         self.eps)  # fmt: skip
        return F.linear(t, E, self.d)


def load_masked_head(
    name_or_folder: str | Path, base: BertForSequenceClassification, revision: str | None = None
) -> MaskedHead:
    """Read the head that a base's checkpoint predicts masked tokens with.

    Parameters
    ----------
    name_or_folder, revision
        As for :func:`spafit.load_pretrained`.
    base : BertForSequenceClassification
        The model that was loaded from there; the head comes to its device.

    Raises
    ------
    WeightsError
        If the checkpoint has no such head, or its decoder is not tied to the word embeddings.
    """
    folder = local_folder(name_or_folder, revision=revision)
    with SafeFolder(folder) as files:
        found = {
            name.removeprefix(_PREFIX): name for name in files.tensors if name.startswith(_PREFIX)
        }

        def read(*spellings: str) -> torch.Tensor:
            name = next((found[each] for each in spellings if each in found), None)
            if name is None:
                raise WeightsError(
                    f"{folder} has no {_PREFIX}{spellings[0]}, which predicts masked tokens; their "
                    "loss needs a checkpoint with its head of the pre-training, such as "
                    "google-bert/bert-large-cased"
                )
            return files.read(name, torch.float32).to(base.device)

        E = base.bert.embeddings.word_embeddings.weight.detach()
        head = MaskedHead(
            W=read("transform.dense.weight"),
            c=read("transform.dense.bias"),
            gamma=read("transform.LayerNorm.weight", "transform.LayerNorm.gamma"),
            beta=read("transform.LayerNorm.bias", "transform.LayerNorm.beta"),
            d=read("bias", "decoder.bias"),
            eps=base.config.layer_norm_eps,
        )
        if "decoder.weight" in found and not torch.equal(read("decoder.weight"), E.float()):
            raise WeightsError(
                f"{folder}: {_PREFIX}decoder.weight is not the word embeddings, and only a decoder "
                "that is tied to them is known here"
            )
    V, D = E.shape
    shapes = {"W": (D, D), "c": (D,), "gamma": (D,), "beta": (D,), "d": (V,)}
    for name, shape in shapes.items():
        if getattr(head, name).shape != shape:
            raise WeightsError(
                f"{folder}: {_PREFIX}* does not fit its config.json: {name} is "
                f"{list(getattr(head, name).shape)}, expected {list(shape)}"
            )
    return head


@dataclass(frozen=True)
class Masked:
    """Texts whose tokens are masked: for several models the same ones.

    Attributes
    ----------
    encodings : Encodings
        With [MASK] in the place of masked tokens.
    positions : list of list of int
        Of the masked tokens of each text.
    tokens : list of list of int
        What stood there.
    """

    encodings: Encodings
    positions: list[list[int]]
    tokens: list[list[int]]

    @property
    def count(self) -> int:
        """How many tokens are masked."""
        return sum(map(len, self.tokens))


def mask(tokenizer: Tokenizer, encodings: Encodings, seed: int) -> Masked:
    """Draw which tokens are masked, by a seed: a share of each text's, but no special ones.

    Raises
    ------
    ConfigError
        If the tokenizer has no [MASK].
    DataError
        If the texts have no tokens.
    """
    mask_id = tokenizer.recipe.vocab.get(MASK)
    if mask_id is None:
        raise ConfigError(f"the tokenizer has no {MASK}, which masked tokens become")
    special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, mask_id}
    generator = np.random.default_rng(seed)
    ids, positions, tokens = [], [], []
    for text in encodings.input_ids:
        free = [at for at, token in enumerate(text) if token not in special]
        size = min(len(free), max(1, round(SHARE * len(free))))
        drawn = sorted(generator.choice(free, size, replace=False).tolist()) if free else []
        positions.append(drawn)
        tokens.append([text[at] for at in drawn])
        ids.append([mask_id if at in drawn else token for at, token in enumerate(text)])
    if not any(tokens):
        raise DataError("the texts have no token that could be masked; give others (--texts)")
    return Masked(dataclasses.replace(encodings, input_ids=ids), positions, tokens)


def masked_loss(model: BertForSequenceClassification, head: MaskedHead, masked: Masked) -> float:
    """Return the mean loss of the masked tokens, in nats, in evaluation mode and float32."""
    E = model.bert.embeddings.word_embeddings.weight.detach().float()
    order = masked.encodings.by_length(range(len(masked.encodings)))
    total, was_training = 0.0, model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast("float32", model.device):
            for start in range(0, len(order), _BATCH):
                rows = order[start : start + _BATCH]
                total += _sum(model, head, E, masked, rows)
    finally:
        model.train(was_training)
    return total / masked.count


def _sum(
    model: BertForSequenceClassification,
    head: MaskedHead,
    E: torch.Tensor,
    masked: Masked,
    rows: Sequence[int],
) -> float:
    batch = masked.encodings.packed(rows).to(model.device)
    X, _ = model.bert.encoder(model.bert.embeddings(*batch[:3]), batch.layout)  # (N, D)
    firsts = batch.layout.first_rows.tolist()
    at = [first + k for first, row in zip(firsts, rows, strict=True) for k in masked.positions[row]]
    tokens = [token for row in rows for token in masked.tokens[row]]
    logits = head(X[torch.tensor(at, dtype=torch.long, device=X.device)].float(), E)
    targets = torch.tensor(tokens, dtype=torch.long, device=X.device)
    return float(F.cross_entropy(logits, targets, reduction="sum"))
