"""Signals that ask a run to stop: the first is noted, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows lacks the last two
"""The signals that ask a run to stop."""


class StopRequests:
    """A context manager that catches SIGTERM, SIGINT, SIGHUP and SIGUSR1.

    Inside the block the first of them is only noted, so that the current step can be finished and
    saved. A second one has its default effect: the process ends at once. A first one that came too
    late to be acted on is raised again when the block ends without an error. Outside the main
    thread signals cannot be caught, and the block does nothing.

    Attributes
    ----------
    received : signal.Signals or None
        The first signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        """Return whether a signal was received."""
        return self.received is not None

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                number = getattr(signal, name, None)
                # A signal ignored by nohup or by a background shell stays ignored.
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
            # None: the handler was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        if error is None and self.received is not None:
            os.kill(os.getpid(), self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self._before:  # the next one ends the process
            signal.signal(each, signal.SIG_DFL)
