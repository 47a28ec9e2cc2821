"""Print a script that lets a shell complete commands and flags with the Tab key.

bash        loralib completion bash > ~/.local/share/bash-completion/completions/loralib
zsh         loralib completion zsh > "${fpath[1]}/_loralib"
fish        loralib completion fish > ~/.config/fish/completions/loralib.fish
PowerShell  loralib completion powershell >> $PROFILE

It takes effect in newly opened shells.  Print it again after an update, which may add flags.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..console import say
from ..errors import MissingDependencyError
from ._flags import Parser

SHELLS = ("bash", "zsh", "fish", "powershell")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of shell."""
    parser.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS), help="the shell that will read the script")


def run(args: argparse.Namespace) -> None:
    """Prints a script that completes loralib's commands and flags in the shell `args.shell`."""
    try:
        import shtab
    except ImportError as error:
        raise MissingDependencyError("completion needs shtab: pip install 'loralib[completion]'") from error
    say(shtab.complete(_whole_parser(shtab.FILE), args.shell), end="")


def _whole_parser(files: Any) -> argparse.ArgumentParser:
    """Returns a parser with all commands, in which text arguments without fixed choices complete as file names."""
    from . import COMMANDS, parser_of

    whole = Parser(prog="loralib", allow_abbrev=False)
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, about in COMMANDS.items():
        own = parser_of(name)
        # `parents` copies the command's flags; -h is left out because it would clash with the copied one.
        commands.add_parser(name, help=about, parents=[own], add_help=False)
    _complete_files(whole, files)
    return whole


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_files(inner, files)
        elif action.nargs != 0 and action.choices is None and action.type in (None, str):
            action.complete = files  # type: ignore[attr-defined]  # the attribute shtab reads
