"""Microsoft's checkpoints, as saved with torch.save by the GPT-2 and NLU examples of their loralib.

The released GPT-2 files hold ``{'model_state_dict': {'module.transformer.h.0.attn.c_attn.lora_A': ...}}``; the NLU
files and those of `lora_state_dict` are flat.  None of them contains lora_alpha or the adapted blocks, so the caller
has to supply these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..adapter import Adapter
from ..config import LoraConfig
from ..errors import AdapterError, FormatError, list_faults
from ..variants import ROWS
from ..wrapping import plain_name
from .tensors import read_pickle, read_safetensors, state_in, write_pickle

__all__ = ["beyond_microsoft", "read_microsoft", "write_microsoft"]


def read_microsoft(path: str | os.PathLike[str], config: LoraConfig) -> Adapter:
    """Reads a Microsoft checkpoint.

    Args:
        path: a file written by torch.save, or the same tensors as safetensors.
        config: r, lora_alpha, target_modules and enable_lora, which the file does not contain.

    Returns:
        All tensors in the file: base weights will be compared with those of the model that the adapter is applied to,
        and a trained head must be named in `config.modules_to_save`.

    Raises:
        FormatError: the file is corrupt, or contains code, or contains no LoRA tensors.
    """
    state = read_safetensors(path)[0] if Path(path).suffix == ".safetensors" else state_in(read_pickle(path))
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise FormatError(f"{path} contains {type(state).__name__}, expected a mapping from names to tensors")
    tensors = {_from_microsoft(name, state): value for name, value in state.items() if _is_needed(name, value, state)}
    if not any(name.endswith(("lora_A", "lora_B")) for name in tensors):
        raise FormatError(f"{path} contains no LoRA tensors (names that end in lora_A or lora_B)")
    return Adapter(config, tensors)


def _is_needed(name: str, value: object, state: Mapping[str, object]) -> bool:
    """Tells whether to read an entry: old files also contain GPT-2's causal mask, and convolutions' weights twice."""
    mask = name.endswith((".attn.bias", ".attn.masked_bias")) and isinstance(value, Tensor) and value.dim() != 1
    owner, _, leaf = name.rpartition(".")
    twin = owner.endswith(".conv") and f"{owner.removesuffix('.conv')}.{leaf}" in state
    return isinstance(value, Tensor) and not mask and not twin


def _from_microsoft(name: str, state: Mapping[str, object]) -> str:
    """Converts Microsoft's name for a tensor to ours; their GPT-2's head has a different name than in transformers."""
    name = plain_name(name).removeprefix("module.")
    gpt2 = "module.transformer.wte.weight" in state or "transformer.wte.weight" in state
    return "lm_head.weight" if gpt2 and name == "lm_head.decoder.weight" else name


def write_microsoft(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Writes the flat form produced by `lora_state_dict`.

    Raises:
        AdapterError: the adapter has tensors that this form cannot hold.
    """
    if extra := beyond_microsoft(adapter):
        raise AdapterError(list_faults("Microsoft's format cannot hold", extra, "Write a PEFT directory instead."))
    write_pickle(path, {name.replace(".lora_embedding_", ".lora_"): t for name, t in adapter.tensors.items()})


def beyond_microsoft(adapter: Adapter) -> list[str]:
    """Returns the names of tensors that Microsoft's form cannot hold: those of DoRA and other variants."""
    return [n for n in adapter.tensors if ("lora_" in n and not n.endswith(_FACTORS)) or n.endswith(f".{ROWS}")]


_FACTORS = (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B")
