"""The page "Your own data": each file in it is read as stated, and each cell about loralib names an existing test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from loralib.data import read_examples, read_sources

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/data.md", "docs/vi/data.md")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def files(name: str) -> list[tuple[str, str, str]]:
    """The files that a page shows: their names, what they hold, and what is said to be recognised ("" if nothing)."""
    shown = re.findall(
        r"^`(\S+)`\n\n```\w+\n(.*?)```\n(?:\n```text\n(.*?)\n```)?", page(name), re.DOTALL | re.MULTILINE
    )
    assert len(shown) == 9
    return shown


@pytest.mark.parametrize("name", PAGES)
def test_each_file_is_read_as_the_page_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file, content, said in files(name):
        Path(file).write_text(content, encoding="utf-8")
        if said:
            (source,) = read_sources(file)
            assert source.notes == (said,)
        else:
            assert read_examples(file, "text")[0].completion == content.rstrip("\n")


def test_both_languages_show_the_same() -> None:
    english, vietnamese = (re.findall(r"^```.*?^```$", page(name), re.DOTALL | re.MULTILINE) for name in PAGES)
    assert english == vietnamese


def test_what_the_page_says_about_columns_is_so(tmp_path: Path) -> None:
    path = tmp_path / "quiz.csv"
    for name in PAGES:
        maps = re.findall(r"--columns '?(\S+?)'?$", page(name), re.MULTILINE)
        assert len(maps) == 3
        for columns in maps:
            path.write_text("titel,frage,antwort,system\nt,f,a,s\n", encoding="utf-8")
            if "system=" not in columns:
                path.write_text("titel,frage,antwort\nt,f,a\n", encoding="utf-8")
            (example,) = read_examples(path, columns=columns)
            assert (example.prompt, example.completion) == ("t\nf" if "titel" in columns else "f", "a")


def test_each_cell_of_ours_names_its_test() -> None:
    rows = re.findall(r"^\| [^|]+ \| \[[^\]]+\]\(\.\./(\S+) \"(\w+)\"\)", page(PAGES[0]), re.MULTILINE)
    table = page(PAGES[0]).partition("| data | loralib |")[2].strip().splitlines()[2:]
    assert len(rows) == len(table) == 16
    for file, function in rows:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
