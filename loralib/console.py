"""Console output: text that any console can show, tables, progress bars, and readable numbers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, TextIO

from .errors import MissingDependencyError

__all__ = [
    "count",
    "counted",
    "duration",
    "ensure_safe",
    "muted",
    "parameter_table",
    "percent",
    "printable",
    "progress",
    "say",
    "size",
    "table",
]

# Replacements for consoles that lack these characters; any other missing character becomes "?".
_PLAIN = str.maketrans(
    {
        "→": "->",
        "←": "<-",
        "↔": "<->",
        "…": "...",
        "–": "-",
        "—": "-",
        "−": "-",
        "×": "x",
        "·": "*",
        "≤": "<=",
        "≥": ">=",
        "≈": "~",
        "±": "+-",
        "✓": "ok",
        "•": "*",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "█": "#",
        "│": "|",
        "─": "-",
    }
)


def ensure_safe() -> None:
    """Makes reading and printing safe for the whole program, on any console and through any pipe.

    A console keeps its encoding, and characters it cannot show become "?".  Files and pipes are UTF-8 both ways,
    whatever the console's code page, so nothing is lost and one command can read what another writes.  A byte-order
    mark on standard input is skipped.  Programs call this once, at startup; libraries use `say` instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if _is_redirected(stream):
            _reconfigure(stream, encoding="utf-8", errors="replace")
        else:
            _reconfigure(stream, errors="replace")
    if _is_redirected(sys.stdin):
        _reconfigure(sys.stdin, encoding="utf-8-sig")


def printable(text: str, encoding: str | None) -> str:
    """Replaces every character that an encoding lacks with its closest equivalent.

    >>> printable("r → 16, 40 €, 语", "cp1252")
    'r -> 16, 40 €, ?'
    >>> printable("r → 16", "utf-8")
    'r → 16'
    """
    encoding = encoding or "utf-8"
    if _can_encode(encoding, text):
        return text
    similar = "".join(char if _can_encode(encoding, char) else char.translate(_PLAIN) for char in text)
    return similar.encode(encoding, "replace").decode(encoding)


def say(*parts: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints like `print`, unbuffered, on any console.

    Args:
        parts: what to print, separated by spaces.
        file: the stream; default: the current stdout.
        end: printed after the last part.
    """
    stream = sys.stdout if file is None else file
    if stream is not None and not _MUTED:  # a program started without a console has no stdout
        text = " ".join(str(part) for part in parts) + end
        with _bars_cleared():
            print(printable(text, getattr(stream, "encoding", None)), file=stream, end="", flush=True)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Silences printing and progress bars in this process, for when another process prints the same things."""
    _MUTED.append(None)
    try:
        yield
    finally:
        _MUTED.pop()


_MUTED: Final[list[None]] = []  # one entry per open `muted` context


@contextlib.contextmanager
def _bars_cleared() -> Iterator[None]:
    """Removes progress bars from the terminal while other text is printed, then redraws them below it."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    bars = [bar for bar in getattr(tqdm, "_instances", ()) if not bar.disable and bar.fp.isatty()]
    for bar in bars:
        with contextlib.suppress(OSError):
            bar.clear()
            bar.fp.flush()  # tqdm leaves the last carriage return in the buffer; text would start mid-line
    try:
        yield
    finally:
        for bar in bars:
            with contextlib.suppress(OSError):
                bar.refresh()


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    description: str = "",
    unit: str = "step",
    file: TextIO | None = None,
) -> Any:
    """Returns a tqdm progress bar: over an iterable, or advanced by ``update(n)``.

    The bar appears on stderr if that is a terminal; in ASCII if the terminal cannot show block characters.

    Args:
        iterable: what to iterate over, or None.
        total: number of steps, if the iterable has no length.
        description: text before the bar.
        unit: the name of one step.
        file: the stream; default: stderr.

    Raises:
        MissingDependencyError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingDependencyError("progress bars need tqdm: pip install 'loralib[train]'") from error
    stream = sys.stderr if file is None else file
    is_terminal = stream is not None and stream.isatty()
    blocks = _can_encode(getattr(stream, "encoding", None) or "utf-8", "█▏")
    return tqdm(
        iterable,
        total=total,
        desc=printable(description, getattr(stream, "encoding", None)) or None,
        unit=unit,
        file=stream,
        disable=not is_terminal or bool(_MUTED),
        ascii=not blocks,
        dynamic_ncols=True,
    )


def table(rows: Sequence[Sequence[object]], header: Sequence[object] = ()) -> str:
    """Formats rows as columns: numbers right-aligned, everything else left-aligned.

    Args:
        rows: cells; integers get thousands separators, anything else is formatted by `str`.
        header: underlined column titles.

    Returns:
        The lines, without a final newline.

    >>> print(table([["trainable", 1062160], ["frozen", 86689873]], header=["parameters", "number"]))
    parameters      number
    ----------  ----------
    trainable    1,062,160
    frozen      86,689,873
    """
    cells = [[_cell(value) for value in row] for row in ([header, *rows] if header else rows)]
    if not cells:
        return ""
    columns = max(len(row) for row in cells)
    cells = [row + [""] * (columns - len(row)) for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(columns)]
    body = cells[1:] if header else cells
    right = [_all_numbers(row[i] for row in body) for i in range(columns)]
    if header:
        cells.insert(1, ["-" * width for width in widths])
    lines = (
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def parameter_table(parameters: Iterable[Any]) -> str:
    """Returns a table of total, trainable and frozen parameters.

    Args:
        parameters: what ``model.parameters()`` yields.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    total = sum(number for number, _ in sizes)
    trainable = sum(number for number, trains in sizes if trains)
    rows = [
        ("Total", count(total), "100.00%"),
        ("Trainable", count(trainable), percent(trainable, total)),
        ("Frozen", count(total - trainable), percent(total - trainable, total)),
    ]
    return table(rows, ("parameters", "number", "share"))


def count(number: int) -> str:
    """Formats an integer with thousands separators.

    >>> count(1062160)
    '1,062,160'
    """
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """Formats a number with a noun, in the singular or plural.

    >>> counted(1, "update"), counted(1200, "update"), counted(2, "entry")
    ('1 update', '1,200 updates', '2 entries')
    """
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{count(number)} {noun}"


def percent(part: float, whole: float) -> str:
    """Formats a ratio as a percentage with two decimals.

    >>> percent(1062160, 87752033)
    '1.21%'
    """
    return f"{part / whole:.2%}" if whole else "-"


def size(bytes: float) -> str:
    """Formats a number of bytes; 1 MB is 2**20 bytes, as in Windows Explorer and PyTorch's messages.

    >>> size(4_257_218)
    '4.06 MB'
    >>> size(640)
    '640 bytes'
    """
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while abs(bytes) >= 1000 and len(units) > 1:  # not 1024: four digits before the decimal point are hard to read
        bytes /= 1024
        units.pop(0)
    return f"{bytes:.0f} bytes" if units[0] == "bytes" else f"{bytes:.2f} {units[0]}"


def duration(seconds: float) -> str:
    """Formats a time span with readable precision.

    >>> [duration(s) for s in (0.0123, 2.5, 75, 7325)]
    ['12 ms', '2.5 s', '1 min 15 s', '2 h 02 min']
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return "{} min {:02} s".format(*divmod(round(seconds), 60))
    return "{} h {:02} min".format(*divmod(round(seconds / 60), 60))


def _is_redirected(stream: Any) -> bool:
    """Tells whether a standard stream is a file or a pipe; False if the stream was replaced by another object."""
    return hasattr(stream, "reconfigure") and not stream.closed and not stream.isatty()


def _reconfigure(stream: Any, **settings: str) -> None:
    if hasattr(stream, "reconfigure"):  # absent if the stream was replaced, or is None
        with contextlib.suppress(OSError, ValueError):  # closed, or already read from
            stream.reconfigure(**settings)


def _can_encode(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _cell(value: object) -> str:
    return count(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _all_numbers(cells: Iterable[str]) -> bool:
    """Tells whether some cells are neither empty nor a dash, and all of these begin with a number ("4.06 MB" does)."""
    present = [cell for cell in cells if cell not in ("", "-")]
    return bool(present) and all(cell.lstrip("+-")[:1].isdigit() for cell in present)
