"""The record of one training run: ``run.json``, ``log.jsonl`` and the best adapter's place."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from spafit.errors import CheckpointError
from spafit.folders import replacing
from spafit.version import __version__

RUN = "run.json"
LOG = "log.jsonl"
ADAPTER = "adapter.safetensors"


class RunFolder:
    """A folder that one run writes and that ``spafit eval`` and ``spafit predict`` read.

    A context manager: on the way out ``run.json`` says whether the run is finished, was interrupted
    or failed, and why.

    Parameters
    ----------
    path : str or Path
        The folder; it is made.
    record : dict
        What is known at the start: settings, data, hashes.
    overwrite : bool
        Whether a record that is there already may be replaced.

    Raises
    ------
    CheckpointError
        If the folder cannot be written to, or holds a run already.
    """

    def __init__(self, path: str | Path, record: dict[str, Any], *, overwrite: bool) -> None:
        self.path = Path(path)
        if not overwrite:
            refuse_run(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ADAPTER).unlink(missing_ok=True)  # of the run that is replaced
            self._log = (self.path / LOG).open("w", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror}") from None
        self.record = {"status": "running", **record, "versions": versions(), "machine": machine()}
        self.write()

    @property
    def adapter(self) -> Path:
        """Where the best adapter goes."""
        return self.path / ADAPTER

    @property
    def files(self) -> tuple[Path, ...]:
        """What the run has written; other files of the folder are not its own."""
        paths = (self.adapter, self.path / LOG, self.path / RUN)
        return tuple(path for path in paths if path.is_file())

    def write(self) -> None:
        """Write ``run.json`` anew, whole or not at all."""
        with replacing(self.path / RUN) as temporary:
            temporary.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to ``log.jsonl``."""
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._log.close()
        if error is None:
            self.record["status"] = "finished"
        else:
            self.record["status"] = "failed" if isinstance(error, Exception) else "interrupted"
            self.record["error"] = f"{type(error).__name__}: {error}"
        self.write()


def refuse_run(folder: str | Path) -> None:
    """Raise a CheckpointError if a folder holds a run already."""
    if (Path(folder) / RUN).exists():
        raise CheckpointError(
            f"{folder} holds a run already; give another folder, or allow it to be replaced "
            "with overwrite (--overwrite)"
        )


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read the ``run.json`` of a run folder.

    Raises
    ------
    CheckpointError
        If there is none, it is damaged, or the run left no adapter.
    """
    path = Path(folder) / RUN
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no run folder: it has no {RUN}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not _is_record(record):
        raise CheckpointError(f"{path} is not the record of a run, or it is damaged")
    if not (Path(folder) / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} has no {ADAPTER}: its run is {record.get('status', 'of unknown status')}"
        )
    return dict(record)


def _is_record(record: Any) -> bool:
    """Whether what reading a run needs is there, and is of its type."""
    if not isinstance(record, dict) or not isinstance(record.get("task"), str):
        return False
    settings, about = record.get("settings"), record.get("about")
    if not isinstance(settings, dict) or not isinstance(about, dict):
        return False
    types = {"max_length": int, "precision": str, "device": str}
    return all(isinstance(settings.get(name), kind) for name, kind in types.items())


def versions() -> dict[str, str]:
    """Give the versions that a result depends on."""
    packages = ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy")
    found = {package: metadata.version(package) for package in packages}
    return {"spafit": __version__, "python": platform.python_version(), **found}


def machine() -> dict[str, Any]:
    """Say on what a result was made."""
    record: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
    return record


def peak_memory_mib(device: torch.device) -> float:
    """Give the most memory used so far: of the GPU, or resident of this process; in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
