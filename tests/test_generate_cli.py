"""loralib generate: prompts from everywhere, text as it comes, files that a killed run goes on with."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from loralib.cli import main

TINY = ["--model", "scratch-32x1-seed0", "--max_new_tokens", "4"]
E2E = Path(__file__).resolve().parent.parent / "examples" / "NLG" / "data" / "e2e" / "test.txt"


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_on_the_command_line_and_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", "Once upon", *TINY]) == 0
    first = capsys.readouterr().out
    assert first.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon\n"))
    assert main(["generate", *TINY]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("choice", [[], ["--temperature", "1.0", "--seed", "3"]], ids=["greedy", "sampled"])
def test_a_run_over_a_file_goes_on_where_it_was_killed(tmp_path: Path, choice: list[str]) -> None:
    source = tmp_path / "meanings.txt"
    source.write_text("".join(E2E.read_text(encoding="utf-8").splitlines(keepends=True)[:30]), encoding="utf-8")
    command = ["generate", "--input", str(source), "--batch", "3", *TINY, *choice]
    assert main([*command, "--output", str(tmp_path / "whole.jsonl")]) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len({line["prompt"] for line in lines_of(tmp_path / "whole.jsonl")}) == whole.count(b"\n") > 4
    for cut in (1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
        assert main([*command, "--output", str(tmp_path / "cut.jsonl")]) == 0
        assert lines_of(tmp_path / "cut.jsonl") == lines_of(tmp_path / "whole.jsonl")


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.jsonl").write_text("mine\n", encoding="utf-8")
    for command, words in (
        (["generate", "x", *TINY, "--output", str(tmp_path / "notes.jsonl")], "not written by this command"),
        (["generate", "--input", str(tmp_path / "none.txt"), *TINY], "none.txt"),
        (["generate", "x", "--adapter", str(tmp_path), *TINY], "holds no adapter"),
        (["generate", "x", *TINY, "--temperature", "-1"], "temperature"),
        (["generate", "x " * 2000, *TINY], "tokens"),
    ):
        assert main(command) == 2, command
        assert words in capsys.readouterr().err
    assert (tmp_path / "notes.jsonl").read_text(encoding="utf-8") == "mine\n"
