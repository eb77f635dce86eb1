"""The random numbers of a run: seeded, taken down, set again, and the caller's given back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch


class RandomStates(NamedTuple):
    """Where all generators that a run may draw from stand.

    PyTorch's give the masks of dropout. Python's and numpy's are not drawn from here (the order of
    the data is a function of seed and epoch alone); a layer of yours may.
    """

    tensors: dict[str, torch.Tensor]
    """PyTorch's, as bytes: ``random.cpu`` and, on a GPU, ``random.cuda``."""
    python: tuple[Any, ...]
    """Of ``random.getstate``."""
    numpy: tuple[Any, ...]
    """Of ``numpy.random.get_state``."""

    def to_json(self) -> dict[str, Any]:
        """Give Python's and numpy's as JSON has them."""
        version, internal, gauss = self.python
        name, key, *rest = self.numpy
        return {
            "python": [version, list(internal), gauss],
            "numpy": [str(name), [int(each) for each in key], *rest],
        }

    @staticmethod
    def from_json(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> RandomStates:
        """Undo :meth:`to_json`, with PyTorch's beside it."""
        version, internal, gauss = values["python"]
        name, key, *rest = values["numpy"]
        return RandomStates(
            dict(tensors),
            (version, tuple(internal), gauss),
            (name, np.array(key, dtype=np.uint32), *rest),
        )


def take(device: torch.device) -> RandomStates:
    """Take down where the generators stand, of the host and of a device."""
    tensors = {"random.cpu": torch.default_generator.get_state()}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    state = np.random.get_state()  # noqa: NPY002 - the global one
    assert isinstance(state, tuple)
    return RandomStates(tensors, random.getstate(), state)


def put(states: RandomStates, device: torch.device) -> None:
    """Set the generators; a GPU's stays as it is where its state was not taken."""
    torch.default_generator.set_state(states.tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in states.tensors:
        torch.cuda.set_rng_state(states.tensors["random.cuda"], device)
    random.setstate(states.python)
    np.random.set_state(states.numpy)  # noqa: NPY002


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all generators inside the block, and give the caller's states back after it."""
    before = take(device)
    # torch.manual_seed would seed every GPU, and only this one's state is given back.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        put(before, device)
