"""LoRA for any PyTorch or transformers model: train it fast, keep it safe, use it everywhere.

    import loralib as lora

    model, tokenizer = lora.load_base("smollm2-135m")
    print(lora.inject(model, lora.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")))
    result = lora.train(model, "train.txt", lora.TrainConfig(output_dir="lora_model"), tokenizer=tokenizer)

The layers and helpers are Microsoft's loralib, drop-in; whatever is heavier than torch is imported when first used.
"""

from __future__ import annotations

from .adapter import Adapter, adapter_of, apply_adapter
from .bases import load_base
from .config import LoraConfig
from .errors import LoraError
from .formats import load_adapter, read_adapter, save_adapter
from .generation import beam_search, generate
from .injection import disabled, inject, merge, remove, unmerge
from .layers import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoRALayer, MergedLinear
from .training import TrainConfig, train
from .utils import lora_state_dict, mark_only_lora_as_trainable

__version__ = "1.0.0"

__all__ = [
    "Adapter",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoRALayer",
    "LoraConfig",
    "LoraError",
    "MergedLinear",
    "TrainConfig",
    "adapter_of",
    "apply_adapter",
    "beam_search",
    "disabled",
    "generate",
    "inject",
    "load_adapter",
    "load_base",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "read_adapter",
    "remove",
    "save_adapter",
    "train",
    "unmerge",
]
