"""What a benchmark's figures were made on: the facts that go into its JSON."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine"]


def machine(*libraries: str) -> dict[str, Any]:
    """Processor, cores, threads in use, and versions: PyTorch's and those of libraries that took part."""
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
    """Its name as the system gives it; Linux gives Python only the architecture, and the name in a file.

    There, with family and model: virtual machines call many processors the same.
    """
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8", errors="replace").splitlines() if facts.is_file() else []
    known = {name.strip(): fact.strip() for name, _, fact in (line.partition(":") for line in reversed(lines))}
    if "model name" not in known:
        return platform.processor() or platform.machine()
    numbers = "".join(f", {name} {known[name]}" for name in ("cpu family", "model") if name in known)
    return known["model name"] + numbers
