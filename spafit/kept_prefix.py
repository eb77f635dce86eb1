"""The hidden states after group 1 of a batch: read where they are kept, else computed and kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from spafit.bert import BertForSequenceClassification
from spafit.folders import cache_folder
from spafit.layout import Packed, PackedBatch
from spafit.prefix_cache import PrefixCache, PrefixKey
from spafit.tokenization import Encodings, Tokenizer


class KeptPrefix:
    """Callable: rows and their packed batch -> hidden states after group 1, (N, D).

    Group 1 must be in evaluation mode (:meth:`spafit.bert.BertModel.freeze_dropout`).

    Parameters
    ----------
    model : BertForSequenceClassification
        The model, on its device.
    encodings : Encodings
        The examples.
    cache : PrefixCache
        Of the same examples.
    """

    def __init__(
        self, model: BertForSequenceClassification, encodings: Encodings, cache: PrefixCache
    ) -> None:
        self.model, self.encodings, self.cache = model, encodings, cache
        # A thread reads the next batches' states while those of this one are stored.
        self._using = threading.Lock()

    def __call__(self, rows: Sequence[int], batch: PackedBatch) -> torch.Tensor:
        """Give (N, D) on the batch's device, 0 in rows that belong to no sequence."""
        device = batch.layout.device
        states = self.read(rows, batch.layout)
        if states is None:
            missing = self.cache.missing(rows)
            computed = self.encodings.packed(missing).to(device)
            hidden = self.model.bert.prefix(computed)[: computed.layout.tokens]
            with self._using:
                self.cache.store(missing, hidden)
            states = self.read(rows, batch.layout)
            assert states is not None
        if device.type == "cuda":  # from other memory the copy would wait for the GPU
            states = states.pin_memory()
        return states.to(device, non_blocking=True)

    def read(self, rows: Sequence[int], layout: Packed) -> torch.Tensor | None:
        """Give (N, D) on the host if the states of all rows are kept, else None."""
        with self._using:
            if self.cache.missing(rows):
                return None
            states = self.cache.read(rows)  # (tokens, D)
        return F.pad(states, (0, 0, 0, layout.filler))


def prefix_key(
    model: BertForSequenceClassification,
    base_fingerprint: str,
    tokenizer_fingerprint: str,
    *,
    dtype: str,
    arithmetic: str,
) -> PrefixKey:
    """Say what the hidden states after a model's group 1 depend on, beside the tokens."""
    return PrefixKey(
        base_fingerprint=base_fingerprint,
        depth=model.bert.frozen_depth,
        tokenizer_fingerprint=tokenizer_fingerprint,
        hidden_size=model.config.hidden_size,
        num_attention_heads=model.config.num_attention_heads,
        layer_norm_eps=model.config.layer_norm_eps,
        dtype=dtype,
        arithmetic=arithmetic,
    )


@contextmanager
def keep_prefix(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    encodings: Encodings,
    base_fingerprint: str,
    *,
    where: str,
    dtype: str,
    limit_gib: float,
    arithmetic: str,
) -> Iterator[KeptPrefix]:
    """Open the cache that a run's settings ask for, and save it on the way out.

    Parameters
    ----------
    model, tokenizer, encodings, base_fingerprint
        What the hidden states depend on.
    where : {"memory", "disk"}
        On disk they lie in the folder ``prefix`` of spafit's cache.
    dtype : {"float32", "half"}
        In what they are kept.
    limit_gib : float
        The most that they may take.
    arithmetic : str
        In what they are computed, such as ``"float32"``.
    """
    key = prefix_key(
        model, base_fingerprint, tokenizer.fingerprint, dtype=dtype, arithmetic=arithmetic
    )
    folder = cache_folder() / "prefix" if where == "disk" else None
    limit_bytes = int(limit_gib * 2**30)
    with PrefixCache(encodings, key, folder=folder, limit_bytes=limit_bytes) as cache:
        yield KeptPrefix(model, encodings, cache)
