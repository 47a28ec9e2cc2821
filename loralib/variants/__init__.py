"""Variants of LoRA, one file each, and which layers have them; docs/variants.md says what each is for.

A variant is a mixin over a plain one of `loralib.layers`: it names the tensors that it trains and says what they add
to the base weight.  `mixin_for` is the one place where a config's settings choose it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..config import LoraConfig
from ..errors import TargetError
from ..layers import LoRAConv, LoRAEmbedding, LoRALayer, LoRALinear, LoRAReadLinear
from .dora import DoRAConv, DoRAEmbedding, DoRALinear, DoRAReadLinear

__all__ = ["mixin_for"]

Mixins = Mapping[type[LoRALayer], type[LoRALayer]]

_DORA: Final[Mixins] = {
    LoRALinear: DoRALinear,
    LoRAReadLinear: DoRAReadLinear,
    LoRAEmbedding: DoRAEmbedding,
    LoRAConv: DoRAConv,
}


def mixin_for(plain: type[LoRALayer], config: LoraConfig) -> type[LoRALayer]:
    """Returns the class that a config asks for in place of the plain one of a kind of layer.

    Raises:
        TargetError: layers of this kind do not have the variant.
    """
    if not config.use_dora:
        return plain
    if plain not in _DORA:
        raise TargetError(f"use_dora: {_kind(plain)} has no DoRA; leave the module out, or use_dora")
    return _DORA[plain]


def _kind(plain: type[LoRALayer]) -> str:
    return plain.__name__.removeprefix("LoRA")
