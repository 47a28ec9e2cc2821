"""The command line: ``loralib COMMAND ...``, the same as ``python -m loralib COMMAND ...``.

Each command is a module in this package with `add_arguments(parser)` and `run(args)`; only the one called is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .. import nlg  # noqa: F401  importing it registers the readers of published data
from ..console import ensure_safe, say, table
from ..errors import ConfigError, LoraError, did_you_mean
from ._flags import Parser, add_fields, from_args

__all__ = ["COMMANDS", "add_fields", "from_args", "main", "parser_of", "run_command"]

COMMANDS = {
    "train": "train an adapter",
    "sweep": "train many adapters at once, to find the best settings",
    "plan": "work out what fits in memory and which command to run",
    "generate": "generate text with a model and its adapters",
    "predict": "classify texts with a trained classifier",
    "chat": "chat with a model in the terminal",
    "evaluate": "score texts against references",
    "reproduce": "train, generate and score as in the LoRA paper",
    "data": "preview, convert and download data",
    "inspect": "inspect and verify an adapter",
    "convert": "convert an adapter to another format",
    "merge": "merge an adapter into its base model",
    "combine": "combine several adapters into one",
    "completion": "set up tab completion for commands and flags",
    "export-base": "save a base model in a directory for other tools",
    "serve": "serve a model and its adapters over HTTP, with a web page",
    "verify": "check whether a running server applies an adapter correctly",
}

_HELP = f"""\
usage: loralib COMMAND [options]

Train and use LoRA adapters for language models.

{table([(f"  {name}", about) for name, about in COMMANDS.items()])}

  loralib train --train_data mine.jsonl                train on your own file
  loralib chat --adapter lora_model                    chat with the result

For the flags of a command: loralib COMMAND --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 2 for invalid input, 130 when interrupted."""
    ensure_safe()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(_HELP)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from .. import __version__

        say(f"loralib {__version__}")
        return 0
    command, *rest = arguments[0].replace("_", "-"), *arguments[1:]
    if command not in COMMANDS:
        say(f"loralib: there is no command {command!r}.{did_you_mean(command, COMMANDS)}", file=sys.stderr)
        say(f"Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run_command(_module(command), f"loralib {command}", rest)


def parser_of(command: str) -> argparse.ArgumentParser:
    """Returns the argument parser of a command."""
    return _parser(_module(command), f"loralib {command}")


def _module(command: str) -> Any:
    return importlib.import_module(f".{command.replace('-', '_')}", __name__)


def _parser(module: Any, name: str) -> Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=name, description=module.__doc__, formatter_class=formatter, allow_abbrev=False)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_command(module: Any, name: str, argv: Sequence[str]) -> int:
    """Parses a command's arguments, runs it, turns its errors into messages, and returns the exit code.

    Args:
        module: has `add_arguments(parser)`, `run(args)` and a docstring that `--help` shows; `JOINS_RANKS = True` if
            several processes can run the command together.
        name: the name of the command.
        argv: its arguments; flags may be written with hyphens or underscores.
    """
    ensure_safe()
    debug = "--debug" in argv  # anywhere, before or after an action
    try:
        with _beside_others(module, name):
            args = _parser(module, name).parse([word for word in argv if word != "--debug"])
            return int(module.run(args) or 0)
    except LoraError as error:
        if debug:
            raise
        if not error.is_told_elsewhere:
            _complain(f"{name}: {error}")
        return int(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        _complain(f"\n{name}: interrupted")
        return 130
    except BrokenPipeError:  # the reader of the pipe has closed it
        return 0
    except OSError as error:  # file errors are LoraErrors; this comes from the console, or the file it is redirected to
        if debug:
            raise
        _complain(f"{name}: {error} (--debug shows where)")
        return 2
    finally:
        _detach_broken_streams()


@contextlib.contextmanager
def _beside_others(module: Any, name: str) -> Iterator[None]:
    """Joins this process to the others that torchrun started, if any.

    Raises:
        ConfigError: torchrun started several processes, but the command runs in one: it has no `JOINS_RANKS`.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    from ..training.ranks import joined

    with joined() as ranks:
        if ranks.size > 1 and not getattr(module, "JOINS_RANKS", False):
            raise ConfigError(
                f"this command runs in a single process, but {ranks.size} were started: run it without torchrun"
            )
        yield


def _complain(text: str) -> None:
    """Prints to stderr if possible; the terminal may be closed, but the exit code still matters."""
    with contextlib.suppress(OSError):
        say(text, file=sys.stderr)


def _detach_broken_streams() -> None:
    """Discards output that cannot be printed: Python would retry at exit, fail, and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with contextlib.suppress(OSError):  # a replaced stream may not have a file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
