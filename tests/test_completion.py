"""Completion: the script that a shell reads knows every command and flag."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loralib.cli import COMMANDS, main
from loralib.cli.completion import SHELLS

TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
_shtab_loralib
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert not [command for command in COMMANDS if command not in text]
    assert "target_modules" in text
    assert "lora_dum" not in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("loralib tra", ["train"]),
        ("loralib train --target_m", ["--target_modules"]),
        ("loralib train --dtype b", ["bf16"]),
        ("loralib data prev", ["preview"]),
        ("loralib chat --adapter my_", ["my_adapter"]),
        ("loralib inspect my_", ["my_adapter"]),
    ],
)
def test_bash_completes(line: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loralib.sh").write_text(script("bash", capsys), encoding="utf-8", newline="\n")
    (tmp_path / "my_adapter").mkdir()
    command = ["bash", "-c", TAB, "bash", "./loralib.sh", *line.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_parses(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    (tmp_path / "script").write_text(script(shell, capsys), encoding="utf-8", newline="\n")
    assert subprocess.run([shell, "-n", str(tmp_path / "script")]).returncode == 0


def test_without_shtab_the_way_to_it_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'loralib[completion]'" in capsys.readouterr().err
