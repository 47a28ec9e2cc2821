"""The only files that tensors are read from and written to: safetensors, and pickles read without running code."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, FormatError
from ..files import write_whole

__all__ = ["read_pickle", "read_safetensors", "write_pickle", "write_safetensors"]


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads all tensors and the metadata of a safetensors file.

    Raises:
        AdapterError: there is no such file.
        FormatError: the file is truncated, corrupt or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = _existing(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path} cannot be read as safetensors: {_first_line(error)}. The file is truncated, corrupt or of another "
            "kind; copy it again from its source."
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
            raise OSError(int(number[1]) if number else errno.EIO, _first_line(error)) from error

    write_whole(path, write, check)


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Reads a file that torch.save wrote, without running anything in it (``weights_only=True``).

    Raises:
        AdapterError: there is no such file.
        FormatError: the file is truncated, corrupt, or holds objects other than tensors and plain values.
    """
    path = _existing(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path} was not read: besides tensors it holds objects that loading would run as code "
            f"({_first_line(error)}). Ask for a safetensors file instead."
        ) from error
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise FormatError(
            f"{path} cannot be read as a torch checkpoint: {_first_line(error)}. The file is truncated, corrupt or of "
            "another kind; copy it again from its source."
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
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
