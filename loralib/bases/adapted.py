"""A base model with an adapter on it, loaded in one call."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapter import Adapter, apply_adapter
from ..errors import BaseModelError
from ..formats import is_read_with_base, read_adapter, with_present_names
from ..injection import merge
from .loading import DEFAULT_BASE, add_rows_for, load_base

__all__ = ["base_of", "load_adapted"]


def base_of(adapter: Adapter | None, name: str | None = None) -> str:
    """Returns the name of the base model to load: the given one, else the adapter's, else the default."""
    return name or (adapter.config.base_model_name_or_path if adapter is not None else None) or DEFAULT_BASE


def load_adapted(
    adapter: str | None = None,
    *,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    merged: bool = False,
) -> tuple[nn.Module, Any]:
    """Loads a base model and its tokenizer, and applies an adapter.

    Args:
        adapter: a PEFT or MLX directory, or a GGUF LoRA file; None: load the base model alone.
        model: the base model; default: the one that the adapter names (GGUF and MLX name none), else the default base.
        dtype: of the base model, see `load_base`.
        device: see `load_base`.
        merged: merge the adapter into the weights.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        AdapterError: there is no adapter at that path, or it does not fit the base.
        BaseModelError: there is no such model, or the adapter does not name it.
        ConfigError: dtype or device is not available.
    """
    value = None if adapter is None or is_read_with_base(adapter) else read_adapter(adapter)
    if adapter is not None and value is None and model is None:
        raise BaseModelError(f"{adapter} does not name its base model; give --model MODEL (model=... in Python)")
    base, tokenizer = load_base(base_of(value, model), dtype=dtype, device=device)
    if adapter is not None:
        value = read_adapter(adapter, model=base) if value is None else with_present_names(value, base)
        add_rows_for(value, base)
        apply_adapter(base, value)
        if merged:
            merge(base)
    return base.eval(), tokenizer
