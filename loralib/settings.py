"""Settings: declared once, as fields of a dataclass, and read from TOML.

Errors name the file, every unknown key and every value of another kind.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError, did_you_mean

__all__ = ["kinds_of", "parse_toml", "read_toml", "setting", "setting_faults"]


def setting(
    default: Any,
    text: str,
    group: str,
    choices: tuple[str, ...] | None = None,
    several: Literal["in a row", "one by one"] | None = None,
) -> Any:
    """Declares a setting: a dataclass field that tells all that its flag, its TOML key and its row in the docs need.

    Args:
        default: its value where none is given.
        text: its help text.
        group: under which heading it stands.
        choices: the values that it may have; None: any.
        several: how its flag takes more than one value: "in a row" (``--data a b``) or "one by one" (``--stop a
            --stop b``: a row of texts would swallow what stands behind it); None: it takes one.

    Returns:
        The field.

    >>> @dataclasses.dataclass
    ... class Bath:
    ...     warmth: int = setting(38, "degrees Celsius", "water")
    >>> Bath().warmth
    38
    """
    about = {"help": text, "group": group, "choices": choices, "several": several}
    return dataclasses.field(default=default, metadata=about)


def read_toml(path: Path, name: str) -> dict[str, Any]:
    """Reads a TOML file.

    Args:
        path: the file.
        name: what messages call it, for instance ``--config run.toml``.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"), name)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is no TOML: {error}") from error


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Reads TOML.

    Raises:
        ConfigError: it is none.

    >>> parse_toml("lr = 2e-4", "an example")
    {'lr': 0.0002}
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return dict(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is no TOML: {error}") from error


def setting_faults(config: type, values: Mapping[str, Any], where: str = "") -> list[str]:
    """Says which keys a settings dataclass does not have, and which values are of another kind than its fields.

    Args:
        config: a dataclass; sequences in it are of texts, and mappings to lists.
        values: what would be given to it, as TOML has it.
        where: what stands before a key in a message.

    Returns:
        One line a fault.

    >>> from loralib.config import LoraConfig
    >>> setting_faults(LoraConfig, {"lora_alhpa": 16, "r": "8"})
    ["lora_alhpa is no setting. Did you mean 'lora_alpha' or 'lora_bias'?", "r is '8', expected a whole number"]
    """
    hints = typing.get_type_hints(config)
    known = [spec.name for spec in dataclasses.fields(config)]
    faults = []
    for name, value in values.items():
        if name not in known:
            faults.append(f"{where}{name} is no setting.{did_you_mean(name, known)}")
            continue
        kinds = kinds_of(hints[name])
        if not any(_fits(value, kind) for kind in kinds):
            wanted = [_KINDS[typing.get_origin(kind) or kind] for kind in kinds if kind is not types.NoneType]
            faults.append(f"{where}{name} is {value!r}, expected {' or '.join(wanted)}")
    return faults


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Returns the types that an annotation allows.

    >>> kinds_of(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    Sequence: "a list of texts",
    Mapping: "a table of lists",
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind that a setting may have; true and false are no numbers."""
    if typing.get_origin(kind) is Sequence:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if typing.get_origin(kind) is Mapping:
        return isinstance(value, dict) and all(isinstance(item, list) for item in value.values())
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
