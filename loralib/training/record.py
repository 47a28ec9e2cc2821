"""run.toml: the settings that reproduce a run, and a record of it: data, base model, versions, outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from ..bases.made_up import is_made_up
from ..data import TokenExample, parse_source
from ..errors import ConfigError
from ..files import write_text
from ..injection import fingerprint
from ..settings import read_toml
from .config import TrainConfig

__all__ = [
    "RECORD",
    "RUN_FILE",
    "SWEEP_FILE",
    "data_record",
    "hash_examples",
    "read_record",
    "run_record",
    "settings_and_versions",
    "settings_text",
    "versions",
    "write_record",
    "write_settings",
]

RUN_FILE, SWEEP_FILE = "run.toml", "sweep.json"
RECORD = "record"  # the table for everything that is not a setting
_NOT_SETTINGS = frozenset(("resume", "overwrite"))  # how a run was started does not affect its results
_HEADING = """\
# Settings of a training run; those left to the program have the values that it chose.
# To repeat it: loralib train --config run.toml
# The table [record] lists what was given, which data and which versions were used; it is not read as settings.
"""


def write_record(directory: Path, config: TrainConfig, record: Mapping[str, Any]) -> None:
    """Writes a run's settings, with their final values, and a table of facts about the run."""
    settings = {name: value for name, value in config.to_dict().items() if name not in _NOT_SETTINGS}
    if record["base"]["name"] and not is_made_up(config.model):  # the model may have been passed in Python
        settings["model"] = record["base"]["name"]
    for kind in ("train", "valid"):
        settings[f"{kind}_data"] = (
            settings[f"{kind}_data"]
            or [each["path"] for each in record["data"] if each["kind"].startswith(kind) and "path" in each]
            or None
        )
    write_text(directory / RUN_FILE, _HEADING + "\n" + "\n".join(_lines({**settings, RECORD: record})) + "\n")


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes settings as a TOML file for ``--config``, leaving out those that are None."""
    write_text(path, settings_text(settings))


def settings_text(settings: Mapping[str, Any]) -> str:
    """Returns settings as TOML, leaving out those that are None."""
    return "\n".join(_lines(settings)) + "\n"


def read_record(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings and the facts of the run in a directory; both are empty if there is no readable run.toml."""
    with suppress(ConfigError):
        values = read_toml(directory / RUN_FILE, RUN_FILE)
        record = values.pop(RECORD, {})
        return values, record if isinstance(record, dict) else {}
    return {}, {}


def versions() -> dict[str, str]:
    """Returns the versions of the software that computes."""
    ours = sys.modules["loralib"].__version__  # already imported; importing it here would go against the import order
    found = {"python": platform.python_version(), "loralib": str(ours)}
    for name in ("torch", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def settings_and_versions(config: TrainConfig) -> dict[str, Any]:
    """Returns what must be the same on all ranks of a run, as far as it is known before data are read."""
    engine = {"LORALIB_ENGINE": os.environ.get("LORALIB_ENGINE") or "full"}
    return {**config.to_dict(), **{f"version of {name}": value for name, value in versions().items()}, **engine}


def run_record(model: nn.Module, given: TrainConfig, data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the facts about a run that are known at its start.

    Args:
        model: with its adapter.
        given: the settings as given.
        data: see `data_record`.
    """
    defaults = {spec.name: spec.default for spec in dataclasses.fields(TrainConfig)}
    changed = {name: value for name, value in given.to_dict().items() if value != defaults[name]}
    return {
        "given": {name: value for name, value in changed.items() if name not in _NOT_SETTINGS},
        "base": {"name": getattr(model, "name_or_path", ""), "fingerprint": fingerprint(model)},
        "versions": versions(),
        "data": list(data),
    }


def data_record(
    kind: str, paths: Sequence[str | Path], rows: Sequence[TokenExample], given: int
) -> list[dict[str, Any]]:
    """Describes data: how many of the examples are used, a hash of their tokens, and each file with its hash.

    Args:
        kind: "training" or "validation".
        paths: the files of the data.
        rows: the examples that are used.
        given: number of examples before any were left out.
    """
    facts = {"kind": kind, "examples": len(rows), "of": given, "tokens_sha256": hash_examples(rows)}
    return [facts, *({"kind": kind, **_file_record(path)} for path in paths)]


def hash_examples(rows: Iterable[TokenExample]) -> str:
    """Returns a short hash of token examples and their loss masks."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row.content).encode())
    return digest.hexdigest()[:16]


def _file_record(item: str | Path) -> dict[str, Any]:
    path = (parse_source(item)[0] if isinstance(item, str) else item).expanduser()
    facts: dict[str, Any] = {"path": str(item)}
    with suppress(OSError):
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        digest = hashlib.sha256()
        for file in files:
            if path.is_dir():
                digest.update(f"{file.relative_to(path).as_posix()}\n".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        facts |= {"bytes": sum(file.stat().st_size for file in files), "sha256": digest.hexdigest()}
    return facts


# A minimal TOML writer: Python can only read TOML.


def _lines(table: Mapping[str, Any], name: str = "") -> Iterable[str]:
    inner = {key: value for key, value in table.items() if _is_table(value)}
    for key, value in table.items():
        if value is not None and key not in inner:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in inner.items():
        path = f"{name}.{_key(key)}" if name else _key(key)
        for each in [value] if isinstance(value, Mapping) else value:
            yield f"\n[{path}]" if isinstance(value, Mapping) else f"\n[[{path}]]"
            yield from _lines(each, path)


def _is_table(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else _value(name)


def _value(value: Any) -> str:
    r"""Formats a value as TOML.

    >>> _value([1e-05, True, 'a "b"'])
    '[1e-05, true, "a \\"b\\""]'
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
