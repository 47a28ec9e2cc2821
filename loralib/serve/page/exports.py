"""Exports of adapters: each runs the command that a user would type, in its own process."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...errors import OutputError, did_you_mean
from ...files import write_errors
from ..process import loralib_command
from ..server import Server
from ..state import RequestError, new_id
from .adapters import source

__all__ = ["TARGETS", "Export", "Exports"]

# The page's name for a format, the command that creates it, and the file name if the result is a single file.
TARGETS: Final[dict[str, tuple[list[str], str]]] = {
    "peft": (["convert", "--target", "peft"], ""),
    "gguf": (["convert", "--target", "llamacpp"], "adapter.gguf"),
    "mlx": (["convert", "--target", "mlx"], ""),
    "merged": (["merge"], ""),
}
_MOST_LINES: Final = 200
_KEPT: Final = 4  # number of finished exports to keep: a merged model is as large as its base


@dataclass
class Export:
    """An export, in progress or finished.

    Attributes:
        id: its random id.
        name: the adapter's name.
        target: one of `TARGETS`.
        status: waiting, running, succeeded or failed.
        lines: the output of the command.
        path: the result, once it exists.
    """

    id: str
    name: str
    target: str
    status: str = "waiting"
    lines: list[str] = field(default_factory=list)
    path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns what clients see of it."""
        seen = {"id": self.id, "name": self.name, "target": self.target, "status": self.status, "lines": self.lines}
        return {**seen, "file": None if self.path is None else self.file_name, "bytes": self.bytes}

    @property
    def file_name(self) -> str:
        """The file name for downloads."""
        safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in self.name).strip("-.")
        return f"{safe or 'adapter'}-{self.target}{'.gguf' if self.target == 'gguf' else '.zip'}"

    @property
    def bytes(self) -> int | None:
        """The size of the result; None: it does not exist yet."""
        return None if self.path is None else self.path.stat().st_size


class Exports:
    """The exports of a server, executed one after another.

    The last few results are kept below the server's state directory until the server ends.  Results left behind by a
    killed server are removed by the next one.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._directory = server, server.state_dir.absolute() / "exports"
        self._remove(self._directory)
        self._all: dict[str, Export] = {}
        self._turn, self._closing = threading.Lock(), threading.Event()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def create(self, name: str, target: str) -> Export:
        """Starts an export.

        Raises:
            RequestError: there is no such adapter or format.
        """
        if target not in TARGETS:
            raise RequestError(
                f"target is {target[:80]!r}, expected one of {', '.join(TARGETS)}.{did_you_mean(target, TARGETS)}",
                param="target",
            )
        directory = source(self._server, name).directory
        for known in self._all.values():
            if (known.name, known.target) == (name, target) and known.status in ("waiting", "running"):
                return known
        export = Export(new_id("export"), name, target)
        self._all[export.id] = export
        threading.Thread(target=self._run, args=(export, directory), name="loralib-export", daemon=True).start()
        return export

    def get(self, export_id: str) -> Export:
        """Returns an export.

        Raises:
            RequestError: there is no export with this id.
        """
        if export_id not in self._all:
            raise RequestError(
                f"there is no export {export_id[:80]!r}; only the last {_KEPT} are kept, until the server stops",
                404,
                "export_not_found",
                "id",
            )
        return self._all[export_id]

    def close(self) -> None:
        """Ends a running export, and removes all results."""
        self._closing.set()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        with self._turn:
            self._remove(self._directory)
        atexit.unregister(self.close)

    @staticmethod
    def _remove(place: Path) -> None:
        # Windows cannot remove a file that is being downloaded; the next server removes it.
        shutil.rmtree(place, ignore_errors=True)

    def _make_room(self) -> None:
        """Removes the oldest finished exports, so that the disk does not fill."""
        finished = [each for each in self._all.values() if each.status in ("succeeded", "failed")]
        for old in finished[: max(0, len(finished) - _KEPT + 1)]:
            del self._all[old.id]
            self._remove(self._directory / old.id)

    def _run(self, export: Export, adapter: Path) -> None:
        with self._turn:
            if self._closing.is_set():
                return
            export.status = "running"
            self._make_room()
            try:
                code = self._convert(export, adapter)
            except (OSError, OutputError) as error:
                export.lines.append(str(error))
                code = 1
            if code:
                self._remove(self._directory / export.id)
            export.status = "failed" if code else "succeeded"

    def _convert(self, export: Export, adapter: Path) -> int:
        command, file = TARGETS[export.target]
        place = self._directory / export.id
        with write_errors(place):
            place.mkdir(parents=True)
        made = place / (file or export.target)
        base = self._server.config.model or self._server.name
        words, environment = loralib_command(*command, "--model", base, str(adapter.absolute()), str(made))
        with subprocess.Popen(
            words,
            env={**environment, "PYTHONUTF8": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as self._process:
            for line in self._process.stdout or ():
                said = line.rstrip().rpartition("\r")[2]
                public = said.replace(str(place), "").replace(str(adapter.absolute()), export.name)
                export.lines = [*export.lines[-_MOST_LINES:], public]
        code = self._process.returncode
        if code == 0:
            export.path = made if made.is_file() else _zipped(made)
        return code


def _zipped(directory: Path) -> Path:
    """Packs a directory into a zip file beside it; without compression, since weights hardly compress."""
    target = directory.with_suffix(".zip")
    with write_errors(target), zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in _files(directory):
            archive.write(path, path.relative_to(directory))
    shutil.rmtree(directory)
    return target


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())
