from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralib import console

ROOT = Path(__file__).resolve().parent.parent
VIETNAMESE = "Huấn luyện xong → lora_model … 1.21% × 2 ≤ 5 “đẹp” 语言 🙂"


class Terminal(io.TextIOWrapper):
    """A console that knows one encoding only."""

    def __init__(self, encoding: str, watched: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self.watched = watched

    def isatty(self) -> bool:
        return self.watched

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


# Loads console alone, since the whole package would load torch.
ALONE = f"""
import sys, types
sys.modules["loralib"] = package = types.ModuleType("loralib")
package.__path__ = [{str(ROOT / "loralib")!r}]
from loralib.console import ensure_safe, say
"""


def run(code: str, encoding: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs code on pipes, where a console would have `encoding`."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, input=input, env=environment, timeout=120)


def run_watched(code: str, encoding: str, columns: int = 0) -> tuple[int, str]:
    """Runs code on a terminal of that encoding; returns its exit code and what it shows, on stdout and stderr."""
    pty = pytest.importorskip("pty")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    ours, theirs = pty.openpty()
    if columns:
        import fcntl
        import termios

        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
            while chunk := os.read(ours, 4096):
                shown += chunk
    os.close(ours)
    return process.returncode, shown.decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "cp1258", "ascii", "utf-8"])
def test_any_console_will_do(encoding: str) -> None:
    code = f"""{ALONE}
text = {VIETNAMESE!r}
say(text)  # a library prints, whoever uses it
ensure_safe()
print(text)  # a program prints
sys.exit(text)
"""
    returned, shown = run_watched(code, encoding)
    assert returned == 1
    replaced = VIETNAMESE.encode(encoding, "replace").decode(encoding)
    assert shown.splitlines() == [console.printable(VIETNAMESE, encoding), replaced, replaced]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_is_redirected_keeps_every_letter(encoding: str) -> None:
    """Programs read files without regard to the console's code page."""
    code = f"""{ALONE}
ensure_safe()
for text in sys.stdin:
    say(text, end='')
    print(text, file=sys.stderr, end='')
"""
    lines = [VIETNAMESE, "one line\u2028with\x85other\x0cseparators\x1c", "dòng cuối"]
    sent = "\n".join(lines)
    result = run(code, encoding, b"\xef\xbb\xbf" + sent.encode())
    assert result.returncode == 0, result.stderr
    assert result.stdout.replace(b"\r\n", b"\n").decode() == sent
    assert result.stderr.replace(b"\r\n", b"\n").decode() == sent


def test_strict_consoles_do_crash_without_it() -> None:
    """Shows that the tests above can fail."""
    assert run(f"print({VIETNAMESE!r})", "cp1252").returncode == 1


def test_streams_that_are_closed_or_were_read_from_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    closed, begun = Terminal("cp1252"), io.TextIOWrapper(io.BytesIO(b"caf\xe9\nth\xe9\n"), encoding="cp1252")
    closed.close()
    begun.readline()
    monkeypatch.setattr(sys, "stderr", closed)
    monkeypatch.setattr(sys, "stdin", begun)
    console.ensure_safe()
    assert begun.readline() == "thé\n"


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "update", "1 update"), (0, "update", "0 updates"), (2, "query", "2 queries"), (1, "entry", "1 entry")],
)
def test_one_thing_is_not_several(number: int, noun: str, text: str) -> None:
    assert console.counted(number, noun) == text


def on_screen(sent: str) -> list[str]:
    """The lines that a terminal shows for this text; a carriage return overwrites the line."""
    lines = []
    for sent_line in sent.split("\n"):
        line, column = "", 0
        for part in re.split("(\r)", sent_line):
            column = 0 if part == "\r" else column
            if part != "\r":
                line = line[:column] + part + line[column + len(part) :]
                column += len(part)
        lines.append(line.rstrip())
    return lines


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_line_printed_beside_a_progress_bar_has_a_line_of_its_own(stream: str) -> None:
    code = f"""{ALONE}
from loralib.console import progress
with progress(total=6, description="training") as bar:
    for number in range(6):
        bar.update()
        bar.refresh()
        say(f"Epoch {{number}}", file=sys.{stream})
"""
    returned, shown = run_watched(code, "utf-8", columns=60)
    assert returned == 0, shown
    assert on_screen(shown)[:6] == [f"Epoch {number}" for number in range(6)]
    assert [line.startswith("training") for line in on_screen(shown)[6:]] == [True, False], "one bar is left, below"
    piped = run(code, "utf-8")
    assert b"training" not in piped.stdout + piped.stderr, "and none where nobody watches"


def test_look_alikes_are_used_only_where_needed() -> None:
    assert console.printable("a × b → c …", "cp1252") == "a × b -> c …"
    assert console.printable("a × b → c …", "ascii") == "a x b -> c ..."


@given(st.text(), st.sampled_from(["ascii", "cp1252", "cp1258", "utf-8", "utf-16", "shift_jis"]))
def test_printable_text_can_be_encoded_and_keeps_what_it_can(text: str, encoding: str) -> None:
    shown = console.printable(text, encoding)
    shown.encode(encoding)
    assert console.printable(shown, encoding) == shown
    if all(ord(char) < 128 for char in text):
        assert shown == text


def test_say_survives_a_program_without_a_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    console.say("nobody hears this")
    console.ensure_safe()


def test_bar_is_ascii_where_blocks_are_missing() -> None:
    for encoding, ascii_only in [("cp1252", True), ("cp1258", True), ("utf-8", False)]:
        terminal = Terminal(encoding)
        for _ in console.progress(range(3), description="Lượt 1 →", file=terminal):
            pass
        shown = terminal.text()
        assert "3/3" in shown
        assert ("█" not in shown) == ascii_only
        assert ("###" in shown) == ascii_only


def test_bar_is_silent_when_redirected() -> None:
    terminal = Terminal("utf-8", watched=False)
    bar = console.progress(total=3, file=terminal)
    assert [bar.update(1), bar.set_postfix_str("loss 1.0"), bar.close()] == [None, None, None]
    assert list(console.progress(range(3), file=terminal)) == [0, 1, 2]
    assert terminal.text() == ""


def test_table_aligns_numbers_right_and_fills_short_rows() -> None:
    assert console.table([["a", 1000, "4.06 MB"], ["long name", 7]]) == "a          1,000  4.06 MB\nlong name      7"
    assert console.table([]) == ""
    assert console.table([["yes", True]]) == "yes  True"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (86400, "24 h 00 min"),
    ],
)
def test_durations_round_up_to_the_next_unit(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "0.98 KB"),
        (5 * 2**30, "5.00 GB"),
        (3 * 2**40, "3.00 TB"),
        (2**60, "1048576.00 TB"),
    ],
)
def test_sizes(bytes: int, text: str) -> None:
    assert console.size(bytes) == text


def test_share_of_nothing() -> None:
    assert console.percent(0, 0) == "-"
