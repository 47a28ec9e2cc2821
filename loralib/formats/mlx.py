"""MLX adapters in mlx-lm's format: adapters.safetensors and adapter_config.json.

A linear layer has ``lora_a`` (in, r) and ``lora_b`` (r, out), an embedding ``lora_a`` (vocabulary, r) and ``lora_b``
(r, width): the transposes of what other tools store.  A single scale applies to all updates.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..adapter import BASE, Adapter, kind_of
from ..combine import check_sound, factors, more_than_low_rank
from ..config import HUB_NAMES, LoraConfig, with_ranks
from ..errors import AdapterError, FormatError, list_faults
from .tensors import CONFIG_FILE, MAX_SETTINGS, MLX_FILE, parse_json, read_bytes, read_safetensors, write_directory

__all__ = ["is_mlx", "mlx_names", "read_mlx", "write_mlx"]

# For these kinds of models, mlx-lm uses transformers' module names; it renames GPT-2's `transformer` to `model`.
_SAME_NAMES = frozenset(
    "cohere gemma gemma2 gemma3_text granite llama mistral mixtral olmo2 phi3 qwen2 qwen3 smollm3 starcoder2".split()
)
_RENAMED: Mapping[str, tuple[str, str]] = {"gpt2": ("transformer.", "model.")}


def is_mlx(directory: str | os.PathLike[str]) -> bool:
    """Tells whether a directory holds an MLX adapter."""
    return (Path(directory) / MLX_FILE).is_file()


def mlx_names(model: nn.Module) -> dict[str, str]:
    """Returns mlx-lm's name for each linear layer and embedding of a model.

    Raises:
        AdapterError: this kind of model is not supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _SAME_NAMES and kind not in _RENAMED:
        raise AdapterError(
            f"MLX adapters for {kind or type(model).__name__} are not supported, only for "
            f"{', '.join(sorted(_SAME_NAMES | set(_RENAMED)))}. Merge the adapter and convert the model instead."
        )
    ours, theirs = _RENAMED.get(str(kind), ("", ""))
    tied = _tied_head(model)
    return {
        name: theirs + name.removeprefix(ours) if name.startswith(ours) else name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module is not tied
    }


def write_mlx(adapter: Adapter, directory: str | os.PathLike[str], model: nn.Module) -> None:
    """Writes an MLX adapter directory: the tensors first, the settings last.

    Args:
        adapter: portable (see `loralib.formats.portable`): one rank, one alpha, linear layers and embeddings only.
        directory: created if needed.
        model: the base model, for its module names.

    Raises:
        AdapterError: the format cannot express the adapter.
    """
    check_sound(adapter)
    names, config = mlx_names(model), adapter.config
    faults = [f"{name}: mlx-lm does not apply adapters to this module" for name in adapter.modules if name not in names]
    if config.rank_pattern or config.alpha_pattern or config.enable_lora:
        faults.append("it does not have the same rank and scale for all modules")
    faults += more_than_low_rank(adapter)
    if faults:
        raise AdapterError(list_faults("the adapter cannot be written for MLX", faults, "Make it portable first."))
    tensors, keys, layers = {}, list[str](), set[int]()
    for name in adapter.modules:
        A, B = factors(adapter, name)
        tensors[f"{names[name]}.lora_a"], tensors[f"{names[name]}.lora_b"] = A.T, B.T
        in_layer = re.fullmatch(r".*?\.(\d+)\.(.+)", names[name])
        keys.append(in_layer[2] if in_layer else names[name])
        layers |= {int(in_layer[1])} if in_layer else set()
    depth = int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    settings = {
        "fine_tune_type": "lora",
        # The number of adapted blocks, counted from the last (0: all); modules in them without tensors stay at zero.
        "num_layers": depth - min(layers) if layers else 1,
        "lora_parameters": {
            "rank": config.r,
            "scale": config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r),
            "dropout": 0.0,
            "keys": list(dict.fromkeys(keys)),
        },
        "model": HUB_NAMES.get(config.base_model_name_or_path or "", config.base_model_name_or_path),
    }
    base = {BASE: adapter.metadata[BASE]} if BASE in adapter.metadata else {}
    write_directory(directory, MLX_FILE, tensors, base, settings)


def read_mlx(directory: str | os.PathLike[str], model: nn.Module) -> Adapter:
    """Reads an MLX adapter directory.

    Args:
        directory: contains adapters.safetensors and adapter_config.json.
        model: the base model, for its module names, and because linear layers and embeddings are stored differently.

    Raises:
        AdapterError: the adapter does not fit the model.
        FormatError: a file is corrupt.
    """
    directory = Path(directory)
    dora, scale, base_name = read_bytes(directory / CONFIG_FILE, parse_settings, max_size=MAX_SETTINGS)
    stored, metadata = read_safetensors(directory / MLX_FILE)
    modules = {theirs: ours for ours, theirs in mlx_names(model).items()}
    leaves = {"lora_a": "A", "lora_b": "B"}
    tensors: dict[str, Tensor] = {}
    ranks, faults = dict[str, int](), []
    for name, tensor in stored.items():
        module, leaf = modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]
        if module is None or leaf not in (*leaves, "m") or tensor.dim() != (1 if leaf == "m" else 2):
            faults.append(f"{name} {tuple(tensor.shape)}: {type(model).__name__} has no such adapter tensor")
        elif leaf == "m":
            tensors[f"{module}.lora_magnitude_vector"] = tensor
        else:
            embedding = isinstance(model.get_submodule(module), nn.Embedding)
            key = "lora_embedding_" if embedding else "lora_"
            tensors[f"{module}.{key}{leaves[leaf]}"] = tensor.T.contiguous()
            ranks[module] = tensor.shape[1] if leaf == "lora_a" else tensor.shape[0]
    if faults or not ranks:
        raise AdapterError(
            list_faults(f"{directory} does not fit the base model", faults or ["it contains no tensors"])
        )
    if any(rank < 1 for rank in ranks.values()):
        raise FormatError(f"{directory / MLX_FILE} contains empty tensors")
    config = LoraConfig(
        target_modules=list(ranks), use_dora=dora, task_type="CAUSAL_LM", base_model_name_or_path=base_name
    )
    alphas = {module: scale * rank for module, rank in ranks.items()}
    base = kind_of(model) | ({BASE: metadata[BASE]} if BASE in metadata else {})
    adapter = Adapter(with_ranks(config, ranks, alphas), tensors, base)
    check_sound(adapter)
    return adapter


def parse_settings(data: bytes) -> tuple[bool, float, str | None]:
    """Reads mlx-lm's adapter_config.json: whether it is DoRA, the scale, and the name of the base model.

    Raises:
        FormatError: it is not such a file, or is for another type of fine-tuning.
    """
    settings = parse_json(data)
    parameters = settings.get("lora_parameters") if isinstance(settings, dict) else None
    if not isinstance(parameters, dict):
        raise FormatError("it has no lora_parameters, which mlx-lm always writes")
    kind, scale, name = settings.get("fine_tune_type", "lora"), parameters.get("scale"), settings.get("model")
    if kind not in ("lora", "dora"):
        raise FormatError(f"its fine_tune_type is {kind!r}, expected 'lora' or 'dora'")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 < abs(scale) < 1e30:
        raise FormatError(f"scale is {scale!r}, expected a finite number other than 0")
    return kind == "dora", float(scale), name if isinstance(name, str) else None


def _tied_head(model: nn.Module) -> nn.Module | None:
    """Returns the head if it shares the embedding's weight, because mlx-lm then has no module for it."""
    head, table = (getattr(model, f"get_{kind}_embeddings", lambda: None)() for kind in ("output", "input"))
    shared = isinstance(head, nn.Module) and isinstance(table, nn.Module) and head.weight is table.weight
    return head if shared else None
