"""Variants of LoRA, one file each, and which layers support them; docs/variants.md says what each is good for.

A variant is a mixin on top of a plain one from `loralib.layers`: it names the tensors that it trains and defines what
they add to the base weight.  `mixin_for` is the only place where a config's settings select it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from ..config import LoraConfig
from ..errors import TargetError
from ..layers import LoRAConv, LoRAEmbedding, LoRALayer, LoRALinear, LoRAMultiheadAttention, LoRAReadLinear, LoRARouter
from .bias_of_B import BiasedLinear
from .dora import DoRAConv, DoRAEmbedding, DoRALinear, DoRAReadLinear
from .eva import EvaStart, eva_start
from .experts import (
    EXPERT_WEIGHTS,
    ExpertWeight,
    LoRAExperts,
    expert_stacks,
    expert_weights,
    holds_experts,
    is_transposed,
    kept_per_token,
    stored_as_rows,
)
from .starts import WeightInitLinear, start_factors
from .token_rows import ROWS, TokenRowsEmbedding, TokenRowsHead, share_rows

__all__ = [
    "EXPERT_WEIGHTS",
    "ROWS",
    "EvaStart",
    "ExpertWeight",
    "LoRAExperts",
    "TokenRowsEmbedding",
    "TokenRowsHead",
    "contradictions",
    "eva_start",
    "expert_stacks",
    "expert_weights",
    "holds_experts",
    "is_transposed",
    "kept_per_token",
    "mixin_for",
    "share_rows",
    "start_factors",
    "stored_as_rows",
]

Mixins = Mapping[type[LoRALayer], type[LoRALayer]]

_DORA: Final[Mixins] = {
    LoRALinear: DoRALinear,
    LoRAReadLinear: DoRAReadLinear,
    LoRAEmbedding: DoRAEmbedding,
    LoRAConv: DoRAConv,
}
_BIASED: Final[Mixins] = {LoRALinear: BiasedLinear}
_WEIGHT_INIT: Final[Mixins] = {LoRALinear: WeightInitLinear}
_KINDS: Final[Mapping[type[LoRALayer], str]] = {
    LoRALinear: "a linear layer",
    LoRAReadLinear: "a linear layer whose weight is read without calling it",
    LoRAMultiheadAttention: "nn.MultiheadAttention",
    LoRARouter: "the router of a mixture",
    LoRAEmbedding: "an embedding",
    LoRAConv: "a convolution",
    LoRAExperts: "the experts of a mixture",
}


def mixin_for(plain: type[LoRALayer], config: LoraConfig) -> type[LoRALayer]:
    """Returns the class that a config selects instead of the plain one for a kind of layer.

    Raises:
        TargetError: the variant does not exist for this kind of layer.
    """
    variants: dict[str, Mixins] = {}
    if config.use_dora:
        variants["use_dora"] = _DORA
    if config.lora_bias:
        variants["lora_bias"] = _BIASED
    if config.changes_base:
        variants[f"init_lora_weights {config.init_lora_weights!r}"] = _WEIGHT_INIT
    for setting, mixins in variants.items():
        if plain not in mixins:
            raise TargetError(f"{setting} does not support {_KINDS[plain]}; leave out this module or the setting")
        plain = mixins[plain]
    return plain


_CONVERT: Final = (
    "convert it to a plain adapter with `loralib convert DIRECTORY PLAIN --target peft --base BASE`, and load that"
)
_MERGE: Final = "`loralib merge DIRECTORY MERGED --base BASE` writes a model that includes it"
_KNOWN_STARTS: Final = "True, 'pissa', 'pissa_niter_N', 'olora' or 'eva'"


def contradictions(config: LoraConfig, trained: bool) -> list[str]:
    """Lists the settings of a config that layers do not support, alone or in combination, each with a way out.

    Args:
        config: settings of an adapter to train, or of a trained one to apply to a model.
        trained: whether it is trained: its initialisation then no longer matters, unless it changed the base.
    """
    start, faults = config.init_lora_weights, []
    name = str(start).lower()
    known = start in (True, "kaiming") or re.fullmatch(r"pissa(_niter_[1-9]\d{0,2})?|olora|eva", name)
    if trained and config.changes_base and name not in ("pissa", "olora"):
        faults.append(f"init_lora_weights = {start!r} cannot be recomputed from the base; {_CONVERT}")
    elif not trained and not known:
        faults.append(
            f"init_lora_weights = {start!r} is not one of the starts that loralib has ({_KNOWN_STARTS}); leave it out "
            "for the default start"
        )
    special = known and start not in (True, "kaiming") and (config.changes_base or not trained)
    pairs = {
        "use_dora and lora_bias": config.use_dora and config.lora_bias,
        f"use_dora and init_lora_weights {start!r}": config.use_dora and special,
        f"lora_bias and init_lora_weights {start!r}": config.lora_bias and special,
        f"enable_lora and init_lora_weights {start!r}": bool(config.enable_lora) and special,
        f"lora_bias and bias {config.bias!r}, which trains the bias that it is added to,": config.lora_bias
        and config.bias != "none",
    }
    way = (_MERGE if config.lora_bias else _CONVERT) if trained else "leave one of them out"
    return faults + [f"{pair} do not work together; {way}" for pair, both in pairs.items() if both]
