"""What a model and its tokenizer say about where a text ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import DataError, list_faults

__all__ = ["check_prompts", "context_length", "end_tokens", "new_tokens"]


def end_tokens(model: nn.Module, tokenizer: Any = None) -> list[int]:
    """Returns the tokens that end a text: the tokenizer's, and those that the model's own settings name."""
    found: list[int | None] = []
    for owner in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(owner, "eos_token_id", None)
        found += value if isinstance(value, list) else [value]
    return sorted({int(token) for token in found if token is not None})


def context_length(model: nn.Module) -> int | None:
    """Returns how many positions the model has, or None where its config does not say."""
    value = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return value if isinstance(value, int) else None


def new_tokens(model: nn.Module, prompt: Sequence[int], wanted: int) -> int:
    """Returns how many tokens can follow a prompt: as many as are wanted, or fewer where the model's context ends."""
    limit = context_length(model)
    # The last token needs no position: nothing is computed from it.
    return wanted if limit is None else min(wanted, limit + 1 - len(prompt))


def check_prompts(model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    """Refuses prompts that the model cannot continue.

    Raises:
        DataError: some have no tokens, or more than the model's context; all of them at once.
    """
    limit = context_length(model)
    faults = []
    for number, ids in enumerate(prompts, 1):
        if not ids:
            faults.append(f"prompt {number} has no tokens")
        elif limit is not None and len(ids) > limit:
            faults.append(f"prompt {number} has {len(ids):,} tokens, the model's context has {limit:,}")
    if faults:
        raise DataError(list_faults("the model cannot continue these prompts", faults, "Shorten or remove them."))
