"""The two layouts of a batch, padded and packed: attention over each, and checks of their ids.

All operations but attention work on the last dimension alone, so the same layer serves both:

- :class:`Padded`, (B, T, D): every sequence padded to the longest. The plain form.
- :class:`Packed`, (N, D): real tokens only, one sequence after the other. The fast form: padded,
  a batch of 16 random examples of RTE has 2.3 times as many positions as tokens.

B sequences, T tokens of the longest, N tokens in all, D hidden, A heads, Dh = D / A.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from spafit.config import BertConfig
from spafit.errors import ConfigError
from spafit.kernels import attention, packed_attention, reference
from spafit.kernels.packed_attention import Bundle, Spans, bundling, make_bundles, padded_rows

# The number of rows is rounded up to a multiple of this, so that fewer sizes occur: oneDNN prepares
# each new size of a product once.
_ROWS_MULTIPLE = 8
_LEAST_ROWS_ROUNDED = 64


class Padded:
    """The layout of padded sequences: hidden states are (B, T, D).

    Parameters
    ----------
    keep : torch.Tensor of bool, (B, T), optional
        True at real tokens; None means that all are real.
    probabilities : list, optional
        A list to which :meth:`attend` appends the attention probabilities (B, A, T, T) of each
        layer, as its plain form computes them.
    """

    def __init__(
        self,
        keep: torch.Tensor | None = None,
        probabilities: list[torch.Tensor] | None = None,
    ) -> None:
        self.keep = None if keep is None else keep[:, None, None, :]  # (B, 1, 1, T)
        self.probabilities = probabilities

    def attend(
        self, QKV: torch.Tensor, num_heads: int, dropout: float = 0.0, impl: str = "auto"
    ) -> torch.Tensor:
        """Return H1 (B, T, D), Eq. (4), for QKV (B, T, 3·D): Q, K and V side by side."""
        B, T, _ = QKV.shape
        Q, K, V = QKV.view(B, T, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, A, T, Dh) each
        if self.probabilities is None:
            H1 = attention(Q, K, V, self.keep, dropout, impl)
        else:
            P = reference.attention_probabilities(Q, K, self.keep, dropout)
            self.probabilities.append(P)
            H1 = P @ V  # (B, A, T, Dh)
        return H1.transpose(1, 2).flatten(2)

    def attend_first(
        self,
        Q: torch.Tensor,
        KV: torch.Tensor,
        num_heads: int,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> torch.Tensor:
        """Return H1 (B, D), Eq. (4), of the first tokens, for Q (B, D) and KV (B, T, 2·D)."""
        return _attend_first(Q, KV, self.keep, num_heads, dropout, impl)

    def first(self, X: torch.Tensor) -> torch.Tensor:
        """Return the first token of each sequence, (B, D)."""
        return X[:, 0]


class Bucket(NamedTuple):
    """A fixed shape to which packed batches are filled up, for captured and compiled steps.

    Attributes
    ----------
    rows : int
        N.
    longest : int
        The most tokens that a sequence may have.
    """

    rows: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Bucket:
        """Return the bucket for sequences of these lengths.

        N takes eight sizes from each power of two to the next, so that at most an eighth of the
        rows, and a sixteenth in the mean, is filler. ``longest`` is a power of two of at least 64.
        """
        tokens = sum(lengths)
        step = max(64, 2 ** (tokens.bit_length() - 4))
        rows = tokens + step - tokens % step  # one row of filler or more
        longest = max(64, *lengths, step)
        return cls(rows, 2 ** (longest - 1).bit_length())


class Packed:
    """The layout of packed sequences: hidden states are (N, D), one sequence after the other.

    N is rounded up to a multiple of 8. The rows after the last token, the filler, belong to no
    sequence: no result depends on them, and their gradients are 0.

    With a :class:`Bucket` the shapes are fixed: N and the longest length are the bucket's.
    Attention then takes the filler as one more sequence, so that all shapes depend on the bucket
    alone and no value depends on uninitialised memory.

    Parameters
    ----------
    lengths : sequence of int
        The number of tokens of each sequence, known on the host. Attention is cheapest if
        neighbouring sequences have similar lengths.
    device : torch.device or str
        The device of the hidden states.
    bucket : Bucket, optional
        The fixed shape.

    Attributes
    ----------
    lengths, bucket
        The same.
    tokens : int
        The number of real tokens.
    filler : int
        The number of rows after them.
    rows : int
        N, the sum of both.
    longest : int
        The number of tokens of the longest sequence, or the most that the bucket allows.
    device : torch.device
        The same.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        bucket: Bucket | None = None,
    ) -> None:
        self.lengths = tuple(lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(
                "a packed batch needs one or more sequences of at least one token each, found "
                f"lengths {list(self.lengths)!r:.80}"
            )
        self.device = torch.device(device)
        self.tokens = sum(self.lengths)
        self.longest = max(self.lengths)
        self.bucket = bucket
        if bucket is None:
            self.filler = -self.tokens % _ROWS_MULTIPLE if self.tokens >= _LEAST_ROWS_ROUNDED else 0
        else:
            self.filler = bucket.rows - self.tokens
            if self.filler < 1 or bucket.longest < max(self.longest, self.filler):
                raise ConfigError(f"sequences of {self.lengths} tokens do not fit into {bucket}")
            self.longest = bucket.longest
        self.rows = self.tokens + self.filler

    @property
    def attended(self) -> tuple[int, ...]:
        """The lengths that attention sees: the filler of a bucket is a sequence of its own."""
        return self.lengths if self.bucket is None else (*self.lengths, self.filler)

    @cached_property
    def bundles(self) -> tuple[Bundle, ...]:
        """The sequences that attention takes together: on a GPU all of them."""
        if self.device.type != "cpu" or self.bucket is not None:
            return (self.whole,)
        return make_bundles(self.lengths, bundling(self.lengths), self.device)

    @cached_property
    def whole(self) -> Bundle:
        """All sequences as one bundle."""
        longest = 0 if self.bucket is None else self.longest
        [bundle] = make_bundles(self.attended, [len(self.attended)], self.device, longest)
        return bundle

    @cached_property
    def spans(self) -> Spans:
        """The boundaries of the sequences that attention sees, for kernels that look them up."""
        ends = torch.tensor((0, *self.attended), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Spans(ends.to(self.device, non_blocking=True), sum(self.attended), self.longest)

    @cached_property
    def first_rows(self) -> torch.Tensor:
        """The row of the first token of each sequence, (B,)."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return (ends - torch.tensor(self.lengths)).to(self.device, non_blocking=True)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return all index tensors for a GPU; with a bucket their shapes depend on it alone."""
        padding = (self.whole.gather, self.whole.scatter, self.whole.keep)
        return (
            self.first_rows,
            self.spans.boundaries,
            *(each for each in padding if each is not None),
        )

    def prepare(self) -> None:
        """Compute the cached properties now instead of at their first use."""
        _ = self.bundles, self.tensors()

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Packed:
        """Return the same layout with every index tensor changed, e.g. moved to another device."""
        first_rows = change(self.first_rows)
        other = Packed(self.lengths, first_rows.device, self.bucket)
        # Set the cached properties, which would be computed again at their first use.
        other.first_rows = first_rows
        other.spans = self.spans._replace(boundaries=change(self.spans.boundaries))
        whole = self.whole
        if whole.gather is not None and whole.scatter is not None and whole.keep is not None:
            whole = dataclasses.replace(
                whole,
                gather=change(whole.gather),
                scatter=change(whole.scatter),
                keep=change(whole.keep),
            )
        other.whole = whole
        return other

    def attend(
        self, QKV: torch.Tensor, num_heads: int, dropout: float = 0.0, impl: str = "auto"
    ) -> torch.Tensor:
        """Return H1 (N, D), Eq. (4), for QKV (N, 3·D): Q, K and V side by side."""
        spans = None if self.device.type == "cpu" and impl != "triton" else self.spans
        return packed_attention(QKV, self.bundles, num_heads, dropout, impl, spans)

    def attend_first(
        self,
        Q: torch.Tensor,
        KV: torch.Tensor,
        num_heads: int,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> torch.Tensor:
        """Return H1 (B, D), Eq. (4), of the first tokens, for Q (B, D) and KV (N, 2·D)."""
        bundle, B = self.whole, len(self.lengths)
        KV = padded_rows(KV, bundle).view(bundle.count, bundle.longest, -1)[:B]  # (B, T, 2·D)
        keep = None if bundle.keep is None else bundle.keep[:B]
        return _attend_first(Q, KV, keep, num_heads, dropout, impl)

    def first(self, X: torch.Tensor) -> torch.Tensor:
        """Return the first token of each sequence, (B, D)."""
        return X.index_select(0, self.first_rows)


Layout = Padded | Packed


def _attend_first(
    Q: torch.Tensor,
    KV: torch.Tensor,
    keep: torch.Tensor | None,
    num_heads: int,
    dropout: float,
    impl: str,
) -> torch.Tensor:
    B, T, _ = KV.shape
    K, V = KV.view(B, T, 2, num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, A, T, Dh) each
    Q = Q.view(B, 1, num_heads, -1).transpose(1, 2)  # (B, A, 1, Dh)
    if impl == "triton":  # its kernel is for whole sequences
        impl = "auto"
    H1 = attention(Q, K, V, keep, dropout, impl)  # (B, A, 1, Dh)
    return H1.flatten(1)


class PackedBatch(NamedTuple):
    """Examples as int64 tensors of shape (N,), without padding between them, and their layout."""

    input_ids: torch.Tensor
    """Token ids; that of [PAD] in the rows that belong to no sequence."""
    token_type_ids: torch.Tensor
    """1 for the second text and its [SEP], else 0."""
    position_ids: torch.Tensor
    """0, 1, 2 ... from the start of each sequence."""
    layout: Packed

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move to a device, without waiting for it."""
        device = torch.device(device)
        if device == self.layout.device:
            return self
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def taken(self, sequences: Sequence[int]) -> tuple[PackedBatch, torch.Tensor]:
        """Return some of the sequences as a batch, and the row (N',) of each of its rows in this.

        A number may occur more than once. Rows that belong to no sequence are copies of the first.
        """
        lengths = self.layout.lengths
        starts = [0, *itertools.accumulate(lengths)]
        layout = Packed([lengths[each] for each in sequences], self.layout.device)
        rows = [row for each in sequences for row in range(starts[each], starts[each + 1])]
        index = torch.tensor(rows + [0] * layout.filler).to(self.layout.device, non_blocking=True)
        ids, types, positions = (each.index_select(0, index) for each in self[:3])
        return PackedBatch(ids, types, positions, layout), index

    def pinned(self) -> PackedBatch:
        """Return a copy in pinned memory of the host, from which copies to a GPU need no wait."""
        return self.mapped(torch.Tensor.pin_memory)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the three tensors and the layout's."""
        return (*self[:3], *self.layout.tensors())

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        """Return the same batch with every tensor changed, as to another device or memory."""
        ids, types, positions = map(change, self[:3])
        return PackedBatch(ids, types, positions, self.layout.mapped(change))


class Unpacking(NamedTuple):
    """Restores the order and shape of the padded batch from packed results."""

    shape: tuple[int, int]
    """(B, T)."""
    places: torch.Tensor
    """The place of each token in the flattened (B, T), (tokens,)."""
    sequences: torch.Tensor
    """The row of each padded sequence in the packed order, (B,)."""

    def hidden(self, X: torch.Tensor) -> torch.Tensor:
        """Return (N, D) as (B, T, D), 0 at padding."""
        B, T = self.shape
        padded = X.new_zeros(B * T, X.shape[1])
        return padded.index_copy(0, self.places, X[: len(self.places)]).view(B, T, -1)

    def per_sequence(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return (B, ...) in the order of the padded batch."""
        return pooled.index_select(0, self.sequences)


class Unchanged:
    """Takes the place of :class:`Unpacking` for a batch that stayed padded: changes nothing."""

    def hidden(self, X: torch.Tensor) -> torch.Tensor:
        """Return (B, T, D) as it is."""
        return X

    def per_sequence(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return (B, ...) as it is."""
        return pooled


def pack(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor,
    pad_token_id: int = 0,
) -> tuple[PackedBatch, Unpacking]:
    """Pack a padded batch (B, T), its sequences sorted by length.

    The lengths must be known on the host: with tensors on a GPU this waits for the GPU. Training
    packs from lists on the host instead (:meth:`spafit.text.tokenization.Encodings.packed`).

    Parameters
    ----------
    input_ids, token_type_ids : torch.Tensor of int64, (B, T)
        The padded batch.
    attention_mask : torch.Tensor, (B, T), optional
        1 at real tokens; they need not be the first ones of a row. None means that all are real.
    pad_token_id : int
        The token id of the filler rows.
    """
    B, T = input_ids.shape
    device = input_ids.device
    if attention_mask is None:
        lengths = [T] * B
        sequences = torch.arange(B, device=device)
        places = torch.arange(B * T, device=device)
    else:
        keep = attention_mask.to(torch.bool)
        order = torch.argsort(keep.sum(1), stable=True)  # (B,)
        lengths = keep.sum(1)[order].tolist()
        sequences = torch.argsort(order)
        rows, columns = keep[order].nonzero(as_tuple=True)
        places = order[rows] * T + columns
    layout = Packed(lengths, device)

    def packed(values: torch.Tensor, fill: int) -> torch.Tensor:
        taken = values.flatten().index_select(0, places)
        return F.pad(taken, (0, layout.filler), value=fill)

    positions = torch.arange(T, device=device).expand(B, T)
    batch = PackedBatch(
        packed(input_ids, pad_token_id), packed(token_type_ids, 0), packed(positions, 0), layout
    )
    return batch, Unpacking((B, T), places, sequences)


def check_padded(
    config: BertConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
) -> None:
    """Check a padded batch (B, T).

    Values of ids and masks on a GPU are not checked: the host would wait for it at every step.

    Raises
    ------
    ConfigError
        If types or shapes do not fit each other or the model, an id is outside its vocabulary, the
        mask holds other values than 0 and 1, or a sequence has no real token.
    """
    ids = {"input_ids": input_ids}
    if token_type_ids is not None:
        ids["token_type_ids"] = token_type_ids
    _check_types(ids)
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise ConfigError(f"attention_mask must be a tensor, found {_kind(attention_mask)}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ConfigError(
            f"input_ids must be a batch of sequences, (B, T) with B and T at least 1, "
            f"found {tuple(input_ids.shape)}"
        )
    _check_length(config, input_ids.shape[1])
    for name, tensor in (
        ("attention_mask", attention_mask),
        ("token_type_ids", token_type_ids),
    ):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ConfigError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"found {tuple(tensor.shape)}"
            )
    _check_ids(config, ids)
    if attention_mask is None or input_ids.device.type != "cpu":
        return
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ConfigError(
            "attention_mask must be 1 at real tokens and 0 at padding; this one holds other "
            "values, such as those that some programs add to the scores"
        )
    if not bool(attention_mask.any(dim=1).all()):
        raise ConfigError("every row of attention_mask needs at least one real token")


def check_packed(
    config: BertConfig, batch: PackedBatch, prefix: torch.Tensor | None, per_sequence: bool = False
) -> None:
    """Check a packed batch, and the output of group 1 that was kept for it, if any.

    That is (N, D), or with ``per_sequence`` (B, D).

    Raises
    ------
    ConfigError
        If a sequence is longer than the model's positions, ids or prefix have another type or
        shape, or (on a CPU, where checking is cheap) an id is outside its vocabulary.
    """
    ids = dict(zip(PackedBatch._fields, batch[:3], strict=False))
    _check_types(ids)
    for name, each in ids.items():
        if each.shape != (batch.layout.rows,):
            raise ConfigError(
                f"{name} must have shape ({batch.layout.rows},), found {tuple(each.shape)}"
            )
    _check_length(config, max(batch.layout.lengths))
    rows = len(batch.layout.lengths) if per_sequence else batch.layout.rows
    shape = (rows, config.hidden_size)
    if prefix is not None and prefix.shape != shape:
        raise ConfigError(
            f"the prefix of this batch must have shape {shape}, found {tuple(prefix.shape)}; "
            "give what BertModel.prefix gives for the same batch"
        )
    _check_ids(config, ids)


def _check_length(config: BertConfig, tokens: int) -> None:
    positions = config.max_position_embeddings
    if tokens > positions:
        raise ConfigError(
            f"sequences of {tokens} tokens do not fit the model's {positions} positions; "
            f"encode with max_length={positions} or less"
        )


def _check_types(ids: dict[str, torch.Tensor]) -> None:
    for name, each in ids.items():
        if not isinstance(each, torch.Tensor) or each.dtype not in (torch.int64, torch.int32):
            raise ConfigError(f"{name} must be a tensor of int64, found {_kind(each)}")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def _check_ids(config: BertConfig, ids: dict[str, torch.Tensor]) -> None:
    if ids["input_ids"].device.type != "cpu" or torch.compiler.is_compiling():
        return
    sizes = {
        "input_ids": config.vocab_size,
        "token_type_ids": config.type_vocab_size,
        "position_ids": config.max_position_embeddings,
    }
    for name, each in ids.items():
        lowest, highest = int(each.min()), int(each.max())
        if lowest < 0 or highest >= sizes[name]:
            raise ConfigError(
                f"{name} must lie in 0 .. {sizes[name] - 1}, found {lowest} .. {highest}; "
                "is this the tokenizer of this model?"
            )
