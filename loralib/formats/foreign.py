"""Identifies files by the names of their tensors: which tool an adapter belongs to, and where to use it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import LoraError
from .tensors import read_pickle, read_safetensors, state_in

__all__ = ["describe", "names_in"]

_DIFFUSION = (
    "loralib adapts language models and other PyTorch modules; to use it in diffusers: "
    "pipeline.load_lora_weights(FILE)."
)
# Known kinds, in order of precedence: a pattern for tensor names, a description, and what to do with the file.
_KINDS: tuple[tuple[str, str, str], ...] = (
    (r"hada_w[12]|lokr_w[12]|oft_blocks|\.diff$", "a LyCORIS adapter (LoHa, LoKr or similar)", _DIFFUSION),
    (
        r"^lora_(unet|te\d?|transformer|prior)_|\.lora_(down|up)\.",
        "an adapter in kohya's format, for images",
        _DIFFUSION,
    ),
    (
        r"^(unet|text_encoder(_\d)?|transformer|prior)\..*(lora_[AB]\.weight$|lora\.(down|up)|lora_linear_layer)|\.processor\.",
        "an adapter in diffusers' format, for images",
        _DIFFUSION,
    ),
    (
        r"^base_model\.model\.|\.lora_[AB](\.default)?\.weight$",
        "the tensors of a PEFT adapter without its settings",
        "Put it into a directory as adapter_model.safetensors (or .bin), next to its adapter_config.json.",
    ),
    (
        r"^(blk\.\d+|token_embd|output)\..*\.lora_[ab]$",
        "an adapter with llama.cpp's names",
        "Give the GGUF file itself.",
    ),
    (
        r"\.lora_[ab]$",
        "the tensors of an MLX adapter without its settings",
        "Put it into a directory as adapters.safetensors, next to its adapter_config.json.",
    ),
)
_OURS = re.compile(r"lora_(embedding_)?[AB]$")


def describe(names: Collection[str]) -> tuple[str, str] | None:
    """Identifies a file that is not a checkpoint of Microsoft's loralib, with advice on what to do with it.

    Args:
        names: names of the tensors in it.

    >>> describe(["lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.alpha"])[0]
    "an adapter in kohya's format, for images"
    >>> describe(["h.0.attn.c_attn.lora_A", "h.0.attn.c_attn.lora_B"]) is None
    True
    >>> describe(["h.0.attn.c_attn.weight"])[0]
    'not an adapter: it contains no LoRA tensors (names that end in lora_A or lora_B)'
    """
    for pattern, what, advice in _KINDS:
        if any(re.search(pattern, name) for name in names if isinstance(name, str)):
            return what, advice
    if not any(_OURS.search(name) for name in names if isinstance(name, str)):
        what = "not an adapter: it contains no LoRA tensors (names that end in lora_A or lora_B)"
        return what, "Give a trained adapter; a base model belongs in --model."
    return None


def names_in(path: Path) -> list[str] | None:
    """Returns the names of the tensors in a file, regardless of its extension; None if it cannot be read safely."""
    for read in (lambda: read_safetensors(path)[0], lambda: read_pickle(path)):
        try:
            value = read()
        except LoraError:
            continue
        state = state_in(value)
        return [str(name) for name in state] if isinstance(state, Mapping) else None
    return None
