"""The command line: ``loralib COMMAND ...``, the same as ``python -m loralib COMMAND ...``.

Each command is a module here with `add_arguments(parser)` and `run(args)`; it is imported only when it is called.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from .. import nlg  # noqa: F401  it registers the readers of published data
from ..console import ensure_safe, say, table
from ..errors import ConfigError, LoraError, did_you_mean, list_faults
from ..settings import kinds_of, read_toml, setting_faults

__all__ = ["COMMANDS", "add_fields", "from_args", "main", "run_command"]

COMMANDS = {
    "train": "train an adapter",
    "generate": "write text with a model and an adapter",
    "chat": "talk to a model in the terminal",
    "evaluate": "score texts against references",
    "reproduce": "train, write and score as the LoRA paper did",
    "data": "look at, convert and fetch data",
    "inspect": "look at an adapter, and verify it",
    "convert": "turn an adapter into another format",
    "merge": "write the merged model",
    "combine": "make one adapter of several",
}

Config = TypeVar("Config")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns what the program should exit with: 0, 2 for a user's mistake, 130 when interrupted."""
    ensure_safe()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say("usage: loralib COMMAND [options]      (loralib COMMAND --help tells about one)\n")
        say(table([(f"  {name}", about) for name, about in _available().items()]))
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from .. import __version__

        say(f"loralib {__version__}")
        return 0
    command, *rest = arguments
    if command not in _available():
        say(f"loralib: there is no command {command!r}.{did_you_mean(command, _available())}", file=sys.stderr)
        say(f"Commands: {', '.join(_available())}", file=sys.stderr)
        return 2
    return run_command(importlib.import_module(f".{command}", __name__), f"loralib {command}", rest)


def run_command(module: Any, name: str, argv: Sequence[str]) -> int:
    """Parses a command's arguments and runs it, turning its errors into messages and exit codes.

    Args:
        module: has `add_arguments(parser)`, `run(args)`, and a docstring that tells what it does.
        name: what the command is called.
        argv: its arguments; flags may be written with hyphens or underscores.

    Returns:
        What the program should exit with.
    """
    ensure_safe()
    parser = _Parser(prog=name, description=module.__doc__, formatter_class=_Formatter, allow_abbrev=False)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    debug = "--debug" in argv  # wherever it stands, before or behind an action
    try:
        args = parser.parse([word for word in argv if word != "--debug"])
        return int(module.run(args) or 0)
    except LoraError as error:
        if debug:
            raise
        _complain(f"{name}: {error}")
        return int(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        _complain(f"\n{name}: interrupted")
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        return 0
    except OSError as error:  # of files, OutputError and others tell; what is left is the console, or a file it goes to
        if debug:
            raise
        _complain(f"{name}: {error} (--debug shows where)")
        return 2
    finally:
        _let_go_of_broken_streams()


def _complain(text: str) -> None:
    """Prints to stderr, where that is possible: a terminal that was closed takes no more, and the exit code counts."""
    with contextlib.suppress(OSError):
        say(text, file=sys.stderr)


def _let_go_of_broken_streams() -> None:
    """What cannot be printed is dropped; else Python tries again in the end, complains, and exits with another code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with contextlib.suppress(OSError):  # a stream that has been replaced need not be a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def add_fields(parser: argparse.ArgumentParser, config: type, defaults: Mapping[str, Any] | None = None) -> None:
    """Adds a flag for each field of a settings dataclass, with the field's help text, and ``--config FILE.toml``.

    Args:
        parser: gets the flags, in the groups that the fields name.
        config: a dataclass whose fields are each a `knob`.
        defaults: other defaults than the fields' own.
    """
    parser.add_argument("--config", metavar="FILE.toml", help="read settings from a file; flags win over it")
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(config)
    for spec in dataclasses.fields(config):
        group = groups.setdefault(spec.metadata["group"], None) or parser.add_argument_group(spec.metadata["group"])
        groups[spec.metadata["group"]] = group
        kind = _scalar(hints[spec.name])
        default = (defaults or {}).get(spec.name, spec.default)
        text = spec.metadata["help"].replace("%", "%%")
        if kind is bool:
            if default:
                group.add_argument(
                    f"--no_{spec.name}", dest=spec.name, action="store_false", default=None, help=f"do not {text}"
                )
                group.add_argument(f"--{spec.name}", dest=spec.name, action="store_true", help=argparse.SUPPRESS)
            else:
                group.add_argument(f"--{spec.name}", action="store_true", default=None, help=text)
            continue
        shown = "" if default in (None, ()) else f" (default {default})"
        group.add_argument(
            f"--{spec.name}",
            action="append" if spec.metadata["several"] == "one by one" else "store",
            type=kind,
            choices=spec.metadata["choices"],
            nargs="+" if spec.metadata["several"] == "in a row" else None,
            metavar=None if spec.metadata["choices"] else _METAVARS[kind],
            help=text + shown,
        )


def from_args(config: type[Config], args: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> Config:
    """Makes a settings dataclass of parsed flags: flags win over ``--config``, which wins over the defaults.

    Raises:
        ConfigError: the TOML file cannot be read or has unknown keys, or a value is out of range.
    """
    values = dict(defaults or {})
    if args.config is not None:
        given = read_toml(Path(args.config), f"--config {args.config}")
        faults = setting_faults(config, given)
        if faults:
            raise ConfigError(list_faults(f"--config {args.config} has settings that cannot be", faults))
        values |= given
    names = [spec.name for spec in dataclasses.fields(cast(Any, config))]
    values |= {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return config(**values)


_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


def _scalar(hint: Any) -> Any:
    """The type of one flag for a field's annotation: the first plain type in it."""
    return next((option for option in kinds_of(hint) if option in (bool, int, float, str)), str)


def _available() -> dict[str, str]:
    """The commands that this version has: a command is there when its module is."""
    here = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return {name: about for name, about in COMMANDS.items() if name in here}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


class _Parser(argparse.ArgumentParser):
    """An argument parser that takes hyphens for underscores and names what an unknown flag may have meant."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args([_with_underscores(word) for word in argv])
        if unknown:
            flags = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            faults = [f"{word}.{did_you_mean(word.partition('=')[0], flags)}" for word in unknown]
            self.error(list_faults("unknown arguments", faults))
        return args

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {message}\n(see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), known)
            raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(known)}.{hint}")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            expected = {int: "a whole number", float: "a number"}.get(cast(Any, action.type), "another value")
            raise argparse.ArgumentError(action, f"{text!r} was given, expected {expected}") from None


def _with_underscores(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if _FLAG.fullmatch(flag) else word


_FLAG = re.compile(r"--[A-Za-z][\w-]*")
