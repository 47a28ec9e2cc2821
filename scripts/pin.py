"""Pins what pyproject.toml asks for in requirements/{run,serve,dev}.txt: `python scripts/pin.py` (needs uv).

One file serves every system and Python version, by markers.  What a CUDA build of PyTorch wants is left out: PyTorch
pins it itself, and it must not land on machines that install the CPU build.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNWANTED = re.compile(r"(nvidia|cuda)-|triton==|.* == 'emscripten'")
NEEDLESS = re.compile(r" (;|and) sys_platform != 'emscripten'")
HEADER = "# Made by scripts/pin.py from pyproject.toml; not edited by hand.\n"


def pin(target: str, extras: list[str], *constraints: str) -> None:
    command = ["uv", "pip", "compile", "pyproject.toml", "--universal", "--python-version", "3.10"]
    command += ["--no-header", "--no-annotate", "--quiet", "--upgrade"]
    command += [f"--extra={extra}" for extra in extras]
    command += [f"--constraint=requirements/{name}" for name in ("torch.txt", *constraints)]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout.splitlines()
    kept = [NEEDLESS.sub("", line) for line in lines if not UNWANTED.match(line)]
    (ROOT / "requirements" / target).write_bytes((HEADER + "\n".join(kept) + "\n").encode())


if __name__ == "__main__":
    pin("dev.txt", ["dev"])
    pin("run.txt", ["train"], "dev.txt")
    pin("serve.txt", ["train", "serve"], "dev.txt")
