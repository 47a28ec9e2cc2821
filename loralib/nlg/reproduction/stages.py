"""Stages of a reproduction: records of what each result was made from, and whether it is still valid.

A stage's record, ``stages/NAME.json``, holds its inputs (settings, hashes of files) and hashes of the files it wrote. A
result is valid if the inputs are the same and the files are unchanged.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...console import duration, say
from ...errors import OutputError
from ...files import write_json

__all__ = ["Stages", "difference", "digest"]


class Stages:
    """The stages recorded in one directory.

    Args:
        directory: where results are written.

    Raises:
        OutputError: the directory holds files that are not results of this command.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records = directory / "stages"
        others = [path.name for path in directory.iterdir() if not path.name.startswith(".")]
        if others and not self.records.is_dir():
            raise OutputError(
                f"{directory} contains other files ({', '.join(sorted(others)[:5])}), which are not overwritten. "
                "Choose another --output_dir."
            )

    def run(
        self, name: str, inputs: Mapping[str, Any], make: Callable[[bool], Mapping[str, Any]], outputs: Sequence[str]
    ) -> dict[str, Any]:
        """Runs a stage, or returns its earlier result if that is still valid.

        Args:
            name: the stage's name.
            inputs: all that its result depends on, as JSON values.
            make: makes the result; it is told whether an earlier attempt with the same inputs was interrupted.
            outputs: the files that it writes, relative to the directory.

        Returns:
            What ``make`` returned, now or earlier.
        """
        inputs = json.loads(json.dumps(inputs))
        place = self.records / f"{name}.json"
        record = self._read(place)
        unfinished = False
        if record is not None and record["inputs"] == inputs:
            if record["done"]:
                changed = [
                    file for file, hashed in record["outputs"].items() if digest(self.directory / file) != hashed
                ]
                if not changed and set(record["outputs"]) == set(outputs):
                    say(f"{name}: already done ({duration(record['seconds'])})")
                    return dict(record["result"])
                say(f"{name}: running again, since {', '.join(changed or outputs)} changed or went missing")
            else:
                unfinished = True
                say(f"{name}: continuing")
        elif record is not None:
            say(f"{name}: running again, since {'; '.join(difference(record['inputs'], inputs))}")
        else:
            say(f"{name} ...")
        spent = record["seconds"] if record is not None and unfinished else 0.0
        # Mark the stage as unfinished, with the time spent so far, in case the run is killed.
        clock = _Clock(spent)
        self._write(place, {"inputs": inputs, "done": False, "seconds": clock.seconds, "outputs": {}, "result": {}})
        try:
            result = dict(make(unfinished))
        except BaseException:
            self._write(place, {"inputs": inputs, "done": False, "seconds": clock.seconds, "outputs": {}, "result": {}})
            raise
        hashes = {file: digest(self.directory / file) for file in outputs}
        self._write(
            place, {"inputs": inputs, "done": True, "seconds": clock.seconds, "outputs": hashes, "result": result}
        )
        return result

    def seconds(self, names: Sequence[str]) -> dict[str, float]:
        """Returns the seconds that stages took."""
        found = {name: self._read(self.records / f"{name}.json") for name in names}
        return {name: float(record["seconds"]) for name, record in found.items() if record is not None}

    def _read(self, place: Path) -> dict[str, Any] | None:
        """Returns a record, or None if it is missing or unreadable; its stage is then run again."""
        try:
            record = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(record, dict) and {"inputs", "done", "seconds", "outputs", "result"} <= record.keys()
        return record if whole else None

    def _write(self, place: Path, record: Mapping[str, Any]) -> None:
        write_json(place, record)


class _Clock:
    def __init__(self, spent: float) -> None:
        self._spent, self._start = spent, time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(self._spent + time.perf_counter() - self._start, 2)


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file, or "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            hashed = hashlib.sha256()
            while block := file.read(1 << 20):
                hashed.update(block)
            return hashed.hexdigest()
    except OSError:
        return ""


def difference(before: Any, after: Any) -> list[str]:
    """Describes the values in which two nested mappings differ.

    >>> difference({"settings": {"lr": 1e-4}, "form": "lines"}, {"settings": {"lr": 2e-4}, "form": "lines"})
    ['settings.lr was 0.0001 and is 0.0002']
    """
    old, new = dict(_leaves("", before)), dict(_leaves("", after))
    changed = [name for name in [*old, *(name for name in new if name not in old)] if old.get(name) != new.get(name)]
    return [_told(name, old.get(name), new.get(name)) for name in changed] or ["it changed"]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, inner)
    else:
        yield name, value


def _told(name: str, before: Any, after: Any) -> str:
    if any(isinstance(value, str) and len(value) == 64 for value in (before, after)):
        return f"{name} changed"  # the hashes themselves would tell a reader nothing
    return f"{name} was {before} and is {after}"
