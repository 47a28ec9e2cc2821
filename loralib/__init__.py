"""LoRA for any PyTorch or transformers model: train it fast, keep it safe, use it everywhere.

    import loralib as lora

    model, tokenizer = lora.load_base("smollm2-135m")
    print(lora.inject(model, lora.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")))
    result = lora.train(model, "train.txt", lora.TrainConfig(output_dir="lora_model"), tokenizer=tokenizer)

The layers and helpers are drop-in replacements for Microsoft's loralib; anything heavier than torch is imported lazily.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .layers import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoRALayer, MergedLinear
from .utils import lora_state_dict, mark_only_lora_as_trainable

if TYPE_CHECKING:
    from .adapter import Adapter, ApplyReport, adapter_of, apply_adapter
    from .bases import load_base
    from .bases.classifiers import load_adapted_classifier, load_classifier
    from .config import LoraConfig
    from .data import Example
    from .engine.bank import Bank
    from .errors import LoraError
    from .formats import load_adapter, read_adapter, save_adapter
    from .generation import Generation, Hypothesis, Sampling, beam_search, generate
    from .injection import InjectReport, disabled, inject, merge, remove, unmerge
    from .training import TrainConfig, train, train_many
    from .training.predicting import Prediction, predict
    from .training.sweep_record import SweepResult
    from .training.trainer import TrainResult

__version__ = "1.0.0"

__all__ = [
    "Adapter",
    "ApplyReport",
    "Bank",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Example",
    "Generation",
    "Hypothesis",
    "InjectReport",
    "Linear",
    "LoRALayer",
    "LoraConfig",
    "LoraError",
    "MergedLinear",
    "Prediction",
    "Sampling",
    "SweepResult",
    "TrainConfig",
    "TrainResult",
    "adapter_of",
    "apply_adapter",
    "beam_search",
    "disabled",
    "generate",
    "inject",
    "load_adapted_classifier",
    "load_adapter",
    "load_base",
    "load_classifier",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "predict",
    "read_adapter",
    "remove",
    "save_adapter",
    "train",
    "train_many",
    "unmerge",
]

# Where the lazy names live (PEP 562): importing loralib should cost little more than importing torch.
_LAZY = {
    "adapter": ("Adapter", "ApplyReport", "adapter_of", "apply_adapter"),
    "bases": ("load_base",),
    "bases.classifiers": ("load_adapted_classifier", "load_classifier"),
    "config": ("LoraConfig",),
    "data": ("Example",),
    "engine.bank": ("Bank",),
    "errors": ("LoraError",),
    "formats": ("load_adapter", "read_adapter", "save_adapter"),
    "generation": ("Generation", "Hypothesis", "Sampling", "beam_search", "generate"),
    "injection": ("InjectReport", "disabled", "inject", "merge", "remove", "unmerge"),
    "training": ("TrainConfig", "train", "train_many"),
    "training.predicting": ("Prediction", "predict"),
    "training.sweep_record": ("SweepResult",),
    "training.trainer": ("TrainResult",),
}
_MODULES = {name: module for module, names in _LAZY.items() for name in names}


if not TYPE_CHECKING:  # hidden from type checkers, which would accept any misspelt name because of it

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
