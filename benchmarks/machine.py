"""Facts about the machine that a benchmark ran on, for its JSON."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine"]


def machine(*libraries: str) -> dict[str, Any]:
    """Processor, cores, threads in use, and versions of PyTorch and of other libraries involved."""
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in libraries},
    }


def _processor() -> str:
    """The processor's name as given by the system; on Linux, Python only knows the architecture, so a file is read.

    It includes family and model there, because virtual machines give many processors the same name.
    """
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8", errors="replace").splitlines() if facts.is_file() else []
    known = {name.strip(): fact.strip() for name, _, fact in (line.partition(":") for line in reversed(lines))}
    if "model name" not in known:
        return platform.processor() or platform.machine()
    numbers = "".join(f", {name} {known[name]}" for name in ("cpu family", "model") if name in known)
    return known["model name"] + numbers
