"""Read the weights of a folder strictly: one safetensors file, or several with an index."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from spafit.config import read_json
from spafit.errors import WeightsError, listed, one_line
from spafit.files.durable import is_plain_name
from spafit.weights.safefile import AGAIN, SafeFile, TensorInfo


class SafeFolder:
    """The weights of one folder: ``model.safetensors``, or several files with an index.

    A context manager with the same :meth:`read` and :meth:`view` as :class:`SafeFile`.

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
        If neither or both of these exist, if the index is not a plain map of tensor names to file
        names in the folder, or if the index and the files do not agree on every tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        weight_map = read_index(index) if _holds(index.is_file) else None
        single = folder / "model.safetensors"
        if weight_map is None and not _holds(single.is_file):
            raise WeightsError(_no_weights(folder))
        if weight_map is not None and _holds(single.is_file):
            raise WeightsError(
                f"{folder} has both {single.name} and {index.name}; remove the wrong one, so that "
                "it is clear which weights are used"
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
                            f"{one_line(name)} is in both {self._file_of[name].path} and "
                            f"{path}; {AGAIN}"
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
        """Return one tensor as the file's own pages (see :meth:`SafeFile.view`)."""
        return self._file_of[name].view(name)

    def _require_index(self, index: Path, weight_map: dict[str, str]) -> None:
        found = {name: file.path.name for name, file in self._file_of.items()}
        wrong = sorted(
            name
            for name in weight_map.keys() | found.keys()
            if weight_map.get(name) != found.get(name)
        )
        if wrong:
            faults = listed(
                f"{one_line(name, 40)}: index {weight_map.get(name)}, files {found.get(name)}"
                for name in wrong
            )
            raise WeightsError(f"{index} and its files do not agree: {faults}; fetch all again")


def _holds(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # no permission to read it, or its name is too long
        return False


def read_index(index: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Return the name of the file that holds each tensor, by an index of several files.

    Parameters
    ----------
    index : Path
        The file.
    suffix : str
        The end of the names of these files.

    Raises
    ------
    WeightsError
        If it is missing or no plain map of tensor names to the names of files beside it.
    """
    try:
        content = read_json(index)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{index} cannot be used: {one_line(str(error))}; {AGAIN}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map of tensor names to file names; {AGAIN}")
    for name, shard in weight_map.items():
        if not is_plain_name(shard) or not shard.endswith(suffix):
            raise WeightsError(
                f"{index} puts {name!r:.200} into {shard!r:.200}, which is not the plain name of a "
                f"{suffix} file beside it; do not use this index"
            )
    return weight_map


def _no_weights(folder: Path) -> str:
    lacking = f"{folder} holds neither model.safetensors nor model.safetensors.index.json"
    if not _holds(folder.is_dir):
        return f"{folder} is not a folder; give the folder that holds model.safetensors"
    for pickle in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if _holds((folder / pickle).is_file):
            return (
                f"{lacking}, only {pickle}, a pickle or several, which is never loaded; turn it "
                f"into safetensors once with: python -m weights_tools convert {folder}"
            )
    return f"{lacking}; give the folder that holds the weights"
