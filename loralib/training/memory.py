"""Memory during a run: what is freed is kept for the next step, and what stays is not looked through for garbage."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["freed_memory_kept", "objects_set_aside"]

# Parameters of glibc's mallopt(3).  Their first use ends glibc's own adjustment of both, so a run leaves them at what
# that would have come to: blocks of up to 32 MiB from the heap, of which 64 MiB may lie idle at its end.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MMAP_USUAL, _TRIM_USUAL = 32 << 20, 64 << 20


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Lets the process keep what it frees, for the time of a run.

    A step frees large tensors that the next step asks for again.  glibc returns such blocks to the system, which hands
    them out again page by page, each cleared first.  Where the environment sets glibc's allocator, it is left alone.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    if not libc.mallopt(_MMAP_THRESHOLD, 1 << 30):  # refused by older ones
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_USUAL)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_USUAL)
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_USUAL)
        libc.malloc_trim(0)


@contextmanager
def objects_set_aside() -> Iterator[None]:
    """Keeps Python's garbage collector from looking at the objects that are there now, for the time of a run.

    With PyTorch and transformers loaded they are half a million, and stay.  To walk over them all took 0.2 s, every 30
    steps of a small model.
    """
    gc.collect()  # what is garbage now would be set aside, too
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _glibc() -> Any:
    """The C library, if it is glibc and set by nobody; other allocators keep memory, or have no such setting."""
    if not sys.platform.startswith("linux"):
        return None
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
