"""Attention over packed rows on GPUs: flex_attention with block masks, or a dense mask where it is unavailable.

The tree of a packed row (`data/packing.py`) is one number per token, the end of its subtree: query q sees key k if and
only if ``k <= q < ends[k]`` and, in a sliding-window layer, q is less than `window` positions after k.  `mask_mod` is
that formula.  flex_attention compiles it into its kernel, and skips the blocks of 128 queries and 128 keys in which no
pair is visible.  These follow from the minimum and maximum values of each block, which are computed on the CPU, without
synchronising with the device or building a T x T mask.  The dense mask evaluates the same function for all pairs.

Kernels are compiled for specific shapes, so a row is padded to one of few lengths (`bucket`).  A padding token is
visible only to itself, and predicts nothing.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .attention import AttentionSettings, masked_weights
from .compiled import copied
from .transfer import to_device

__all__ = ["BLOCK", "FlexLayout", "bucket", "has_compiler", "has_flex", "mask_mod"]

BLOCK: Final = 128  # flex_attention's own block size
_NARROWEST: Final = 16  # minimum head width that its kernels support

MaskMod = Callable[[Any, Any, Tensor, Tensor], Tensor]


def bucket(tokens: int) -> int:
    """Returns the length that a row of this many tokens is padded to: fewer than 128 more, or up to an eighth more.

    The lengths are multiples of 128; from 2,048 on, there are eight between consecutive powers of two.  128 itself is
    excluded, because compilers treat a row of a single block as a special case.

    >>> [bucket(tokens) for tokens in (1, 256, 257, 1024, 1025, 4097)]
    [256, 256, 384, 1024, 1152, 4608]
    """
    blocks = max(2, -(-tokens // BLOCK))
    step = 1 << max(0, (blocks - 1).bit_length() - 4)
    return -(-blocks // step) * step * BLOCK


@functools.cache
def has_compiler() -> bool:
    """Returns whether torch.compile can build GPU kernels: it needs triton, which PyTorch installs on Linux."""
    return importlib.util.find_spec("triton") is not None


def has_flex(device: torch.device) -> bool:
    """Returns whether flex_attention can be used in training: it has no backward pass on CPUs."""
    return device.type == "cuda" and has_compiler()


class FlexLayout:
    """One padded row of consecutive examples; prefixes that they share appear once.

    Args:
        ends: (T,) token k is seen by the tokens k .. ends[k] - 1; on the CPU, like the positions; T is a `bucket`.
        positions: (T,) the position of each token in its example.
        device: the model's device.
        flex: whether flex_attention may be used; otherwise masks are dense.
        windows: window sizes of the layers (see `AttentionSettings`), if known: their masks are built now, because a
            compiled block cannot build any.
    """

    def __init__(
        self,
        ends: Tensor,
        positions: Tensor,
        device: torch.device | str,
        *,
        flex: bool,
        windows: Iterable[int | None] = (),
    ) -> None:
        self.tokens = len(ends)
        self._ends, self._positions, self._flex = ends.to(torch.int32), positions.to(torch.int32), flex
        self._ends_there, self._positions_there = (to_device(x, device) for x in (self._ends, self._positions))
        self._block_masks: dict[int | None, BlockMask] = {}
        self._dense_masks: dict[int | None, Tensor] = {}
        for window in windows:
            self.block_mask(window) if flex else self.dense_mask(window)

    @property
    def windows(self) -> frozenset[int | None]:
        """The window sizes requested by layers so far."""
        return frozenset(self._block_masks) | frozenset(self._dense_masks)

    def block_mask(self, window: int | None) -> BlockMask:
        """Returns which tokens see which in layers with this window, for flex_attention."""
        if window in self._block_masks:
            return self._block_masks[window]
        mask = _block_mask(self._ends, self._positions, window, self._rule(window), self._ends_there.device)
        self._block_masks[window] = mask
        return mask

    def dense_mask(self, window: int | None) -> Tensor:
        """Returns which tokens see which in layers with this window: (T, T) bool."""
        if window in self._dense_masks:
            return self._dense_masks[window]
        places = torch.arange(self.tokens, device=self._ends_there.device)
        mask = self._rule(window)(0, 0, places[:, None], places[None])
        if not torch.compiler.is_compiling():  # when compiling, the mask is part of the compiled code
            self._dense_masks[window] = mask
        return mask

    def _rule(self, window: int | None) -> MaskMod:
        return mask_mod(self._ends_there, self._positions_there, window)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        """Returns the attention of q (T, H, D) over k and v (T, H / G, D)."""
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, D)
        if self._flex and not settings.dropout and q.shape[-1] >= _NARROWEST:
            y = _flex(q, k, v, self.block_mask(settings.window), settings)
        else:
            y = _with_dense_mask(q, k, v, self.dense_mask(settings.window), settings)
        return y[0].transpose(0, 1)


def mask_mod(ends: Tensor, positions: Tensor, window: int | None) -> MaskMod:
    """Returns a function that says whether the query at index q sees the key at index k.

    Args:
        ends: see `FlexLayout`; on the device, like the positions.
        positions: see `FlexLayout`.
        window: see `AttentionSettings`.
    """

    def in_tree(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k])

    if window is None:
        return in_tree

    def in_window(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k]) & (positions[q] - positions[k] < window)

    return in_window


def _block_mask(
    ends: Tensor, positions: Tensor, window: int | None, rule: MaskMod, device: torch.device | str
) -> BlockMask:
    """Returns the blocks of keys visible to each block of queries: partially, as given by the rule, or fully.

    For the queries s .. s + 127 and an earlier block of keys, some pair is visible if and only if the maximum end in
    the block is greater than s, and all pairs are if the minimum end is at least s + 128.  A window only removes pairs:
    blocks are skipped, or count as fully visible, only if their minimum and maximum positions prove it.

    Args:
        ends: (T,) see `FlexLayout`; on the CPU, like the positions.
        positions: (T,) see `FlexLayout`.
        window: see `AttentionSettings`.
        rule: decides whether a pair is visible, on the device.
        device: the device on which the mask is used.
    """
    count = len(ends) // BLOCK
    starts = torch.arange(count)[:, None] * BLOCK
    first_end, last_end = ends.view(count, BLOCK).aminmax(dim=1)
    before = torch.ones(count, count, dtype=torch.bool).tril(-1)
    some, all_of_it = before & (last_end > starts), before & (first_end >= starts + BLOCK)
    if window is not None:
        nearest, farthest = positions.view(count, BLOCK).aminmax(dim=1)
        some &= nearest[:, None] - farthest < window
        all_of_it &= farthest[:, None] - nearest < window
    partly = (some & ~all_of_it) | torch.eye(count, dtype=torch.bool)
    some_count, some_blocks, all_count, all_blocks = (
        to_device(x, device) for seen in (partly, all_of_it) for x in _listed(seen)
    )
    return BlockMask.from_kv_blocks(
        some_count, some_blocks, all_count, all_blocks, BLOCK_SIZE=BLOCK, mask_mod=cast(Any, rule)
    )


def _listed(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many blocks of keys each block of queries sees (1, 1, n), and their indices first (1, 1, n, n)."""
    order = torch.argsort(seen.to(torch.int32), dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, settings: AttentionSettings) -> Tensor:
    # Inside a compiled block, it is compiled along with the block; eager mode is for tests on CPUs.
    alone = q.is_cuda and not torch.compiler.is_compiling()
    attend = _compiled_flex(settings.softcap, torch.is_grad_enabled()) if alone else _attend
    return attend(q, k, v, mask, settings.scaling, settings.softcap)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scaling: float, softcap: float | None) -> Tensor:
    score_mod = None if softcap is None else _softcap(softcap)
    gqa = q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=scaling, enable_gqa=gqa)


@functools.cache
def _compiled_flex(softcap: float | None, with_gradients: bool) -> Callable[..., Tensor]:
    """Returns `_attend` compiled; PyTorch limits recompilations per function, so each kind of layer gets a copy."""
    return cast("Callable[..., Tensor]", torch.compile(copied(_attend)))


@functools.cache
def _softcap(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def _with_dense_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, settings: AttentionSettings) -> Tensor:
    """Computes the same with PyTorch's other operators: for dropout, narrow heads, and if nothing can be compiled."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if settings.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, settings.dropout, scale=settings.scaling)
    hidden = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    weights = masked_weights(q[0], k[0], hidden, settings)
    return (F.dropout(weights, settings.dropout) @ v[0])[None]
