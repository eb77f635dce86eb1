"""Hidden states after the frozen layers, computed once and kept.

With group 1 (the embeddings and layers 0 to N1) frozen and in evaluation mode, the output of layer
N1 for an example is constant: it does not depend on the epoch, run, seed or learning rate, nor on
the method if it freezes the same layers. It is computed once, kept in memory or in a file, and read
from then on. If no layer trains, one vector of an example is enough: [CLS], or where the head
alone trains (linear probing) the pooled output.

Kept states are used only for equal inputs (:class:`PrefixKey`, and the token ids and token types of
every example) and with a correct checksum. Otherwise they are computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spafit.errors import CheckpointError, ConfigError, DataError, SpafitError, TrainingError
from spafit.text.tokenization import Encodings
from spafit.training.prefix import file as prefix_file
from spafit.training.prefix.file import MappedFile, UnusableError
from spafit.weights.safefile import all_finite

# The numpy type (always little-endian) and the torch type for each of the key's type names.
_DTYPES = {"float32": ("<f4", torch.float32), "half": ("<f2", torch.float16)}

OUTPUTS = ("states", "first", "pooled")
"""What may be kept of an example: its hidden states, (tokens, D); [CLS]'s, or what the pooler makes
of it, (1, D)."""


@dataclass(frozen=True)
class PrefixKey:
    """What a kept hidden state depends on, besides the tokens.

    Attributes
    ----------
    prefix_fingerprint : str
        SHA-256 of the embeddings and layers that are computed: values and settings.
    depth : int
        Layers computed: N1 + 1.
    tokenizer_fingerprint : str
        SHA-256 of the tokenizer's recipe.
    hidden_size : int
        D.
    dtype : str
        The type that the states are stored in: "float32", or "half" (float16, at half the size).
    precision : str
        The precision that they were computed in, such as "float32" or "bf16".
    computed_on : str
        What else determines their rounding: device, threads, libraries.
    output : str
        What is kept: one of :data:`OUTPUTS`.

    Raises
    ------
    ConfigError
        If ``dtype`` or ``output`` is none of those.
    """

    prefix_fingerprint: str
    depth: int
    tokenizer_fingerprint: str
    hidden_size: int
    dtype: str
    precision: str
    computed_on: str
    output: str = "states"

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            raise ConfigError(f"what is kept is one of {', '.join(OUTPUTS)}: {self.output!r}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"hidden states are kept as float32 or half, found {self.dtype!r}")


class PrefixCache:
    """The hidden states after group 1 of the examples of one :class:`Encodings`.

    A context manager: on exit new states are saved. Several processes may fill the same file at
    once: each writes its own, and the last one is kept. If the disk fails after the start, what
    cannot be written is held in memory until the cache is closed.

    Parameters
    ----------
    encodings : Encodings
        The examples; rows are their numbers.
    key : PrefixKey
        What the states depend on.
    folder : str or Path, optional
        Keep a file in this folder, which is created if needed; None keeps the states in memory.
    limit_bytes : int
        The most bytes to use: in memory, or for all caches in the folder together. The least
        recently used caches in the folder are removed to make room.

    Attributes
    ----------
    path : Path or None
        The file; it exists once something was saved.
    per_example : bool
        Whether one vector (D,) of an example is kept, and not one of each token.
    nbytes : int
        The bytes of memory or disk needed for all examples.
    notes : list of str
        Notes for the user: a file was damaged and is rebuilt, files were removed to make room, the
        disk failed.

    Raises
    ------
    ConfigError
        If the examples do not fit in the limit, or on the disk.
    CheckpointError
        If something has to be written and the folder cannot be written to.
    """

    def __init__(
        self, encodings: Encodings, key: PrefixKey, *, folder: str | Path | None, limit_bytes: int
    ) -> None:
        self.per_example = key.output != "states"
        lengths = [1] * len(encodings) if self.per_example else encodings.lengths
        self._dtype, self._torch_dtype = _DTYPES[key.dtype]
        self._starts = [0, *itertools.accumulate(lengths)]
        self._shape = (self._starts[-1], key.hidden_size)
        self._folder = None if folder is None else Path(folder)
        self._limit_bytes = limit_bytes
        # For each example: where it is kept, its CRC-32, and whether that was checked here.
        self._held: list[_Memory | MappedFile | None] = [None] * len(lengths)
        self._checksums: list[int | None] = [None] * len(lengths)
        self._checked = bytearray(len(lengths))
        self._aside: dict[int, NDArray[Any]] = {}  # in memory only, never saved
        self._has_failed = False
        self._new: _Memory | MappedFile | None = None
        self._kept: MappedFile | None = None
        self._closed = False
        self.path: Path | None = None
        self.notes: list[str] = []

        self.nbytes = prefix_file.data_bytes(self._shape, self._dtype)
        if self._folder is not None:
            self._about = _describe(encodings, key)
            self._digest = _digest(self._about)
            self.path = prefix_file.kept_path(self._folder, self._digest)
            self.nbytes += prefix_file.index_bytes(self._about)
        if self.nbytes > limit_bytes:
            half = "keep them as half, " if key.dtype == "float32" else ""
            raise ConfigError(
                f"the hidden states of {len(lengths)} examples ({self._shape[0]} vectors) take "
                f"{self.nbytes} bytes, the limit is {limit_bytes}; {half}raise the limit, or do "
                "not keep them"
            )
        if self._folder is not None:
            prefix_file.prepare(self._folder)
            self._open_kept()
            if None in self._checksums:
                self._new = self._begin()  # so that an unusable folder is reported at once

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except SpafitError as failure:
            if error is None:
                raise
            self.notes.append(str(failure))  # the error being raised matters more

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Return which of some examples have to be computed and stored.

        Parameters
        ----------
        rows : sequence of int
            Numbers of examples.

        Returns
        -------
        list of int
            Those that are not kept or are damaged; each once, in the order given.
        """
        return [row for row in dict.fromkeys(self._numbers(rows)) if not self._is_usable(row)]

    def store(self, rows: Sequence[int], hidden: Tensor, *, keep: bool = True) -> None:
        """Store the hidden states of some examples, replacing earlier ones.

        If the disk fails they are held in memory, and :attr:`notes` says so once.

        Parameters
        ----------
        rows : sequence of int
            Numbers of examples.
        hidden : Tensor
            Their hidden states, one example after the other, (N, D), or a vector of each, (B, D);
            of any device and of at most 32 bits.
        keep : bool
            False holds them in memory until this is closed, and never saves them; states that are
            kept already stay.

        Raises
        ------
        TrainingError
            If a value is NaN or infinite.
        ConfigError
            If a value is too large for half, or a type is too wide for float32.
        DataError
            If the shape does not fit these examples.
        """
        rows = self._numbers(rows)
        shape = (self._count(rows), self._shape[1])
        if hidden.shape != shape:
            raise DataError(
                f"the hidden states of {len(rows)} examples must have shape {shape}, "
                f"found {tuple(hidden.shape)}"
            )
        if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ConfigError(
                f"hidden states of {hidden.dtype} would lose digits; store float32 or narrower"
            )
        values = hidden.detach().to("cpu", self._torch_dtype).contiguous()
        if not all_finite(values):
            if all_finite(hidden):
                raise ConfigError(
                    "a hidden state is too large for half (65504 at most); keep float32"
                )
            raise TrainingError(
                "the frozen layers gave NaN or infinite hidden states, which are not kept; use the "
                "weights of a healthy run, or a wider precision"
            )
        array = values.numpy().astype(self._dtype, copy=False)
        position = 0
        for row in rows:
            length = self._starts[row + 1] - self._starts[row]
            piece = array[position : position + length]
            is_kept = self._keep(row, piece) if keep else self._is_kept(row)
            if not is_kept:
                self._aside[row] = piece.copy()
            position += length

    def read(self, rows: Sequence[int]) -> Tensor:
        """Read the hidden states of some examples.

        Parameters
        ----------
        rows : sequence of int
            Numbers of examples, all of them kept: :meth:`missing` returns none.

        Returns
        -------
        Tensor
            (N, D) or (B, D), float32, on the CPU, one example after the other, in new memory.

        Raises
        ------
        DataError
            If an example is not kept.
        """
        rows = self._numbers(rows)
        out = np.empty((self._count(rows), self._shape[1]), self._dtype)
        position = 0
        for row in rows:
            if not self._is_usable(row):
                raise DataError(
                    f"the hidden states of example {row} are not kept; store what missing() names"
                )
            piece = self._piece(row)
            out[position : position + len(piece)] = piece
            position += len(piece)
        native = out.astype(np.dtype(self._dtype).newbyteorder("="), copy=False)
        return torch.from_numpy(native).to(torch.float32)

    def save(self) -> None:
        """Save new states to the disk; does nothing for a cache in memory.

        Raises
        ------
        CheckpointError
            If the file cannot be written; what was saved before is unchanged.
        """
        new, path = self._new, self.path
        if path is None or not isinstance(new, MappedFile) or new not in self._held:
            return
        # A renamed file never changes, so the old one's states are copied to the new one.
        for row, source in enumerate(self._held):
            if source is not new and self._is_kept(row):
                self._put(row, self._piece(row))
        pairs = zip(self._held, self._checksums, strict=True)
        checksums = [None if source is None else crc for source, crc in pairs]
        new.move_into_place(path, prefix_file.encode_index(self._about, checksums))
        if self._kept is not None:
            self._kept.close()
        self._kept, self._new = new, None

    def close(self) -> None:
        """Save (see :meth:`save`) and release everything; nothing can be read afterwards."""
        if self._closed:
            return
        try:
            self.save()
        finally:
            self._closed = True
            self._held = []
            self._aside.clear()
            if isinstance(self._new, MappedFile):
                self._new.discard()
            if self._kept is not None:
                self._kept.close()
            self._new = self._kept = None

    def forget_aside(self) -> None:
        """Forget what was stored with ``keep=False``, which is for one run alone."""
        self._aside.clear()

    def _numbers(self, rows: Sequence[int]) -> list[int]:
        if self._closed:
            raise CheckpointError("these kept hidden states were closed; open them again")
        try:
            numbers = [operator.index(row) for row in rows]
        except TypeError:
            raise DataError(f"rows are the numbers of examples, found {rows!r:.200}") from None
        if numbers and (min(numbers) < 0 or max(numbers) >= len(self._held)):
            raise DataError(
                f"rows are numbers of examples from 0 to {len(self._held) - 1}, found {rows!r:.200}"
            )
        return numbers

    def _count(self, rows: list[int]) -> int:
        """Return the number of vectors of some examples."""
        return sum(self._starts[row + 1] - self._starts[row] for row in rows)

    def _piece(self, row: int) -> NDArray[Any]:
        """Return a view of the states of a usable example."""
        source = self._held[row]
        if source is None:
            return self._aside[row]
        return source.array[self._starts[row] : self._starts[row + 1]]

    def _keep(self, row: int, piece: NDArray[Any]) -> bool:
        """Write an example's states to the new file or memory; False if that (ever) failed."""
        if self._has_failed:
            return False
        try:
            if self._new is None:
                self._new = self._begin()
            self._put(row, piece)
        except (CheckpointError, ConfigError) as error:
            self._has_failed = True
            self.notes.append(f"{error}. New hidden states are held in memory from here on")
            return False
        self._aside.pop(row, None)
        return True

    def _put(self, row: int, piece: NDArray[Any]) -> None:
        """Write an example's states to the new file or memory."""
        assert self._new is not None
        self._held[row] = None  # in case writing fails
        self._new.write(self._starts[row], piece)
        self._held[row] = self._new
        # States on a disk are checked when they are first read.
        self._checked[row] = self._folder is None
        self._checksums[row] = None if self._folder is None else zlib.crc32(piece.data)

    def _is_usable(self, row: int) -> bool:
        """Return whether the states of an example can be read."""
        return self._is_kept(row) or row in self._aside

    def _is_kept(self, row: int) -> bool:
        """Return whether an example is kept; its checksum is checked at its first use."""
        source = self._held[row]
        if source is None:
            return False
        if source.is_whole():
            if not self._checked[row]:
                self._checked[row] = zlib.crc32(self._piece(row).data) == self._checksums[row]
            if self._checked[row]:
                return True
        self._held[row] = None
        note = f"{self.path}: damaged hidden states were found, and are computed again"
        if note not in self.notes:
            self.notes.append(note)
        return False

    def _open_kept(self) -> None:
        """Open the states that an earlier run kept, if they exist and fit."""
        assert self.path is not None
        try:
            self._kept, self._checksums = prefix_file.open_kept(
                self.path, self._about, self._shape, self._dtype
            )
        except FileNotFoundError:
            return
        except UnusableError as fault:
            self.notes.append(f"{self.path} {fault}; it is rebuilt")
            return
        self._held = [None if crc is None else self._kept for crc in self._checksums]
        with contextlib.suppress(OSError):  # marks it as recently used, if we may
            os.utime(self.path)

    def _begin(self) -> _Memory | MappedFile:
        """Create the new memory or file."""
        if self._folder is None:
            return _Memory(self._shape, self._dtype)
        removed = prefix_file.make_room(self._folder, self._digest, self.nbytes, self._limit_bytes)
        self.notes.extend(f"{path} was removed to make room" for path in removed)
        return prefix_file.create(self._folder, self._digest, self._shape, self._dtype)


class _Memory:
    """The interface of :class:`MappedFile` in memory."""

    def __init__(self, shape: tuple[int, int], dtype: str) -> None:
        self.array: NDArray[Any] = np.empty(shape, dtype)

    def is_whole(self) -> bool:
        return True

    def write(self, start: int, values: NDArray[Any]) -> None:
        self.array[start : start + len(values)] = values


def digest_of(encodings: Encodings, key: PrefixKey) -> str:
    """Return the SHA-256 of all that the states of some examples depend on."""
    return _digest(_describe(encodings, key))


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _describe(encodings: Encodings, key: PrefixKey) -> dict[str, Any]:
    """Return what the states belong to, for the index; the lengths delimit the examples."""
    digest = hashlib.sha256()
    for sequences in (encodings.input_ids, encodings.token_type_ids):
        digest.update(np.fromiter(itertools.chain.from_iterable(sequences), "<i8").tobytes())
    return {
        "format": prefix_file.FORMAT,
        "key": dataclasses.asdict(key),
        "tokens": digest.hexdigest(),
        "lengths": encodings.lengths,
    }
