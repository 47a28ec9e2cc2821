"""Attention in which a layout says which tokens see which, for both training and generation.

transformers' models look up their attention function in a registry, by a name in their config.  `interface_name`
registers `attention` there, and a `Hold` (placement.py) makes one model's modules use it.  A pass through the model
receives a layout as the argument `layout`:

- `PackedLayout`: a training batch as one row of consecutive examples, in which shared prompts appear once; the
  equivalent for GPUs is `FlexLayout` (flex.py);
- `TreeLayout`: one step of generation, with the new tokens of many sequences and their branches, over a KV cache.

Each offers the visibility of keys in two forms: `blocks` for the compiled kernel, and dense masks or tiles for
PyTorch's operators.
Shapes: T tokens in the row; H query heads of width D, where G query heads share each of the H / G key heads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import UnsupportedModelError
from .kernels import LANES, Kernels, VisibilityBlocks, loaded

__all__ = [
    "AttentionSettings",
    "KVCache",
    "Layout",
    "PackedLayout",
    "PromptChunk",
    "TreeLayout",
    "attention",
    "interface_name",
    "masked_weights",
    "resized",
    "with_layout",
]

# Arguments that models pass to an attention function but that do not change the result.
_HARMLESS: Final = frozenset(
    {
        "cache_position",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)


@dataclass(frozen=True)
class AttentionSettings:
    """How one layer computes attention scores from queries and keys.

    Attributes:
        scaling: factor of q k^T.
        softcap: scores s become ``softcap * tanh(s / softcap)`` (Gemma 2); None: no soft-capping.
        window: a query only sees keys less than this many positions before it; None: all before it.
        dropout: probability of dropping an attention weight.
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether the compiled kernel supports these settings."""
        return self.softcap is None and not self.dropout


class Layout(Protocol):
    """Which tokens of a row see which."""

    tokens: int  # T, the length of the row

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        """Returns the attention of q (T, H, D) over the keys it sees, given k and v (T, H / G, D) of the row."""


# Registration in transformers' attention interface.

_NAMES: Final[dict[str, str]] = {}  # our name -> the implementation it replaces
_THREAD: Final = threading.local()


def interface_name(implementation: str | None) -> str | None:
    """Returns the attention implementation that a held model's config reports.

    In a pass with a layout, this is a name under which `attention` replaces the original, such as "sdpa"; models build
    no mask for names they do not know.  Outside such a pass it is the original name.  With gradient checkpointing, a
    layer may be recomputed during the backward pass in one of autograd's own threads.
    """
    if not getattr(_THREAD, "has_layout", False):
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return implementation
    original = implementation or "eager"
    name = f"loralib.{original.replace('flash', 'fa')}"  # transformers searches names for "flash"
    if name not in _NAMES:
        from transformers import AttentionInterface

        AttentionInterface.register(name, attention)
        _NAMES[name] = original
    return name


@contextmanager
def with_layout() -> Iterator[None]:
    """Makes held models call `attention` in this thread, for a pass with a layout."""
    before, _THREAD.has_layout = getattr(_THREAD, "has_layout", False), True
    try:
        yield
    finally:
        _THREAD.has_layout = before


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes one layer's attention, with the signature of transformers' attention interface.

    Args:
        module: the attention module.
        query: (1, H, T, D), with rotary positions applied.
        key: (1, H / G, T, D).
        value: (1, H / G, T, D).
        attention_mask: must be None, because the layout defines visibility.
        scaling: factor applied to the scores; None: 1 / sqrt(D).
        dropout: probability of dropping an attention weight.
        softcap: see `AttentionSettings`.
        sliding_window: see `AttentionSettings`.
        layout: which tokens see which; None: the call does not come from us, and the original attention is used.
        **others: other arguments passed by models; rejected if they could change the result.

    Returns:
        (1, T, H, D), and None in place of the attention weights.

    Raises:
        UnsupportedModelError: the layer needs something that is not supported here.
    """
    if layout is None:
        names = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "sliding_window": sliding_window}
        given = {name: value for name, value in names.items() if value is not None}
        return _original(module)(module, query, key, value, attention_mask, **given, **others)
    compiling = torch.compiler.is_compiling()
    if not compiling:  # checked when the same layer ran in the initial trial
        _refuse_unknown(module, query, attention_mask, sliding_window, layout, others)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    settings = AttentionSettings(scaling, softcap, sliding_window, dropout)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    # A layer index that differs between layers would force a separate compilation for each.
    layer = 0 if compiling else cast(int, module.layer_idx)
    return layout.attend(layer, q, k, v, settings).unsqueeze(0), None


def _original(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Returns the attention function that a module used before ours was installed."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = cast(Any, module.config)._attn_implementation
    spaces = (getattr(kind.__dict__.get("forward"), "__globals__", {}) for kind in type(module).__mro__)
    eager = next((space["eager_attention_forward"] for space in spaces if "eager_attention_forward" in space), None)
    function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(_NAMES.get(name, name), cast(Any, eager))
    return cast("Callable[..., tuple[Tensor, Tensor | None]]", function)


def _refuse_unknown(
    module: nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    layout: Layout,
    others: dict[str, Any],
) -> None:
    name = type(module).__name__
    if query.shape[0] != 1 or query.shape[2] != layout.tokens:
        raise UnsupportedModelError(f"{name} does not compute the row of tokens that it was given")
    if attention_mask is not None:
        raise UnsupportedModelError(f"{name} makes its own attention mask")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise UnsupportedModelError(f"{name} is not causal")
    unknown = sorted(key for key, value in others.items() if value is not None and key not in _HARMLESS)
    if unknown:
        raise UnsupportedModelError(f"{name} passes {', '.join(unknown)} to its attention, which loralib does not know")
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        raise UnsupportedModelError(f"{name} counts tokens from the beginning of the row")
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        kind = kinds[module.layer_idx]
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"{name} is of layer type {kind}")
        slides = kind == "sliding_attention"
    else:
        slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if slides != (sliding_window is not None):
        raise UnsupportedModelError(f"{name} does not state the size of its sliding window")


# A training batch in one row.


@dataclass(frozen=True)
class _Tiles:
    """Tiles of queries with similar numbers of keys, for PyTorch's operators.

    Attributes:
        numbers: (n,) indices of the tiles in the row.
        keys: (n * K,) indices of the keys of each tile, K per tile.
        hidden: (n, tile, K) minus infinity where a query does not see the key, otherwise 0.
    """

    numbers: Tensor
    keys: Tensor
    hidden: Tensor
    _masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, heads: int, group: int, dtype: torch.dtype) -> Tensor:
        """Returns `hidden` expanded to all heads: (n * heads, group * tile, K)."""
        key = (heads, group, dtype)
        if key not in self._masks:
            count, tile, width = self.hidden.shape
            hidden = self.hidden.to(dtype)[:, None, None].expand(count, heads, group, tile, width)
            self._masks[key] = hidden.reshape(count * heads, group * tile, width)
        return self._masks[key]


class PackedLayout:
    """One row of consecutive examples; prefixes that they share appear once.

    Args:
        ends: (T,) token k is seen by the tokens k .. ends[k] - 1.
        positions: (T,) the position of each token in its example.
        tile: number of queries computed together when there are no kernels.
    """

    # The number of keys is rounded up to a multiple of this, because the remainder after whole vectors is slow.
    _KEYS = 32
    # Tiles with at most this many keys are computed together even if few are visible: fewer operators save more time.
    _FEW_KEYS = 256

    def __init__(self, ends: Tensor, positions: Tensor, tile: int = 48) -> None:
        self._ends, self._positions, self._tile_size = ends, positions, tile
        self.tokens = len(ends)
        self._tiles: dict[int | None, list[_Tiles]] = {}
        self._blocks: dict[int | None, VisibilityBlocks] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        """Returns the attention of q (T, H, D) over k and v (T, H / G, D)."""
        kernels = loaded()
        if settings.plain and kernels is not None and kernels.accept_queries(q, k, v):
            blocks = self.blocks(settings.window)
            return cast(Tensor, _KernelAttention.apply(q, k, v, blocks, settings.scaling))  # type: ignore[no-untyped-call]
        return self._attend_in_tiles(q, k, v, settings)

    def blocks(self, window: int | None) -> VisibilityBlocks:
        """Returns which queries see which keys, for the compiled kernel.

        Args:
            window: see `AttentionSettings`.
        """
        if window not in self._blocks:
            starts = range(0, self.tokens, LANES)
            self._blocks[window] = VisibilityBlocks.of_tiles([self._tile(start, LANES, window) for start in starts])
        return self._blocks[window]

    # Without kernels: tiles of queries, each against only the keys that at least one of them sees.  For 456 tokens this
    # takes a third of the time of scaled_dot_product_attention with a dense mask, for 1,824 tokens a tenth.

    def _attend_in_tiles(self, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        (total, heads, width), kv_heads, tile = q.shape, k.shape[1], self._tile_size
        count, group = -(-total // tile), heads // kv_heads
        # (T, H, D) -> (n, H / G, G * tile, D): query heads that share a key head are stacked.
        q = F.pad(q, (0, 0, 0, 0, 0, count * tile - total)).view(count, tile, kv_heads, group, width)
        q = q.permute(0, 2, 3, 1, 4).reshape(count, kv_heads, group * tile, width)
        v_width = v.shape[-1]  # DeepSeek's values are narrower than its keys
        k, v, parts = k.flatten(1), v.flatten(1), self._tiles_of(settings.window)
        results = []
        for part in parts:
            queries = (q if len(parts) == 1 else q[part.numbers]).flatten(0, 1)
            mask = part.mask(kv_heads, group, q.dtype)
            # Small weights are kept for the backward pass; large ones are recomputed.
            large = torch.is_grad_enabled() and mask.numel() > 4 * queries.numel()
            arguments = (queries, k, v, part.keys, mask, settings)
            result = (
                checkpoint(_tile_attention, *arguments, use_reentrant=False) if large else _tile_attention(*arguments)
            )
            results.append(result.view(-1, kv_heads, group, tile, v_width))
        y = results[0]
        if len(parts) > 1:
            y = torch.cat(results)[torch.argsort(torch.cat([part.numbers for part in parts]))]
        return y.permute(0, 3, 1, 2, 4).reshape(count * tile, heads, v_width)[:total]

    def _tiles_of(self, window: int | None) -> list[_Tiles]:
        if window not in self._tiles:
            starts = range(0, self.tokens, self._tile_size)
            tiles = [self._tile(start, self._tile_size, window) for start in starts]
            self._tiles[window] = list(self._grouped(tiles))
        return self._tiles[window]

    def _tile(self, start: int, size: int, window: int | None) -> tuple[Tensor, Tensor]:
        """Returns the keys (K,) visible to any query from `start` on, and which queries see which: (size, K) bool."""
        queries = torch.arange(start, min(start + size, self.tokens))
        keys = torch.nonzero(self._ends[: int(queries[-1]) + 1] > start).flatten()
        visible = (keys <= queries[:, None]) & (queries[:, None] < self._ends[keys])
        if window is not None:
            visible &= self._positions[queries][:, None] - self._positions[keys] < window
            used = visible.any(0)
            keys, visible = keys[used], visible[:, used]
        return keys, visible

    def _grouped(self, tiles: list[tuple[Tensor, Tensor]]) -> Iterator[_Tiles]:
        """Groups tiles with similar numbers of keys, padded to the same number."""
        waiting = sorted(range(len(tiles)), key=lambda number: len(tiles[number][0]))
        while waiting:
            widest = len(tiles[waiting[-1]][0])
            chosen = [n for n in waiting if len(tiles[n][0]) * 2 >= widest or widest <= self._FEW_KEYS]
            widest = -(-widest // self._KEYS) * self._KEYS
            waiting = waiting[: -len(chosen)]
            chosen.sort()
            keys = torch.zeros(len(chosen), widest, dtype=torch.long)
            hidden = torch.full((len(chosen), self._tile_size, widest), float("-inf"))
            for row, number in enumerate(chosen):
                index, visible = tiles[number]
                keys[row, : len(index)] = index
                hidden[row, : visible.shape[0], : visible.shape[1]].masked_fill_(visible, 0.0)
                hidden[row, visible.shape[0] :, 0] = (
                    0.0  # queries beyond the end of the row see one key, so that no softmax is 0 / 0
                )
            yield _Tiles(torch.tensor(chosen), keys.flatten(), hidden)


class _KernelAttention(torch.autograd.Function):
    """Attention of q (T, H, D) over k and v (T, H / G, D), using the compiled kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: VisibilityBlocks, scaling: float) -> Tensor:
        y, kept = cast(Kernels, loaded()).attention(q, k, v, blocks, scaling, keep=True)
        ctx.blocks, ctx.scaling, ctx.kept = blocks, scaling, kept
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y = ctx.saved_tensors
        kernels = cast(Kernels, loaded())
        return (*kernels.attention_back(gradient, q, k, v, y, ctx.kept, ctx.blocks, ctx.scaling), None, None)


def _tile_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, hidden: Tensor, settings: AttentionSettings
) -> Tensor:
    """Returns the attention of tiles (n * heads, rows, D) over keys `index` (n * K) of k and v (T, heads * D)."""
    count = len(index) // hidden.shape[-1]
    heads = len(q) // count

    def gather(x: Tensor) -> Tensor:  # (n * heads, K, D)
        rows = x.index_select(0, index).view(count, len(index) // count, heads, -1).transpose(1, 2)
        return rows.reshape(count * heads, len(index) // count, -1)

    weights = masked_weights(q, gather(k), hidden, settings)
    if settings.dropout:
        weights = F.dropout(weights, settings.dropout)
    return torch.bmm(weights, gather(v))


def masked_weights(q: Tensor, k: Tensor, hidden: Tensor, settings: AttentionSettings) -> Tensor:
    """Returns attention weights (N, rows, K) of q (N, rows, D) over k (N, K, D); the softmax is always in fp32.

    Without soft-capping, scores are scaled before they are rounded to the dtype of q.
    """
    if settings.softcap is None:
        return torch.softmax(torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=settings.scaling), -1)
    capped = settings.softcap * torch.tanh(
        torch.bmm(q, k.transpose(1, 2)).float() * (settings.scaling / settings.softcap)
    )
    return torch.softmax(capped + hidden, -1).to(q.dtype)


# One step of generation.


@dataclass
class KVCache:
    """Keys and values of all layers: (slots, H / G, D) each, allocated when a layer first writes.

    A slot holds one token.  Its owner and the sequences that see it are tracked elsewhere: sequences may share the
    slots of a common prefix, and nothing is ever moved.  Slot 0 holds zeros; others are uninitialised until written.
    """

    slots: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def resize(self, slots: int) -> None:
        """Grows or shrinks the cache to this many tokens, keeping what fits."""
        self.slots = slots
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                new = tensor.new_empty(slots, *tensor.shape[1:])  # pages that were never written take no memory yet
                common = min(slots, len(tensor))
                new[:common] = tensor[:common]
                store[layer] = new

    def store(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's keys and values (T, H / G, D) to slots (T,); returns all of the layer's keys and values."""
        for store, new in ((self.keys, key), (self.values, value)):
            if layer not in store:
                store[layer] = new.new_empty(self.slots, *new.shape[1:])
                store[layer][0] = 0
            store[layer].index_copy_(0, slots, new)
        return self.keys[layer], self.values[layer]


def resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns a copy cropped or zero-padded to another shape.

    >>> resized(torch.ones(2, 2, dtype=torch.long), (1, 3)).tolist()
    [[1, 1, 0]]
    """
    new = tensor.new_zeros(tuple(shape))
    common = tuple(slice(min(pair)) for pair in zip(tensor.shape, shape, strict=True))
    new[common] = tensor[common]
    return new


@dataclass(frozen=True)
class PromptChunk:
    """A chunk of a prompt, processed in one pass.

    Attributes:
        start: number of prompt tokens that have already been processed.
        slots: (start + n,) slots of the prompt's tokens, up to the last of this chunk.
    """

    start: int
    slots: Tensor

    @property
    def count(self) -> int:
        """n, the number of tokens in this chunk."""
        return len(self.slots) - self.start


@dataclass
class TreeLayout:
    """One row of new tokens: first one for each branch, sequence by sequence, then chunks of new prompts.

    Each token in a sequence's tree of branches has one column, and a boolean says whether a branch sees it.  So beams
    share their prompt and everything else that they have in common.

    Attributes:
        cache: holds the keys and values.
        slots: (T,) where to write those of the new tokens.
        sequence: (R,) the sequence that each branch belongs to.
        grid_index: (R,) the branch's index in the padded grid of sequences x branches; None: the grid is full.
        visible: (S, N, C) which columns each branch sees, including its own.
        branch_positions: (S, N) position of each branch's new token in its sequence.
        positions: (S, C) position in the sequence of each column's token.
        table: (S, C) the slot of each column.
        prompt_chunks: the chunks of new prompts, in the order of their tokens.
    """

    cache: KVCache
    slots: Tensor
    sequence: Tensor
    grid_index: Tensor | None
    visible: Tensor
    branch_positions: Tensor
    positions: Tensor
    table: Tensor
    prompt_chunks: list[PromptChunk]
    _masks: dict[tuple[int | None, int, int, torch.dtype], Tensor] = field(default_factory=dict)
    _blocks: dict[tuple[int | None, int], VisibilityBlocks] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = len(self.slots)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        """Stores k and v (T, H / G, D), and returns the attention of q (T, H, D) over the tokens that each one sees."""
        keys, values = self.cache.store(layer, self.slots, k, v)
        results = []
        start = len(self.sequence)
        if start:
            results.append(self._attend_branches(q[:start], keys, values, settings))
        for chunk in self.prompt_chunks:
            own = slice(start, start + chunk.count)
            if chunk.start:
                # Gathered in prompt order, because a prompt's slots may be scattered over the cache.
                seen = keys.index_select(0, chunk.slots), values.index_select(0, chunk.slots)
            else:
                seen = k[own], v[own]
            results.append(_attend_causally(q[own], *seen, settings))
            start += chunk.count
        return results[0] if len(results) == 1 else torch.cat(results)

    def blocks(self, window: int | None, group: int) -> VisibilityBlocks:
        """Returns which slots the branches see, for the compiled kernel; `group` query heads share keys."""
        key = (window, group)
        if key not in self._blocks:
            visible = self._within(window)
            sequences, branches, columns = visible.shape
            size = LANES // group
            visible = F.pad(visible, (0, 0, 0, -branches % size)).view(-1, size, columns)
            blocks = len(visible) // sequences  # per sequence
            in_sequence = torch.bincount(self.sequence, minlength=sequences)
            counts = (in_sequence[:, None] - size * torch.arange(blocks)).clamp(0, size).flatten()
            used = counts > 0
            owners = torch.arange(sequences).repeat_interleave(blocks)[used]
            of_columns = VisibilityBlocks.of(visible[used], counts[used], owners, group)
            # The kernel treats all slots as one text; `keys` says which of them belong to each sequence.
            owners = owners.repeat_interleave(of_columns.starts.diff())
            slots = self.table[owners, of_columns.keys].to(torch.int32)
            self._blocks[key] = replace(of_columns, keys=slots, sequences=torch.zeros_like(of_columns.sequences))
        return self._blocks[key]

    def _mask(self, window: int | None, kv_heads: int, group: int, dtype: torch.dtype) -> Tensor:
        """Returns (S * kv_heads, N * group, C): 0 where a branch sees a column, otherwise a very negative number."""
        key = (window, kv_heads, group, dtype)
        if key not in self._masks:
            visible = self._within(window)
            # Not -inf: empty cells of the grid see nothing, which would give NaN (0 / 0), and NaNs are slow.
            hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            hidden.masked_fill_(~visible, max(-1e30, torch.finfo(dtype).min / 2))
            sequences, branches, columns = visible.shape
            spread = hidden[:, None, :, None].expand(sequences, kv_heads, branches, group, columns)
            self._masks[key] = spread.reshape(sequences * kv_heads, branches * group, columns)
        return self._masks[key]

    def _within(self, window: int | None) -> Tensor:
        if window is None:
            return self.visible
        return self.visible & (self.branch_positions[:, :, None] - self.positions[:, None] < window)

    def _attend_branches(self, q: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
        """Returns the attention of the branches (R, H, D): one product per sequence, of all its branches and keys."""
        sequences, branches, columns = self.visible.shape
        kv_heads, heads, width = keys.shape[1], *q.shape[1:]
        group = heads // kv_heads
        kernels = loaded() if settings.plain and group <= LANES else None
        if kernels is not None and kernels.accept_queries(q, keys, values):
            return kernels.attention(q, keys, values, self.blocks(settings.window, group), settings.scaling)[0]
        grid = q
        if self.grid_index is not None:
            grid = q.new_zeros(sequences * branches, heads, width).index_copy_(0, self.grid_index, q)
        # Query heads that share keys are stacked: (S * H / G, N * G, D).
        grid = grid.view(sequences, branches, kv_heads, group, width).permute(0, 2, 1, 3, 4)
        grid = grid.reshape(sequences * kv_heads, branches * group, width)
        # Columns that no branch sees may hold NaN, which survives a weight of 0, so they use slot 0, which holds zeros.
        slots = torch.where(self.visible.any(1), self.table, 0)[:, None]
        of_heads = torch.arange(kv_heads, device=q.device)[:, None]
        keys = keys[slots, of_heads].view(sequences * kv_heads, columns, width)
        values = values[slots, of_heads].view(sequences * kv_heads, columns, -1)
        y = masked_weights(grid, keys, self._mask(settings.window, kv_heads, group, q.dtype), settings) @ values
        y = y.view(sequences, kv_heads, branches, group, -1).permute(0, 2, 1, 3, 4)
        y = y.reshape(sequences * branches, heads, -1)
        return y if self.grid_index is None else y[self.grid_index]


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
    """Returns the causal attention of a prompt's last tokens, q (T, H, D), over all its k and v (P + T, H / G, D)."""
    total, group = len(k), q.shape[1] // k.shape[1]
    before = total - len(q)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if not before and settings.softcap is None and (settings.window is None or total <= settings.window):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=settings.scaling)
    else:
        place = torch.arange(total, device=q.device)
        back = place[before:, None] - place
        visible = back >= 0 if settings.window is None else (back >= 0) & (back < settings.window)
        if settings.softcap is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=settings.scaling)
        else:
            hidden = torch.zeros(visible.shape, device=q.device).masked_fill_(~visible, float("-inf"))
            y = (masked_weights(q[0], k[0], hidden, settings) @ v[0])[None]
    return y[0].transpose(0, 1)
