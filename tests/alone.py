"""Runs programs in a Python that finds no package but those that the demo pins: python tests/alone.py PROGRAM...

Each is a file and its arguments, or -c and a line of Python, with | between them.
"""

from __future__ import annotations

import importlib.metadata as metadata
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def allowed() -> set[str]:
    """Returns the names of what the demo installs here."""
    files = (REQUIREMENTS / name for name in ("run.txt", "model.txt"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pins = [Requirement(line.partition(" --hash")[0]) for line in lines if not line.startswith("#")]
    names = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate()]
    # A build of PyTorch for CUDA brings what it is built with, which pin.py leaves to it.
    installed = [distribution.metadata["Name"] for distribution in metadata.distributions()]
    return {"loralib", *map(plain, names + [name for name in installed if re.match("nvidia|cuda|triton", name)])}


class Rest:
    """Replaces all module finders: finds what they find, except hidden packages and their metadata."""

    def __init__(self, finders: list[Any], names: set[str]) -> None:
        self.finders, self.names = finders, names
        owners = metadata.packages_distributions().items()
        self.hidden = {package for package, theirs in owners if not names & set(map(plain, theirs))}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.hidden:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context: Any) -> Iterator[Any]:
        for finder in self.finders:
            for distribution in getattr(finder, "find_distributions", lambda *_: ())(*context):
                if plain(distribution.metadata["Name"]) in self.names:
                    yield distribution


def main(programs: list[str]) -> None:
    rest = Rest(sys.meta_path[:], allowed())
    assert not {"pytest", "peft"} & allowed()
    sys.meta_path[:] = [rest]
    for program in programs:
        sys.argv = program.split("|")
        if sys.argv[0] == "-c":
            exec(sys.argv.pop(1), {})
            continue
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise


if __name__ == "__main__":
    main(sys.argv[1:])
