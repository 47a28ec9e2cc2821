"""Adapters in files: `save_adapter`, `load_adapter`, and one module per format."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from torch import nn

from ..adapter import Adapter, ApplyReport, apply_adapter
from ..config import LoraConfig
from ..errors import AdapterError, FormatError
from ..hub import fetch, is_hub_id
from ..wrapping import unwrapped
from .foreign import describe, names_in
from .gguf import is_gguf, read_gguf, write_gguf
from .merged import MergeReport, merge_and_compare, merge_into, save_merged
from .microsoft import beyond_microsoft, read_microsoft, write_microsoft
from .mlx import is_mlx, read_mlx, write_mlx
from .old_names import with_present_names
from .peft import read_peft, save_adapter, write_peft
from .portable import Portable, check_portable, export, make_portable
from .tensors import CONFIG_FILE, MLX_FILE, PEFT_FILE, PEFT_PICKLE
from .trainer import is_trainer_checkpoint, save_trained_weights
from .usage import how_to_run, modelfile

__all__ = [
    "TOKENIZER_FILES",
    "MergeReport",
    "Portable",
    "beyond_microsoft",
    "check_portable",
    "export",
    "how_to_run",
    "is_read_with_base",
    "is_trainer_checkpoint",
    "load_adapter",
    "locate_adapter",
    "make_portable",
    "merge_and_compare",
    "merge_into",
    "modelfile",
    "read_adapter",
    "read_gguf",
    "read_microsoft",
    "read_mlx",
    "read_peft",
    "save_adapter",
    "save_merged",
    "save_trained_weights",
    "stores_settings",
    "with_present_names",
    "write_gguf",
    "write_microsoft",
    "write_mlx",
    "write_peft",
]


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    config: LoraConfig | None = None,
    allow_base_mismatch: bool = False,
) -> ApplyReport:
    """Applies a saved adapter to a model, strictly: either every tensor fits, or the model is left unchanged.

    Args:
        model: the base model; if it holds an adapter, this is replaced once the new one is known to fit.
        path: a PEFT or MLX directory, or its id on the Hub (see `locate_adapter`); a GGUF LoRA file, or a Microsoft
            checkpoint file.
        config: the settings for a Microsoft checkpoint, whose file contains none.
        allow_base_mismatch: see `loralib.adapter.apply_adapter`.

    Returns:
        What was applied; ``print`` it.

    Raises:
        AdapterError: there is no adapter at the path, or it does not fit; lists every fault.
    """
    adapter = read_adapter(path, config=config, model=unwrapped(model))
    return apply_adapter(model, adapter, allow_base_mismatch=allow_base_mismatch)


def read_adapter(
    path: str | os.PathLike[str], *, config: LoraConfig | None = None, model: nn.Module | None = None
) -> Adapter:
    """Reads an adapter in any format, without applying it.

    Args:
        path: see `load_adapter`.
        config: the settings for a Microsoft checkpoint, whose file contains none.
        model: the base model; needed for GGUF and MLX, which use their own module names, and for adapters with module
            names from an older version of transformers.

    Raises:
        AdapterError: there is no adapter at the path, it cannot be read without `config` or `model`, or it stores its
            own settings, which `config` would contradict.
        FormatError: a file is corrupt.
    """
    path = locate_adapter(path)
    if config is not None and stores_settings(path):
        raise AdapterError(
            f"{path} stores its own settings; leave out config, which is for checkpoints of Microsoft's loralib"
        )
    if is_read_with_base(path):
        gguf = path.is_file()
        if model is None:
            kind = "GGUF" if gguf else "MLX"
            raise AdapterError(
                f"{path} is {kind}, which has its own names for modules; give the base model (model=... in Python), "
                "or convert it to a directory that every command reads: `loralib convert` with --model"
            )
        return read_gguf(path, model) if gguf else read_mlx(path, model)
    if not path.is_file():
        adapter = read_peft(path)
        return adapter if model is None else with_present_names(adapter, model)
    if (foreign := _foreign(path)) is not None:
        raise FormatError(f"{path} is {foreign[0]}. {foreign[1]}")
    if config is None and _is_checkpoint(path):
        read_microsoft(path, LoraConfig())  # settings do not help a file that cannot be read
        raise AdapterError(
            f"{path} contains no settings, like every file in the form of Microsoft's loralib; give "
            "config=LoraConfig(r=..., lora_alpha=..., target_modules=...) in Python, or convert it to a directory "
            "that every command reads: `loralib convert` with --trained_rank, --lora_alpha, --target_modules"
        )
    if config is None:
        raise AdapterError(
            f"{path} is not an adapter; expected a directory that training or save_adapter() wrote, an MLX directory, "
            "a GGUF LoRA file or a checkpoint of Microsoft's loralib"
        )
    return read_microsoft(path, config)


def is_read_with_base(path: str | os.PathLike[str]) -> bool:
    """Tells whether reading an adapter requires its base model: GGUF and MLX use their own module names."""
    path = locate_adapter(path)
    return (path.is_file() and is_gguf(path)) or is_mlx(path)


def stores_settings(path: str | os.PathLike[str]) -> bool:
    """Tells whether an adapter stores its settings: all do but Microsoft's checkpoints."""
    path = locate_adapter(path)
    return path.is_dir() or is_gguf(path)


def locate_adapter(path: str | os.PathLike[str]) -> Path:
    """Returns the directory or file of an adapter; downloads it from the Hub if there is no local one.

    Args:
        path: the directory, or a file in it, or an id on the Hub: ``owner/name``, optionally with the folder in the
            repository and a revision, as in ``owner/name/folder@revision``.

    Raises:
        AdapterError: the repository contains no adapter, or cannot be reached.
    """
    local = Path(path).expanduser()
    if not local.exists() and isinstance(path, str) and "/" in path and is_hub_id(path):
        return fetch(
            path,
            functools.partial(_needed_files, path),
            [CONFIG_FILE, PEFT_FILE, PEFT_PICKLE, MLX_FILE, *TOKENIZER_FILES],
            error=AdapterError,
            what="adapter",
            advice="Check the name and the network, or give the directory that training or save_adapter() wrote.",
        )
    return local.parent if local.name in (CONFIG_FILE, PEFT_FILE, PEFT_PICKLE, MLX_FILE) else local


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def _needed_files(name: str, files: list[str]) -> list[str]:
    """Returns which files of a repository to download: an adapter, one copy of its tensors, and its tokenizer.

    >>> _needed_files("a/b", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "optimizer.pt"])
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    tensors = next((file for file in (PEFT_FILE, PEFT_PICKLE, MLX_FILE) if file in files), None)
    if CONFIG_FILE not in files or tensors is None:
        kind = "a model, not an adapter; give it as --model" if "config.json" in files else "not an adapter"
        below = sorted({file.rpartition("/")[0] for file in files if file.endswith(f"/{CONFIG_FILE}")})
        hint = f" There are adapters in its subfolders: {name}/{below[0]}" if below else ""
        raise AdapterError(
            f"{name} on the hub is {kind}: expected {CONFIG_FILE} and {PEFT_FILE}, but it contains "
            f"{', '.join(files[:10]) or 'nothing'}.{hint}"
        )
    return [CONFIG_FILE, tensors, *(file for file in files if file in TOKENIZER_FILES)]


def _foreign(path: Path) -> tuple[str, str] | None:
    """Identifies another tool's adapter file, with advice on what to do with it; see `describe`."""
    names = names_in(path) if _is_checkpoint(path) else None
    return None if names is None else describe(names)


def _is_checkpoint(path: Path) -> bool:
    """Tells whether a file begins like those of torch.save (a zip archive, or a pickle) or safetensors."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start.startswith((b"PK\x03\x04", b"\x80")) or start[8:] == b"{"
