"""Records the first hour in a real terminal: `python scripts/record_session.py`, in the project's environment.

Runs the commands of docs/first-hour.md one after another, each in a pseudo-terminal, in an empty folder but for a small
file of one's own.  What the screen showed goes into that page, in both languages, and the README's picture.  Not on
Windows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs" / place / "first-hour.md" for place in ("", "vi")]
PICTURE = ROOT / "docs" / "img" / "session.svg"
COLUMNS, LINES = 110, 50
PROMPT = "$ "


@dataclass(frozen=True)
class Step:
    """A command, and what is typed into it: after the screen has shown a text, another one is entered."""

    command: str
    typed: tuple[tuple[str, str], ...] = ()


QUESTION = "Please turn the heater in the attic off."
TRAIN = "loralib train --train_data mine.jsonl --output_dir home"
# By their heading in the page.
SESSION: dict[str, tuple[Step, ...]] = {
    "look": (Step("head -n 2 mine.jsonl"), Step("loralib data preview mine.jsonl --count 1")),
    "train": (Step(TRAIN),),
    "generate": (
        Step(f'loralib generate "{QUESTION}" --max_new_tokens 40'),
        Step(f'loralib generate "{QUESTION}" --max_new_tokens 40 --adapter home'),
    ),
    "stop": (Step(f"{TRAIN}2 --num_epochs 4", (("Epoch 1:", "\x03"),)), Step(f"{TRAIN}2 --num_epochs 4 --resume")),
    "chat": (
        Step(
            "loralib chat --temperature 0 --max_new_tokens 40",
            (("> ", "What is the capital of France?\n"), ("\n> ", "/exit\n")),
        ),
    ),
    "inspect": (Step("loralib inspect home"),),
    "merge": (Step("loralib merge home merged"), Step("loralib convert home portable --target vllm")),
}
IN_PICTURE = ("train", "generate")


def own_file(path: Path) -> None:
    """Writes the small file: what is said to a home, and what the home should do."""
    ways = (
        "Please turn the {device} in the {room} {state}.",
        "Turn {state} the {device} in the {room}!",
        "Could you switch the {room} {device} {state}?",
        "I want the {device} in the {room} to be {state}.",
    )
    rooms = ("kitchen", "bedroom", "hall", "garage", "study", "cellar")
    devices = ("lamp", "heater", "fan", "radio")
    lines = []
    for number, (room, device, state) in enumerate(product(rooms, devices, ("on", "off"))):
        said = ways[number % 4 if state == "on" else (number // 4) % 4].format(room=room, device=device, state=state)
        done = f" room: {room}, device: {device}, state: {state}"
        lines.append(json.dumps({"prompt": said, "completion": done}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def record(step: Step, place: Path) -> str:
    """Runs a command in a terminal; returns what the screen shows at its end."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    process = subprocess.Popen(
        shlex.split(step.command),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=place,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
    )
    os.close(theirs)
    raw, waiting, seen = b"", list(step.typed), 0
    until = time.monotonic() + 900
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux's way to say that the other side is closed
                break
            if not chunk:
                break
            raw += chunk
        shown = raw.decode("utf-8", "replace").replace("\r\n", "\n")
        if waiting and waiting[0][0] in shown[seen:]:
            seen = len(shown)
            os.write(ours, waiting.pop(0)[1].encode())
    code = process.wait()
    os.close(ours)
    screen = screen_of(raw.decode("utf-8", "replace"))
    return screen if code == 0 else f"{screen}\n(exit code {code})"


def screen_of(raw: str) -> str:
    """Returns the text that a terminal shows after these characters: carriage returns overwrite, colours are left out.

    >>> screen_of("10%\\r100%\\r\\nEpoch 1\\x1b[K\\n")
    '100%\\nEpoch 1'
    """
    lines: list[list[str]] = [[]]
    row = column = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[^\[]|[\s\S]", raw):
        if part.startswith("\x1b"):
            count = int(re.sub(r"\D", "", part) or 1)
            if part.endswith("A"):
                row = max(0, row - count)
            elif part.endswith("K"):
                del lines[row][column:]
        elif part == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append([])
        elif part == "\r":
            column = 0
        elif part == "\b":
            column = max(0, column - 1)
        elif part >= " ":
            lines[row].extend(" " * (column + 1 - len(lines[row])))
            lines[row][column] = part
            column += 1
    return "\n".join("".join(line).rstrip() for line in lines).strip("\n")


def in_page(page: str, shown: dict[str, str]) -> str:
    """Returns the page with its recorded parts replaced."""
    for name, text in shown.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"the page has no part between <!-- {name} --> and <!-- /{name} -->, or more than one")
        page = pattern.sub(lambda found, text=text: f"{found[1]}```\n{text}\n```\n{found[2]}", page)
    return page


def picture_of(text: str) -> str:
    """Draws a terminal with a text in it, as SVG."""
    lines = text.splitlines()
    width, height = 8.4 * max(map(len, lines)) + 40, 18 * len(lines) + 60
    drawn = []
    for number, line in enumerate(lines):
        colour = "#7ee787" if line.startswith(PROMPT) else "#e6edf3"
        drawn.append(f'<text x="20" y="{58 + 18 * number}" fill="{colour}" xml:space="preserve">{escape(line)}</text>')
    dots = "".join(
        f'<circle cx="{22 + 20 * place}" cy="20" r="6" fill="{colour}"/>'
        for place, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
        'font-family="ui-monospace, Consolas, Menlo, \'DejaVu Sans Mono\', monospace" font-size="14">',
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>{dots}',
        *drawn,
        "</svg>",
        "",
    ))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SESSION, help="record these parts alone; nothing is written")
    only = parser.parse_args(argv).only
    shown: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        own_file(Path(folder) / "mine.jsonl")
        for name in only or SESSION:
            parts = []
            for step in SESSION[name]:
                print(f"{PROMPT}{step.command}", flush=True)
                screen = record(step, Path(folder)).replace(f"{folder}/", "")
                print(screen, flush=True)
                parts.append(f"{PROMPT}{step.command}\n{screen}")
            shown[name] = "\n".join(parts)
    if only is None:
        for page in PAGES:
            page.write_bytes(in_page(page.read_text(encoding="utf-8"), shown).encode())
        PICTURE.write_bytes(picture_of("\n\n".join(shown[name] for name in IN_PICTURE)).encode())


if __name__ == "__main__":
    main()
