"""Strict reading, and careful writing, of safetensors files.

A safetensors file is 8 bytes of length, a JSON header of that length (name -> dtype, shape, byte
range), and the tensors' bytes. Everything that the header claims is checked before a byte of the
data is used: the format's own library accepts a name that stands twice, and reads values that are
NaN.

Tensors are read straight into their own memory, one at a time (:meth:`SafeFile.read`; the peak is
what the caller keeps, plus one tensor where its type is converted), or are the file's own pages
(:meth:`SafeFile.view`), which takes a fifth of the time and lasts as long as the file does.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from spafit.errors import WeightsError
from spafit.folders import replacing
from spafit.strict_json import no_duplicates

MAX_HEADER_BYTES = 100_000_000
"""A longer header is refused; BERT-large's takes 40 thousand bytes."""

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
"""The header's names of types, as torch's."""

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""The types in which weights are accepted."""

# A smaller tensor is read, not mapped.
_LEAST_MAPPED_BYTES = 2**20
# Linux's MADV_POPULATE_READ: map all pages of a range in one call.
_POPULATE_READ = 22

AGAIN = "fetch or copy the file again"

# The first bytes of what is often found under the name of a safetensors file, and the mend.
_IMPOSTORS = {
    b"version ": "it is a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"PK\x03\x04": "it is a PyTorch archive: run `python -m weights_tools convert`",
    b"\x80\x02": "it is a pickle: run `python -m weights_tools convert`",
    b"<!": "it is a web page, saved in place of the file: fetch the file itself",
    b"<html": "it is a web page, saved in place of the file: fetch the file itself",
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

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
        If the file is missing, truncated or longer than its header says, if the header is too long,
        not JSON, holds a key twice, or an entry's type, shape or bytes are unknown or do not fit
        each other, or if the tensors overlap or leave holes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._pages: mmap.mmap | None = None
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise WeightsError(f"{self.path} cannot be opened: {error.strerror}") from None
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafeFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read(
        self, name: str, dtype: torch.dtype | None = None, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read one tensor into memory of its own, or into memory that is given.

        Parameters
        ----------
        name : str
            A key of :attr:`tensors`.
        dtype : torch.dtype, optional
            Convert to this type; None keeps the file's.
        into : torch.Tensor, optional
            A contiguous CPU tensor of the header's shape and of the type asked for, to be filled;
            what it holds after an error is undefined.

        Returns
        -------
        torch.Tensor
            On the CPU, of the header's shape: ``into`` where it is given.

        Raises
        ------
        WeightsError
            If the file has become shorter, or a floating-point value is NaN or infinite, in the
            file or after conversion.
        """
        info = self.tensors[name]
        stored = TORCH_DTYPES[info.dtype]
        if into is not None and into.dtype == stored:
            tensor = into
        else:
            tensor = torch.empty(info.shape, dtype=stored, device="cpu")
        if info.nbytes:
            memory = tensor.reshape(-1).view(torch.uint8).numpy().data
            self._file.seek(self._data_start + info.start)
            if self._file.readinto(memory) != info.nbytes:
                raise self._error(f"ended while {name} was read", AGAIN)
        if info.dtype in FLOAT_DTYPES:
            self._require_finite(name, tensor, "")
        if dtype is None or dtype == tensor.dtype:
            return tensor
        converted = tensor.to(dtype) if into is None else into.copy_(tensor)
        if info.dtype in FLOAT_DTYPES:
            self._require_finite(name, converted, f" once converted to {dtype}")
        return converted

    def view(self, name: str) -> torch.Tensor:
        """Give one tensor as the file's own pages, which are copied only where they are written to.

        Nothing is read twice, and processes that load the same file share its memory. The file must
        not be cut short while the tensor is in use: as with every mapped file, the system would end
        the process. (A file that is replaced, as spafit and the hub's cache do it, stays as it was
        for those who have it open.)

        Parameters
        ----------
        name : str
            A key of :attr:`tensors`.

        Returns
        -------
        torch.Tensor
            On the CPU, of the header's type and shape. Small tensors, and those that the file does
            not align, are read.

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
            raise self._error(f"ended while {name} was read", AGAIN)
        if self._pages is None:
            self._pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        with contextlib.suppress(AttributeError, OSError):  # an older system: page by page
            page = start - start % mmap.PAGESIZE
            self._pages.madvise(_POPULATE_READ, page, start + info.nbytes - page)
        tensor = torch.frombuffer(self._pages, dtype=dtype, count=info.numel, offset=start)
        if info.dtype in FLOAT_DTYPES:
            self._require_finite(name, tensor, "")
        return tensor.view(info.shape)

    def _require_finite(self, name: str, tensor: torch.Tensor, when: str) -> None:
        if all_finite(tensor):
            return
        bad = int((~torch.isfinite(tensor)).sum())
        raise self._error(
            f"{name} holds NaN or infinite values: {bad} of {tensor.numel()}{when}",
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
        # An empty tensor starts where the next one does, and stands before it.
        infos.sort(key=lambda info: (info.start, info.end))
        position = 0
        for info in infos:
            if info.start != position:
                fault = "overlaps the tensor before it" if info.start < position else "leaves a gap"
                raise self._error(
                    f"{info.name} {fault}: it starts at byte {info.start}, expected {position}",
                    AGAIN,
                )
            position = info.end
        expected = self._data_start + position
        if size != expected:
            fault = "is truncated" if size < expected else "has bytes that belong to no tensor"
            raise self._error(f"{fault}: its tensors end at byte {expected}, it at {size}", AGAIN)
        self.tensors = {info.name: info for info in infos}

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError) as error:
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
                f"{name} must have exactly dtype, shape and data_offsets, found {entry!r:.200}",
                AGAIN,
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
            raise self._error(f"{name} has the unknown type {dtype!r:.200}", AGAIN)
        if not _is_sizes(shape):
            raise self._error(f"{name} has an impossible shape, {shape!r:.200}", AGAIN)
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._error(f"{name} has impossible data_offsets, {offsets!r:.200}", AGAIN)
        info = TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1])
        expected = info.numel * TORCH_DTYPES[dtype].itemsize
        if info.nbytes != expected:
            raise self._error(
                f"{name} of type {dtype} and shape {list(shape)} takes {expected} bytes, "
                f"its data_offsets give {info.nbytes}",
                AGAIN,
            )
        return info

    def _error(self, what: str, mend: str) -> WeightsError:
        return WeightsError(f"{self.path}: {what}; {mend}")


class SafeFolder:
    """The weights of one folder: ``model.safetensors``, or several files with an index.

    A context manager, like :class:`SafeFile`, whose :meth:`read` it shares.

    Parameters
    ----------
    folder : str or Path
        The folder.

    Attributes
    ----------
    files : tuple of Path
        The safetensors files.
    tensors : dict of str to TensorInfo
        All tensors, file by file in the order of their bytes.

    Raises
    ------
    WeightsError
        If there are no such files or both forms, if the index is not a plain map of names to file
        names inside the folder, or if it and the files do not agree on every tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        weight_map = _read_index(index) if index.is_file() else None
        single = folder / "model.safetensors"
        if weight_map is None and not single.is_file():
            raise WeightsError(_no_weights(folder))
        if weight_map is not None and single.is_file():
            raise WeightsError(
                f"{folder} has both {single.name} and {index.name}; remove the one that is not "
                "meant, so that there is no doubt about which weights are used"
            )
        names = [single.name] if weight_map is None else sorted(set(weight_map.values()))
        self.files = tuple(folder / name for name in names)
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, SafeFile] = {}
        with contextlib.ExitStack() as opened:
            for path in self.files:
                file = opened.enter_context(SafeFile(path))
                for name, info in file.tensors.items():
                    if name in self.tensors:
                        raise WeightsError(
                            f"{name} stands in both {self._file_of[name].path} and {path}; {AGAIN}"
                        )
                    self.tensors[name] = info
                    self._file_of[name] = file
            if weight_map is not None:
                self._require_index(index, weight_map)
            self._opened = opened.pop_all()

    def __enter__(self) -> SafeFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def read(
        self, name: str, dtype: torch.dtype | None = None, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read one tensor (see :meth:`SafeFile.read`)."""
        return self._file_of[name].read(name, dtype, into)

    def view(self, name: str) -> torch.Tensor:
        """Give one tensor as the file's own pages (see :meth:`SafeFile.view`)."""
        return self._file_of[name].view(name)

    def _require_index(self, index: Path, weight_map: dict[str, str]) -> None:
        found = {name: file.path.name for name, file in self._file_of.items()}
        wrong = sorted(
            name
            for name in weight_map.keys() | found.keys()
            if weight_map.get(name) != found.get(name)
        )
        if wrong:
            listed = "; ".join(
                f"{name}: index {weight_map.get(name)}, files {found.get(name)}" for name in wrong
            )
            raise WeightsError(f"{index} and its files do not agree: {listed}; fetch all again")


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file that is there in full or not at all.

    Parameters
    ----------
    path : str or Path
        The file; one that exists is replaced, and a symbolic link keeps pointing to it.
    tensors : mapping of str to torch.Tensor
        They are written contiguous; two that share memory are written twice.
    metadata : mapping of str to str
        The header's ``__metadata__``.

    Raises
    ------
    WeightsError
        If the file cannot be written.
    """
    ready: dict[str, torch.Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # The library refuses tensors that share memory, such as tied embeddings.
        if plain.untyped_storage().data_ptr() in memory:
            plain = plain.clone()
        memory.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    with replacing(path) as temporary:
        try:
            save_file(ready, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise WeightsError(f"{path} cannot be written: {error}") from None


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if tensor.numel() == 0:
        return True
    # A NaN anywhere is both minimum and maximum: one pass, and no temporary of the same size.
    lowest, highest = tensor.aminmax()
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{index} cannot be used: {error}; {AGAIN}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map of tensor names to file names; {AGAIN}")
    for name, shard in weight_map.items():
        # A plain file name: nothing that leads out of the folder, on any system.
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or any(character in shard for character in '/\\:\0"')
        ):
            raise WeightsError(
                f"{index} puts {name} into {shard!r}, which is not the plain name of a "
                ".safetensors file beside it; do not use this index"
            )
    return weight_map


def _no_weights(folder: Path) -> str:
    lacking = f"{folder} holds neither model.safetensors nor model.safetensors.index.json"
    if not folder.is_dir():
        return f"{folder} is not a folder; give the folder that holds model.safetensors"
    if (folder / "pytorch_model.bin").is_file():
        return (
            f"{lacking}, only pytorch_model.bin, a pickle, which is never loaded; turn it into "
            f"safetensors once with: python -m weights_tools convert {folder}"
        )
    return f"{lacking}; give the folder that holds the weights"
