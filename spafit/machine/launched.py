"""What torchrun tells a process that it starts; nothing heavy is imported here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from spafit.errors import ConfigError


@dataclass(frozen=True)
class Launched:
    """The place of this process among those that torchrun started together.

    Attributes
    ----------
    rank : int
        Its number among all of them, from 0.
    count : int
        How many they are, on all machines together; more than 1.
    local_rank : int
        Its number among those on this machine, from 0: the number of its GPU.
    """

    rank: int
    count: int
    local_rank: int


def launched(environment: Mapping[str, str] | None = None) -> Launched | None:
    """Return what ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` say; None for a process alone.

    Parameters
    ----------
    environment : mapping of str to str, optional
        None means the process's own.

    Raises
    ------
    ConfigError
        If ``WORLD_SIZE`` is above 1, and the other two do not fit it or are missing.
    """
    given = os.environ if environment is None else environment
    if given.get("WORLD_SIZE", "1") == "1":
        return None
    found = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        text = given.get(name, "")
        if not (text.isascii() and text.isdigit()):
            raise ConfigError(
                f"{name} must be a whole number where WORLD_SIZE is set, found {text!r:.80}; start "
                "the processes by torchrun, or unset WORLD_SIZE to train in one"
            )
        found[name] = int(text)
    rank, count, local_rank = found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]
    if not local_rank <= rank < count:
        raise ConfigError(
            f"RANK = {rank}, LOCAL_RANK = {local_rank} and WORLD_SIZE = {count} do not fit "
            "together; start the processes by torchrun"
        )
    return Launched(rank, count, local_rank)
