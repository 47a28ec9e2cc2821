"""The only files that tensors are read from and written to: safetensors, and pickles read without running code."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import AdapterError, FormatError
from ..files import write_whole

__all__ = [
    "parse_json",
    "parse_pickle",
    "parse_safetensors",
    "parsed",
    "read_bytes",
    "read_pickle",
    "read_safetensors",
    "write_pickle",
    "write_safetensors",
]


_MAX_FILE = 16 * 2**30  # bytes; adapters have some megabytes, with trained embeddings a few gigabytes
_MAX_HEADER = 16 * 2**20  # bytes; the names of a thousand tensors take 0.1 MB

_T = TypeVar("_T")


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads all tensors and the metadata of a safetensors file.

    Raises:
        AdapterError: there is no such file.
        FormatError: the file is truncated, corrupt, or names something twice.
    """
    return read_bytes(path, parse_safetensors)


def parse_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file; see `read_safetensors`."""
    from safetensors.torch import load

    # The library keeps the last of two equal names, and reads a header of any size.
    size = int.from_bytes(data[:8], "little")
    if size > _MAX_HEADER:
        raise FormatError(f"its header claims {size:,} bytes, expected at most {_MAX_HEADER:,}")
    header = parse_json(data[8 : 8 + size])
    return load(data), dict(header.get("__metadata__", {}))


def parse_json(data: bytes | str) -> Any:
    """Parses JSON, strictly: a key that stands twice in an object, and NaN or infinite numbers, are errors.

    Raises:
        FormatError: it is no such JSON.

    >>> parse_json('{"r": 8}')
    {'r': 8}
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise FormatError(f"the key {twice[:80]!r} stands twice")
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
        raise FormatError(f"no JSON: {_reason(error)}") from error


def read_bytes(path: str | os.PathLike[str], parse: Callable[[bytes], _T]) -> _T:
    """Reads a whole file and parses it.

    Raises:
        AdapterError: there is no such file.
        FormatError: the parser cannot make sense of it.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"there is no file {path}; check the path")
    try:
        if path.stat().st_size > _MAX_FILE:
            raise FormatError(f"{path} has {path.stat().st_size:,} bytes, expected at most {_MAX_FILE:,}")
        data = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from error
    return parsed(data, parse, path)


def parsed(data: bytes, parse: Callable[[bytes], _T], name: object) -> _T:
    """Parses the content of a file that may be hostile; `name` is what the file is called in messages.

    Raises:
        FormatError: whatever the file brought the parser to raise.
    """
    try:
        return parse(data)
    except Exception as error:
        raise FormatError(
            f"{name} cannot be read: {_reason(error)}. The file is truncated, corrupt or of another kind; "
            "copy it again from its source."
        ) from error


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Writes tensors and metadata to a safetensors file, whole or not at all; see `write_whole` for `check`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(plain, str(temporary), {"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # an OSError in other clothes: "... (os error 28)"
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, _reason(error)) from error
        _sort_metadata(temporary)

    write_whole(path, write, check)


def _sort_metadata(path: Path) -> None:
    """Puts the metadata of a safetensors file in order: the library writes it in another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:  # the same characters in another order; the rest is padding
            file.seek(8)
            file.write(ordered.ljust(length))


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Reads a file that torch.save wrote, without running anything in it (``weights_only=True``).

    Raises:
        AdapterError: there is no such file.
        FormatError: the file is truncated, corrupt, or holds objects other than tensors and plain values.
    """
    return read_bytes(path, parse_pickle)


def parse_pickle(data: bytes) -> Any:
    """Reads what torch.save wrote; see `read_pickle`."""
    _check_archive(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of old files does not help their readers
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            "besides tensors it holds objects that loading would run as code, so it was not loaded "
            f"({str(error).splitlines()[0][:100]}); ask for a safetensors file"
        ) from error
    for name, tensor in _tensors_in(value):
        _check_storage(name, tensor)
    return value


def write_pickle(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value with torch.save, whole or not at all."""
    content = io.BytesIO()  # torch.save on a file that cannot grow raises no OSError
    torch.save(value, content)
    write_whole(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


def _check_archive(data: bytes) -> None:
    """Refuses archives that would grow when they are unpacked, or are not what their checksums say.

    torch.save does not compress.  torch.load looks neither at checksums nor whether the two sizes of a part agree, and
    gives memory as it finds it for a part that is marked as a folder.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):  # the form before torch 1.6
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise FormatError("a name stands twice in the archive")
        if any(entry.compress_type or entry.compress_size != entry.file_size for entry in entries):
            raise FormatError("it is compressed, which torch.save does not do")
        if any(entry.is_dir() or entry.external_attr & 0x10 for entry in entries):
            raise FormatError("it holds a folder, which torch.save does not write")
        if sum(entry.file_size for entry in entries) > len(data):
            raise FormatError("its parts claim to be larger than the file")
        if broken := archive.testzip():
            raise FormatError(f"the checksum of {broken[:80]!r} is wrong")


def _tensors_in(value: Any, name: str = "the file", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Walks through what was loaded; a pickle may hold itself."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth > 8:
        raise FormatError(f"{name[:80]} is nested too deeply")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors_in(inner, str(key), depth + 1)


def _check_storage(name: str, tensor: Tensor) -> None:
    """Refuses tensors that are larger than what is stored for them (strides of 0), or not stored at all."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise FormatError(f"{name[:80]} is a tensor of layout {tensor.layout} on {tensor.device}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FormatError(f"{name[:80]} {tuple(tensor.shape)} is larger than what the file stores for it")


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
