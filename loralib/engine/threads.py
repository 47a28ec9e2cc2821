"""The threads that OpenMP keeps between one parallel part of a computation and the next.

Each thread that computes has some of its own.  While there are no more of all of them together than cores, GCC's
OpenMP lets those that wait spin for a few milliseconds; once there are more, it sends them to sleep at once.  A token
of a small model has hundreds of short parallel parts.  Waking a thread for each of them made it take half as long again
in a second thread, although those of the first had nothing to do.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["release_threads"]

_SOFT = 1  # they may begin again


def release_threads() -> None:
    """Ends the threads that wait for parallel work of the calling thread; its next such work begins others."""
    if sys.platform != "linux":  # where other runtimes have other rules
        return
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (OSError, AttributeError):  # PyTorch was built without OpenMP, or with an older one
        return
    pause(_SOFT)
