"""Files that appear whole or not at all or grow by lines, and what one run at a time may hold."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from .errors import OutputError

__all__ = [
    "append_lines",
    "cache_directory",
    "free_memory",
    "hold_directory",
    "hold_file",
    "read_text",
    "remove_file",
    "resume_lines",
    "write_json",
    "write_text",
    "write_whole",
]

_LOCK = ".loralib.lock"


def write_whole(
    path: str | os.PathLike[str], write: Callable[[Path], object], check: Callable[[Path], object] | None = None
) -> None:
    """Writes a file aside, syncs it, and renames it into place: readers see the old file or the new one.

    Args:
        path: the file to write; its directory is made if needed.
        write: called with the path of a temporary file in the same directory; must create its content.
        check: called with the same path once the content is synced; what it raises keeps the file from appearing.

    Raises:
        OutputError: the directory or file cannot be written (read-only, disk full, path is a directory).
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        # mkstemp makes files private to the user; give the mode an ordinary open() would have given.
        with contextlib.suppress(OSError):
            temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        _sync_directory(path.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(_why_not_written(path, error)) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text with "\\n" line ends, whole or not at all (see `write_whole`)."""
    write_whole(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented UTF-8 JSON, whole or not at all (see `write_whole`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False, allow_nan=False) + "\n")


def read_text(path: str | os.PathLike[str]) -> str:
    """Returns the text of a UTF-8 file; a byte-order mark is dropped."""
    return Path(path).read_text(encoding="utf-8-sig")


def remove_file(path: str | os.PathLike[str]) -> None:
    """Removes a file if it is there.

    Raises:
        OutputError: it is there and cannot be removed.
    """
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(_why_not_written(Path(path), error)) from error


def resume_lines(
    path: Path, first: str, check: Callable[[list[dict[str, Any]]], object], flag: str
) -> list[dict[str, Any]]:
    """Reads the JSON lines that a killed run appended, and cuts off a last one that it left half-written.

    Args:
        path: the file; need not be there.
        first: the key that each line begins with.
        check: called with what the lines hold before anything is cut; whatever it raises leaves the file as it is.
            KeyError, TypeError and ValueError say that another program wrote it.
        flag: by which a user chooses the file, for messages.

    Returns:
        What the whole lines hold.

    Raises:
        OutputError: the file cannot be read, or was written by something else.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise OutputError(f"cannot go on with {path}: {error.strerror}. Choose another {flag}.") from error
    whole = content[: content.rfind(b"\n") + 1]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        check(records + _unended(content[len(whole) :], first))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} is there and was not written by this command; choose another {flag}") from error
    if len(whole) < len(content):
        with _explained(path), path.open("r+b") as file:
            file.truncate(len(whole))
    return records


def append_lines(path: Path, records: Iterable[Mapping[str, Any]], written: Callable[[], object]) -> None:
    """Appends lines of JSON as they come, each synced before `written` is called.

    Raises:
        OutputError: the file cannot be written.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line that could not be written is not tried again when the file is closed.
        file = path.open("ab", buffering=0)
    with file:
        for record in records:
            line = json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
            with _explained(path, " Run the same command again to go on."):
                done = file.write(line)
                if done < len(line):  # the disk had room for a part; the rest says why
                    file.write(line[done:])
                os.fsync(file.fileno())
            written()


@contextlib.contextmanager
def hold_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a directory and holds it: a second run that wants it is refused while the first one lives.

    The lock is the operating system's (flock, or msvcrt on Windows), so a killed run never leaves one behind.

    Args:
        directory: the directory to make and hold.

    Yields:
        The directory as an absolute path.

    Raises:
        OutputError: the directory has no name, cannot be made or written, or another run holds it.
    """
    if not os.fspath(directory):
        raise OutputError("output_dir is '', expected the name of a directory (. is the current one).")
    path = Path(directory).absolute()
    with _held(path / _LOCK, path, f"output directory {path}", "--output_dir"):
        yield path


@contextlib.contextmanager
def hold_file(path: str | os.PathLike[str], flag: str) -> Iterator[None]:
    """Holds a file that a run adds to, as `hold_directory` does a directory; the file need not be there.

    Args:
        path: the file; its directory is made if needed.
        flag: by which a user chooses it, for messages.

    Raises:
        OutputError: its directory cannot be made or written, or another run holds the file.
    """
    path = Path(path).absolute()
    with _held(path.parent / f".{path.name}.lock", path, str(path), flag):
        yield


@contextlib.contextmanager
def _held(lock: Path, path: Path, what: str, flag: str) -> Iterator[None]:
    """Holds a lock file, made if needed and removed in the end, that stands for `path`."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+b")
    except OSError as error:
        raise OutputError(_why_not_written(path, error)) from error
    except ValueError as error:  # a NUL in the name
        raise OutputError(f"{str(path)!r} cannot be the name of a directory or file: {error}.") from error
    try:
        with file:
            if not _lock(file):
                raise OutputError(
                    f"{what} is held by another run that is still going. Wait for it to end, or choose another {flag}."
                )
            try:
                yield
            finally:
                # Unlink only while the lock is held, so that nobody can lock the file between the two.
                if os.name != "nt":
                    remove_file(lock)
    finally:
        if os.name == "nt":  # Windows cannot unlink an open file; nor one that another run has open
            with contextlib.suppress(OSError):
                remove_file(lock)


def _lock(file: IO[bytes]) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have unlinked the file we opened: then nobody else sees our lock.
            return os.fstat(file.fileno()).st_nlink > 0
    except OSError:
        return False
    return True


def _unended(rest: bytes, first: str) -> list[Any]:
    """What a last line without its end holds, if that is all it lacks.

    Raises:
        ValueError: this cannot be the beginning of a line of ours.
    """
    start = f'{{"{first}": '.encode()
    if not rest.startswith(start[: len(rest)]):
        raise ValueError("the last line is something else")
    try:
        return [json.loads(rest)]
    except ValueError:
        return []


@contextlib.contextmanager
def _explained(path: Path, then: str = "") -> Iterator[None]:
    """Turns an error of the file system into one that a user understands."""
    try:
        yield
    except OSError as error:
        raise OutputError(_why_not_written(path, error) + then) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(directory: Path) -> None:
    """Makes a rename last through a power cut; Windows has no such call and needs none."""
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
        return f"cannot write {path}: {reason}. Choose a directory that you may write to."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"cannot write {path}: a file is in the way where a directory is needed. Choose another directory."
    return f"cannot write {path}: {reason}."


def free_memory() -> float | None:
    """Returns how many bytes of memory are free, or None where the system does not say.

    Linux and Windows say what is free without swapping, and a container's own limit counts; elsewhere the whole memory
    is the best that is known.
    """
    if os.name == "nt":
        return _free_on_windows()
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (AttributeError, OSError, ValueError):
            return None
    return min(free, _left_of_limit(Path("/sys/fs/cgroup")))


def _left_of_limit(groups: Path) -> float:
    """What a container's memory limit leaves (Linux control groups, version 2 or 1); without a limit infinite."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (groups / limit).read_text("ascii"), (groups / used).read_text("ascii")
            stat = dict(
                line.split() for line in (groups / limit).with_name("memory.stat").read_text("ascii").splitlines()
            )
            kept = float(stat.get("inactive_file", 0))  # of files: given up when memory is short
            return max(0.0, float(most) - float(now) + kept)  # "max" is no number: there is no limit
        except (OSError, ValueError):
            continue
    return float("inf")


def _free_on_windows() -> float | None:
    class Status(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API."""

        _fields_ = [
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("free", ctypes.c_uint64),
            ("others", ctypes.c_uint64 * 5),
        ]

    status = Status()
    status.length = ctypes.sizeof(status)
    found = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return float(status.free) if found else None


def cache_directory() -> Path:
    """Returns where what was made once is kept: LORALIB_CACHE, else the system's place for caches."""
    chosen = os.environ.get("LORALIB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "loralib" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "loralib"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loralib"
