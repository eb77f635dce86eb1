"""The hidden states after group 1 of a batch: read where they are kept, else computed and kept.

What is missing is computed in groups of examples of like length that depend on the data alone, not
on the batch that asks first: how a product of matrices rounds depends on what is multiplied with
it, and a run that is taken up again must read what it would have read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, TrainingError
from spafit.files.replacing import cache_folder
from spafit.kernels.products import library_on
from spafit.layout import Packed, PackedBatch
from spafit.machine.memory import is_out_of_memory, shortage
from spafit.machine.versions import processor
from spafit.text.tokenization import Encodings, Tokenizer
from spafit.training.prefix.cache import PrefixCache, PrefixKey
from spafit.version import __version__

_GROUP = 32
"""Examples whose hidden states are computed together."""


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
        order = encodings.by_length(range(len(encodings)))
        groups = [order[start : start + _GROUP] for start in range(0, len(order), _GROUP)]
        self._group_of = {row: group for group in groups for row in group}

    def __call__(self, rows: Sequence[int], batch: PackedBatch) -> torch.Tensor:
        """Give (N, D) on the batch's device, 0 in rows that belong to no sequence."""
        device = batch.layout.device
        states = self.read(rows, batch.layout)
        if states is None:
            for row in self.cache.missing(rows):
                if self.cache.missing([row]):  # else its group has brought it
                    self._compute(self._group_of[row], device)
            states = self.read(rows, batch.layout)
            assert states is not None
        if device.type == "cuda":  # from other memory the copy would wait for the GPU
            states = states.pin_memory()
        return states.to(device, non_blocking=True)

    def _compute(self, rows: Sequence[int], device: torch.device, *, keep: bool = True) -> None:
        """Compute the states of some examples, and keep them.

        Those of a group that had to be halved round otherwise, and so are not kept for later runs.
        """
        computed = self.encodings.packed(rows).to(device)
        try:
            hidden = self.model.bert.prefix(computed)[: computed.layout.tokens]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise TrainingError(
                    f"memory does not suffice for the frozen layers of one example "
                    f"({shortage(error)}); cut texts shorter (--max-length)"
                ) from error
            hidden = None
        if hidden is None:  # outside the handler, which holds on to what filled the memory
            self._compute(rows[: len(rows) // 2], device, keep=False)
            self._compute(rows[len(rows) // 2 :], device, keep=False)
            return
        with self._using:
            self.cache.store(rows, hidden, keep=keep)

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
        computed_on=_rounding(model.classifier.weight.device),
    )


def _rounding(device: torch.device) -> str:
    """Say what the last digits of a sum depend on, beside its numbers and their types."""
    parts = [f"spafit {__version__}", f"torch {torch.__version__}", device.type]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    else:
        vectors = torch.backends.cpu.get_cpu_capability()
        parts += [processor(), vectors, f"{torch.get_num_threads()} threads"]
    precision = torch.get_float32_matmul_precision()
    return ", ".join([*parts, f"{library_on(device)} at {precision} precision"])


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
    say: Callable[[str], None],
) -> Iterator[KeptPrefix]:
    """Open the cache that a run's settings ask for, and save it on the way out.

    Once it is open, a disk that fails ends nothing: at the end that is said too.

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
    say : callable
        Given, on the way out, the notes of the cache that nobody has taken.
    """
    key = prefix_key(
        model, base_fingerprint, tokenizer.fingerprint, dtype=dtype, arithmetic=arithmetic
    )
    folder = cache_folder() / "prefix" if where == "disk" else None
    limit_bytes = int(limit_gib * 2**30)
    cache = PrefixCache(encodings, key, folder=folder, limit_bytes=limit_bytes)
    try:
        yield KeptPrefix(model, encodings, cache)
    finally:
        try:
            cache.close()
        except CheckpointError as error:
            cache.notes.append(f"{error}. Later runs compute the prefix again")
        for note in cache.notes:
            say(note)
