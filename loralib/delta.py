"""Every LoRA formula, once: forward, merge, export and serving all call these.

Hu et al. 2021 (arXiv:2106.09685), section 4.1: a frozen weight W is updated by a product of two thin matrices,

    h = W x + scaling * B A x,        scaling = lora_alpha / r,

with A (r, in) and B (out, r).  Shape letters: r rank, k enabled blocks, n blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "add_delta",
    "block_diagonal_B",
    "delta_weight",
    "low_rank",
    "scaling_of",
]


def scaling_of(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """Returns the factor of the low-rank update.

    Args:
        r: the rank; 0 (a layer without adapter) gives 0.
        lora_alpha: the constant of the paper, section 4.1.
        use_rslora: divide by sqrt(r) instead of r (Kalajdzievski 2023, arXiv:2312.03732).

    >>> scaling_of(4, 32), scaling_of(16, 32, use_rslora=True), scaling_of(0, 1)
    (8.0, 8.0, 0.0)
    """
    if r == 0:
        return 0.0
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def low_rank(x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Computes ``scaling * B A x`` for rows x, in the dtype of x.

    A and B may be kept in a wider dtype than x (fp32 factors on a bf16 base); they are cast, being small, not x.

    Args:
        x: (..., in).
        A: (r, in).
        B: (out, r).
        scaling: see `scaling_of`.

    Returns:
        (..., out), in the dtype of x.

    >>> low_rank(torch.ones(2, 3), torch.ones(1, 3), torch.ones(4, 1), 0.5).tolist()
    [[1.5, 1.5, 1.5, 1.5], [1.5, 1.5, 1.5, 1.5]]
    """
    # The scaling goes onto the r-wide middle: r numbers a row instead of `out`.
    return F.linear(F.linear(x, A.to(x.dtype)) * scaling, B.to(x.dtype))


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Computes ``scaling * B A`` in at least fp32.

    Args:
        A: (r, in).
        B: (out, r).
        scaling: see `scaling_of`.

    Returns:
        (out, in), in fp32 (fp64 if a factor is fp64).
    """
    wide = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    return (B.to(wide) @ A.to(wide)) * scaling


def add_delta(weight: Tensor, delta: Tensor) -> Tensor:
    """Computes ``W + delta`` in at least fp32 and rounds once, to the dtype of W.

    Args:
        weight: W, of any floating dtype.
        delta: of the same shape, as `delta_weight` makes it.
    """
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)


def block_diagonal_B(B: Tensor, blocks: Sequence[bool]) -> Tensor:
    """Spreads the B of a fused projection so that it is a plain low-rank update of rank r * k.

    Microsoft's MergedLinear adapts k of n equal output blocks, each with r rows of A and its own B block.  With B laid
    out block-diagonally, and zero rows where a block is not adapted, the same numbers are one plain product B A.

    Args:
        B: (k * out / n, r), the enabled blocks below one another.
        blocks: n booleans, k of them True.

    Returns:
        (out, r * k).

    >>> block_diagonal_B(torch.tensor([[1.0], [2.0]]), [True, False, True]).tolist()
    [[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]
    """
    size = B.shape[0] // sum(blocks)
    enabled = iter(torch.block_diag(*B.split(size)).split(size))
    off = B.new_zeros(size, sum(blocks) * B.shape[1])
    return torch.cat([next(enabled) if on else off for on in blocks])
