"""Rotary positions and other features that depend on the length of a sequence.

"longrope" (Phi-3) rotates all positions of a sequence differently once it exceeds the length that the model was first
trained for, and "dynamic" does so for each greater length.  transformers considers the longest sequence of a batch.  So
longer sequences are computed separately, and keys cached before crossing the limit are useless afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .forward import device_of, plain_logits

__all__ = ["forget_length", "remembers_length", "rope_limit", "split_by_length"]

Row = TypeVar("Row")
_LIMITS = ("original_max_position_embeddings", "max_position_embeddings")


def rope_limit(model: nn.Module) -> int | None:
    """Returns the length up to which rows may be computed together; None: at any length."""
    changing = [module for module in model.modules() if any(map(_changes, _kinds(module)))]
    limits = [_limit(getattr(module, "config", None)) for module in changing]
    # Sparse attention (DeepSeek V3.2) selects a fixed number of keys per row; padding would decide among equal ones.
    limits += [size for module in model.modules() if isinstance(size := getattr(module, "index_topk", None), int)]
    return min(limits, default=None)


def remembers_length(model: nn.Module) -> bool:
    """Returns whether positions depend on the longest sequence seen before ("dynamic"; see `forget_length`)."""
    return any("dynamic" in kind for module in model.modules() for kind in _kinds(module))


def _changes(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _kinds(module: nn.Module) -> list[str]:
    kind = getattr(module, "rope_type", None)
    return [str(value) for value in (kind.values() if isinstance(kind, Mapping) else [kind])]


def _limit(config: Any) -> int:
    """Returns the shortest length given by the first setting in `_LIMITS` that a config has; 0 if it has none."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layers = [value for value in rope.values() if isinstance(value, Mapping)]
    for name in _LIMITS:
        found = [value for each in [rope, *layers] if isinstance(value := each.get(name), int)]
        own = getattr(config, name, None)
        found += [own] if isinstance(own, int) else []
        if found:
            return min(found)
    return 0


def split_by_length(rows: Sequence[Row], limit: int | None, length: Callable[[Row], int] = len) -> Iterator[list[Row]]:  # type: ignore[assignment]
    """Splits rows into groups that may be computed together: all up to a limit, and beyond it those of equal length.

    >>> list(split_by_length(["ab", "abcd", "a", "abcde", "wxyz"], limit=3))
    [['ab', 'a'], ['abcd', 'wxyz'], ['abcde']]
    """
    if limit is None:
        yield list(rows)
        return
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(max(length(row), limit), []).append(row)
    yield from (groups[size] for size in sorted(groups))


def forget_length(model: nn.Module) -> None:
    """Makes "dynamic" positions forget the longest sequence seen so far, by running a short one."""
    with torch.no_grad():
        plain_logits(model, torch.zeros(1, 1, dtype=torch.long, device=device_of(model)))
