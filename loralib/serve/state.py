"""The directory of a server's files and jobs: a lock that keeps out a second server, and a database.

The database is SQLite with a write-ahead log: a committed transaction survives a kill at any moment, and an uncommitted
one disappears entirely.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import string
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from ..errors import LoraError, OutputError
from ..files import hold_directory

__all__ = ["RequestError", "State", "new_id", "now"]

_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, suffix TEXT NOT NULL,
    bytes INTEGER NOT NULL, purpose TEXT NOT NULL, created INTEGER NOT NULL, facts TEXT NOT NULL
);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL, wanted TEXT NOT NULL,
    suffix TEXT NOT NULL, training_file TEXT NOT NULL, validation_file TEXT, settings TEXT NOT NULL,
    asked TEXT NOT NULL, error TEXT, created INTEGER NOT NULL, started INTEGER, finished INTEGER
);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, key TEXT NOT NULL, created INTEGER NOT NULL,
    level TEXT NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL, UNIQUE (job, key)
);
CREATE INDEX events_of_job ON events (job, type, number);
"""


class RequestError(LoraError, ValueError):
    """A request cannot be fulfilled.

    Attributes:
        status: the HTTP status for it.
        code: a code for programs.
        param: the argument at fault.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def new_id(kind: str) -> str:
    """Returns an unguessable id such as ``file-Zk3...``.

    >>> len(new_id("file"))
    29
    """
    return f"{kind}-" + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(24))


class State:
    """A directory locked by one server, with its database.  Any thread may use it.

    Args:
        directory: the directory, created if needed.

    Attributes:
        directory: the directory as an absolute path.
        is_closing: whether the server is shutting down, so that nobody waits any longer.

    Raises:
        OutputError: the directory is in use by another server or cannot be written, or its database cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self._held = contextlib.ExitStack()
        self.is_closing = False
        self._changed = threading.Condition()  # its lock is the database's
        self.directory = self._held.enter_context(hold_directory(directory, "--state_dir"))
        try:
            self._connection = self._open(self.directory / "state.sqlite")
        except BaseException:
            self._held.close()
            raise

    def _open(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        except sqlite3.Error as error:
            connection.close()
            raise OutputError(
                f"{path} cannot be used: {error}. Choose another --state_dir, or move that file away."
            ) from error
        if version > _VERSION:
            connection.close()
            raise OutputError(
                f"{path} was written by a newer loralib (its tables have version {version}, expected at most "
                f"{_VERSION}). Use that loralib, or another --state_dir."
            )
        return connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Changes the database atomically: if an error is raised, nothing is changed.

        Raises:
            RequestError: the disk is full.
            OutputError: the database cannot be written.
        """
        with self._changed:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                    self._changed.notify_all()
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                if "full" in str(error):
                    raise RequestError("the server's disk is full; nothing was changed", 507, "disk_full") from error
                raise OutputError(f"the database of the jobs cannot be written: {error}.") from error

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Reads from the database."""
        with self._changed:
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise OutputError(f"the database of the jobs cannot be read: {error}.") from error

    def wait_for(self, is_so: Callable[[], object], timeout: float | None = None) -> None:
        """Waits until something is so, which is asked again after each change, or until the server shuts down."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_closing or is_so(), timeout)

    def end_waiting(self) -> None:
        """Ends what waits now and later, because the server shuts down."""
        with self._changed:
            self.is_closing = True
            self._changed.notify_all()

    def close(self) -> None:
        """Closes the database and releases the directory."""
        with self._changed:
            self._connection.close()
            self._held.close()


def now() -> int:
    """Returns the current time in the form used by OpenAI's API."""
    return int(time.time())
