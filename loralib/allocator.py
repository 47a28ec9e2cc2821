"""glibc's allocator: whether memory that is freed stays with the process."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["keep_freed_memory"]

# Parameters of glibc's mallopt(3).  Setting either ends glibc's own adjustment of both, so a run leaves them where that
# would have ended up: blocks of up to 32 MiB come from the heap, of which 64 MiB may lie idle at its end.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MMAP_USUAL, _TRIM_USUAL, _MMAP_LEAN = 32 << 20, 64 << 20, 1 << 20

_leans: list[bool] = []  # of the contexts that are open, one inside another


@contextmanager
def keep_freed_memory(lean: bool = False) -> Iterator[None]:
    """Keeps memory that the process frees for its next step, instead of returning it to the system.

    A step frees large tensors that the next one allocates again.  glibc returns such blocks to the system, which hands
    them out again page by page, each cleared first.  An allocator that the environment configures is left alone.

    Args:
        lean: return large blocks after all, where memory matters more than time, as while many tensors are made and
            freed once.  Before glibc 2.38 a freed block has no room for an aligned one of its own size, so that kept
            memory is full of holes.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _leans.append(lean)
    _set_up(libc)
    try:
        yield
    finally:
        _leans.pop()
        _set_up(libc)
        libc.malloc_trim(0)


def _set_up(libc: Any) -> None:
    """Does as the innermost context says, or as usual."""
    lean = _leans[-1] if _leans else None
    libc.mallopt(_TRIM_THRESHOLD, -1 if lean is False else _TRIM_USUAL)
    if lean:
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_LEAN)
    elif lean is None or not libc.mallopt(_MMAP_THRESHOLD, 1 << 30):  # older versions refuse so much
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_USUAL)


def _glibc() -> Any:
    """The C library if it is glibc with default settings; other allocators keep memory, or have no such setting."""
    if not sys.platform.startswith("linux"):
        return None
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
