"""Command-line flags made from the fields of settings dataclasses, and the argument parser that all commands share."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar, cast

from ..config import parse_target_modules
from ..console import say
from ..errors import ConfigError, did_you_mean, list_faults
from ..settings import AUTO, canonical, kinds_of, read_toml, setting_faults

__all__ = ["Parser", "add_fields", "add_flag", "add_list", "from_args"]

Config = TypeVar("Config")

_METAVARS: Final[dict[Any, str]] = {
    int: "N",
    float: "X",
    str: "TEXT",
    "files": "FILE",
    "names": "NAME",
    "pairs": "N=X,...",
}
# Heading of the group that --help shows first: settings declared with `common`.
_COMMON: Final = "most commonly used flags"
_FLAG: Final = re.compile(r"--[A-Za-z][\w-]*")


# Flags of other trainers that no name here resembles.
_ELSEWHERE: Final = {"--load_in_4bit": "--quantize nf4", "--load_in_8bit": "--quantize int8"}


def _hint(word: str, flags: Sequence[str]) -> str:
    ours = _ELSEWHERE.get(word)
    return f" Here it is {ours}." if ours and ours.split()[0] in flags else did_you_mean(word, flags)


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts hyphens for underscores and suggests the nearest flag for an unknown one."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses a command's arguments; if they are invalid, prints a message and exits with 2."""
        args, unknown = self.parse_known_args([_with_underscores(word) for word in argv])
        if unknown:
            flags = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            faults = [f"{word}.{_hint(word.partition('=')[0], flags)}" for word in unknown]
            self.error(list_faults("unknown arguments", faults))
        return args

    def format_help(self) -> str:
        """Returns the help: a usage line that does not list every flag, then the groups in the order of `_place`."""
        formatter = self._get_formatter()
        words = [formatter._format_args(action, _name(action)) for action in self._get_positional_actions()]
        formatter.add_usage(" ".join(["%(prog)s [options]", *words]).replace("%", "%%").replace("%%(", "%("), [], [])
        formatter.add_text(self.description)
        for group in sorted(self._action_groups, key=self._place):
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help().replace("`", "")  # help texts also stand in the docs, as Markdown

    def _place(self, group: Any) -> int:
        """Returns a group's sort key in the help: positional arguments, common flags, others, --help itself."""
        if group is self._positionals:
            return 0
        if group.title == _COMMON:
            return 1
        has_common = any(other.title == _COMMON for other in self._action_groups)
        return 3 if group is self._optionals and has_common else 2

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with 2."""
        say(f"{self.prog}: {message}\n(see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), known)
            raise argparse.ArgumentError(action, f"{value!r} was given, expected one of {', '.join(known)}.{hint}")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            raise argparse.ArgumentError(action, f"{text!r} was given, expected {_expected(action.type)}") from None


def _expected(parse: Any) -> str:
    """Describes the words that `parse` takes."""
    return str(_EXPECTED.get(parse) or getattr(parse, "expected", "numbers"))


def _whole_or_auto(word: str) -> int | str:
    return word if word == AUTO else int(word)


def _number_or_auto(word: str) -> float | str:
    return word if word == AUTO else float(word)


_OR_AUTO: Final[dict[Any, Callable[[str], Any]]] = {int: _whole_or_auto, float: _number_or_auto}


def _comma_list(word: str) -> list[str]:
    return [part.strip() for part in word.split(",") if part.strip()]


def _files(word: str) -> list[str]:
    """Splits a comma-separated list of files; a word that, less any ``:weight``, is an existing file stays whole."""
    exists = os.path.exists(word) or os.path.exists(word.rpartition(":")[0])
    return [word] if exists else _comma_list(word)


def _lists_of_names(word: str) -> tuple[Any, ...]:
    return tuple(parse_target_modules(each) for each in word.split(";") if each.strip())


def _pairs(word: str) -> dict[int, float]:
    pairs = [part.partition("=") for part in _comma_list(word)]
    return {int(key): float(value) for key, _, value in pairs}


class _Update(argparse.Action):
    """Adds a mapping to those of earlier uses of the flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **values})


_SPLIT: Final[dict[str | None, Callable[[str], Any]]] = {"names": parse_target_modules, "files": _files}
_EXPECTED: Final[dict[Any, str]] = {
    int: "a whole number",
    float: "a number",
    _whole_or_auto: f"a whole number, or {AUTO}",
    _number_or_auto: f"a number, or {AUTO}",
    _pairs: "pairs such as 13=-5,7=1.5",
    _lists_of_names: 'one word: "q_proj,v_proj" adapts both in each run, "q_proj;v_proj" is two choices',
}


def add_flag(group: argparse._ActionsContainer, *names: str, **options: Any) -> None:
    """Adds a flag; the names after the first are alternative spellings, hidden from the help."""
    options = {"dest": names[0].removeprefix("--"), **options}
    group.add_argument(names[0], **options)
    for name in names[1:]:
        group.add_argument(name, **{**options, "help": argparse.SUPPRESS, "default": argparse.SUPPRESS})


def add_list(
    group: argparse._ActionsContainer, *names: str, items: Callable[[str], Any] = _comma_list, **options: Any
) -> None:
    """Adds a flag that takes a list, written ``a,b,c`` or ``a b c``; `items` parses each word."""

    class Words(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            try:
                value = _joined([items(word) for word in values]) if values else self.const
            except ValueError:
                told = f"{' '.join(values)!r} was given, expected {_expected(items)}"
                raise argparse.ArgumentError(self, told) from None
            setattr(namespace, self.dest, value)

    add_flag(group, *names, **{"nargs": "+", "action": Words, **options})


def _joined(parts: Sequence[Any]) -> Any:
    """Merges the values parsed from the words of a list: lists, or strings that are one item each.

    Raises:
        ValueError: a word is a whole list of alternatives, a tuple, to which the other words could belong or not.
    """
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, tuple) for part in parts):
        raise ValueError
    return [item for part in parts for item in ([part] if isinstance(part, str) else part)]


def _each(kind: Any) -> Callable[[str], list[Any]]:
    """Returns a function that splits a word at commas into values of type `kind`."""

    def split(word: str) -> list[Any]:
        return [None if each == AUTO else _truth(each) if kind is bool else kind(each) for each in _comma_list(word)]

    words = {bool: "true, false, or both", int: "whole numbers", float: "numbers"}
    split.expected = f"{words.get(kind, 'words')} separated by commas"  # type: ignore[attr-defined]
    return split


def _truth(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ValueError
    return word.lower() == "true"


def add_fields(
    parser: argparse.ArgumentParser,
    config: type,
    defaults: Mapping[str, Any] | None = None,
    several: Container[str] = (),
) -> None:
    """Adds a flag with help for each `setting` of a dataclass, in its group, and ``--config FILE.toml``.

    Settings declared as `common` form the first group. `defaults` override the fields' own. Settings in `several` take
    lists of values; if each value is a list of names, semicolons separate them.
    """
    parser.add_argument("--config", metavar="FILE.toml", help="read settings from a TOML file; flags take precedence")
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(config)
    for spec in dataclasses.fields(config):
        about = spec.metadata
        if not about["flag"]:
            continue
        title = _COMMON if about["common"] else about["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        names = [f"--{name}" for name in (spec.name, *about["aliases"])]
        kind = next((kind for kind in kinds_of(hints[spec.name]) if kind in (bool, int, float, str)), str)
        default = (defaults or {}).get(spec.name, None if spec.default is dataclasses.MISSING else spec.default)
        text = about["help"].replace("%", "%%")
        shown = AUTO if about["auto"] and default is None else default
        with_default = text + ("" if shown in (None, ()) else f" (default {_shown(shown)})")
        if kind is bool and default:
            off = {"action": "store_const", "const": [False] if spec.name in several else False}
            group.add_argument(f"--no_{spec.name}", dest=spec.name, default=None, help=f"do not {text}", **off)
        if spec.name in several:
            add_list(group, *names, **_several_of(kind, about["several"] == "names"), help=with_default)
            continue
        if kind is bool:
            add_flag(group, *names, action="store_true", default=None, help=argparse.SUPPRESS if default else text)
            continue
        options = {
            "choices": about["choices"],
            "metavar": None if about["choices"] else _metavar(spec, kind),
            "help": with_default,
        }
        if about["several"] == "pairs":
            add_flag(group, *names, type=_pairs, action=_Update, **options)
        elif about["several"] in _SPLIT:
            add_list(group, *names, items=_SPLIT[about["several"]], **options)
        else:
            action = "append" if about["several"] == "repeat" else "store"
            add_flag(group, *names, action=action, type=_OR_AUTO[kind] if about["auto"] else kind, **options)


def _several_of(kind: Any, is_names: bool) -> dict[str, Any]:
    """Returns the options of a flag that takes several values where its setting takes one."""
    if is_names:
        return {"items": _lists_of_names, "metavar": ("NAME,...", ";NAME,...")}
    if kind is bool:
        return {"items": _each(bool), "metavar": "true,false", "nargs": "*", "const": [True]}
    return {"items": _each(kind), "metavar": _METAVARS[kind]}


def _metavar(spec: Any, kind: Any) -> str:
    """Returns the placeholder for a flag's value in the help."""
    return "DIR" if spec.name.endswith("_dir") else _METAVARS.get(spec.metadata["several"], _METAVARS[kind])


def _shown(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def _name(action: argparse.Action) -> str:
    return action.metavar if isinstance(action.metavar, str) else action.dest


def from_args(config: type[Config], args: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> Config:
    """Builds a settings dataclass from parsed flags: flags override ``--config``, which overrides the defaults.

    Raises:
        ConfigError: the TOML file cannot be read or has unknown keys, or a value is invalid.
    """
    values = dict(defaults or {})
    if args.config is not None:
        given = canonical(config, read_toml(Path(args.config), f"--config {args.config}"))
        given.pop("record", None)  # metadata that run.toml stores beside the settings
        faults = setting_faults(config, given)
        if faults:
            raise ConfigError(list_faults(f"--config {args.config} has invalid settings", faults))
        values |= given
    names = [spec.name for spec in dataclasses.fields(cast(Any, config))]
    values |= {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return config(**values)


def _with_underscores(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if _FLAG.fullmatch(flag) else word
