"""SIGINT, SIGTERM, SIGHUP and Ctrl-Break ask a run to finish its update, save, and end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import InterruptedRunError

__all__ = ["StopRequest", "stop_on_signal"]

_SIGHUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has no such signal


class StopRequest:
    """A signal handler that remembers the first signal (0: none yet); a second one raises KeyboardInterrupt."""

    signal_number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number != _SIGHUP:  # SIGHUP arrives twice: from the system and from the shell
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def error(self, message: str) -> InterruptedRunError:
        """Returns the error that ends the run; for its exit code Ctrl-Break counts as SIGTERM, as Windows means it."""
        is_break = self.signal_number == getattr(signal, "SIGBREAK", None)
        name = signal.Signals(self.signal_number).name
        return InterruptedRunError(f"{name}: {message}", signal.SIGTERM if is_break else self.signal_number)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Collects stop signals instead of dying of them; only the main thread can, elsewhere none ever arrives."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    names = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP")  # SIGBREAK: Ctrl-Break on Windows
    handlers = {getattr(signal, n): signal.getsignal(getattr(signal, n)) for n in names if hasattr(signal, n)}
    if _SIGHUP is not None and handlers[_SIGHUP] is signal.SIG_IGN:  # under nohup the run outlives its terminal
        del handlers[_SIGHUP]
    for number in handlers:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
