"""Adapters in files: `save_adapter` and `load_adapter`, and one module for each format."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import nn

from ..adapter import Adapter, ApplyReport, adapter_of, apply_adapter
from ..config import LoraConfig
from ..errors import AdapterError
from ..injection import adapted_layers
from ..layers import LoRALinear
from .gguf import is_gguf, read_gguf, write_gguf
from .merged import MergeReport, merge_and_compare, merge_into, save_merged
from .microsoft import read_microsoft, write_microsoft
from .mlx import is_mlx, read_mlx, write_mlx
from .peft import read_peft, write_peft
from .portable import Portable, check_portable, export, make_portable, named_modules, task_of

__all__ = [
    "MergeReport",
    "Portable",
    "check_portable",
    "export",
    "is_read_with_base",
    "load_adapter",
    "make_portable",
    "merge_and_compare",
    "merge_into",
    "read_adapter",
    "read_gguf",
    "read_microsoft",
    "read_mlx",
    "read_peft",
    "save_adapter",
    "save_merged",
    "write_gguf",
    "write_microsoft",
    "write_mlx",
    "write_peft",
]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Adapter:
    """Saves the adapter of a model as a PEFT directory that PEFT, vLLM and transformers load.

    Args:
        model: adapted by `loralib.inject`, or built from loralib's layers.
        directory: made if needed; its files are replaced one by one, the config last, and others are left alone.

    Returns:
        What was saved.

    Raises:
        TargetError: the model holds no adapter.
        OutputError: the directory cannot be written.
    """
    adapter = adapter_of(model)
    targets = named_modules(adapter, model)
    name = adapter.config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    # A place in the hub's cache means nothing on another machine.
    if cached := re.search(r"[\\/]models--([^\\/]+)[\\/]snapshots[\\/]", name or ""):
        name = cached[1].replace("--", "/")
    # Readers of Conv1D want to be told that the weight is stored (in, out).
    turned = any(isinstance(m, LoRALinear) and m.fan_in_fan_out for _, m in adapted_layers(model))
    config = adapter.config.replace(
        target_modules=targets,  # which says it all
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        base_model_name_or_path=name,
        fan_in_fan_out=turned,
        task_type=adapter.config.task_type or task_of(model),
    )
    adapter = Adapter(config, adapter.tensors, adapter.metadata)
    write_peft(adapter, directory)
    return adapter


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    config: LoraConfig | None = None,
    allow_base_mismatch: bool = False,
) -> ApplyReport:
    """Puts a saved adapter on a model, strictly: every tensor fits, or the model stays as it is.

    Args:
        model: the base; an adapter it holds is replaced once the new one is known to fit.
        path: a PEFT or MLX directory, a GGUF LoRA file, or a Microsoft checkpoint file.
        config: for a Microsoft checkpoint, which does not say its settings.
        allow_base_mismatch: see `loralib.adapter.apply_adapter`.

    Returns:
        How many tensors were applied; ``print`` it.

    Raises:
        AdapterError: there is no adapter at the path, or it does not fit; all faults are listed.
    """
    adapter = read_adapter(path, config=config, model=model)
    return apply_adapter(model, adapter, allow_base_mismatch=allow_base_mismatch)


def read_adapter(
    path: str | os.PathLike[str], *, config: LoraConfig | None = None, model: nn.Module | None = None
) -> Adapter:
    """Reads an adapter as a value, whichever format it is in.

    Args:
        path: see `load_adapter`.
        config: for a Microsoft checkpoint, which does not say its settings.
        model: for GGUF and MLX, which have names of their own for modules: the base.

    Raises:
        AdapterError: there is no adapter at the path, or more has to be given to understand it.
        FormatError: a file is corrupt.
    """
    path = _directory_of(Path(path))
    if is_read_with_base(path):
        gguf = path.is_file()
        if model is None:
            kind = "GGUF" if gguf else "MLX"
            raise AdapterError(
                f"{path} is {kind}, which has names of its own for modules; give the base model (model=... in Python). "
                "`loralib convert` with --base makes a directory of it that every command reads"
            )
        return read_gguf(path, model) if gguf else read_mlx(path, model)
    if not path.is_file():
        return read_peft(path)
    if config is None and _is_checkpoint(path):
        raise AdapterError(
            f"{path} is a checkpoint of Microsoft's loralib, which does not say its settings; give "
            "config=LoraConfig(r=..., lora_alpha=..., target_modules=...) in Python. `loralib convert` with "
            "--lora_dim, --lora_alpha, --target_modules makes a directory of it that every command reads"
        )
    if config is None:
        raise AdapterError(
            f"{path} is no adapter: expected the directory that training or save_adapter() wrote, or an MLX directory, "
            "a GGUF LoRA file or a checkpoint of Microsoft's loralib"
        )
    return read_microsoft(path, config)


def is_read_with_base(path: str | os.PathLike[str]) -> bool:
    """Tells whether an adapter is in a form with names of its own for modules (GGUF, MLX), which its base explains."""
    path = _directory_of(Path(path))
    return (path.is_file() and is_gguf(path)) or is_mlx(path)


def _directory_of(path: Path) -> Path:
    """Returns the directory of an adapter where one of its files is named."""
    names = ("adapter_model.safetensors", "adapters.safetensors", "adapter_config.json")
    return path.parent if path.name in names else path


def _is_checkpoint(path: Path) -> bool:
    """Tells whether a file begins as torch.save (a zip archive, or a pickle) or safetensors write it."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start.startswith((b"PK\x03\x04", b"\x80")) or start[8:] == b"{"
