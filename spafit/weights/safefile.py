"""Read safetensors files strictly, and write them reproducibly.

A safetensors file is 8 bytes of length, a JSON header of that length (name -> dtype, shape, byte
range), and the tensors' bytes. The whole header is checked before any of the data is used, and the
values are checked after they are read: the safetensors library accepts duplicate names and NaN.

:meth:`SafeFile.view` lets the library mmap a tensor, which takes a fifth of the time of a copy. Two
things do not use the library: :meth:`SafeFile.read`, because the library mmaps what it reads, so
that a failing disk or a truncated file would kill the process instead of raising an error; and
:func:`tensor_file`, because the library writes the metadata in random order, so that two equal runs
would give different files.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spafit.config import open_regular, parse_json
from spafit.errors import WeightsError, one_line
from spafit.files.durable import is_at, write_file
from spafit.files.replacing import replacing

MAX_HEADER_BYTES = 2**24
"""A longer header is refused: parsed, it can take 25 times its size. BERT-large's has 40 kB."""

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The torch type for each type name in a header."""

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""The types in which weights are accepted."""

# The largest that torch can count and index.
_LARGEST_SIZE, _MOST_DIMENSIONS = 2**63 - 1, 64

# A smaller tensor is read, not mapped.
_LEAST_MAPPED_BYTES = 2**20

AGAIN = "fetch or copy the file again"

NO_WEIGHTS = {
    b"version ": "it is a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<!": "it is a web page, saved in place of the file: fetch the file itself",
    b"<html": "it is a web page, saved in place of the file: fetch the file itself",
}
"""The first bytes of what is often found in place of a file of weights, and the remedy."""

# In place of a safetensors file also these.
_IMPOSTORS = {
    **NO_WEIGHTS,
    b"PK\x03\x04": "it is a PyTorch archive: run `python -m weights_tools convert`",
    b"\x80\x02": "it is a pickle: run `python -m weights_tools convert`",
}


@dataclass(frozen=True)
class TensorInfo:
    """A header's entry for one tensor.

    Attributes
    ----------
    name : str
        Its key.
    dtype : str
        Its type as the header spells it, a key of :data:`TORCH_DTYPES`.
    shape : tuple of int
        Its shape.
    start, end : int
        Its bytes, counted from the start of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes in the file."""
        return self.end - self.start


class SafeFile:
    """One open safetensors file whose header has been checked in full.

    A context manager; :meth:`read` works inside the ``with`` block.

    Parameters
    ----------
    path : str or Path
        The file.

    Attributes
    ----------
    path : Path
        The file.
    metadata : dict of str to str
        The header's ``__metadata__``.
    tensors : dict of str to TensorInfo
        The tensors, in the order of their bytes.

    Raises
    ------
    WeightsError
        If the file is missing, not a regular file, truncated or longer than its header says; if the
        header is too long, not JSON or has a duplicate key; if an entry's type, shape or byte range
        is invalid or inconsistent; or if the tensors overlap or leave gaps.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._library: safe_open | None = None
        try:
            self._file = open_regular(self.path)
        except (OSError, ValueError) as error:  # ValueError: the name has a zero byte
            reason = error.strerror if isinstance(error, OSError) else error
            raise WeightsError(f"{self.path} cannot be opened: {reason}") from None
        try:
            self._read_header()
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise self._error(f"cannot be read: {error.strerror}", AGAIN) from None
            raise

    def __enter__(self) -> SafeFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._library = None

    def read(
        self, name: str, dtype: torch.dtype | None = None, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read one tensor into new memory, or into a given tensor.

        Parameters
        ----------
        name : str
            A key of :attr:`tensors`.
        dtype : torch.dtype, optional
            Convert to this type; None keeps the file's.
        into : torch.Tensor, optional
            A contiguous CPU tensor of the header's shape and of the type asked for, to read into;
            its content is undefined after an error.

        Returns
        -------
        torch.Tensor
            On the CPU, of the header's shape; ``into`` if it is given.

        Raises
        ------
        WeightsError
            If the file cannot be read or was truncated since it was opened, if there is not enough
            memory, or if a value is NaN or infinite, in the file or after conversion.
        """
        info = self.tensors[name]
        stored = TORCH_DTYPES[info.dtype]
        if into is not None and into.dtype == stored:
            tensor = into
        else:
            try:
                tensor = torch.empty(info.shape, dtype=stored, device="cpu")
            except RuntimeError:
                raise self._error(
                    f"has {info.nbytes} bytes in {one_line(name)}, for which there is not enough "
                    "memory",
                    "use a larger machine",
                ) from None
        if info.nbytes:
            memory = tensor.reshape(-1).view(torch.uint8).numpy().data
            try:
                self._file.seek(self._data_start + info.start)
                count = self._file.readinto(memory)  # type: ignore[attr-defined]
            except OSError as error:
                raise self._error(f"cannot be read: {error.strerror}", AGAIN) from None
            if count != info.nbytes:
                raise self._error(f"ended while {one_line(name)} was read", AGAIN)
        if tensor.is_floating_point():
            self._require_finite(name, tensor, "")
        if dtype is None or dtype == tensor.dtype:
            return tensor
        converted = tensor.to(dtype) if into is None else into.copy_(tensor)
        if info.dtype in FLOAT_DTYPES:
            self._require_finite(name, converted, f" once converted to {dtype}")
        return converted

    def view(self, name: str) -> torch.Tensor:
        """Mmap one tensor, copy on write.

        Processes that load the same file share its memory. The file must not be truncated while the
        tensor is in use: as with every mmap, the system would kill the process. (Replacing the file
        by a rename, as spafit and the hub's cache do, is safe.)

        Parameters
        ----------
        name : str
            A key of :attr:`tensors`.

        Returns
        -------
        torch.Tensor
            On the CPU, of the header's type and shape. Small and unaligned tensors are read instead
            of mapped.

        Raises
        ------
        WeightsError
            As :meth:`read`.
        """
        info = self.tensors[name]
        start, dtype = self._data_start + info.start, TORCH_DTYPES[info.dtype]
        if info.nbytes < _LEAST_MAPPED_BYTES or start % dtype.itemsize:
            return self.read(name)
        if os.fstat(self._file.fileno()).st_size < start + info.nbytes:
            raise self._error(f"ended while {one_line(name)} was read", AGAIN)
        tensor = self._mapped(name)
        if tensor is None:
            return self.read(name)
        if tensor.is_floating_point():
            self._require_finite(name, tensor, "")
        return tensor

    def _mapped(self, name: str) -> torch.Tensor | None:
        """Let the library mmap a tensor; None if it cannot, or if the file was replaced."""
        try:
            if self._library is None:
                self._library = safe_open(self.path, "pt")
            tensor: torch.Tensor
            tensor = self._library.get_tensor(name)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError, RuntimeError, ValueError):
            return None  # for example on a file system without mmap
        return tensor if is_at(self._file.fileno(), self.path) else None

    def _require_finite(self, name: str, tensor: torch.Tensor, when: str) -> None:
        if all_finite(tensor):
            return
        bad = int((~torch.isfinite(_comparable(tensor))).sum())
        raise self._error(
            f"{one_line(name)} holds NaN or infinite values: {bad} of {tensor.numel()}{when}",
            "use the weights of a healthy run" if not when else "load it in a wider type",
        )

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(8)
        if len(head) < 8:
            raise self._error(f"is truncated: {size} bytes, not even a header's length", AGAIN)
        (header_bytes,) = struct.unpack("<Q", head)
        if header_bytes > MAX_HEADER_BYTES:
            for magic, mend in _IMPOSTORS.items():
                if head.startswith(magic):
                    raise self._error("is not a safetensors file", mend)
            raise self._error(
                f"says that its header takes {header_bytes} bytes, more than the "
                f"{MAX_HEADER_BYTES} that are accepted",
                AGAIN,
            )
        if 8 + header_bytes > size:
            raise self._error(
                f"is truncated: its header ends at byte {8 + header_bytes}, the file at {size}",
                AGAIN,
            )
        header = self._parse(self._file.read(header_bytes))
        self.metadata = self._check_metadata(header.pop("__metadata__", {}))
        self._data_start = 8 + header_bytes
        infos = [self._check_entry(name, entry) for name, entry in header.items()]
        self._check_places(infos, size)
        self.tensors = {info.name: info for info in infos}

    def _check_places(self, infos: list[TensorInfo], size: int) -> None:
        """Sort the tensors by their byte ranges, and check that these cover all of the data."""
        # An empty tensor starts at the same byte as the next one, and comes before it.
        infos.sort(key=lambda info: (info.start, info.end))
        position = 0
        for info in infos:
            if info.start != position:
                fault = "overlaps the tensor before it" if info.start < position else "leaves a gap"
                raise self._error(
                    f"{one_line(info.name)} {fault}: it starts at byte {info.start}, "
                    f"expected {position}",
                    AGAIN,
                )
            position = info.end
        expected = self._data_start + position
        if size != expected:
            fault = "is truncated" if size < expected else "has bytes that belong to no tensor"
            raise self._error(f"{fault}: its tensors end at byte {expected}, it at {size}", AGAIN)

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            header = parse_json(raw)
        except ValueError as error:
            raise self._error(f"has a header that cannot be used: {error}", AGAIN) from None
        if not isinstance(header, dict):
            raise self._error("has a header that is not a JSON object", AGAIN)
        return header

    def _check_metadata(self, metadata: object) -> dict[str, str]:
        if isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()):
            return metadata
        raise self._error("has a __metadata__ that does not map strings to strings", AGAIN)

    def _check_entry(self, name: str, entry: object) -> TensorInfo:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._error(
                f"{one_line(name)} must have exactly dtype, shape and data_offsets, "
                f"found {entry!r:.200}",
                AGAIN,
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
            raise self._error(f"{one_line(name)} has the unknown type {dtype!r:.200}", AGAIN)
        if not _is_sizes(shape):
            raise self._error(f"{one_line(name)} has an impossible shape, {shape!r:.200}", AGAIN)
        if not _is_offsets(offsets):
            raise self._error(
                f"{one_line(name)} has impossible data_offsets, {offsets!r:.200}", AGAIN
            )
        info = TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1])
        expected = info.numel * TORCH_DTYPES[dtype].itemsize
        if info.nbytes != expected:
            raise self._error(
                f"{one_line(name)} of type {dtype} and shape {list(shape)} takes {expected} bytes, "
                f"its data_offsets give {info.nbytes}",
                AGAIN,
            )
        return info

    def _error(self, what: str, mend: str) -> WeightsError:
        return WeightsError(f"{self.path}: {one_line(what, 600)}; {mend}")


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file atomically.

    Parameters
    ----------
    path : str or Path
        The file; one that exists is replaced, and a symbolic link keeps pointing to it.
    tensors : mapping of str to torch.Tensor
        Written contiguously; memory that two of them share is written twice.
    metadata : mapping of str to str
        The header's ``__metadata__``.

    Raises
    ------
    WeightsError
        If the file cannot be written.
    """
    with replacing(path, WeightsError) as temporary:
        temporary.unlink()
        write_file(temporary, tensor_file(tensors, metadata))


def tensor_file(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, piece by piece, without copying CPU tensors.

    Parameters
    ----------
    tensors, metadata
        As for :func:`save_tensors`.
    """
    # In the order of the safetensors library: wide types first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        if tensors[name].numel():
            plain = tensors[name].detach().cpu().contiguous()
            yield plain.reshape(-1).view(torch.uint8).numpy().data


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    if tensor.numel() == 0:
        return True
    # Any NaN makes both minimum and maximum NaN: one pass, and no temporary of the same size.
    lowest, highest = _comparable(tensor).aminmax()
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    # Torch cannot compare float8.
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _is_sizes(value: object) -> bool:
    """Return whether torch can make a tensor of this shape, even an empty one."""
    return (
        isinstance(value, list)
        and len(value) <= _MOST_DIMENSIONS
        and all(type(size) is int and 0 <= size <= _LARGEST_SIZE for size in value)
        and math.prod(size or 1 for size in value) <= _LARGEST_SIZE
    )


def _is_offsets(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(offset) is int for offset in value)
        and 0 <= value[0] <= value[1] <= _LARGEST_SIZE
    )
