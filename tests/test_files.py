"""Files are written completely or not at all, and a directory belongs to one run at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loralib.errors import DataError, LoraError, OutputError
from loralib.files import (
    _left_of_limit,
    append_lines,
    free_memory,
    hold_directory,
    hold_file,
    hold_output,
    remove_file,
    resume_lines,
    write_json,
    write_text,
    write_whole,
)


def test_text_and_json_are_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "xin chào\n£\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "xin chào\n£\n".encode()
    write_json(tmp_path / "a.json", {"b": "é", "a": [1]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"b": "é", "a": [1]}
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "a.json"}


@pytest.mark.parametrize("stage", ["write", "check"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, stage: str) -> None:
    path = tmp_path / "a.bin"
    write_text(path, "old")

    def fails(temporary: Path) -> None:
        raise KeyboardInterrupt

    def writes(temporary: Path) -> None:
        temporary.write_text("new", encoding="utf-8")

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fails if stage == "write" else writes, fails if stage == "check" else None)
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_values_json_cannot_hold_leave_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "1\n"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "the disk is full. Free some space"),
        (errno.EACCES, "Choose a directory that you can write to"),
        (errno.EROFS, "Choose a directory that you can write to"),
        (errno.EIO, "cannot write"),
    ],
)
def test_what_goes_wrong_is_said_with_the_fix(tmp_path: Path, number: int, expected: str) -> None:
    def fails(temporary: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(OutputError, match=expected) as refused:
        write_whole(tmp_path / "a", fails)
    assert isinstance(refused.value, LoraError)
    assert isinstance(refused.value, OSError)
    assert not list(tmp_path.iterdir())


def test_files_and_directories_in_the_way(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="there is a file where a directory is needed"):
        write_text(tmp_path / "file" / "b", "x")
    with pytest.raises(OutputError, match="directory"):
        write_text(tmp_path / "folder", "x")
    with (
        pytest.raises(OutputError, match="there is a file where a directory is needed"),
        hold_directory(tmp_path / "file"),
    ):
        pass
    with pytest.raises(OutputError):
        remove_file(tmp_path / "folder")
    remove_file(tmp_path / "absent")
    remove_file(tmp_path / "nowhere" / "absent")
    remove_file(tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_files_get_the_mode_that_open_would_give(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "x")
    (tmp_path / "theirs").write_text("x", encoding="utf-8")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


HOLD = """
import sys
from loralib.files import hold_directory
with hold_directory(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as first:
        assert first.stdout is not None
        assert first.stdin is not None
        assert first.stdout.readline().strip() == "held"
        with pytest.raises(OutputError, match="in use by another run"), hold_directory(tmp_path / "out"):
            pass
        first.kill()  # the lock is the operating system's: a killed run leaves none
        first.wait()
    with hold_directory(tmp_path / "out") as path:
        assert path == tmp_path / "out"
        assert path.is_absolute()
    assert not list((tmp_path / "out").iterdir())
    with hold_directory(tmp_path / "out"):
        pass


def test_a_file_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "texts.jsonl"
    with hold_file(path, "--output"):
        refused = pytest.raises(OutputError, match=r"texts.jsonl is in use by another run.* another --output")
        with refused, hold_file(path, "--output"):
            pass
        with hold_file(path.with_name("others.jsonl"), "--output"):
            path.write_text("mine", encoding="utf-8")
    with pytest.raises(DataError), hold_file(path, "--output"):
        raise DataError("whatever happens")
    assert list(path.parent.iterdir()) == [path]


def record(number: int) -> dict[str, object]:
    return {"id": number, "text": f"số {number}"}


def check(records: list[dict[str, object]]) -> None:
    if [row["id"] for row in records] != list(range(len(records))):
        raise ValueError


def test_lines_are_appended_behind_the_last_whole_one(tmp_path: Path) -> None:
    path, written = tmp_path / "deep" / "lines.jsonl", list[int]()
    assert resume_lines(path, "id", check, "--output") == []
    append_lines(path, map(record, range(3)), lambda: written.append(path.read_bytes().count(b"\n")))
    assert written == [1, 2, 3]
    content = path.read_bytes()
    assert "số 2" in content.decode()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        done = resume_lines(path, "id", check, "--output")
        assert path.read_bytes() == content[: content.rfind(b"\n", 0, cut) + 1]
        append_lines(path, map(record, range(len(done), 3)), int)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        "mine\n",
        "mine",
        "[1]\n",
        '{"id": 1, "text": ""}\n',
        '{"id": 0}\n{"text": 1}\n',
        '{"id": 7}',
        "[" * 100_000 + "\n",
    ],
    ids=["line", "no line", "list", "refused", "no id", "unended", "deep"],
)
def test_lines_of_something_else_are_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "notes").write_text(content, encoding="utf-8")
    with pytest.raises(OutputError, match="not written by this command; choose another --output"):
        resume_lines(tmp_path / "notes", "id", check, "--output")
    assert (tmp_path / "notes").read_text(encoding="utf-8") == content
    with pytest.raises(OutputError, match="cannot continue"):
        resume_lines(tmp_path, "id", check, "--output")


def test_a_full_disk_is_said_and_the_lines_before_it_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    append_lines(path, [record(0)], int)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"the disk is full.* Run the same command"):
        append_lines(path, [record(1)], int)
    with path.open("r+b") as file:  # as a disk leaves it that had room for a part
        file.truncate(path.stat().st_size - 3)
    assert resume_lines(path, "id", check, "--output") == [record(0)]


def test_a_directory_without_a_name_is_refused() -> None:
    with pytest.raises(OutputError, match="expected the name of a directory"), hold_directory(""):
        pass


def test_free_memory_is_a_part_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    free = free_memory()
    assert free is not None
    assert 1e6 < free < psutil.virtual_memory().total
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert free_memory() is None  # the core works without psutil


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_memory_limit_counts(tmp_path: Path, version: int) -> None:
    names = {
        1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        2: ("memory.max", "memory.current", "memory.stat"),
    }[version]
    (tmp_path / names[0]).parent.mkdir(exist_ok=True)
    for name, content in zip(names, ("1000\n", "700\n", "anon 500\ninactive_file 150\n"), strict=True):
        (tmp_path / name).write_text(content, encoding="ascii")
    assert _left_of_limit(tmp_path) == 450
    (tmp_path / names[0]).write_text("max\n", encoding="ascii")
    assert _left_of_limit(tmp_path) == float("inf")


# What Windows does.


def test_a_lock_that_passes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, list[int]()

    def busy(source: Any, target: Any) -> None:
        calls.append(1)
        if len(calls) < 4:
            error = PermissionError(errno.EACCES, "being used by another process")
            error.winerror = 32  # type: ignore[attr-defined]
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr("loralib.files.time.sleep", lambda _: None)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "x"
    assert len(calls) == 4
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "never yours")))
    with pytest.raises(OutputError, match="Choose a directory that you can write to"):
        write_text(tmp_path / "b", "x")


def test_too_long_a_path_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"its path of \d+ characters is too long"):
        write_text(tmp_path / ("x" * 300) / "a", "x")


def test_a_held_output_leaves_no_empty_directories(tmp_path: Path) -> None:
    with pytest.raises(DataError), hold_output(tmp_path / "a" / "b", is_directory=True):
        raise DataError("whatever happens")
    with pytest.raises(DataError), hold_output(tmp_path / "a" / "b.gguf", is_directory=False):
        raise DataError("whatever happens")
    assert not list(tmp_path.iterdir())
    with hold_output(tmp_path / "a" / "b", is_directory=True):
        write_text(tmp_path / "a" / "b" / "c", "x")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c"]
