"""Reads and writes files of tensors: safetensors, and pickles, which are read without running code."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from ..errors import AdapterError, FormatError, OutputError, first_line
from ..files import free_memory, remove_file, write_json, write_whole

__all__ = [
    "CONFIG_FILE",
    "MAX_SETTINGS",
    "MLX_FILE",
    "PEFT_FILE",
    "PEFT_PICKLE",
    "check_names",
    "is_lfs_pointer",
    "parse_json",
    "parse_pickle",
    "parse_safetensors",
    "parsed",
    "read_bytes",
    "read_header",
    "read_pickle",
    "read_safetensors",
    "state_in",
    "write_directory",
    "write_pickle",
    "write_safetensors",
]

# The files in adapter directories: settings, and tensors, which identify the format.
CONFIG_FILE = "adapter_config.json"
PEFT_FILE, PEFT_PICKLE, MLX_FILE = "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"

_MAX_FILE = 16 * 2**30  # bytes; adapters take some megabytes, or a few gigabytes with trained embeddings
_MAX_HEADER = 16 * 2**20  # bytes; the names of a thousand tensors take 0.1 MB

MAX_SETTINGS = 1_000_000  # bytes; usually a few thousand, or some 100,000 with a rank for every module
_MAX_NAME = 1000  # characters
_MAX_STEPS = 5_000_000  # in a pickle; a tensor takes about thirty

_T = TypeVar("_T")


class _HoldsCode(FormatError):
    """A pickle contains more than tensors and plain values."""


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads all tensors and the metadata of a safetensors file.

    Raises:
        AdapterError: there is no such file.
        FormatError: the file is truncated or corrupt, or a name occurs twice.
    """
    return read_bytes(path, parse_safetensors, _parse_header)


def parse_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parses the content of a safetensors file; see `read_safetensors`."""
    from safetensors.torch import load

    header = _parse_header(data, len(data))
    try:
        return load(data), dict(header.get("__metadata__", {}))
    except KeyError as error:
        raise FormatError(f"tensors of type {error} are not supported") from error


def _parse_header(data: bytes, size: int) -> dict[str, Any]:
    """Parses and checks the header of a file with `size` bytes: the library accepts any length, and duplicate names."""
    length = int.from_bytes(data[:8], "little")
    if length > _MAX_HEADER:
        raise FormatError(f"its header claims {length:,} bytes, expected at most {_MAX_HEADER:,}")
    header = parse_json(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise FormatError("its header is not a list of tensors")
    check_names(header)
    for text in header.get("__metadata__", {}).values():
        if not all(char.isprintable() or char.isspace() for char in text):
            raise FormatError("its metadata holds control characters")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if max(ends, default=0) != size - 8 - length:
        raise FormatError(
            f"its header declares {max(ends, default=0):,} bytes of data, but there are {size - 8 - length:,}"
        )
    return header


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """Reads which tensors a safetensors file of any size contains, without reading them.

    Returns:
        For each name ``{"dtype": "BF16", "shape": [...], "data_offsets": [begin, end]}``, and the position in the file
        that offsets are relative to.

    Raises:
        FormatError: the file is truncated or corrupt, or a name occurs twice.
        OSError: it cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        start += file.read(min(int.from_bytes(start, "little"), _MAX_HEADER))
    entries = dict(parsed(start, lambda data: _parse_header(data, size), path))
    entries.pop("__metadata__", None)
    return entries, len(start)


def is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
    """Whether a file is what Git LFS puts in place of a large file until it is downloaded."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:  # a directory, or unreadable
        return False


_POINTER = b"version https://git-lfs.github.com/spec/"


def check_names(names: Iterable[str]) -> None:
    """Refuses names that must not be printed: very long ones, and those with control characters.

    Raises:
        FormatError: there is such a name.
    """
    for name in names:
        if len(name) > _MAX_NAME or not name.isprintable():
            raise FormatError(f"a name of {len(name):,} characters, or with control characters: {name[:80]!a}")


def parse_json(data: bytes | str) -> Any:
    """Parses JSON strictly: duplicate keys in an object, and NaN or infinite numbers, are errors.

    Raises:
        FormatError: the text is not valid JSON in this sense.

    >>> parse_json('{"r": 8}')
    {'r': 8}
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise FormatError(f"the key {duplicate[:80]!r} occurs twice")
        return values

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise FormatError(f"the number {text[:80]} is out of range")
        return value

    try:
        if isinstance(data, bytes):
            data = data.decode("utf-8-sig")
        return json.loads(data, object_pairs_hook=unique, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"not JSON: {first_line(error)}") from error


def read_bytes(
    path: str | os.PathLike[str],
    parse: Callable[[bytes], _T],
    check_start: Callable[[bytes, int], object] | None = None,
    max_size: int | None = None,
) -> _T:
    """Reads a whole file and parses it.

    Args:
        path: the file.
        parse: called with its content.
        check_start: called first, with the beginning of the file and its size; if it raises, the rest is not read.
        max_size: maximum size of such a file in bytes; default: that of any adapter.

    Raises:
        AdapterError: there is no such file.
        FormatError: the file is too large, or cannot be parsed.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"there is no file {path}; check the path")
    try:
        size = path.stat().st_size
        if size > (max_size := _MAX_FILE if max_size is None else max_size):
            raise FormatError(f"{path} has {size:,} bytes, expected at most {max_size:,}")
        if is_lfs_pointer(path):
            raise FormatError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory, or download it"
            )
        if check_start is not None:
            with path.open("rb") as file:
                parsed(file.read(8 + _MAX_HEADER), lambda start: check_start(start, size), path)
        free = free_memory()
        if free is not None and size > free:  # many systems promise memory that they do not have
            raise MemoryError
        data = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise AdapterError(f"{path} has {size:,} bytes, which is more than fits in memory") from error
    return parsed(data, parse, path)


def parsed(data: bytes, parse: Callable[[bytes], _T], name: object) -> _T:
    """Parses the content of a file that may be malicious; messages refer to the file by `name`.

    Raises:
        FormatError: the parser raised any exception.
    """
    try:
        return parse(data)
    except _HoldsCode as error:
        raise FormatError(f"{name} was not loaded: {error}. Ask for a safetensors file.") from error
    except Exception as error:
        raise FormatError(
            f"{name} cannot be read: {first_line(error)}. The file is truncated, corrupt or not of this kind; copy it "
            "again from its source."
        ) from error


def write_directory(
    directory: str | os.PathLike[str],
    file: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    settings: Mapping[str, Any],
) -> None:
    """Writes an adapter directory: first the tensors, then the settings; other files are left alone.

    Raises:
        OutputError: it holds an adapter in another format, whose settings file has the same name as ours.
    """
    directory = Path(os.path.expanduser(directory))
    for other in (MLX_FILE,) if file == PEFT_FILE else (PEFT_FILE, PEFT_PICKLE):
        if (directory / other).exists():
            raise OutputError(
                f"{directory} contains an adapter in another format ({other}), whose {CONFIG_FILE} would be "
                "overwritten; choose another directory"
            )
    # Without a config, a directory is not an adapter: an interrupted run cannot leave a mixture of two.
    remove_file(directory / CONFIG_FILE)
    write_safetensors(directory / file, tensors, metadata)
    write_json(directory / CONFIG_FILE, settings)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Writes tensors and metadata to a safetensors file, atomically; for `check`, see `write_whole`."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        # The library's save_file does not raise OSError if the disk is full.
        temporary.write_bytes(save(plain, {"format": "pt", **(metadata or {})}))
        _sort_metadata(temporary)

    write_whole(path, write, check)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file: the library writes it in a different order each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:  # the same characters in another order; the rest is padding
            file.seek(8)
            file.write(ordered.ljust(length))


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Reads a file written by torch.save, without running anything in it (``weights_only=True``).

    Raises:
        AdapterError: there is no such file.
        FormatError: the file is truncated, corrupt, or contains objects other than tensors and plain values.
    """
    return read_bytes(path, parse_pickle)


def state_in(value: Any) -> Any:
    """Returns the named tensors in what a training script saved, perhaps beside its optimiser; or the value itself.

    >>> state_in({"epoch": 1, "state_dict": {"0.lora_A": 2}})
    {'0.lora_A': 2}
    """
    while isinstance(value, Mapping):
        inner = next((value[key] for key in _STATES if isinstance(value.get(key), Mapping)), None)
        if inner is None:
            break
        value = inner
    return value


_STATES = ("model_state_dict", "state_dict", "model")


def parse_pickle(data: bytes) -> Any:
    """Parses the content of a file written by torch.save; see `read_pickle`."""
    for program in _programs(data):
        _check_program(program)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about old files do not help users
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _HoldsCode(_CODE) from error
    for name, tensor in _tensors_in(value):
        _check_storage(name, tensor)
    return value


def write_pickle(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value with torch.save, atomically."""
    content = io.BytesIO()  # torch.save does not raise OSError if the disk is full
    torch.save(value, content)
    write_whole(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


_CODE = "it contains objects other than tensors, which would run as code when loaded"
# The globals that torch.save uses for tensors and plain values.
_HARMLESS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch(\.cuda)? \w+Storage"
    r"|torch (Size|device|bool|(b?float|u?int|complex)\w+)"
)


def _programs(data: bytes) -> Iterator[IO[bytes]]:
    """Yields the pickles that torch.load will run; refuses archives that would expand, or whose checksums are wrong.

    torch.save does not compress.  torch.load checks neither checksums nor whether an entry's two sizes agree, and
    returns uninitialised memory for an entry that is marked as a directory.
    """
    # Like torch, only look at the first bytes: zipfile would also find an archive appended to a file in the old format.
    if not data.startswith(b"PK\x03\x04"):  # format before torch 1.6: five pickles, then the numbers
        stream = io.BytesIO(data)
        yield from (stream for _ in range(5))
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise FormatError("a name occurs twice in the archive")
        if any(entry.compress_type or entry.compress_size != entry.file_size for entry in entries):
            raise FormatError("it is compressed, which torch.save does not do")
        if any(entry.is_dir() or entry.external_attr & 0x10 for entry in entries):
            raise FormatError("it contains a folder, which torch.save does not write")
        if sum(entry.file_size for entry in entries) > len(data):
            raise FormatError("its entries claim to be larger than the file")
        if broken := archive.testzip():
            raise FormatError(f"the checksum of {broken[:80]!r} is wrong")
        programs = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(programs) != 1:
            raise FormatError(f"it contains {len(programs)} entries named data.pkl, expected one")
        yield io.BytesIO(archive.read(programs[0]))


def _check_program(stream: IO[bytes]) -> None:
    """Refuses a pickle that contains anything but tensors and plain values, without running it.

    torch does not run foreign code, but some of its own functions allocate as much memory as requested, or repeatedly
    double a string.  And deeply nested tuples, each containing the same tuple twice, take forever to hash.
    """
    tuples, tuple_on_top = set[object](), False  # memo indices of tuples
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if count > _MAX_STEPS:
            raise FormatError(f"it takes more than {_MAX_STEPS:,} steps to load")
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            tuples |= {argument} if tuple_on_top else set()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if argument in tuples:
                raise FormatError("it refers to a tuple twice, which torch.save does not write")
            tuple_on_top = False
        elif name == "GLOBAL" and not _HARMLESS.fullmatch(str(argument)):
            raise _HoldsCode(f"{_CODE} ({str(argument)[:100]})")
        elif name in ("MEMOIZE", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "POP", "POP_MARK", "DUP"):
            raise _HoldsCode(f"{_CODE} ({name})")
        elif name not in ("PROTO", "FRAME"):
            tuple_on_top = name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


def _tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Traverses a loaded object, each part once: a pickle may contain itself, or the same part a million times."""
    seen, stack = set[int](), [("the file", value)]
    while stack:
        name, inner = stack.pop()
        if isinstance(inner, Tensor):
            yield name, inner
        elif isinstance(inner, Mapping) and id(inner) not in seen:
            seen.add(id(inner))
            check_names(key for key in inner if isinstance(key, str))
            stack += [(str(key)[:80], part) for key, part in inner.items()]


def _check_storage(name: str, tensor: Tensor) -> None:
    """Refuses a tensor that is larger than its storage (with strides of 0), or has none."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise FormatError(f"{name[:80]} is a tensor of layout {tensor.layout} on {tensor.device}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FormatError(f"{name[:80]} {tuple(tensor.shape)} is larger than the data stored for it")
