"""Uploaded files: streamed to disk under a random name, and read once to describe their content."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from ..data import read_sources
from ..data.readers import guess_format
from ..errors import LoraError, OutputError, did_you_mean, first_line
from ..files import remove_file, write_errors
from .state import RequestError, State, new_id, now

__all__ = ["FileStore", "Upload", "UploadedFile"]

PURPOSES: Final = ("fine-tune",)
_ID: Final = re.compile(r"file-[A-Za-z0-9]{24}", re.ASCII)
_OURS: Final = re.compile(r"\.?(file|upload)-[A-Za-z0-9]{24}(\.|$)", re.ASCII)  # prefix of the names of stored files
_SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet", ".arrow", ".xml")
_READ_AT_ONCE: Final = 64 << 20  # bytes; larger files are only read by the job


@dataclass(frozen=True)
class UploadedFile:
    """An uploaded file.

    Attributes:
        id: its random id.
        name: the client's name for it; never used as a path.
        path: its path.
        bytes: its size.
        purpose: its purpose.
        created: upload time, in seconds since 1970.
        facts: how it is read: `format`, `examples`, `notes`, and `error` if it cannot be read; None if unknown.
    """

    id: str
    name: str
    path: Path
    bytes: int
    purpose: str
    created: int
    facts: dict[str, Any]

    @property
    def is_read(self) -> bool:
        """Whether the server has read it; very large files are left to the job."""
        return self.facts["examples"] is not None or self.facts["error"] is not None


class Upload:
    """A file being uploaded; `close` discards it unless it was kept."""

    def __init__(self, directory: Path, most: int) -> None:
        self._path = directory / f".{new_id('upload')}.tmp"
        self._most, self.size = most, 0
        with _without_paths():
            self._file: BinaryIO = self._path.open("xb")

    def write(self, piece: bytes) -> None:
        """Appends data.

        Raises:
            RequestError: the file becomes too large, or the disk is full.
            OutputError: it cannot be written.
        """
        self.size += len(piece)
        if self.size > self._most:
            raise RequestError(
                f"the file is larger than the {self._most / 1e6:,.1f} MB that this server accepts (--max_upload_mb)",
                413,
                "file_too_large",
                "file",
            )
        with _without_paths():
            self._file.write(piece)

    def keep(self, path: Path) -> None:
        """Moves the file to its final path, after syncing it to disk."""
        with _without_paths():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._path.replace(path)

    def close(self) -> None:
        """Closes the file, and removes it unless it was kept."""
        with suppress(OSError):  # buffered data for which the disk has no room
            self._file.close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


@contextmanager
def _without_paths() -> Iterator[None]:
    """Reports why a file cannot be written, without revealing the server's paths."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise RequestError("the server's disk is full; the upload was not kept", 507, "disk_full") from error
        raise OutputError(f"the upload was not kept: {error.strerror}") from error


class FileStore:
    """The uploaded files of a server: their content on disk, and what is known about them in the database.

    Any thread may use it.

    Args:
        state: the server's directory and database.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._directory = state.directory / "files"
        with write_errors(self._directory):
            self._directory.mkdir(exist_ok=True)
        known = {self._path(row).name for row in state.rows("SELECT id, suffix FROM files")}
        for path in self._directory.iterdir():  # removes uploads cut short by a crash; other files are left alone
            if path.name not in known and _OURS.match(path.name) and path.is_file():
                remove_file(path)

    def begin(self, most: int) -> Upload:
        """Begins an upload of at most `most` bytes; the caller must close it."""
        return Upload(self._directory, most)

    def finish(self, upload: Upload, name: str, purpose: str) -> UploadedFile:
        """Keeps a complete upload, and describes its content.

        Raises:
            RequestError: it is empty, or its purpose is unknown.
            OutputError: it cannot be written.
        """
        if purpose not in PURPOSES:
            raise RequestError(
                f"purpose is {purpose!r}, expected 'fine-tune'.{did_you_mean(purpose, PURPOSES)}", param="purpose"
            )
        if not upload.size:
            raise RequestError("the file is empty", param="file")
        name = _shown_name(name)
        file_id, suffix = new_id("file"), _suffix(name)
        path = self._directory / (file_id + suffix)
        upload.keep(path)
        try:
            facts = _facts(path, name, upload.size)
            with self._state.transaction() as database:
                database.execute(
                    "INSERT INTO files (id, name, suffix, bytes, purpose, created, facts) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (file_id, name, suffix, upload.size, purpose, now(), json.dumps(facts)),
                )
        except BaseException:
            remove_file(path)
            raise
        return self.get(file_id)

    def list(self) -> Sequence[UploadedFile]:
        """Returns all files, newest first."""
        return [self._made(row) for row in self._state.rows("SELECT * FROM files ORDER BY number DESC")]

    def get(self, file_id: str, param: str = "file_id") -> UploadedFile:
        """Returns a file.

        Raises:
            RequestError: there is no file with this id.
        """
        rows = self._state.rows("SELECT * FROM files WHERE id = ?", file_id) if _ID.fullmatch(file_id) else []
        if not rows:
            raise RequestError(f"there is no file {file_id[:80]!r}", 404, "file_not_found", param)
        return self._made(rows[0])

    def delete(self, file_id: str) -> None:
        """Removes a file.

        Raises:
            RequestError: there is no file with this id, or an unfinished job uses it.
        """
        file = self.get(file_id)
        with self._state.transaction() as database:
            users = database.execute(
                "SELECT id FROM jobs WHERE (training_file = ? OR validation_file = ?) "
                "AND status NOT IN ('succeeded', 'failed', 'cancelled')",
                (file_id, file_id),
            ).fetchall()
            if users:
                raise RequestError(
                    f"{file_id} is in use by {', '.join(row['id'] for row in users)}: cancel that first",
                    409,
                    "file_in_use",
                )
            database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        remove_file(file.path)

    def _path(self, row: Any) -> Path:
        return self._directory / f"{row['id']}{row['suffix']}"

    def _made(self, row: Any) -> UploadedFile:
        facts = json.loads(row["facts"])
        return UploadedFile(
            row["id"], row["name"], self._path(row), row["bytes"], row["purpose"], row["created"], facts
        )


def _shown_name(name: str) -> str:
    """Returns a client's file name for display: its last component, without unprintable characters.

    >>> _shown_name("../../etc/pass\\x00wd.jsonl")
    'passwd.jsonl'
    """
    last = re.split(r"[/\\]", name)[-1]
    return "".join(char for char in last if char.isprintable())[-200:].strip() or "file"


def _suffix(name: str) -> str:
    """Returns the extension of a file name, if it is one that identifies a format.

    >>> _suffix("a.b.JSONL.gz"), _suffix("run.sh")
    ('.jsonl.gz', '')
    """
    lower = name.lower()
    plain = lower.removesuffix(".gz")
    known = next((suffix for suffix in _SUFFIXES if plain.endswith(suffix)), "")
    return known + lower[len(plain) :]


def _facts(path: Path, name: str, size: int) -> dict[str, Any]:
    """Reads a file as training would with its default settings."""
    facts: dict[str, Any] = {"format": None, "examples": None, "notes": [], "error": None}
    try:
        if max(size, _unpacked(path)) > _READ_AT_ONCE:
            note = f"{name}: larger than {_READ_AT_ONCE / 1e6:,.0f} MB, so it is read only when a job runs"
            return {**facts, "notes": [note]}
        facts["format"] = guess_format(path)
        (source,) = read_sources(path, objective=None)
        notes = [note.replace(str(path), name) for note in source.notes]
        kind = {"preferences": True} if source.examples[0].rejected is not None else {}
        return {**facts, "examples": len(source.examples), "notes": notes, **kind}
    except LoraError as error:
        return {**facts, "error": str(error).replace(str(path), name)}
    except Exception as error:  # a file may contain anything, and a library may raise anything
        return {**facts, "error": f"{name} cannot be read: {type(error).__name__}: {first_line(error)}"}


def _unpacked(path: Path) -> int:
    """Returns the decompressed size of a gzip file, up to a limit; 0 if it is not compressed."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return 0
    size = 0
    with suppress(OSError, EOFError, zlib.error), gzip.open(path) as unpacked:  # if damaged, its reader will report it
        while size <= _READ_AT_ONCE and (piece := unpacked.read(1 << 20)):
            size += len(piece)
    return size
