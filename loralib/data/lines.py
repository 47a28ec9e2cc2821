"""Reads whole UTF-8 text files, optionally compressed, with errors that name the file, the line and the fix."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Final

from ..errors import DataError, did_you_mean, list_faults

__all__ = ["decoded", "do_not_match", "is_text", "read_bytes", "read_lines", "read_text", "shown", "split_lines"]


def read_bytes(path: str | Path, expected: str = "some text") -> bytes:
    """Returns the bytes of a file, decompressed if it uses gzip.

    Args:
        path: the file; it must not be empty.
        expected: what it should contain, for error messages.

    Raises:
        DataError: the file is missing, a directory, unreadable, empty, compressed differently, or a broken archive.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(_why_missing(path)) from None
    except OSError as error:
        if path.is_dir():
            raise DataError(f"{path} is a directory. Name a file in it.") from None
        fix = " Check its permissions." if isinstance(error, PermissionError) else ""
        raise DataError(f"cannot read {path}: {error.strerror or error}.{fix}") from None
    if raw[:2] == b"\x1f\x8b":
        raw = _unpacked(path, raw)
    packer = next((name for start, name in _PACKERS.items() if raw.startswith(start)), None)
    if packer:
        raise DataError(f"{path} is {packer}, expected {expected}. Unpack it, or save the data in another format.")
    if not raw.strip():
        raise DataError(f"{path} is empty, expected {expected}. Choose another file.")
    return raw


_PACKERS: Final = {
    b"PK\x03\x04": "a ZIP archive (or a spreadsheet)",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "packed twice by gzip",
}
# Limits for decompression: an absolute size, or this many times the compressed size (text compresses 3 to 30 times).
_LARGE, _RATIO = 2**28, 200


def _unpacked(path: Path, raw: bytes) -> bytes:
    most = max(_LARGE, _RATIO * len(raw))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            content = file.read(most + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is a broken gzip archive: {error}. Copy or download it again.") from None
    if len(content) > most:
        raise DataError(
            f"{path} unpacks to more than {_RATIO} times its size, which text does not. Unpack it and check its "
            "contents."
        )
    return content


def read_text(path: str | Path, expected: str = "some text") -> str:
    """Returns the text of a UTF-8 file, which may be gzip-compressed, without its byte-order mark.

    Raises:
        DataError: as for `read_bytes`, or the file is not UTF-8 (each such line is listed with its byte offset).
    """
    return decoded(Path(path), read_bytes(path, expected), expected)


def decoded(path: Path, raw: bytes, expected: str = "some text") -> str:
    """Decodes the bytes of a file; see `read_text`."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(_why_not_utf8(path, raw, expected)) from None


def read_lines(path: str | Path, expected: str = "some text") -> list[str]:
    r"""Returns the lines of a UTF-8 file without line endings, which are \n, \r\n or \r, but no other characters.

    Raises:
        DataError: as for `read_text`.
    """
    return split_lines(read_text(path, expected))


def split_lines(text: str) -> list[str]:
    """Splits a text into lines; see `read_lines`.

    >>> split_lines("a\\u2028b\\r\\nc\\n")
    ['a\\u2028b', 'c']
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _why_missing(path: Path) -> str:
    directory = path.absolute().parent
    if not directory.is_dir():
        return f"{path} does not exist, nor does the directory {directory}. Check the path."
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file() and entry.name[0] != ".")
    near = did_you_mean(path.name, names)
    listed = ", ".join([*names[:8], "..."] if len(names) > 8 else names) or "no files"
    return f"{path} does not exist.{near or f' Check the path: {directory} has {listed}.'}"


def _why_not_utf8(path: Path, raw: bytes, expected: str) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"{path} is UTF-16 (byte-order mark at byte 0), expected UTF-8. Save it again as UTF-8."
    if b"\0" in raw:
        return f"{path} is a binary file, expected {expected}. Choose another file."
    faults, offset = [], 0
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} at offset {offset + error.start}"
            faults.append(f"{path}:{number}: {byte} ({error.reason})")
        offset += len(line) + 1
    fix = "Save the file as UTF-8 (many editors: Save As, Encoding), or convert it: iconv -f CP1252 -t UTF-8."
    lines = f"{len(faults):,} line{'s' * (len(faults) != 1)}"
    return list_faults(f"{path} is not UTF-8: {lines} cannot be decoded", faults, fix)


def is_text(value: object) -> bool:
    """Tells whether a value from JSON is text that a tokenizer accepts; JSON strings may contain lone surrogates.

    >>> is_text("é"), is_text("\\ud800"), is_text(None)
    (True, False, False)
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(line: str, width: int = 60) -> str:
    """Returns a line in quotes, shortened for use in a message."""
    return repr(line if len(line) <= width else line[: width - 3] + "...")


def do_not_match(count: int, unit: str = "line") -> str:
    """Returns "1 line does not match" or "N lines do not match"."""
    return f"1 {unit} does not match" if count == 1 else f"{count:,} {unit}s do not match"
