"""Keep freed memory between the steps of a run, where the C library would give it back after each of them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["freed_memory_kept"]

# Parameters of glibc's mallopt(3), and their defaults.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_TRIM_DEFAULT = _MMAP_DEFAULT = 128 * 1024
_MMAP_LARGEST = 1 << 30


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Lets the process keep what it frees, for the time of a run.

    A step frees large tensors that the next step asks for again.  glibc returns such blocks to the system, which hands
    them out again page by page, each cleared first.  The peak stays what it was: it is only held on to.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _MMAP_LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_DEFAULT)
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_DEFAULT)
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library, if it is glibc; other systems' allocators keep memory by themselves or have no such setting."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
