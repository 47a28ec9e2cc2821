"""glibc's allocator: whether freed memory stays with the process."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["keep_freed_memory"]

# Parameters of glibc's mallopt(3).  Setting either one turns off glibc's dynamic adjustment of both, so afterwards both
# are set to where it would have ended up: blocks of up to 32 MiB come from the heap, at whose end 64 MiB may stay free.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MMAP_USUAL, _TRIM_USUAL, _MMAP_LEAN = 32 << 20, 64 << 20, 1 << 20

_leans: list[bool] = []  # `lean` of each open context, innermost last


@contextmanager
def keep_freed_memory(lean: bool = False) -> Iterator[None]:
    """Keeps memory that the process frees for its next step, instead of returning it to the system.

    A step frees large tensors that the next one allocates again.  glibc returns such blocks to the system, which hands
    them out again page by page, clearing each.  Allocators configured in the environment are left alone.

    Args:
        lean: return large blocks after all, while memory matters more than time (many tensors are created once).
            Before glibc 2.38, a freed block has no room for an aligned one of its own size, so memory that is kept
            becomes fragmented.
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
    """Applies the settings of the innermost open context, or glibc's usual ones if none is open."""
    lean = _leans[-1] if _leans else None
    libc.mallopt(_TRIM_THRESHOLD, -1 if lean is False else _TRIM_USUAL)
    if lean:
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_LEAN)
    elif lean is None or not libc.mallopt(_MMAP_THRESHOLD, 1 << 30):  # older versions reject such a large threshold
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_USUAL)


def _glibc() -> Any:
    """The C library if it is glibc with default settings; other allocators keep memory, or lack these settings."""
    if not sys.platform.startswith("linux"):
        return None
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
