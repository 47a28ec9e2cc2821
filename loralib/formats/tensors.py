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

__all__ = ["parse_json", "read_bytes", "read_pickle", "read_safetensors", "write_pickle", "write_safetensors"]


_MAX_FILE = 32 * 2**30  # bytes; adapters have some megabytes, with trained embeddings a few gigabytes
_MAX_HEADER = 16 * 2**20  # bytes; the names of a thousand tensors take 0.1 MB

_COPY_AGAIN = "The file is truncated, corrupt or of another kind; copy it again from its source."

_T = TypeVar("_T")


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads all tensors and the metadata of a safetensors file.

    Raises:
        AdapterError: there is no such file.
        FormatError: the file is truncated, corrupt, or names something twice.
    """
    from safetensors import safe_open

    path = _existing(path)
    try:
        with path.open("rb") as file:
            # The library keeps the last of two equal names, and reads a header of any size.
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER:
                raise FormatError(f"its header claims {size:,} bytes, expected at most {_MAX_HEADER:,}")
            parse_json(file.read(size))
        with safe_open(str(path), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return tensors, dict(opened.metadata() or {})
    except Exception as error:  # whatever a hostile file brings the library to raise
        raise FormatError(f"{path} cannot be read as safetensors: {_first_line(error)}. {_COPY_AGAIN}") from error


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
        raise FormatError(f"no JSON: {_first_line(error)}") from error


def read_bytes(path: str | os.PathLike[str], parse: Callable[[bytes], _T]) -> _T:
    """Reads a whole file and parses it; the parser's complaints get the path.

    Raises:
        AdapterError: there is no such file.
        FormatError: the parser could not make sense of it.
    """
    path = _existing(path)
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise FormatError(f"{path} cannot be read: {_first_line(error)}. {_COPY_AGAIN}") from error


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
            raise OSError(int(number[1]) if number else errno.EIO, _first_line(error)) from error
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
    path = _existing(path)
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of old files does not help their readers
            value = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in _tensors_in(value):
            _check_storage(name, tensor)
        return value
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path} was not read: besides tensors it holds objects that loading would run as code "
            f"({_first_line(error)}). Ask for a safetensors file instead."
        ) from error
    except Exception as error:  # whatever a hostile file brings the library to raise
        raise FormatError(
            f"{path} cannot be read as a torch checkpoint: {_first_line(error)}. {_COPY_AGAIN}"
        ) from error


def write_pickle(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value with torch.save, whole or not at all."""
    content = io.BytesIO()  # torch.save on a file that cannot grow raises no OSError
    torch.save(value, content)
    write_whole(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"there is no file {path}; check the path")
    if path.stat().st_size > _MAX_FILE:
        raise FormatError(f"{path} has {path.stat().st_size:,} bytes, expected at most {_MAX_FILE:,} for an adapter")
    return path


def _check_archive(path: Path) -> None:
    """Refuses archives that would grow when they are unpacked; torch.save never compresses."""
    if not zipfile.is_zipfile(path):  # the form before torch 1.6
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise FormatError("a name stands twice in the archive")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FormatError("it is compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise FormatError("its parts claim to be larger than the file")


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
