"""Atomic and line-by-line writing of files, locks against concurrent runs, free memory, and the cache directory."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import OutputError

__all__ = [
    "append_lines",
    "cache_directory",
    "free_memory",
    "hold_directory",
    "hold_file",
    "hold_output",
    "remove_file",
    "resume_lines",
    "write_errors",
    "write_json",
    "write_text",
    "write_whole",
]

_LOCK = ".loralib.lock"
_MAX_PATH = 248  # maximum length of a directory's path on Windows without long paths; for a file it is 259


def write_whole(
    path: str | os.PathLike[str], write: Callable[[Path], object], check: Callable[[Path], object] | None = None
) -> None:
    """Writes a file atomically: to a temporary file, synced, then renamed; readers see the old file or the new one.

    Args:
        path: the file to write; its directory is created if needed.
        write: called with the path of a temporary file in the same directory, to which it writes the content.
        check: called with the same path once the content is synced; if it raises, the old file is kept.

    Raises:
        OutputError: the directory or file cannot be written (read-only, disk full, path is a directory).
    """
    path = Path(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            if check is not None:
                check(temporary)
            # mkstemp makes files private to the user; restore the mode that an ordinary open() would have set.
            with contextlib.suppress(OSError):
                temporary.chmod(0o666 & ~_umask())
            _patiently(lambda: os.replace(temporary, path))
        finally:
            with contextlib.suppress(OSError):  # already renamed, if everything went well
                temporary.unlink()
        _sync_directory(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text with "\\n" line endings, atomically (see `write_whole`)."""
    write_whole(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented UTF-8 JSON, atomically (see `write_whole`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False, allow_nan=False) + "\n")


def remove_file(path: str | os.PathLike[str]) -> None:
    """Removes a file if it exists.

    Raises:
        OutputError: it exists and cannot be removed.
    """
    path = Path(path)
    with write_errors(path):
        _patiently(lambda: path.unlink(missing_ok=True))


def _patiently(action: Callable[[], object], waits: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0)) -> None:
    """Does something to a file, and retries while Windows reports that another process has it open.

    Virus scanners and indexers briefly open each new file.

    Args:
        action: raises PermissionError while the file is in use.
        waits: seconds before each retry.
    """
    for wait in (*waits, None):
        try:
            action()
            return
        except PermissionError as error:
            if wait is None or getattr(error, "winerror", None) not in _PASSING:
                raise
            time.sleep(wait)


_PASSING = (5, 32, 33)  # temporary errors on Windows: access denied, sharing violation, lock violation


def resume_lines(
    path: Path, first: str, check: Callable[[list[dict[str, Any]]], object], flag: str
) -> list[dict[str, Any]]:
    """Reads the JSON lines that an interrupted run appended, and truncates an incomplete last line.

    Args:
        path: the file; it does not have to exist.
        first: the first key in each line.
        check: called with the records before truncation; if it raises, the file stays unchanged. KeyError, TypeError
            and ValueError mean that another program wrote the file.
        flag: the command-line flag for the file, for error messages.

    Returns:
        The records of the complete lines.

    Raises:
        OutputError: the file cannot be read, or another program wrote it.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise OutputError(f"cannot continue {path}: {error.strerror}. Choose another {flag}.") from error
    whole = content[: content.rfind(b"\n") + 1]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        check(records + _last_record(content[len(whole) :], first))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} exists and was not written by this command; choose another {flag}") from error
    if len(whole) < len(content):
        with write_errors(path), path.open("r+b") as file:
            file.truncate(len(whole))
    return records


def append_lines(path: Path, records: Iterable[Mapping[str, Any]], written: Callable[[], object]) -> None:
    """Appends records as JSON lines, one at a time; each is synced before `written` is called.

    Raises:
        OutputError: the file cannot be written.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that closing the file does not retry a line that could not be written.
        file = path.open("ab", buffering=0)
    with file:
        for record in records:
            line = json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
            with write_errors(path, " Run the same command again to continue."):
                done = file.write(line)
                if done < len(line):  # the disk had room for only a part; writing the rest raises the reason
                    file.write(line[done:])
                os.fsync(file.fileno())
            written()


@contextlib.contextmanager
def hold_directory(directory: str | os.PathLike[str], flag: str = "--output_dir") -> Iterator[Path]:
    """Creates a directory and locks it: a second run is refused immediately while the first one is running.

    The operating system holds the lock, so a killed run leaves none behind.  Directories that stay empty are removed.

    Args:
        directory: the directory to create and lock.
        flag: the command-line flag for the directory, for error messages.

    Yields:
        The directory as an absolute path.

    Raises:
        OutputError: the name is empty, the directory cannot be written, or another run is using it.
    """
    if not os.fspath(directory):
        raise OutputError("output_dir is '', expected the name of a directory (. for the current one).")
    path = Path(os.path.expanduser(directory)).absolute()
    with _removed_if_empty(path), _locked(path / _LOCK, path, f"output directory {path}", flag):
        yield path


@contextlib.contextmanager
def hold_file(path: str | os.PathLike[str], flag: str, *, wait: bool = False) -> Iterator[None]:
    """Locks a file that a run appends to, as `hold_directory` locks a directory; the file does not have to exist.

    Args:
        path: the file; its directory is created if needed.
        flag: the command-line flag for the file, for error messages.
        wait: whether to wait until no other run is using the file.

    Raises:
        OutputError: its directory cannot be written, or another run is using the file.
    """
    path = Path(path).absolute()
    with _locked(path.parent / f".{path.name}.lock", path, str(path), flag, wait=wait):
        yield


@contextlib.contextmanager
def hold_output(path: str | os.PathLike[str], *, is_directory: bool) -> Iterator[None]:
    """Checks that a result can be written before it is computed, and keeps other runs away from its path meanwhile.

    Args:
        path: what will be written.
        is_directory: whether it is a directory instead of a file.

    Raises:
        OutputError: it cannot be written, or another run or program is using it.
    """
    path = Path(path).absolute()
    if is_directory:
        with hold_directory(path, "OUTPUT"):
            yield
        return
    with write_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory, expected the name of a file", str(path))
        if path.exists():
            _patiently(lambda: path.open("r+b").close())  # Windows cannot replace a file that is open elsewhere
    with _removed_if_empty(path.parent), hold_file(path, "OUTPUT"):
        yield


@contextlib.contextmanager
def _removed_if_empty(path: Path) -> Iterator[None]:
    """Removes those of a directory and its parents that did not exist before, if they are still empty at the end."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError, ValueError):  # in use, or not a valid name
                folder.rmdir()


@contextlib.contextmanager
def _locked(lock_file: Path, path: Path, what: str, flag: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file for `path`, and removes it at the end."""
    from filelock import FileLock, Timeout  # torch requires it

    lock = FileLock(lock_file)
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except Timeout as error:
        raise OutputError(
            f"{what} is in use by another run. Wait for it to finish, or choose another {flag}."
        ) from error
    except OSError as error:
        raise OutputError(_why_not_written(path, error)) from error
    except ValueError as error:  # NUL character in the name
        raise OutputError(f"{str(path)!r} cannot be the name of a directory or file: {error}.") from error
    try:
        yield
    finally:
        try:
            if os.name != "nt":  # on Windows, filelock removes the file itself
                remove_file(lock_file)  # while it is still locked: nobody can lock it in between
        finally:
            lock.release()


def _last_record(rest: bytes, first: str) -> list[Any]:
    """Returns the record in a last line that lacks only its line ending; an empty list if more is missing.

    Raises:
        ValueError: `append_lines` cannot have written the beginning of this line.
    """
    start = f'{{"{first}": '.encode()
    if not rest.startswith(start[: len(rest)]):
        raise ValueError("the last line is not the beginning of a record")
    try:
        return [json.loads(rest)]
    except ValueError:
        return []


@contextlib.contextmanager
def write_errors(path: Path, advice: str = "") -> Iterator[None]:
    """Turns file system errors into OutputErrors that say what to do; `advice` is appended."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if (fault := _system_error(error)) is None:
            raise
        raise OutputError(_why_not_written(path, fault) + advice) from error


def _system_error(error: Exception) -> OSError | None:
    """Returns an exception as the OSError that it is; of libraries in Rust (tokenizers), only its text says so."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(directory: Path) -> None:
    """Makes a rename survive a power failure; Windows has no such call and does not need one."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why_not_written(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        return f"cannot write {path}: the disk is full. Free some space, or write to another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write {path}: {reason}. Choose a directory that you can write to."
    length = len(os.path.abspath(path))
    if error.errno == errno.ENAMETOOLONG or (os.name == "nt" and error.errno == errno.ENOENT and length >= _MAX_PATH):
        return (
            f"cannot write {path}: its path of {length} characters is too long. Choose a directory closer to the root"
            + (", or allow long paths in Windows (LongPathsEnabled)." if os.name == "nt" else ".")
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"cannot write {path}: there is a file where a directory is needed. Choose another directory."
    return f"cannot write {path}: {reason}."


def free_memory() -> float | None:
    """Returns how many bytes can be allocated without swapping, or None if psutil is not installed.

    A container's memory limit is taken into account.
    """
    try:
        import psutil
    except ImportError:
        return None
    return min(float(psutil.virtual_memory().available), _left_of_limit(Path("/sys/fs/cgroup")))


def _left_of_limit(groups: Path) -> float:
    """Returns the memory left within a container's limit (Linux cgroups, version 2 or 1); infinity without one."""
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = (groups / limit_file).read_text("ascii"), (groups / usage_file).read_text("ascii")
            lines = (groups / limit_file).with_name("memory.stat").read_text("ascii").splitlines()
            file_cache = float(dict(line.split() for line in lines).get("inactive_file", 0))  # freed on demand
            return max(0.0, float(limit) - float(usage) + file_cache)  # float() rejects "max": there is no limit
        except (OSError, ValueError):
            continue
    return float("inf")


def cache_directory() -> Path:
    """Returns the directory for cached files: LORALIB_CACHE, or else the system's cache directory."""
    chosen = os.environ.get("LORALIB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "loralib" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "loralib"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loralib"
