"""The process of one training job: ``loralib train`` with a pipe as its standard input.

The pipe works as a dead man's switch: when it closes, the trainer saves its state and exits.  It closes because the
server closed it (a job is paused or cancelled, or the server shuts down), or because the server died in whatever way.
So no run continues unsupervised, and no signal has to find a process by its id.  If a process is started for the same
job while the previous one is still saving, it waits for that one (`--stop_with_stdin`).
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

_NICER: Final = 10  # added to the server's niceness, because requests have priority over training
_PIECE: Final = 1 << 20  # number of bytes to read from a file at a time
_COMMAND: Final = "loralib train: "  # prefix of its error messages


def loralib_command(*words: str) -> tuple[list[str], dict[str, str]]:
    """Returns a loralib command line, and an environment in which a child process finds this same package."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-m", "loralib", *words], {**os.environ, "PYTHONPATH": path}


class TrainingProcess:
    """A process that trains with a job's settings.

    Args:
        directory: the job's directory, with ``job.toml``; output goes to ``output.log`` and ``errors.log`` there.

    Raises:
        OutputError: it cannot be started.
    """

    def __init__(self, directory: Path) -> None:
        apart: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is for the server, which asks its jobs to save
        if sys.platform == "win32":
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
            apart = {"creationflags": flags | subprocess.BELOW_NORMAL_PRIORITY_CLASS}
        config = str(directory / "job.toml")
        command, env = loralib_command("train", "--config", config, "--resume", "--stop_with_stdin")
        try:
            with (directory / "output.log").open("ab") as output, (directory / "errors.log").open("wb") as errors:
                self._process = subprocess.Popen(
                    command, cwd=directory, env=env, stdin=subprocess.PIPE, stdout=output, stderr=errors, **apart
                )
        except OSError as error:
            raise OutputError(f"the training process cannot be started: {error}") from error
        self._kill_at: float | None = None
        if hasattr(os, "setpriority"):
            with suppress(OSError):  # it has already exited
                nice = os.getpriority(os.PRIO_PROCESS, 0) + _NICER
                os.setpriority(os.PRIO_PROCESS, self._process.pid, min(19, nice))

    def stop(self, kill_after: float | None = None) -> None:
        """Asks the process to save its state and exit; kills it if that takes longer than `kill_after` seconds."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(OSError):
                self._process.stdin.close()
        if kill_after is not None and self._kill_at is None:
            self._kill_at = time.monotonic() + kill_after

    def leave(self) -> None:
        """Asks the process to save its state and exit, without waiting for that."""
        self.stop()
        threading.Thread(target=self._process.wait, name="loralib-leave", daemon=True).start()

    def poll(self) -> int | None:
        """Returns its exit code; None while it is running."""
        code = self._process.poll()
        if code is None and self._kill_at is not None and time.monotonic() > self._kill_at:
            self._process.kill()
        if code is not None:
            self.stop()  # closes our end of the pipe
        return code


class LogTail:
    """Yields complete lines appended to a file since the last call; the file must only grow."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yields the offset of each new line, and the line."""
        for start, line in _whole_lines(self._path, self._offset):
            self._offset = start + len(line)
            yield start, line.decode("utf-8", "replace").strip()


class MetricsTail:
    """Yields new events of a metrics.jsonl, which a resumed run truncates to the length in its checkpoint.

    The run then writes the same events again.  The last line read must therefore still be in its place; if it is not,
    everything is read again, and the caller identifies known events by kind and update.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._last = path, 0, b""

    def events(self) -> Iterator[dict[str, Any]]:
        """Yields new events, and possibly earlier ones again."""
        if self._last and not self._is_intact():
            self._offset, self._last = 0, b""
        for start, line in _whole_lines(self._path, self._offset):
            try:
                event = json.loads(line)
            except ValueError:  # it was truncated while being read
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
    """Yields the complete lines of a file after an offset, each with its own offset."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(offset)
        rest = b""
        while piece := file.read(_PIECE):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield offset, line + b"\n"
                offset += len(line) + 1


def last_words(path: Path, most: int = 4000) -> str:
    """Returns the error message with which a training process ended."""
    try:
        text = path.read_bytes()[-1 << 16 :].decode("utf-8", "replace").strip()
    except OSError:
        return ""
    _, found, message = ("\n" + text).rpartition("\n" + _COMMAND)
    lines = text.splitlines()[-1 if "Traceback" in text else -10 :]
    return (message if found else "\n".join(lines))[:most]
