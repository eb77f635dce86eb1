"""Helpers shared by the named cases of hostile weights, adapters and configurations."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spafit.bert import BertForSequenceClassification
from spafit.errors import SpafitError, WeightsError
from spafit.weights.adapter_files import load_adapter, read_adapter_header
from spafit.weights.pretrained import load_pretrained
from spafit.weights.safe_folder import SafeFolder
from spafit.weights.safefile import SafeFile
from support.declared_files import HEAD, C, base_shapes
from support.file_machine import CONFIG
from support.hostile_headers import Draft, Pairs

Way = Callable[[Path, BertForSequenceClassification], Any]

WAYS: dict[str, Way] = {
    "SafeFile": lambda path, base: SafeFile(path),
    "SafeFolder": lambda path, base: SafeFolder(path.parent),
    "load_pretrained": lambda path, base: load_pretrained(path.parent, num_labels=C),
    "read_adapter_header": lambda path, base: read_adapter_header(path),
    "load_adapter": lambda path, base: load_adapter(base, path),
}
"""The ways in which a file of weights is opened."""


@contextlib.contextmanager
def bounded(seconds: float, megabytes: float) -> Iterator[None]:
    """Hold the block to a time of the processor and, where the system counts it, to a memory."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)

    counted = os.access("/proc/self/clear_refs", os.W_OK)
    if counted:
        Path("/proc/self/clear_refs").write_text("5")
    before, start = peak() if counted else 0, time.process_time()
    yield
    assert time.process_time() - start < seconds
    if counted:
        assert (peak() - before) / 1024 < megabytes


def refusal(action: Callable[[], Any], match: str, error: type[SpafitError] = WeightsError) -> str:
    """Return the message of an error, which must be one line of reasonable length."""
    with pytest.raises(error, match=match) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


def write(path: Path, header: Pairs | bytes, data: bytes = b"") -> Path:
    """Write a file of any header."""
    text = header if isinstance(header, bytes) else None
    path.write_bytes(Draft(Pairs() if text else header, bytearray(data)).raw(text))
    return path


def write_model(folder: Path) -> Path:
    """Write a sound tiny model with its head, and give its folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG.to_json_dict()))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (base_shapes() | HEAD).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder
