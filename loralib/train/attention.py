"""Attention over a packed row: tiles of queries, each against only the keys that one of its queries sees.

`Plan` turns a pack's intervals into such tiles, once a step and once for each sliding window that the model's layers
use; `packed_attention` is the function that transformers' attention interface calls in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.packing import Pack
from ..errors import TrainingError

__all__ = ["Plan", "packed_attention", "using"]

NAME = "loralib_packed"

# What models hand to an attention function without it changing what is computed.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "is_causal"}
)


@dataclass(frozen=True)
class Tiles:
    """Tiles with about as many keys.

    Attributes:
        tiles: (n,) their numbers.
        keys: (n, K) the keys that each sees.
        mask: (n, tile, K) which query sees which of them.
    """

    tiles: Tensor
    keys: Tensor
    mask: Tensor


@dataclass
class Plan:
    """How the attention of one packed row is computed.

    Args:
        ends: (T,) token k is seen by the tokens k .. ends[k] - 1.
        positions: (T,) place of each token in its example.
        tile: how many queries are computed together.
    """

    ends: Tensor
    positions: Tensor
    tile: int = 64
    _tiles: dict[int | None, list[Tiles]] = field(default_factory=dict)

    @classmethod
    def of(cls, pack: Pack) -> Plan:
        """Returns the plan of a packed step."""
        assert pack.ends is not None
        return cls(pack.ends, pack.positions[0])

    def tiles(self, window: int | None) -> list[Tiles]:
        """Returns the tiles, those with about as many keys together.

        Args:
            window: a query sees only keys less than this many positions before it; None: all.
        """
        if window not in self._tiles:
            self._tiles[window] = list(
                self._group([self._tile(start, window) for start in range(0, len(self.ends), self.tile)])
            )
        return self._tiles[window]

    def _tile(self, start: int, window: int | None) -> tuple[Tensor, Tensor]:
        total = len(self.ends)
        queries = torch.arange(start, min(start + self.tile, total), device=self.ends.device)
        keys = torch.nonzero(self.ends[: int(queries[-1]) + 1] > start).flatten()
        seen = (keys <= queries[:, None]) & (queries[:, None] < self.ends[keys])
        if window is not None:
            seen &= self.positions[queries][:, None] - self.positions[keys] < window
            some = seen.any(0)
            keys, seen = keys[some], seen[:, some]
        return keys, seen

    def _group(self, tiles: list[tuple[Tensor, Tensor]]) -> Iterator[Tiles]:
        waiting = sorted(range(len(tiles)), key=lambda number: len(tiles[number][0]))
        while waiting:
            widest = len(tiles[waiting[-1]][0])
            chosen = [number for number in waiting if len(tiles[number][0]) * 4 >= widest * 3]
            waiting = waiting[: -len(chosen)]
            keys = self.ends.new_zeros(len(chosen), widest)
            mask = torch.zeros(len(chosen), self.tile, widest, dtype=torch.bool, device=self.ends.device)
            for row, number in enumerate(chosen):
                index, seen = tiles[number]
                keys[row, : len(index)] = index
                mask[row, : seen.shape[0], : seen.shape[1]] = seen
            mask[..., 0] |= ~mask.any(-1)  # queries past the row's end see something, so that no softmax is 0 / 0
            yield Tiles(torch.tensor(chosen, device=self.ends.device), keys, mask)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    plan: Plan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Computes one layer's attention over a packed row (the signature is that of transformers' attention interface).

    Args:
        module: the attention module; told apart by it: is it causal, and does its layer use a sliding window.
        query: (1, H, T, D), rotated already.
        key: (1, H / groups, T, D).
        value: (1, H / groups, T, D).
        attention_mask: must be None: the plan says who sees whom.
        scaling: factor of the scores; None: 1 / sqrt(D).
        dropout: probability of dropping an attention weight.
        softcap: scores s become ``softcap * tanh(s / softcap)`` (Gemma 2).
        sliding_window: see `Plan.tiles`.
        plan: which query sees which key.
        **others: what else models hand over; refused if it could change the result.

    Returns:
        (1, T, H, D), and None in the place of attention weights.

    Raises:
        TrainingError: the layer needs something that packing does not know.
    """
    _refuse_unknown(module, query, attention_mask, sliding_window, plan, others)
    assert plan is not None
    out = _attend(
        query[0], key[0], value[0], plan, scaling or query.shape[-1] ** -0.5, softcap, sliding_window, dropout
    )
    return out[None], None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scaling: float,
    softcap: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    heads, total, width = q.shape
    groups = heads // k.shape[0]
    tile = plan.tile
    count = -(-total // tile)
    # Heads that share keys go below one another: (n, H / groups, groups * tile, D).
    q = F.pad(q, (0, 0, 0, count * tile - total)).view(k.shape[0], groups, count, tile, width)
    q = q.permute(2, 0, 1, 3, 4).reshape(count, k.shape[0], groups * tile, width)
    out = torch.empty_like(q)
    for part in plan.tiles(window):
        keys = k[:, part.keys].transpose(0, 1)
        values = v[:, part.keys].transpose(0, 1)
        scores = (q[part.tiles] @ keys.transpose(-1, -2)).float() * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = ~part.mask.repeat(1, groups, 1)[:, None]
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1).to(q.dtype)
        weights = F.dropout(weights, dropout)
        out = out.index_copy(0, part.tiles, weights @ values)
    out = out.view(count, k.shape[0], groups, tile, width).permute(0, 3, 1, 2, 4)
    return out.reshape(count * tile, heads, width)[:total]


def _refuse_unknown(
    module: nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    plan: Plan | None,
    others: dict[str, Any],
) -> None:
    name = type(module).__name__
    if plan is None or query.shape[0] != 1 or query.shape[2] != len(plan.ends):
        raise TrainingError(f"{name} does not hand the packing plan through")
    if attention_mask is not None:
        raise TrainingError(f"{name} makes an attention mask of its own")
    if not getattr(module, "is_causal", True):
        raise TrainingError(f"{name} is not causal")
    strange = sorted(key for key, value in others.items() if value is not None and key not in _HARMLESS)
    if strange:
        raise TrainingError(f"{name} asks its attention for {', '.join(strange)}")
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        kind = kinds[module.layer_idx]
        if kind not in ("full_attention", "sliding_attention"):
            raise TrainingError(f"{name} is of layer type {kind}")
        slides = kind == "sliding_attention"
    else:
        slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if slides != (sliding_window is not None):
        raise TrainingError(f"{name} does not say how far its sliding window reaches")


@contextmanager
def using(config: Any) -> Iterator[None]:
    """Makes a transformers model of that config call `packed_attention` for the time of a step."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
