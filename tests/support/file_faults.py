"""Count file operations and make them fail; shared by the tests of write faults."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from spafit.training.saving import Saver

Arguments = tuple[Any, ...]

#: The operations on files that a save is made of. ``io.open`` stands for ``Path.open``.
OPERATIONS = (
    "open write fsync close mkdir rename replace unlink rmdir ftruncate chmod scandir listdir stat "
    "io.open"
).split()

# Of which no file or folder is changed: these go on where a disk is full or read-only.
READING = {"close", "scandir", "listdir", "stat"}
# Those that also go on where a disk is full.
FREEING = {"unlink", "rmdir", "rename", "replace", "ftruncate", "chmod"}

ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EROFS", "EDQUOT")} | {
    "a short write, then ENOSPC": errno.ENOSPC
}


@dataclass
class FileOperations:
    """A context manager under which every operation on files is counted, and may be made to fail.

    ``fault(number, name, arguments)`` is asked before each one, numbered from 1, while ``active``
    is true; what it raises is what the operation raises, and a number of bytes that it gives is all
    that a write takes.
    """

    fault: Callable[[int, str, tuple[Any, ...]], int | None] = lambda *_: None
    active: bool = True
    names: list[str] = field(default_factory=list)
    _before: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> FileOperations:
        for name in OPERATIONS:
            home: Any = io if name == "io.open" else os
            self._before[name] = getattr(home, name.removeprefix("io."))
            setattr(home, name.removeprefix("io."), self._wrapped(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._before.items():
            setattr(io if name == "io.open" else os, name.removeprefix("io."), function)

    @contextmanager
    def only_inside(self) -> Iterator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def _wrapped(self, name: str) -> Callable[..., Any]:
        function = self._before[name]

        def operation(*arguments: Any, **named: Any) -> Any:
            if not self.active:
                return function(*arguments, **named)
            self.names.append(name)
            if name == "close":  # the file is closed, whatever close says
                function(*arguments, **named)
                return self.fault(len(self.names), name, arguments)
            most = self.fault(len(self.names), name, arguments)
            if name == "write" and most is not None:
                file, part = arguments
                return function(file, memoryview(part)[:most])
            return function(*arguments, **named)

        return operation


def makes_or_writes(name: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether an operation needs room, or leave to write."""
    if name == "open":
        return bool(arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
    if name == "io.open":
        return any(letter in (arguments[1] if len(arguments) > 1 else "r") for letter in "wax+")
    return name not in READING


def raised(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Failing:
    """Makes the n-th operation fail, once or from there on; a fault that FileOperations asks.

    A disk that is full or read-only can be read, and a full one lets files be removed and moved in
    the long run.
    """

    def __init__(self, kind: str, first: int, *, lasting: bool) -> None:
        self.kind, self.first, self.lasting = kind, first, lasting
        self.error = ERRORS[kind]
        self.failed: list[str] = []
        self._is_short = "short" in kind

    def __call__(self, number: int, name: str, arguments: Arguments) -> int | None:
        if number < self.first or (self.failed and not self.lasting) or name == "stat":
            return None
        # Closing may tell, once, of an earlier write.
        is_spared = name != "close" or self.lasting
        if self.kind != "EIO" and is_spared and not makes_or_writes(name, arguments):
            return None
        if self.lasting and self.error in (errno.ENOSPC, errno.EDQUOT) and name in FREEING:
            return None
        if self._is_short and name == "write":
            self._is_short, self.first = False, number + 1
            return len(arguments[1]) // 2
        self.failed.append(name)
        raise raised(self.error)


@contextmanager
def save_failing(number: int, failing: Callable[..., int | None], *, lasting: bool) -> Iterator:
    """Make operations of a run's n-th save fail; with ``lasting``, all operations from then on."""
    save, saves = Saver._save, iter(range(1, 1000))
    with FileOperations(failing, active=False) as operations, pytest.MonkeyPatch.context() as patch:

        def saving(self: Saver, state: Any) -> None:
            is_it = next(saves) == number
            operations.active = operations.active or is_it
            try:
                save(self, state)
            finally:
                operations.active = operations.active and lasting

        patch.setattr(Saver, "_save", saving)
        yield operations
