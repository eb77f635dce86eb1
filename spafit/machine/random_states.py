"""The random generators of a run: seeded, saved, restored, and reset for the caller."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from spafit.errors import CheckpointError

_CUDA_BYTES = 16  # seed and offset


class RandomStates(NamedTuple):
    """The states of all generators that a run may draw from.

    PyTorch's draw the masks of dropout. spafit does not use Python's and numpy's (the order of the
    data is a function of seed and epoch alone), but a layer of the user's own may.
    """

    tensors: dict[str, torch.Tensor]
    """The states of PyTorch's, as bytes: ``random.cpu`` and, on a GPU, ``random.cuda``."""
    python: tuple[Any, ...]
    """From ``random.getstate``."""
    numpy: tuple[Any, ...]
    """From ``numpy.random.get_state``."""

    def to_json(self) -> dict[str, Any]:
        """Return the states of Python's and numpy's generators as JSON values."""
        version, internal, gauss = self.python
        name, key, *rest = self.numpy
        return {
            "python": [version, list(internal), gauss],
            "numpy": [str(name), [int(each) for each in key], *rest],
        }

    @staticmethod
    def from_json(tensors: Mapping[str, torch.Tensor], values: Any) -> RandomStates:
        """Rebuild the states from :meth:`to_json` and from the tensors of PyTorch's.

        Raises
        ------
        CheckpointError
            If one of them is not the state of a generator.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"the states of the generators are {values!r:.80}")
        match values.get("python"):
            case [3, list(internal), None | float() as gauss] if _is_mersenne(
                internal[:-1], internal[-1:]
            ):
                python = (3, tuple(internal), gauss)
            case other:
                raise CheckpointError(f"the state of Python's generator is {other!r:.80}")
        match values.get("numpy"):
            case ["MT19937", list(key), position, int(has_gauss), float(gauss)] if _is_mersenne(
                key, [position]
            ) and has_gauss in (0, 1):
                of_numpy = ("MT19937", np.array(key, np.uint32), position, has_gauss, gauss)
            case other:
                raise CheckpointError(f"the state of numpy's generator is {other!r:.80}")
        for name, tensor in tensors.items():
            _check_torch(name, tensor)
        if "random.cpu" not in tensors:
            raise CheckpointError("the state of PyTorch's generator is missing")
        return RandomStates(dict(tensors), python, of_numpy)


def _is_mersenne(key: list[Any], position: list[Any]) -> bool:
    """Return whether this is a Mersenne Twister's state: 624 words, and how many were used."""
    return (
        len(key) == 624
        and all(type(word) is int and 0 <= word < 2**32 for word in key)
        and len(position) == 1
        and type(position[0]) is int
        and 0 <= position[0] <= 624
    )


def _check_torch(name: str, tensor: torch.Tensor) -> None:
    """Raise a CheckpointError if PyTorch would not accept the state of a generator."""
    if name not in ("random.cpu", "random.cuda") or tensor.dtype != torch.uint8:
        raise CheckpointError(f"{name} ({tensor.dtype}) is not the state of a generator")
    if name == "random.cpu":
        try:
            torch.Generator().set_state(tensor)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{name} is not the state of a generator: {reason}") from None
    elif tensor.shape != (_CUDA_BYTES,):
        raise CheckpointError(f"{name} {tuple(tensor.shape)} is not the state of a generator")


def take(device: torch.device) -> RandomStates:
    """Return the states of the host's generators and of a device's."""
    tensors = {"random.cpu": torch.default_generator.get_state()}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    state = np.random.get_state()  # noqa: NPY002 - the global one
    assert isinstance(state, tuple)
    return RandomStates(tensors, random.getstate(), state)


def put(states: RandomStates, device: torch.device) -> None:
    """Restore the generators; a GPU's is left unchanged if its state was not taken."""
    torch.default_generator.set_state(states.tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in states.tensors:
        torch.cuda.set_rng_state(states.tensors["random.cuda"], device)
    random.setstate(states.python)
    np.random.set_state(states.numpy)  # noqa: NPY002


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all generators inside the block, and restore the caller's states after it."""
    before = take(device)
    seed_all(seed, device)
    try:
        yield
    finally:
        put(before, device)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed the host's generators and a device's."""
    # torch.manual_seed would seed every GPU, but only this one's state is restored.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
