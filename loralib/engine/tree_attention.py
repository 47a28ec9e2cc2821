"""Attention of a step of generation: branches of many texts, each against its own text's keys, which are stored once.

A text is a prompt and the tree of its continuations.  All its keys and values lie in one row of the cache, a column a
token, each token once; which columns a branch sees is a bit mask.  So beams share their prompt and all they have in
common, and choosing other beams moves bits, not keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels import LANES, Blocks, loaded

__all__ = ["Cache", "Unsupported", "Work", "attend", "configs_of", "using"]

NAME = "loralib_generate"

# What models hand to an attention function without it changing what is computed.
_HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "is_causal",
    }
)


class Unsupported(Exception):
    """The model needs something in its attention that is not computed here; never seen outside of this package."""


@dataclass
class Cache:
    """Keys and values of all layers: (rows, H_kv, columns, D) each, made when a layer first writes."""

    rows: int = 0
    columns: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def resize(self, rows: int, columns: int) -> None:
        """Makes room for so many texts and tokens a text, or gives room back; what fits stays."""
        self.rows, self.columns = rows, columns
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                store[layer] = resized(tensor, (rows, tensor.shape[1], columns, tensor.shape[3]))

    def of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the store of a layer whose new keys and values are (1, H_kv, T, D)."""
        if layer not in self.keys:
            for store, like in ((self.keys, key), (self.values, value)):
                store[layer] = like.new_zeros(self.rows, like.shape[1], self.columns, like.shape[3])
        return self.keys[layer], self.values[layer]

    def move(self, source: int, target: int) -> None:
        """Copies a text to another row."""
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[target] = tensor[source]


def resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns a copy of another size, filled up with zeros.

    Zeros, since a weight of 0 does not silence what else an unwritten key might hold, as NaN.

    >>> resized(torch.ones(2, 2, dtype=torch.long), (1, 3)).tolist()
    [[1, 1, 0]]
    """
    new = tensor.new_zeros(tuple(shape))
    common = tuple(slice(min(pair)) for pair in zip(tensor.shape, shape, strict=True))
    new[common] = tensor[common]
    return new


@dataclass
class Work:
    """What one pass through the model computes; every layer gets it.

    The pass is one row of tokens: first the new token of each branch, text by text, then the new prompts.

    Attributes:
        cache: where keys and values are.
        text: (R,) the text of each branch, its row in the cache.
        column: (R,) where the branch's new token is stored.
        place: (R,) the branch's place in the padded grid of texts x branches; None: the grid is full.
        sees: (S, N, C) the columns that each branch sees, its own included.
        branch_positions: (S, N) place of each branch's new token in its text.
        positions: (S, C) place in the text of each stored token.
        prompts: row in the cache and length of each new prompt, in the order of their tokens.
    """

    cache: Cache
    text: Tensor
    column: Tensor
    place: Tensor | None
    sees: Tensor
    branch_positions: Tensor
    positions: Tensor
    prompts: list[tuple[int, int]]
    _masks: dict[tuple[int | None, int, int, torch.dtype], Tensor] = field(default_factory=dict)
    _blocks: dict[tuple[int | None, int], Blocks] = field(default_factory=dict)

    def mask(self, window: int | None, kv_heads: int, group: int, dtype: torch.dtype) -> Tensor:
        """Returns (S * kv_heads, N * group, C): 0 where a branch sees a column, a very negative number where not.

        Args:
            window: a branch sees only columns less than this many places before it; None: all.
            kv_heads: heads of keys.
            group: heads of queries that share one.
            dtype: of the result.
        """
        wanted = (window, kv_heads, group, dtype)
        if wanted not in self._masks:
            sees = self._within(window)
            # Not -inf: the grid's empty places see nothing, and 0 / 0 would be slow to compute with.
            hidden = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
            hidden.masked_fill_(~sees, max(-1e30, torch.finfo(dtype).min / 2))
            texts, branches, columns = sees.shape
            spread = hidden[:, None, :, None].expand(texts, kv_heads, branches, group, columns)
            self._masks[wanted] = spread.reshape(texts * kv_heads, branches * group, columns)
        return self._masks[wanted]

    def blocks(self, window: int | None, group: int) -> Blocks:
        """Returns the same for the compiled kernel: `group` heads of a branch share keys."""
        wanted = (window, group)
        if wanted not in self._blocks:
            sees = self._within(window)
            texts, branches, columns = sees.shape
            size = LANES // group
            sees = F.pad(sees, (0, 0, 0, -branches % size)).view(-1, size, columns)
            blocks = len(sees) // texts  # of each text
            in_text = torch.bincount(self.text, minlength=texts)
            counts = (in_text[:, None] - size * torch.arange(blocks)).clamp(0, size).flatten()
            used = counts > 0
            of_texts = torch.arange(texts).repeat_interleave(blocks)
            self._blocks[wanted] = Blocks.of(sees[used], counts[used], of_texts[used], group)
        return self._blocks[wanted]

    def _within(self, window: int | None) -> Tensor:
        if window is None:
            return self.sees
        return self.sees & (self.branch_positions[:, :, None] - self.positions[:, None] < window)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    work: Work | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Computes one layer's attention (the signature is that of transformers' attention interface).

    Args:
        module: the attention module.
        query: (1, H, T, D), rotated already.
        key: (1, H_kv, T, D).
        value: (1, H_kv, T, D).
        attention_mask: must be None: the work says who sees whom.
        scaling: factor of the scores; None: 1 / sqrt(D).
        dropout: must be 0.
        softcap: scores s become ``softcap * tanh(s / softcap)`` (Gemma 2).
        sliding_window: a token sees only tokens less than this many places before it; None: all.
        work: what is computed.
        **others: what else models hand over; refused if it could change the result.

    Returns:
        (1, T, H, D), and None in the place of attention weights.

    Raises:
        Unsupported: the layer needs something else.
    """
    if work is None or query.shape[0] != 1 or attention_mask is not None or dropout:
        raise Unsupported(f"{type(module).__name__} does not hand its work through")
    strange = sorted(name for name, given in others.items() if given is not None and name not in _HARMLESS)
    if strange or not getattr(module, "is_causal", True):
        raise Unsupported(f"{type(module).__name__} asks its attention for {', '.join(strange) or 'both directions'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = work.cache.of(module.layer_idx, key, value)  # type: ignore[arg-type]
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # (T, heads, D)
    parts = []
    start = len(work.text)
    if start:
        keys[work.text, :, work.column] = k[:start]
        values[work.text, :, work.column] = v[:start]
        parts.append(_branches(q[:start], keys, values, work, scaling, softcap, sliding_window))
    for text, length in work.prompts:
        own = slice(start, start + length)
        keys[text, :, :length] = key[0, :, own]
        values[text, :, :length] = value[0, :, own]
        parts.append(_prompt(query[:, :, own], key[:, :, own], value[:, :, own], scaling, softcap, sliding_window))
        start += length
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _branches(
    q: Tensor, keys: Tensor, values: Tensor, work: Work, scaling: float, softcap: float | None, window: int | None
) -> Tensor:
    """Attention of the branches (R, H, D): for each text one product of all its branches and all its keys."""
    texts, branches, _ = work.sees.shape
    kv_heads, heads, width = keys.shape[1], *q.shape[1:]
    group = heads // kv_heads
    kernels = loaded() if softcap is None and group <= LANES else None
    if kernels is not None and kernels.take_queries(q, keys, values):
        return kernels.attention(q, keys, values, work.blocks(window, group), scaling)[0]
    grid = q if work.place is None else q.new_zeros(texts * branches, heads, width).index_copy_(0, work.place, q)
    # Heads that share keys go below one another: (S * H_kv, N * group, D).
    grid = grid.view(texts, branches, kv_heads, group, width).permute(0, 2, 1, 3, 4)
    grid = grid.reshape(texts * kv_heads, branches * group, width)
    # All columns, also those that nobody sees: a product with a part of them would first copy that part.
    keys, values = keys[:texts].flatten(0, 1), values[:texts].flatten(0, 1)
    mask = work.mask(window, kv_heads, group, q.dtype)
    if softcap is None:
        scores = torch.baddbmm(mask, grid, keys.transpose(1, 2), alpha=scaling)
    else:
        scores = softcap * torch.tanh((grid @ keys.transpose(1, 2)).float() * (scaling / softcap)) + mask
    out = torch.softmax(scores, -1).to(values.dtype) @ values  # softmax computes in fp32, whatever the dtype
    out = out.view(texts, kv_heads, branches, group, -1).permute(0, 2, 1, 3, 4)
    out = out.reshape(texts * branches, heads, -1)
    return out if work.place is None else out[work.place]


def _prompt(q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None, window: int | None) -> Tensor:
    """Causal attention of one prompt: (1, heads, T, D) to (T, H, D)."""
    length = q.shape[2]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if softcap is None and (window is None or length <= window):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    else:
        place = torch.arange(length, device=q.device)
        apart = place[:, None] - place
        hidden = (apart < 0) if window is None else (apart < 0) | (apart >= window)
        if softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=scaling)
        else:
            scores = softcap * torch.tanh((q @ k.transpose(2, 3)).float() * (scaling / softcap))
            out = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1).to(v.dtype) @ v
    return out[0].transpose(0, 1)


def configs_of(model: nn.Module) -> list[Any]:
    """Returns the configs in which a model's attention modules look for the function to call."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())


@contextmanager
def using(configs: Sequence[Any]) -> Iterator[None]:
    """Makes transformers' models of these configs call `attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
