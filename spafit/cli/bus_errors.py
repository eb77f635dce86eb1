"""A clear end where a mapped file is written to in place: SIGBUS, which kills without a word.

Weights may be mapped (:meth:`spafit.weights.safefile.SafeFile.view`). If another program cuts their
file short, as ``cp`` does before it writes, the next access to a page raises SIGBUS. A handler in
Python cannot run then: the access is repeated as soon as the C part of the handler returns. That
part however writes the signal's number to a pipe, whose other end a thread waits for.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def explained(mend: str) -> Iterator[None]:
    """Say in one line why the process ends if SIGBUS comes within the block; exit with 128 + 7.

    The thread needs the interpreter's lock, which PyTorch's operations release. Outside the main
    thread, and where there is no SIGBUS, the block does nothing.

    Parameters
    ----------
    mend : str
        What to do about it, for the message.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGBUS"):
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watch = threading.Thread(target=_watch, args=(reading, mend), daemon=True)
    watch.start()
    before = signal.signal(signal.SIGBUS, lambda number, frame: None)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGBUS, signal.SIG_DFL if before is None else before)
        os.close(writing)
        watch.join()
        os.close(reading)


def _watch(reading: int, mend: str) -> None:
    while received := os.read(reading, 1):
        if received[0] == signal.SIGBUS:
            text = (
                f"spafit: bus error: a file in use was cut short or written to in place; {mend}\n"
            )
            with suppress(OSError):
                os.write(2, text.encode())
            os._exit(128 + signal.SIGBUS)
