"""Settings: a dataclass field declares its type, range, help text and aliases once.

The same declaration checks values given in Python, creates the command-line flag, reads the TOML key, and fills
``help()`` and the tables in the docs.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

from .errors import ConfigError, did_you_mean, list_faults

__all__ = [
    "AUTO",
    "canonical",
    "check",
    "kinds_of",
    "parse_toml",
    "read_toml",
    "setting",
    "setting_faults",
    "settings_class",
    "settings_schema",
]

Config = TypeVar("Config")
AUTO: Final = "auto"  # the value that lets the program choose


def setting(
    default: Any,
    help: str,
    group: str = "",
    choices: tuple[str, ...] | None = None,
    *,
    several: Literal["names", "files", "repeat", "pairs"] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    rule: Callable[[Any], object] | None = None,
    expected: str | None = None,
    aliases: tuple[str, ...] = (),
    common: bool = False,
    auto: bool = False,
    flag: bool = True,
) -> Any:
    """Declares a setting as a dataclass field; its annotation determines the allowed types.

    Args:
        default: the default value.
        help: the help text.
        group: the heading of its flag in ``--help`` and in the docs.
        choices: the only allowed values; None allows any.
        several: how its flag takes several values. "names": ``--x a,b`` or ``--x a b``. "files": the same, but a comma
            in the name of an existing file does not split it. "repeat": ``--x a --x b``. "pairs", for a mapping of
            integers to numbers: ``--x 5=1.5,7=-2``, or ``--x 5=1.5 --x 7=-2``. None: one value.
        at_least: lower bound, inclusive. Bounds and `rule` apply to each value of a mapping.
        above: lower bound, exclusive.
        at_most: upper bound, inclusive.
        below: upper bound, exclusive.
        rule: an additional test that a value of the right type must pass.
        expected: describes valid values in error messages; by default derived from type, bounds and choices.
        aliases: alternative names, accepted as flags, TOML keys and Python arguments.
        common: whether most users need it: its flag is then listed first in ``--help``.
        auto: whether None, the default, lets the program choose a value; ``auto`` requests this in flags, TOML and
            Python.
        flag: whether it has a flag; without one it can be set only in Python.

    >>> @dataclasses.dataclass
    ... class Bath:
    ...     temperature: int = setting(38, "degrees Celsius", "water", at_least=0, below=100)
    >>> Bath().temperature
    38
    >>> setting_faults(Bath, {"temperature": 120})
    ['temperature is 120, expected a whole number of at least 0 and below 100']
    """
    about = {name: value for name, value in locals().items() if name != "default"}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def settings_class(config: type[Config]) -> type[Config]:
    """Decorates a dataclass of settings.

    ``help()`` lists its fields; ``__init__`` accepts aliases and suggests names for unknown arguments.
    """
    specs = dataclasses.fields(cast(Any, config))
    listed = "".join(f"\n        {spec.name}: {spec.metadata['help']}." for spec in specs if "help" in spec.metadata)
    if config.__doc__ is not None and "Attributes:" not in config.__doc__:
        config.__doc__ = f"{config.__doc__.rstrip()}\n\n    Attributes:{listed}\n    "
    init: Any = config.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        known = _spellings(config)
        if unknown := [f"{name}.{did_you_mean(name, known)}" for name in values if name not in known]:
            raise ConfigError(list_faults(f"{config.__name__} does not have these settings", unknown))
        init(self, *args, **canonical(config, values))

    cast(Any, config).__init__ = __init__
    return config


def canonical(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values under the fields' own names instead of aliases.

    Raises:
        ConfigError: a setting is given under two names.
    """
    names = _spellings(config)
    renamed: dict[str, Any] = {}
    for name, value in values.items():
        key = names.get(name, name)
        if key in renamed:
            both = " and ".join(other for other in values if names.get(other) == key)
            raise ConfigError(f"{both} are two names for the same setting: give only one of them")
        renamed[key] = value
    return renamed


def check(config: Any, what: str, rules: Callable[[], Iterable[str]] = tuple) -> None:
    """Checks a settings dataclass, from its ``__post_init__``; path objects become strings, and "auto" becomes None.

    `what` says whose settings these are.  `rules` finds combinations of fields that are invalid; it is called only if
    every value has the right type.

    Raises:
        ConfigError: one or more settings are invalid; the message lists all of them.
    """
    values = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}
    chosen = {spec.name for spec in dataclasses.fields(config) if spec.metadata.get("auto")}
    for name, value in values.items():
        plain = None if name in chosen and value == AUTO else _without_paths(value)
        if plain is not value:
            object.__setattr__(config, name, plain)
            values[name] = plain
    faults = setting_faults(type(config), values)
    hints = _hints(config.__class__)
    if all(_fits(value, hints[name]) for name, value in values.items()):
        faults += rules()
    if faults:
        count = f"{len(faults)} settings of {what} are" if len(faults) > 1 else f"1 setting of {what} is"
        raise ConfigError(list_faults(f"{count} invalid", faults))


def setting_faults(config: type, values: Mapping[str, Any], where: str = "") -> list[str]:
    """Lists what is wrong with values for a settings dataclass: unknown names, wrong types, values out of range.

    The values are given by name, as in a TOML table; `where` is put before each name in a message.

    >>> from loralib.config import LoraConfig
    >>> print(*setting_faults(LoraConfig, {"lora_alhpa": 16, "use_dora": "yes"}), sep="\\n")
    lora_alhpa is not a setting. Did you mean 'lora_alpha' or 'lora_bias'?
    use_dora is 'yes', expected true or false
    """
    specs = {spec.name: spec for spec in dataclasses.fields(config)}
    names, hints, faults = _spellings(config), _hints(config), []
    for name, value in values.items():
        if name not in names:
            faults.append(f"{where}{name} is not a setting.{did_you_mean(name, names)}")
        else:
            faults += _value_faults(f"{where}{name}", value, hints[names[name]], specs[names[name]].metadata)
    return faults


def settings_schema(config: type, without: Container[str] = ()) -> dict[str, Any]:
    """Returns the JSON schema of a table of settings for an API; `without` names settings to leave out.

    >>> from loralib.config import LoraConfig
    >>> settings_schema(LoraConfig)["properties"]["r"]["minimum"]
    1
    """
    hints = _hints(config)
    properties: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        about = spec.metadata
        kinds = [_schema_of(kind) for kind in kinds_of(hints[spec.name])]
        for kind in kinds:
            if kind.get("type") in ("integer", "number"):
                kind |= {_IN_SCHEMAS[name]: about[name] for name in _IN_SCHEMAS if about.get(name) is not None}
        if about.get("choices"):
            kinds = [{"enum": list(about["choices"])}]
        if about.get("auto"):
            kinds.append({"enum": [AUTO]})
        said = {"description": about["help"]} if "help" in about else {}
        whole = {**kinds[0], **said} if len(kinds) == 1 else {"anyOf": kinds, **said}
        properties |= {name: whole for name in (spec.name, *about.get("aliases", ())) if name not in without}
    return {"type": "object", "properties": properties, "additionalProperties": False}


_IN_SCHEMAS: Final = {
    "at_least": "minimum", "above": "exclusiveMinimum", "at_most": "maximum", "below": "exclusiveMaximum"
}  # fmt: skip
_JSON_TYPES: Final = {
    bool: "boolean", int: "integer", float: "number", str: "string", types.NoneType: "null", Sequence: "array",
    Mapping: "object",
}  # fmt: skip


def _schema_of(kind: Any) -> dict[str, Any]:
    container, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    schema: dict[str, Any] = {"type": _JSON_TYPES[container]}
    if container in (Sequence, Mapping):
        inner = [_schema_of(part) for part in kinds_of(parts[-1])]
        items = inner[0] if len(inner) == 1 else {"anyOf": inner}
        schema["items" if container is Sequence else "additionalProperties"] = items
    return schema


def read_toml(path: Path, name: str) -> dict[str, Any]:
    """Reads a TOML file; messages refer to it by `name`, for instance ``--config run.toml``.

    Raises:
        ConfigError: the file cannot be read, or is not valid TOML.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8-sig"), name)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Parses TOML.

    Raises:
        ConfigError: the text is not valid TOML.

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
        raise ConfigError(f"{name} is not valid TOML: {error}") from error


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Returns the types that an annotation allows.

    >>> kinds_of(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


_hints = functools.cache(typing.get_type_hints)


def _spellings(config: type) -> dict[str, str]:
    """Maps each accepted name, including aliases, to its field."""
    specs = dataclasses.fields(config)
    return {name: spec.name for spec in specs for name in (spec.name, *spec.metadata.get("aliases", ()))}


def _without_paths(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)) and any(isinstance(item, os.PathLike) for item in value):
        return [_without_paths(item) for item in value]
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value fits a type: a bool is not a number, a float must be finite, strings in lists are not empty."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is types.UnionType:
        return any(_fits(value, part) for part in parts)
    if kind is Sequence:
        return isinstance(value, (list, tuple)) and all(item != "" and _fits(item, parts[0]) for item in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(
            _is_key(key, hint) and _fits(item, parts[1]) for key, item in value.items()
        )
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) < 1e300  # leaves room for a product before it overflows
    return isinstance(value, kind)


def _value_faults(name: str, value: Any, hint: Any, about: Mapping[str, Any]) -> list[str]:
    mapping = next((kind for kind in kinds_of(hint) if typing.get_origin(kind) is Mapping), None)
    if mapping is not None and isinstance(value, Mapping) and all(_is_key(key, mapping) for key in value):
        inner = typing.get_args(mapping)[1]
        return [fault for key, v in value.items() for fault in _value_faults(f"{name}[{key!r}]", v, inner, about)]
    if (about.get("auto") and value == AUTO) or (_fits(value, hint) and _in_range(value, about)):
        return []
    choices = about.get("choices") or ()
    near = did_you_mean(value, choices) if isinstance(value, str) else ""
    expected = about.get("expected") or " or ".join(map(repr, choices)) or _description(hint, about)
    return [f"{name} is {value!r}"[:200] + f", expected {expected}" + (f".{near}" if near else "")]


def _is_key(key: Any, mapping: Any) -> bool:
    return key != "" and _fits(key, typing.get_args(mapping)[0])


def _in_range(value: Any, about: Mapping[str, Any]) -> bool:
    if value is None:
        return True
    if about.get("choices") and value not in about["choices"]:
        return False
    if isinstance(value, (int, float)) and not all(holds(value, about[name]) for name, holds, _ in _bounds(about)):
        return False
    return about.get("rule") is None or bool(about["rule"](value))


def _bounds(about: Mapping[str, Any]) -> list[tuple[str, Callable[[Any, Any], bool], str]]:
    return [bound for bound in _BOUNDS if about.get(bound[0]) is not None]


def _description(hint: Any, about: Mapping[str, Any]) -> str:
    """Describes the valid values in words, such as "a whole number of at least 1"."""
    kinds = " or ".join(_name_of(kind) for kind in kinds_of(hint) if kind is not types.NoneType)
    numbers = f"{kinds} {' and '.join(f'{words} {about[name]:,}' for name, _, words in _bounds(about))}".rstrip()
    return f"{numbers}, or {AUTO}" if about.get("auto") else numbers


_BOUNDS = (
    ("at_least", operator.ge, "of at least"),
    ("above", operator.gt, "above"),
    ("at_most", operator.le, "at most"),
    ("below", operator.lt, "below"),
)
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_PLURALS = {bool: "booleans", int: "whole numbers", float: "numbers", str: "strings"}


def _name_of(kind: Any, plural: bool = False) -> str:
    """Returns the name that messages use for a type.

    >>> _name_of(Mapping[str, Sequence[bool]])
    'a table of lists of booleans'
    """
    parts = typing.get_args(kind)
    if not parts:
        return (_PLURALS if plural else _NAMES).get(kind) or f"a {kind.__name__}"
    container = "list" if typing.get_origin(kind) is Sequence else "table"
    inner = " or ".join(_name_of(part, plural=True) for part in kinds_of(parts[-1]))
    return f"{container}s of {inner}" if plural else f"a {container} of {inner}"
