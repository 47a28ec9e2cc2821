"""Memory use of a process; without importing PyTorch, which would count."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["peak_bytes", "resident"]


def resident(key: str) -> int:
    """Reads a memory figure of this process in bytes, on Linux: VmRSS, VmHWM (peak), RssAnon (without mapped files)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def peak_bytes() -> int:
    """Returns the peak memory of this process in bytes."""
    if sys.platform == "linux":
        return resident("VmHWM")  # ru_maxrss starts from the parent process's value
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
