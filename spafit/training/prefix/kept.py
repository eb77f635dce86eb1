"""The output of group 1 for a batch: read from the cache, or computed and cached.

Missing states are computed in groups of examples of similar length. The groups depend on the data
alone, not on the first batch that needs them: rounding depends on which examples are computed
together, and a resumed run must read the same numbers.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import NoneType

import torch
import torch.nn.functional as F
from torch import nn

from spafit.adaptable import can_be_bypassed
from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, TrainingError
from spafit.files.replacing import cache_folder
from spafit.kernels.products import library_on
from spafit.layout import Packed, PackedBatch
from spafit.machine.memory import is_out_of_memory, shortage
from spafit.machine.versions import processor
from spafit.techniques import Technique
from spafit.text.tokenization import Encodings, Tokenizer
from spafit.training.prefix.cache import PrefixCache, PrefixKey
from spafit.training.prefix.shared import SharedPrefix
from spafit.version import __version__

# The attributes that PyTorch sets in every module, such as its mode.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

# The types of attributes that are settings.
_SETTINGS = (int, float, str, NoneType, Technique)

_GROUP = 32
"""Examples whose hidden states are computed together."""


class KeptPrefix:
    """Callable: rows and their packed batch -> the output of group 1, (N, D) or (B, D).

    It is that of :meth:`spafit.bert.BertModel.prefix`. Group 1 must be in evaluation mode
    (:meth:`spafit.bert.BertModel.freeze_dropout`).

    Parameters
    ----------
    model : BertForSequenceClassification
        The model, on its device.
    encodings : Encodings
        The examples.
    cache : PrefixCache
        The cache for the same examples.
    """

    def __init__(
        self, model: BertForSequenceClassification, encodings: Encodings, cache: PrefixCache
    ) -> None:
        self.model, self.encodings, self.cache = model, encodings, cache
        # A thread prefetches the next batches' states while those of this one are stored.
        self._using = threading.Lock()
        order = encodings.by_length(range(len(encodings)))
        groups = [order[start : start + _GROUP] for start in range(0, len(order), _GROUP)]
        self._group_of = {row: group for group in groups for row in group}

    def __call__(self, rows: Sequence[int], batch: PackedBatch) -> torch.Tensor:
        """Return it on the batch's device, 0 in rows that belong to no sequence."""
        device = batch.layout.device
        states = self.read(rows, batch.layout)
        if states is None:
            for row in self.cache.missing(rows):
                if self.cache.missing([row]):  # else it was computed with its group
                    self._compute(self._group_of[row], device)
            states = self.read(rows, batch.layout)
            assert states is not None
        if device.type == "cuda":  # from other memory the copy would wait for the GPU
            states = states.pin_memory()
        return states.to(device, non_blocking=True)

    def _compute(self, rows: Sequence[int], device: torch.device, *, keep: bool = True) -> None:
        """Compute the states of some examples, and keep them.

        The states of a halved group are rounded differently, so they are not kept for later runs.
        """
        computed = self.encodings.packed(rows).to(device)
        try:
            hidden = self.model.bert.prefix(computed)[: computed.layout.tokens]  # no filler
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise TrainingError(
                    f"not enough memory for the frozen layers of one example "
                    f"({shortage(error)}); truncate the texts more (--max-length)"
                ) from error
            hidden = None
        if hidden is None:  # outside the handler, which keeps the tensors that filled the memory
            self._compute(rows[: len(rows) // 2], device, keep=False)
            self._compute(rows[len(rows) // 2 :], device, keep=False)
            return
        with self._using:
            self.cache.store(rows, hidden, keep=keep)

    def read(self, rows: Sequence[int], layout: Packed) -> torch.Tensor | None:
        """Return it on the host if the states of all rows are kept, else None."""
        with self._using:
            if self.cache.missing(rows):
                return None
            states = self.cache.read(rows)  # (tokens, D) or (B, D)
        return F.pad(states, (0, 0, 0, 0 if self.cache.per_example else layout.filler))


def why_not_kept(model: BertForSequenceClassification) -> str:
    """Return why the hidden states after group 1 must not be kept; empty if they may be.

    Kept states are not computed again, so a hook would not be called; and a module that is not
    spafit's own may depend on anything. In these cases the states are computed every time.
    """
    for name, module in _group_1(model):
        kind = type(module)
        if not (_is_ours(kind) or kind in (nn.Embedding, nn.ModuleList, nn.ModuleDict)):
            return f"bert.{name} is a {kind.__name__}, which is not spafit's own"
        for value in vars(module).values():
            if isinstance(value, Technique) and not _is_ours(type(value)):
                return f"bert.{name} computes {type(value).__name__}, which is not spafit's own"
        if not can_be_bypassed(module):
            return f"bert.{name} has a hook or a replaced forward"
        for key in vars(module):
            if callable(getattr(kind, key, None)):
                return f"bert.{name} has a {key} of its own"
    return ""


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def prefix_key(
    model: BertForSequenceClassification,
    tokenizer_fingerprint: str,
    *,
    dtype: str,
    precision: str,
) -> PrefixKey:
    """Return what the output of a model's group 1 depends on, besides the tokens."""
    bert = model.bert
    of_all_layers = "pooled" if bert.is_frozen else "first"
    return PrefixKey(
        prefix_fingerprint=_fingerprint(model),
        depth=bert.frozen_depth,
        tokenizer_fingerprint=tokenizer_fingerprint,
        hidden_size=model.config.hidden_size,
        dtype=dtype,
        precision=precision,
        computed_on=_rounding(model.classifier.weight.device),
        output=of_all_layers if bert.frozen_depth == len(bert.encoder.layer) else "states",
    )


def _group_1(model: BertForSequenceClassification) -> Iterator[tuple[str, nn.Module]]:
    """Return all modules that compute the states, by their names below ``bert``."""
    bert = model.bert
    yield "encoder", bert.encoder
    yield from bert.embeddings.named_modules(prefix="embeddings")
    for number, layer in enumerate(bert.encoder.layer[: bert.frozen_depth]):
        yield from layer.named_modules(prefix=f"encoder.layer.{number}")
    if bert.pooler is not None and bert.is_frozen:
        yield from bert.pooler.named_modules(prefix="pooler")


def _fingerprint(model: BertForSequenceClassification) -> str:
    """Return the SHA-256 of all that computes the states: types, settings and tensors.

    It includes techniques in a layer that was frozen later, with their scale.
    """
    digest = hashlib.sha256()
    for name, module in _group_1(model):
        settings = {
            key: value
            for key, value in sorted(vars(module).items())
            if key not in _OF_EVERY_MODULE and isinstance(value, _SETTINGS)
        }
        digest.update(f"{name} {type(module).__qualname__} {settings}\n".encode())
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in tensors:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(values.numpy().data)
    return digest.hexdigest()


def _rounding(device: torch.device) -> str:
    """Describe what rounding depends on, besides the numbers and their types."""
    parts = [f"spafit {__version__}", f"torch {torch.__version__}", device.type]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    else:
        vectors = torch.backends.cpu.get_cpu_capability()
        parts += [processor(), vectors, f"{torch.get_num_threads()} threads"]
    precision = torch.get_float32_matmul_precision()
    return ", ".join([*parts, f"{library_on(device)} at {precision} precision"])


@contextmanager
def keep_prefixes(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    encoded: Mapping[str, Encodings],
    *,
    where: str,
    dtype: str,
    limit_gib: float,
    precision: str,
    say: Callable[[str], None],
    shared: SharedPrefix | None = None,
) -> Iterator[dict[str, KeptPrefix]]:
    """Open the caches that a run's settings ask for, and save them on exit.

    Once they are open, a disk failure does not stop the run; it is reported at the end too.

    Parameters
    ----------
    model, tokenizer
        The model, on its device, and its tokenizer.
    encoded : mapping of str to Encodings
        The examples, such as those of "train" and "dev".
    where : {"off", "memory", "disk"}
        Where to keep them; on disk it is the folder ``prefix`` of spafit's cache.
    dtype : {"float32", "half"}
        The type in which they are kept.
    limit_gib : float
        The most that those of one name may take.
    precision : str
        The precision in which they are computed, such as ``"float32"``.
    say : callable of str
        Called with one line if states asked for cannot be kept, and, on exit, with the caches'
        remaining notes.
    shared : SharedPrefix, optional
        What other runs share with this one, if the states are kept in memory.

    Yields
    ------
    dict of str to KeptPrefix
        One for each name; empty if nothing is kept.
    """
    reason = "" if where == "off" else why_not_kept(model)
    if reason:
        say(f"{reason}; the hidden states after group 1 are computed every time, and not kept")
    if reason or where == "off":
        yield {}
        return
    key = prefix_key(model, tokenizer.fingerprint, dtype=dtype, precision=precision)
    folder = cache_folder() / "prefix" if where == "disk" else None
    limit_bytes = int(limit_gib * 2**30)
    with ExitStack() as opened:
        prefixes = {}
        for name, encodings in encoded.items():
            if shared is not None and where == "memory":
                cache = opened.enter_context(shared.opened(name, encodings, key, limit_bytes))
            else:
                cache = PrefixCache(encodings, key, folder=folder, limit_bytes=limit_bytes)
                opened.callback(_close, cache, say)
            prefixes[name] = KeptPrefix(model, encodings, cache)
        yield prefixes


def _close(cache: PrefixCache, say: Callable[[str], None]) -> None:
    """Save and close a cache, and report its notes."""
    try:
        cache.close()
    except CheckpointError as error:
        cache.notes.append(f"{error}. Later runs compute the prefix again")
    for note in cache.notes:
        say(note)
