"""Requests to stop: the first one is noted, the second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows lacks the last two


class StopRequests:
    """A context manager that catches SIGTERM, SIGINT, SIGHUP and SIGUSR1.

    Inside the block the first of them is only noted, so that the step in hand can end and be saved.
    A second one does what it does to a program that knows nothing of it: the process ends at once,
    whatever it is in the middle of. So does a first one that came too late to be heeded: it is
    given again on the way out of a block that ends well.
    Outside the main thread nothing can be caught, and nothing is.

    Attributes
    ----------
    received : signal.Signals or None
        The first signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.received is not None

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                # What nohup, or a shell in the background, has it ignore, is ignored.
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # None: it was set by no Python code, and cannot be had back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        if error is None and self.received is not None:
            os.kill(os.getpid(), self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self._before:  # the next is the system's, which waits for no line of Python
            signal.signal(each, signal.SIG_DFL)
