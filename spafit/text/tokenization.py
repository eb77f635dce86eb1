"""Tokenize texts: from text to token ids.

A pair of texts becomes ``[CLS] A [SEP] B [SEP]``, with token type 0 up to the first ``[SEP]``,
inclusive, and 1 after it; a single text becomes ``[CLS] A [SEP]``. The tokenizers library splits A
and B into word pieces. Special tokens and truncation are added here, where they can be seen: in the
library they are hidden state, and a tokenizer.json may set a length and padding that would be
applied silently to every text.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spafit.errors import ConfigError, DataError, WeightsError, one_line
from spafit.files.replacing import replacing
from spafit.layout import Bucket, Packed, PackedBatch
from spafit.text.added_tokens import CLS, PAD, SEP, SPECIAL_TOKENS
from spafit.text.vocabulary import Recipe, read_recipe, splits_special_tokens
from spafit.weights.hub import local_folder
from spafit.weights.pins import TOKENIZER_FILES

MIN_LENGTH = 8
"""The smallest maximum length: [CLS], two [SEP], and a few tokens of each text."""

_CHUNK = 1024
"""Texts passed to the library at once; its results are large, and are freed after each chunk."""


class Batch(NamedTuple):
    """Some examples as int64 tensors of shape (B, T), padded on the right to the longest.

    A model takes it by position, ``model(*batch)``, or by name, ``model(**batch)``.
    """

    input_ids: torch.Tensor
    """Token ids; the id of [PAD] where there is no token."""
    attention_mask: torch.Tensor
    """1 where there is a token, else 0."""
    token_type_ids: torch.Tensor
    """1 for the second text and its [SEP], else 0."""

    def keys(self) -> tuple[str, ...]:
        """Return the names, which are Hugging Face's."""
        return self._fields

    def __getitem__(self, key: Any) -> Any:
        """Return a tensor by its name or its place."""
        return getattr(self, key) if key in self._fields else tuple.__getitem__(self, key)

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device asynchronously."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pinned(self) -> Batch:
        """Return the batch in pinned host memory."""
        return Batch(*(tensor.pin_memory() for tensor in self))


@dataclass(frozen=True)
class Encodings:
    """The token ids of a sequence of examples, without padding.

    Attributes
    ----------
    input_ids : list of list of int
        Token ids of each example, special tokens included.
    token_type_ids : list of list of int
        Token types of each example, as long as its ids.
    pad_id : int
        The id that :meth:`batch` pads with.
    cut : sequence of int
        The numbers of the examples that were truncated.
    """

    input_ids: list[list[int]]
    token_type_ids: list[list[int]]
    pad_id: int
    cut: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def truncated(self) -> int:
        """How many examples were truncated."""
        return len(self.cut)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        return [len(ids) for ids in self.input_ids]

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return some examples as padded tensors, as long as the longest example.

        Parameters
        ----------
        rows : sequence of int
            Numbers of B examples, at least one, in the order wanted.

        Raises
        ------
        DataError
            If there are no rows, or one is not the number of an example.
        """
        self._check(rows)
        T = max(len(self.input_ids[row]) for row in rows)
        ids, mask, types = [], [], []
        for row in rows:
            tokens = len(self.input_ids[row])
            padding = T - tokens
            ids.append(self.input_ids[row] + [self.pad_id] * padding)
            mask.append([1] * tokens + [0] * padding)
            types.append(self.token_type_ids[row] + [0] * padding)
        return Batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(types))

    def packed(self, rows: Sequence[int], bucketed: bool = False) -> PackedBatch:
        """Return some examples as packed tensors: one after the other, without padding.

        Parameters
        ----------
        rows : sequence of int
            Numbers of B examples, at least one, in the order wanted; attention costs least if they
            are sorted by length.
        bucketed : bool
            Whether to pad the packed tensors to the fixed shape of their
            :class:`~spafit.layout.Bucket`.

        Raises
        ------
        DataError
            If there are no rows, or one is not the number of an example.
        """
        self._check(rows)
        lengths = [len(self.input_ids[row]) for row in rows]
        layout = Packed(lengths, bucket=Bucket.of(lengths) if bucketed else None)
        ids: list[int] = []
        types: list[int] = []
        positions: list[int] = []
        for row in rows:
            ids += self.input_ids[row]
            types += self.token_type_ids[row]
            positions += range(len(self.input_ids[row]))
        return PackedBatch(
            torch.tensor(ids + [self.pad_id] * layout.filler),
            torch.tensor(types + [0] * layout.filler),
            torch.tensor(positions + [0] * layout.filler),
            layout,
        )

    def by_length(self, rows: Iterable[int]) -> list[int]:
        """Return row numbers sorted by length (a stable sort).

        When they are packed in this order, attention computes sequences of similar length together.
        """
        return sorted(rows, key=lambda row: len(self.input_ids[row]))

    def _check(self, rows: Sequence[int]) -> None:
        if len(rows) == 0 or min(rows) < 0 or max(rows) >= len(self):
            raise DataError(
                f"a batch needs one or more row numbers from 0 to {len(self) - 1}, found {rows!r}"
            )


class Tokenizer:
    """BERT's tokenizer.

    A special token that is spelled out in a text, such as ``[SEP]``, becomes that token, as in
    transformers. The author of a text can thereby fake the boundary between two texts; use
    ``split_special_tokens=True`` for untrusted texts.

    Parameters
    ----------
    recipe : Recipe
        The content of the tokenizer's files; :func:`load_tokenizer` reads them.
    split_special_tokens : bool
        Read a special token that is spelled out in a text as plain text: ``[``, ``sep``, ``]``.

    Attributes
    ----------
    recipe, split_special_tokens
        The same.
    pad_id, cls_id, sep_id : int
        Ids of [PAD], [CLS] and [SEP].
    """

    def __init__(self, recipe: Recipe, split_special_tokens: bool = False) -> None:
        self.recipe = recipe
        self.split_special_tokens = split_special_tokens
        self.pad_id = recipe.vocab[PAD]
        self.cls_id = recipe.vocab[CLS]
        self.sep_id = recipe.vocab[SEP]
        self._backend = recipe.build(split_special_tokens)

    @property
    def vocab_size(self) -> int:
        """The largest id and 1, which is the number of rows that the word embeddings need."""
        return self.recipe.size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe, in hexadecimal; equal for a tokenizer.json and its vocab.txt.

        It is different for a tokenizer that splits special tokens.
        """
        if not self.split_special_tokens:
            return self.recipe.fingerprint
        return hashlib.sha256(f"{self.recipe.fingerprint} split".encode()).hexdigest()

    def encode(
        self,
        texts_a: Sequence[str],
        texts_b: Sequence[str | None] | None = None,
        *,
        max_length: int,
    ) -> Encodings:
        """Tokenize texts, truncated to a maximum length but not padded.

        Parameters
        ----------
        texts_a : sequence of str
            First text of each example; it may be empty.
        texts_b : sequence of (str or None), optional
            Second text of each example; None for an example that has one text.
        max_length : int
            The most tokens of an example, special tokens included. A longer pair is truncated
            "longest first": the longer text at its end until both are equally long, then both; at
            the start instead of the end if the recipe says so.

        Raises
        ------
        ConfigError
            If the maximum length is below 8.
        DataError
            If a sequence is itself a string, the numbers of first and second texts differ, or a
            text is not a string that UTF-8 can encode; the message names the row, from 0.
        """
        if max_length < MIN_LENGTH:
            raise ConfigError(
                f"max_length is {max_length}: {CLS} and two {SEP} take 3 tokens, which leaves too "
                f"few for two texts; give {MIN_LENGTH} or more"
            )
        if isinstance(texts_a, str) or isinstance(texts_b, str):
            raise DataError("expected a sequence of texts, found one text; give [text]")
        if texts_b is None:
            texts_b = [None] * len(texts_a)
        if len(texts_a) != len(texts_b):
            raise DataError(
                f"{len(texts_a)} first texts but {len(texts_b)} second texts; give one for each, "
                "or None for an example without one"
            )
        for row, (text_a, text_b) in enumerate(zip(texts_a, texts_b, strict=True)):
            _require_text(text_a, f"row {row}, first text")
            if text_b is not None:
                _require_text(text_b, f"row {row}, second text")

        input_ids: list[list[int]] = []
        token_type_ids: list[list[int]] = []
        cut: list[int] = []
        for start in range(0, len(texts_a), _CHUNK):
            chunk_b = texts_b[start : start + _CHUNK]
            pieces_a = self._pieces(texts_a[start : start + _CHUNK])
            pieces_b = self._pieces([text or "" for text in chunk_b])
            for A, B, text_b in zip(pieces_a, pieces_b, chunk_b, strict=True):
                budget = max_length - (2 if text_b is None else 3)
                keep_A, keep_B = _longest_first(len(A), len(B), budget)
                if keep_A + keep_B < len(A) + len(B):
                    cut.append(len(input_ids))
                if self.recipe.truncates_left:
                    A, B = A[len(A) - keep_A :], B[len(B) - keep_B :]
                first = [self.cls_id, *A[:keep_A], self.sep_id]
                second = [] if text_b is None else [*B[:keep_B], self.sep_id]
                input_ids.append(first + second)
                token_type_ids.append([0] * len(first) + [1] * len(second))
        return Encodings(input_ids, token_type_ids, self.pad_id, cut)

    def __call__(
        self,
        texts: Sequence[str],
        text_pairs: Sequence[str | None] | None = None,
        max_length: int | None = None,
    ) -> Batch:
        """Tokenize texts to one padded batch: ``model(**tokenizer(["A text.", "Another"]))``.

        Parameters
        ----------
        texts, text_pairs
            First and second texts, at least one, as for :meth:`encode`.
        max_length : int, optional
            The most tokens of an example. None truncates nothing; the model refuses an example that
            is longer than its positions.

        Returns
        -------
        Batch
            ``input_ids``, ``attention_mask`` and ``token_type_ids``, on the CPU; ``.to(device)``
            moves them.

        Raises
        ------
        ConfigError, DataError
            As :meth:`encode`; also if there are no texts.
        """
        limit = sys.maxsize if max_length is None else max_length
        encodings = self.encode(texts, text_pairs, max_length=limit)
        if not len(encodings):
            raise DataError("there are no texts; give one or more")
        return encodings.batch(range(len(encodings)))

    def decode(
        self, ids: Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = False
    ) -> str:
        """Return the text of token ids, as nearly as the ids tell.

        Word pieces are joined to words, and words by spaces, as transformers does; case, accents
        and spaces that the tokenizer took away, and words that became [UNK], do not come back.

        Parameters
        ----------
        ids : sequence of int or torch.Tensor, (T,)
            The ids of one sequence; for several see :meth:`batch_decode`.
        skip_special_tokens : bool
            Whether to leave out [CLS], [SEP], [PAD] and the other special tokens.

        Raises
        ------
        DataError
            If they are not the ids of one sequence, or one is not in the vocabulary.
        """
        try:
            tensor = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DataError(f"these are no token ids: {one_line(str(error))}") from None
        no_ids = tensor.is_floating_point() or tensor.dtype == torch.bool
        if tensor.dim() != 1 or (no_ids and len(tensor)):
            raise DataError(
                f"decode takes the ids of one sequence, (T,), found {tuple(tensor.shape)} of "
                f"{tensor.dtype}; for several sequences call batch_decode"
            )
        numbers, size = tensor.tolist(), self.vocab_size
        outside = [number for number in numbers if not 0 <= number < size]
        if outside:
            raise DataError(
                f"{outside[0]} is no token id: they go from 0 to {size - 1}; are these the ids of "
                "this tokenizer?"
            )
        if skip_special_tokens:
            special = {token.id for token in self.recipe.added if token.special}
            numbers = [number for number in numbers if number not in special]
        return self._backend.decode(numbers, skip_special_tokens=False)

    def batch_decode(
        self,
        batch: Sequence[Sequence[int]] | torch.Tensor,
        *,
        skip_special_tokens: bool = False,
    ) -> list[str]:
        """Return the text of each of B sequences, such as of ``input_ids`` (B, T).

        Other arguments and errors as for :meth:`decode`.
        """
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in batch]

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, for both spafit and transformers.

        Parameters
        ----------
        folder : str or Path
            Created if it does not exist.

        Raises
        ------
        WeightsError
            If the folder or a file cannot be written; an existing file is then unchanged.
        """
        # transformers 5 builds the tokenizer from tokenizer_config.json, ignoring these settings in
        # tokenizer.json, and lower-cases by default.
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.recipe.lowercase,
            "strip_accents": self.recipe.strip_accents,
            "tokenize_chinese_chars": self.recipe.split_chinese,
            **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
            **({"split_special_tokens": True} if self.split_special_tokens else {}),
            **({"truncation_side": "left"} if self.recipe.truncates_left else {}),
        }
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a NUL
            reason = error.strerror if isinstance(error, OSError) else error
            raise WeightsError(f"{str(folder)!r:.200} cannot be created: {reason}") from None
        for name, content in (
            ("tokenizer.json", self.recipe.build().to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(config, indent=2)),
        ):
            with replacing(folder / name, WeightsError) as temporary:
                temporary.write_text(content + "\n", encoding="utf-8")

    def _pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text's word pieces, without special tokens."""
        return [
            encoding.ids
            for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]


def load_tokenizer(
    folder_or_name: str | Path,
    *,
    revision: str | None = None,
    lowercase: bool | None = None,
    split_special_tokens: bool | None = None,
) -> Tokenizer:
    """Load a BERT tokenizer from tokenizer.json, or from vocab.txt alone.

    Parameters
    ----------
    folder_or_name : str or Path
        A folder, or the name of a model on the hub, such as "google-bert/bert-large-cased".
    revision : str, optional
        A branch, tag or commit of the hub name.
    lowercase : bool, optional
        Whether to lower-case the text, overriding the files. None: as set in the files, else as
        the vocabulary implies (see :func:`spafit.text.vocabulary.read_recipe`).
    split_special_tokens : bool, optional
        Read a special token that is spelled out in a text as plain text (see :class:`Tokenizer`).
        None: as set in tokenizer_config.json, else False.

    Raises
    ------
    WeightsError
        If there is no such folder or hub name, or the hub cannot be reached.
    ConfigError
        If the files are missing, cannot be read, contradict each other, or are not those of a BERT
        tokenizer.
    """
    folder = local_folder(folder_or_name, revision=revision, files=TOKENIZER_FILES)
    recipe = read_recipe(folder, lowercase)
    if split_special_tokens is None:
        split_special_tokens = splits_special_tokens(folder)
    return Tokenizer(recipe, split_special_tokens)


def _longest_first(a: int, b: int, budget: int) -> tuple[int, int]:
    """Return how many tokens to keep of two texts, of a and b tokens, within a budget.

    The longer text is truncated until both are equally long, then both are. With an odd budget the
    longer text keeps one token more, or the second text if both are equally long.
    """
    if a + b <= budget:
        return a, b
    half = budget // 2
    if min(a, b) <= half:
        return (a, budget - a) if a < b else (budget - b, b)
    return (half, budget - half) if a <= b else (budget - half, half)


def _require_text(text: object, where: str) -> None:
    if not isinstance(text, str):
        raise DataError(
            f"{where}: expected a string, found {text!r:.60} of type {type(text).__name__}; "
            "give a text, or an empty string"
        )
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is a lone surrogate, {text[error.start]!r}, half of "
            "a character; decode the text again with the right encoding"
        ) from None
