"""Adapters in files: `save_adapter` and `load_adapter`, and one module for each format."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ..adapter import Adapter, ApplyReport, adapter_of, apply_adapter
from ..config import LoraConfig
from ..errors import AdapterError
from ..inject import adapted_layers
from ..layers import LinearPath
from .microsoft import read_microsoft, write_microsoft
from .peft import read_peft, write_peft

__all__ = [
    "load_adapter",
    "read_adapter",
    "read_microsoft",
    "read_peft",
    "save_adapter",
    "write_microsoft",
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
    targets = _portable_targets(model, adapter)
    name = adapter.config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    # Readers of Conv1D want to be told that the weight is stored (in, out).
    turned = any(isinstance(m, LinearPath) and m.fan_in_fan_out for _, m in adapted_layers(model))
    config = adapter.config.replace(target_modules=targets, base_model_name_or_path=name, fan_in_fan_out=turned)
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
        path: a PEFT directory, or a Microsoft checkpoint file.
        config: for a Microsoft checkpoint, which does not say its settings.
        allow_base_mismatch: see `loralib.adapter.apply_adapter`.

    Returns:
        How many tensors were applied; ``print`` it.

    Raises:
        AdapterError: there is no adapter at the path, or it does not fit; all faults are listed.
    """
    return apply_adapter(model, read_adapter(path, config=config), allow_base_mismatch=allow_base_mismatch)


def read_adapter(path: str | os.PathLike[str], *, config: LoraConfig | None = None) -> Adapter:
    """Reads an adapter as a value, whichever format it is in; see `load_adapter` for the arguments."""
    path = Path(path)
    if not path.is_file():
        return read_peft(path)
    if path.name in ("adapter_model.safetensors", "adapter_config.json"):
        return read_peft(path.parent)
    if config is None:
        raise AdapterError(
            f"{path} is a checkpoint without settings; "
            "pass config=LoraConfig(r=..., lora_alpha=..., target_modules=...)"
        )
    return read_microsoft(path, config)


def _portable_targets(model: nn.Module, adapter: Adapter) -> str | list[str]:
    """Returns the adapted modules as a list that every reader understands: name endings where they say enough.

    'all-linear' and a regular expression mean what they mean on this model only in readers that know them.
    """
    # nn.MultiheadAttention's out_proj comes with the attention module.
    with_attention = {name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    adapted = [n for n in adapter.modules if n.rpartition(".")[0] not in with_attention or not n.endswith(".out_proj")]
    chosen = list[str]()
    names = [name for name, _ in model.named_modules()]
    for ending in dict.fromkeys(name.rpartition(".")[2] for name in adapted):
        fitting = [name for name in names if name == ending or name.endswith(f".{ending}")]
        mine = [name for name in adapted if name.rpartition(".")[2] == ending]
        chosen += [ending] if set(fitting) <= set(mine) and not adapter.config.layers_to_transform else mine
    return chosen
