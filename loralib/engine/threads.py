"""Idle OpenMP threads, which wait between parallel sections of a computation.

Each computing thread has its own pool.  While all pools together have no more threads than there are cores, GCC's
OpenMP lets waiting threads spin for a few milliseconds; with more threads, it puts them to sleep at once.  A token of a
small model takes hundreds of short parallel sections.  Waking threads for each of them made a token take half as long
again in a second thread, although the pool of the first was idle.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["release_threads"]

_SOFT = 1  # omp_pause_soft: threads can be restarted


def release_threads() -> None:
    """Ends the calling thread's idle OpenMP threads; its next parallel section starts new ones."""
    if sys.platform != "linux":  # other runtimes have different rules
        return
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (OSError, AttributeError):  # PyTorch was built without OpenMP, or with an older version
        return
    pause(_SOFT)
