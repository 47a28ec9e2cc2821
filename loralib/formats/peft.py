"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors.

Tensors are called ``base_model.model.`` + module path + ``.lora_A.weight`` and so on; embeddings' factors and trained
biases end without ``.weight``.  nn.MultiheadAttention keeps its out_proj under ``base_layer`` there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import BLOCKS, Adapter, expand_blocks, narrow_blocks, without_expressions
from ..config import LoraConfig
from ..errors import AdapterError, FormatError, list_faults
from ..files import remove_file, write_json
from .tensors import (
    MAX_SETTINGS,
    parse_json,
    read_bytes,
    read_pickle,
    read_safetensors,
    refuse_other_form,
    write_safetensors,
)

__all__ = ["CONFIG_FILE", "TENSOR_FILE", "read_peft", "write_peft"]

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MLX_TENSOR_FILE = "adapters.safetensors"

_PREFIX = "base_model.model."


def read_peft(directory: str | os.PathLike[str]) -> Adapter:
    """Reads a PEFT adapter directory as a value.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors (or an older adapter_model.bin).

    Raises:
        AdapterError: the directory holds no LoRA adapter, or one that uses features that would be lost.
        FormatError: a file is corrupt.
    """
    directory = Path(directory)
    missing = [name for name in (CONFIG_FILE, TENSOR_FILE) if not (directory / name).is_file()]
    if CONFIG_FILE in missing or (missing and not (directory / PICKLE_FILE).is_file()):
        what = "does not exist" if not directory.exists() else f"holds no adapter: {' and '.join(missing)} missing"
        raise AdapterError(f"{directory} {what}. Give the directory that training or save_adapter() wrote.")
    config = LoraConfig.from_dict(_read_config(directory / CONFIG_FILE))
    metadata: dict[str, str] = {}
    if TENSOR_FILE in missing:
        tensors = read_pickle(directory / PICKLE_FILE)
        if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise FormatError(f"{directory / PICKLE_FILE} holds no mapping of names to tensors")
    else:
        tensors, metadata = read_safetensors(directory / TENSOR_FILE)
    metadata.pop("format", None)
    named = {_name_here(name): tensors[name] for name in sorted(tensors)}  # files have no order of their own
    if len(named) < len(tensors):
        raise FormatError(f"{directory} names a tensor twice, in an older and a newer way; copy the adapter again")
    adapter = without_expressions(Adapter(config, named, metadata))
    if BLOCKS in metadata:
        try:
            blocks = parse_json(metadata[BLOCKS])
        except FormatError as error:
            raise FormatError(f"{directory / TENSOR_FILE}: metadata {BLOCKS!r} holds {error}") from error
        fused = [name for name in adapter.modules if f"{name}.lora_embedding_A" not in named]
        lone = [name for name in fused if not {f"{name}.lora_A", f"{name}.lora_B"} <= set(named)]
        if lone:
            raise FormatError(list_faults(f"{directory}: factors are missing for", lone, "Copy the adapter again."))
        return narrow_blocks(adapter, blocks)
    return adapter


def write_peft(adapter: Adapter, directory: str | os.PathLike[str]) -> None:
    """Writes a PEFT adapter directory: the tensors first, the config last; other files there are left alone.

    Args:
        adapter: fused blocks are written out as plain low-rank updates that every reader knows.
        directory: made if needed.
    """
    directory = Path(directory)
    refuse_other_form(directory, (MLX_TENSOR_FILE,))
    plain = expand_blocks(adapter)
    # Without its config, what stands in the directory is no adapter: a killed run leaves no mixture of two.
    remove_file(directory / CONFIG_FILE)
    tensors = {_name_there(name, plain.tensors): tensor for name, tensor in plain.tensors.items()}
    write_safetensors(directory / TENSOR_FILE, tensors, plain.metadata)
    write_json(directory / CONFIG_FILE, plain.config.to_dict())


def _read_config(path: Path) -> dict[str, Any]:
    values = read_bytes(path, parse_json, most=MAX_SETTINGS)
    if not isinstance(values, dict):
        raise FormatError(f"{path} holds {type(values).__name__}, expected an object of settings")
    return values


def _name_here(name: str) -> str:
    """PEFT's name of a tensor -> ours."""
    name = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
    # Older files carry the adapter's name; newer ones leave it out.
    name = re.sub(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.default(?=\.|$)", r".\1", name)
    return re.sub(r"\.(lora_[AB]|lora_magnitude_vector)\.weight$", r".\1", name)


def _name_there(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Our name of a tensor -> PEFT's."""
    module, _, leaf = name.rpartition(".")
    if leaf == "bias" and f"{module}.lora_A" in tensors:  # PEFT wraps what it adapts
        leaf = "base_layer.bias"
    parent = module.removesuffix(".out_proj")
    if parent != module and f"{parent}.lora_A" in tensors:  # nn.MultiheadAttention
        module = f"{parent}.base_layer.out_proj"
    return f"{_PREFIX}{module}.{leaf}" + (".weight" if leaf in ("lora_A", "lora_B") else "")
