"""Converts adapters with module names from older versions of transformers, as PEFT does.

transformers 5 renamed modules of some models, and has a table of how to read checkpoints of older versions. Where this
only renames, so do we.  The experts of a mixture have become a single tensor, and so do their adapters.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from ..adapter import Adapter
from ..config import with_ranks
from ..errors import AdapterError, list_faults
from ..wrapping import named_parameters, unwrapped
from .experts import stack_experts

__all__ = ["with_present_names"]

_EXPERT = re.compile(r"\.experts\.\d+\.")


def with_present_names(adapter: Adapter, model: nn.Module) -> Adapter:
    """Returns an adapter with the module names that the current version of transformers uses.

    Args:
        adapter: may have names from older versions.
        model: the base model.

    Raises:
        AdapterError: it adapts experts that are no longer modules.
    """
    model = unwrapped(model)
    present = {name for name, _ in model.named_modules()}
    present |= {*named_parameters(model)} if adapter.expert_weights else set()
    lost = [name for name in adapter.modules if name not in present]
    if not lost:
        return adapter
    if any(_EXPERT.search(f".{name}.") for name in lost):
        adapter = stack_experts(adapter, model)
        held = set(adapter.expert_weights)
        lost = [name for name in adapter.modules if name not in present and name not in held]
    experts = [name for name in lost if _EXPERT.search(f".{name}.")]
    if experts and any(name.endswith(".experts") for name in present):
        raise AdapterError(
            list_faults(
                f"the adapter was made for an older transformers, in which the experts of {type(model).__name__} were "
                "modules; now one tensor holds all of them, in an unknown layout",
                experts,
                "PEFT can merge it: PeftModel.from_pretrained(base, "
                "ADAPTER).merge_and_unload().save_pretrained(DIR). Then use that directory as the base model.",
                most=4,
            )
        )
    renamings = _renamings(model)
    names = {name: new for name in lost if (new := _renamed(name, renamings)) in present and new not in adapter.modules}
    if not names:
        return adapter
    tensors = {}
    for key, tensor in adapter.tensors.items():
        module, _, leaf = key.rpartition(".")
        tensors[f"{names.get(module, module)}.{leaf}"] = tensor
    renamed = replace(adapter, tensors=tensors)
    ranks = {names.get(name, name): adapter.config.rank_of(name) for name in adapter.modules}
    alphas = {names.get(name, name): adapter.config.alpha_of(name) for name in adapter.modules}
    config = with_ranks(adapter.config.targeting(list(renamed.target_modules)), ranks, alphas)
    return replace(renamed, config=config)


def _renamings(model: Any) -> list[tuple[str, str]]:
    """Returns the patterns and replacements with which transformers renames weights saved by older versions."""
    if not hasattr(model, "config"):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        rules: list[Any] = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        return [(old, rule.target_patterns[0]) for rule in rules for old in rule.source_patterns]
    except (ImportError, AttributeError, TypeError):  # transformers does not guarantee this interface
        return []


def _renamed(name: str, renamings: list[tuple[str, str]]) -> str:
    text = f"{name}."
    for old, new in renamings:
        try:
            text = re.sub(old, new, text)
        except re.error:
            continue
    return text.rstrip(".")
