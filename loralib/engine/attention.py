"""Attention over a packed row: tiles of queries, each against only the keys that one of its queries sees.

`Plan` turns a pack's intervals into such tiles, once a step and once for each sliding window that the model's layers
use; `packed_attention` is the function that transformers' attention interface calls in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.packing import Pack
from ..errors import TrainingError
from .kernels import LANES, Blocks, Kernels, loaded

__all__ = ["Plan", "packed_attention", "using"]

NAME = "loralib_packed"

# The number of keys is rounded up to a multiple of this: what is left over after whole vectors is slow.
_LANES = 32
# Tiles with at most so many keys are computed together, however few some of them see: operators are fewer then, which
# gains more than the keys that nothing sees cost.
_FEW_KEYS = 256

# What models hand to an attention function without it changing what is computed.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "is_causal"}
)


@dataclass(frozen=True)
class Tiles:
    """Tiles with about as many keys.

    Attributes:
        tiles: (n,) their numbers.
        keys: (n * K,) the keys that each sees, K for each tile.
        hidden: (n, tile, K) minus infinity where a query does not see the key, else 0.
    """

    tiles: Tensor
    keys: Tensor
    hidden: Tensor
    _masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, heads: int, rows: int, dtype: torch.dtype) -> Tensor:
        """Returns `hidden` for all heads: (n * heads, rows, K), where heads that share keys lie below one another."""
        wanted = (heads, rows, dtype)
        if wanted not in self._masks:
            count, tile, width = self.hidden.shape
            hidden = self.hidden.to(dtype)[:, None, None].expand(count, heads, rows // tile, tile, width)
            self._masks[wanted] = hidden.reshape(count * heads, rows, width)
        return self._masks[wanted]


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
    tile: int = 48
    _tiles: dict[int | None, list[Tiles]] = field(default_factory=dict)
    _blocks: dict[int | None, Blocks] = field(default_factory=dict)

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
                self._group([self._tile(start, self.tile, window) for start in range(0, len(self.ends), self.tile)])
            )
        return self._tiles[window]

    def blocks(self, window: int | None) -> Blocks:
        """Returns the same for the compiled kernel: see `tiles`."""
        if window not in self._blocks:
            starts = range(0, len(self.ends), LANES)
            self._blocks[window] = Blocks.of_tiles([self._tile(start, LANES, window) for start in starts])
        return self._blocks[window]

    def _tile(self, start: int, size: int, window: int | None) -> tuple[Tensor, Tensor]:
        total = len(self.ends)
        queries = torch.arange(start, min(start + size, total), device=self.ends.device)
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
            chosen = [number for number in waiting if len(tiles[number][0]) * 2 >= widest or widest <= _FEW_KEYS]
            widest = -(-widest // _LANES) * _LANES
            waiting = waiting[: -len(chosen)]
            chosen.sort()
            keys = self.ends.new_zeros(len(chosen), widest)
            hidden = torch.full((len(chosen), self.tile, widest), float("-inf"), device=self.ends.device)
            for row, number in enumerate(chosen):
                index, seen = tiles[number]
                keys[row, : len(index)] = index
                hidden[row, : seen.shape[0], : seen.shape[1]].masked_fill_(seen, 0.0)
                hidden[row, seen.shape[0] :, 0] = 0.0  # queries past the row's end see something: no softmax is 0 / 0
            yield Tiles(torch.tensor(chosen, device=self.ends.device), keys.flatten(), hidden)


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
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    kernels = loaded()
    if kernels is not None and not dropout and softcap is None and kernels.take_queries(*rows):
        found = _KernelAttention.apply(*rows, plan.blocks(sliding_window), scaling)  # type: ignore[no-untyped-call]
        return cast(Tensor, found).unsqueeze(0), None
    tiles = plan.tiles(sliding_window)
    attend = cast(Callable[..., Tensor], _TileAttention.apply)
    return attend(*rows, tiles, plan.tile, scaling, softcap, dropout).unsqueeze(0), None


class _KernelAttention(torch.autograd.Function):
    """Attention of q (T, H, D) over k and v (T, H / groups, D), by the compiled kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scaling: float) -> Tensor:
        y, kept = cast(Kernels, loaded()).attention(q, k, v, blocks, scaling, keep=True)
        ctx.blocks, ctx.scaling, ctx.kept = blocks, scaling, kept
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y = ctx.saved_tensors
        kernels = cast(Kernels, loaded())
        return (*kernels.attention_back(gradient, q, k, v, y, ctx.kept, ctx.blocks, ctx.scaling), None, None)


class _TileAttention(torch.autograd.Function):
    """Attention of q (T, H, D) over k and v (T, H / groups, D), with the backward pass written out.

    Scores are rounded to the dtype of q where it is narrower than fp32; they are scaled before that, and the softmax is
    computed in fp32.  Weights are kept for the backward pass while they are small, and made again where they are not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        parts: list[Tiles],
        tile: int,
        scaling: float,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        shape = q.shape
        q, k, v = _to_tiles(q, tile, k.shape[1]), k.flatten(1), v.flatten(1)
        ctx.shape, ctx.parts, ctx.tile, ctx.scaling, ctx.softcap = shape, parts, tile, scaling, softcap
        ctx.weights, ctx.kept = [], []  # kept: which weights dropout kept, times 1 / (1 - dropout)
        found = []
        for part in parts:
            queries = _pick(q, part)
            weights = _weights(queries, _gather(k, part, queries), part, scaling, softcap)[0]
            kept = torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout) if dropout else None
            used = weights if kept is None else weights * kept
            found.append(torch.bmm(used, _gather(v, part, queries)).view(queries.shape))
            ctx.weights.append(weights if weights.numel() <= 4 * queries.numel() else None)
            ctx.kept.append(kept)
        ctx.save_for_backward(q, k, v)
        return _from_tiles(_together(found, parts), tile, shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grad_tiles = _to_tiles(grad_out, ctx.tile, q.shape[1])
        grads_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
        for part, weights, kept in zip(ctx.parts, ctx.weights, ctx.kept, strict=True):
            queries = _pick(q, part)
            keys, values = _gather(k, part, queries), _gather(v, part, queries)
            slope = None
            if weights is None or ctx.softcap is not None:
                weights, slope = _weights(queries, keys, part, ctx.scaling, ctx.softcap)
            grad = _pick(grad_tiles, part).flatten(0, 1)
            _scatter(grad_v, part, torch.bmm((weights if kept is None else weights * kept).transpose(1, 2), grad))
            grad = torch.bmm(grad, values.transpose(1, 2))
            if kept is not None:
                grad *= kept
            grad = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
            grad *= ctx.scaling if slope is None else slope * ctx.scaling
            grads_q.append(torch.bmm(grad, keys).view(queries.shape))
            _scatter(grad_k, part, torch.bmm(grad.transpose(1, 2), queries.flatten(0, 1)))
        of_keys, grad_q = (len(k), -1, ctx.shape[-1]), _together(grads_q, ctx.parts)
        grads = (_from_tiles(grad_q, ctx.tile, ctx.shape), grad_k.view(of_keys), grad_v.view(of_keys))
        return (*grads, None, None, None, None, None)


def _weights(
    queries: Tensor, keys: Tensor, part: Tiles, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """The attention weights (n * heads, groups * tile, K), and the slope of the soft-capping."""
    hidden = part.mask(queries.shape[1], queries.shape[2], queries.dtype)
    queries, keys = queries.flatten(0, 1), keys.transpose(1, 2)
    if softcap is None:
        return torch.softmax(torch.baddbmm(hidden, queries, keys, alpha=scaling), -1), None
    bent = torch.bmm(queries, keys).float().mul_(scaling / softcap).tanh_()
    weights = torch.softmax((bent * softcap).add_(hidden), -1).to(queries.dtype)
    return weights, bent.square_().neg_().add_(1.0).to(queries.dtype)


def _to_tiles(x: Tensor, tile: int, heads: int) -> Tensor:
    """(T, H, D) to (n, heads, H / heads * tile, D): the query heads that share a key head stand below one another."""
    total, all_heads, width = x.shape
    count = -(-total // tile)
    if total < count * tile:
        x = F.pad(x, (0, 0, 0, 0, 0, count * tile - total))
    x = x.reshape(count, tile, heads, all_heads // heads, width).permute(0, 2, 3, 1, 4)
    return x.reshape(count, heads, all_heads // heads * tile, width).contiguous()


def _from_tiles(x: Tensor, tile: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_to_tiles`."""
    total, all_heads, width = shape
    count, heads = x.shape[:2]
    x = x.view(count, heads, -1, tile, width).permute(0, 3, 1, 2, 4)
    return x.reshape(count * tile, all_heads, width)[:total]


def _pick(tiles: Tensor, part: Tiles) -> Tensor:
    return tiles if len(tiles) == len(part.tiles) else tiles[part.tiles]


def _together(found: list[Tensor], parts: list[Tiles]) -> Tensor:
    """The inverse of `_pick` over all parts."""
    if len(found) == 1:
        return found[0]
    return torch.cat(found)[torch.argsort(torch.cat([part.tiles for part in parts]))]


def _gather(x: Tensor, part: Tiles, queries: Tensor) -> Tensor:
    """The rows (n * heads, K, D) of the keys that each tile sees, from x (T, heads * D)."""
    count, heads, _, width = queries.shape
    rows = x.index_select(0, part.keys).view(count, -1, heads, width).transpose(1, 2)
    return rows.reshape(count * heads, -1, width)


def _scatter(into: Tensor, part: Tiles, rows: Tensor) -> None:
    """Adds rows (n * heads, K, D) to where `_gather` took them from."""
    count = len(part.tiles)
    rows = rows.view(count, -1, *rows.shape[1:]).transpose(1, 2)
    into.index_add_(0, part.keys, rows.reshape(len(part.keys), -1))


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
