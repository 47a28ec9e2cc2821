"""The process of one training job: ``loralib train`` with a pipe as its standard input.

The pipe is a dead man's handle.  The trainer saves itself and ends when it closes: because the server closed it (a job
is paused or cancelled, the server shuts down), or because the server is gone, however it died.  So no run goes on that
nobody watches, and no signal has to find a process by its number.  A process that is started for the same job while
the one before is still saving waits for it (`--stop_with_stdin`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ..errors import OutputError

__all__ = ["LogTail", "MetricsTail", "TrainingProcess", "last_words", "loralib_command"]

_NICER: Final = 10  # added to the server's niceness: requests come before training
_PIECE: Final = 1 << 20  # bytes read from a file at a time
_COMMAND: Final = "loralib train: "  # how its errors begin


def loralib_command(*words: str) -> tuple[list[str], dict[str, str]]:
    """Returns a command line of loralib, and the environment in which a child process finds this very package."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-m", "loralib", *words], {**os.environ, "PYTHONPATH": path}


class TrainingProcess:
    """A process that trains as a job's settings say.

    Args:
        directory: the job's, with ``job.toml``; its output goes to ``output.log`` and ``errors.log`` there.

    Raises:
        OutputError: it cannot be started.
    """

    def __init__(self, directory: Path) -> None:
        apart: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is for the server, which asks its jobs to save
        if sys.platform == "win32":
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
            apart = {"creationflags": flags | subprocess.BELOW_NORMAL_PRIORITY_CLASS}
        config = str(directory / "job.toml")
        command, environment = loralib_command("train", "--config", config, "--resume", "--stop_with_stdin")
        try:
            with (directory / "output.log").open("ab") as output, (directory / "errors.log").open("wb") as errors:
                self._process = subprocess.Popen(
                    command,
                    cwd=directory,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=errors,
                    **apart,
                )
        except OSError as error:
            raise OutputError(f"the training process cannot be started: {error}") from error
        self._kill_at: float | None = None
        if hasattr(os, "setpriority"):
            with suppress(OSError):  # it is gone already
                nice = os.getpriority(os.PRIO_PROCESS, 0) + _NICER
                os.setpriority(os.PRIO_PROCESS, self._process.pid, min(19, nice))

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def stop(self, kill_after: float | None = None) -> None:
        """Asks it to save itself and end; it is killed if that takes longer than so many seconds."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(OSError):
                self._process.stdin.close()
        if kill_after is not None and self._kill_at is None:
            self._kill_at = time.monotonic() + kill_after

    def leave(self) -> None:
        """Asks it to save itself and end, without waiting for that."""
        self.stop()
        threading.Thread(target=self._process.wait, name="loralib-leave", daemon=True).start()

    def poll(self) -> int | None:
        """Returns how it ended; None while it runs."""
        code = self._process.poll()
        if code is None and self._kill_at is not None and time.monotonic() > self._kill_at:
            self._process.kill()
        if code is not None:
            self.stop()  # closes our end of the pipe
        return code


class LogTail:
    """Whole lines that a file has got since the last look; the file only grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yields where each new line begins, and the line."""
        for start, line in _whole_lines(self._path, self._offset):
            self._offset = start + len(line)
            yield start, line.decode("utf-8", "replace").strip()


class MetricsTail:
    """New events of a metrics.jsonl, which a run that resumes cuts to the length that its checkpoint knows.

    It then writes the same events again.  So the last line that was read must still be where it was; if not, all is
    read from the beginning, and whoever collects events knows them by kind and update.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._last = path, 0, b""

    def events(self) -> Iterator[dict[str, Any]]:
        """Yields events that were not there before, and perhaps earlier ones again."""
        if self._last and not self._is_intact():
            self._offset, self._last = 0, b""
        for start, line in _whole_lines(self._path, self._offset):
            try:
                event = json.loads(line)
            except ValueError:  # it was cut while we were reading
                self._offset, self._last = 0, b""
                return
            self._offset, self._last = start + len(line), line
            yield event

    def _is_intact(self) -> bool:
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(self._offset - len(self._last))
            return file.read(len(self._last)) == self._last
        return False


def _whole_lines(path: Path, offset: int) -> Iterator[tuple[int, bytes]]:
    """Yields the complete lines of a file from a position on, each with where it begins."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(offset)
        rest = b""
        while piece := file.read(_PIECE):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield offset, line + b"\n"
                offset += len(line) + 1


def last_words(path: Path, most: int = 4000) -> str:
    """Returns the error that a training process ended with, in its own words."""
    try:
        text = path.read_bytes()[-1 << 16 :].decode("utf-8", "replace").strip()
    except OSError:
        return ""
    _, found, message = ("\n" + text).rpartition("\n" + _COMMAND)
    lines = text.splitlines()[-1 if "Traceback" in text else -10 :]
    return (message if found else "\n".join(lines))[:most]
