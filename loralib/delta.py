"""Every LoRA formula, once: forward, merging, export and serving all call these.

Hu et al. 2021 (arXiv:2106.09685), section 4.1: a frozen weight W is updated by a product of two thin matrices,

    h = W x + scaling * B A x,        scaling = lora_alpha / r,

with A (r, in) and B (out, r).  Shape letters: r rank, k enabled blocks, n blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = [
    "add_delta",
    "balanced_factors",
    "block_diagonal_B",
    "delta_weight",
    "dense",
    "diagonal_blocks",
    "dora_norms",
    "dora_weight",
    "effective_rank",
    "grouped_linear",
    "grouped_product",
    "low_rank",
    "olora_factors",
    "pissa_factors",
    "product_svd",
    "row_squares",
    "scale_outputs",
    "scaling_of",
    "state_of",
    "stored_bytes",
]

_ROWS_AT_ONCE: Final = 128  # while products of two activations are summed up


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


def grouped_linear(x: Tensor, weights: Tensor, counts: Sequence[int], biases: Tensor | None = None) -> Tensor:
    """Computes ``W[e] x + b[e]`` for rows that come in groups, the first of which are those of weight 0.

    No weight is copied, and none is touched that has no rows: what is kept for the backward pass are the rows.

    Args:
        x: (S, in), sorted by group.
        weights: (E, out, in), one for each group.
        counts: how many rows each of the E groups has.  Rows after the last group belong to none, and become zeros.
        biases: (E, out).

    Returns:
        (S, out), in the dtype of x.

    >>> grouped_linear(torch.ones(3, 2), torch.stack([torch.eye(2), 5 * torch.eye(2)]), [1, 2]).tolist()
    [[1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]
    """
    weight_of = weights.unbind()
    bias_of = [None] * len(weight_of) if biases is None else biases.unbind()
    return grouped_product(x, counts, weights.shape[1], lambda n, rows: F.linear(rows, weight_of[n], bias_of[n]))


def grouped_product(x: Tensor, counts: Sequence[int], width: int, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Computes a product for each group of rows; see `grouped_linear`.

    Args:
        x: (S, in), sorted by group.
        counts: how many rows each group has; rows after the last group become zeros.
        width: numbers in a row of the products.
        product: called with a group's number and its rows (count, in); returns (count, width).

    Returns:
        (S, width), in the dtype of x.
    """
    rest = len(x) - sum(counts)
    # One split: each slice of its own would get a gradient of the size of x.
    rows = x.split([*counts, rest])
    products = [product(number, rows[number]) for number, count in enumerate(counts) if count]
    if rest or not products:
        products.append(x.new_zeros(rest, width))
    return torch.cat(products)


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Computes ``scaling * B A`` in at least fp32.

    Args:
        A: (..., r, in).
        B: (..., out, r).
        scaling: see `scaling_of`.

    Returns:
        (..., out, in), in fp32 (fp64 if a factor is fp64).
    """
    wide = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    return (B.to(wide) @ A.to(wide)) * scaling


def dense(weight: Tensor) -> Tensor:
    """Returns a base weight as an ordinary floating-point tensor, in the shape that its layer computes with.

    Whatever reads a base weight's values or shape goes through here, so that another kind of storage is a line here.
    One that is spread over processes (FSDP2) is put together, in which every process must take part; one that is held
    in fewer bits (`loralib.bases.quant`) is made dense.
    """
    whole = getattr(weight, "full_tensor", None) or getattr(weight, "dense", None)
    return weight if whole is None else cast(Tensor, whole())


def stored_bytes(weight: Tensor) -> int:
    """Returns the bytes that a base weight takes."""
    return int(getattr(weight, "stored_bytes", weight.nbytes))


def state_of(weight: Tensor) -> tuple[Any, ...]:
    """Returns what differs once a weight holds other values, unless they were written behind its version counter."""
    held: Tensor = getattr(weight, "codes", weight)  # one that is held in fewer bits has no place of its own
    version = None if weight.is_inference() else weight._version
    return held.data_ptr(), version, weight.dtype, weight.shape, weight.stride()


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


def diagonal_blocks(B: Tensor, blocks: Sequence[bool]) -> Tensor:
    """Undoes `block_diagonal_B`, of which it keeps the blocks on the diagonal.

    >>> diagonal_blocks(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), [True, False, True]).tolist()
    [[1.0], [2.0]]
    """
    size, r = B.shape[0] // len(blocks), B.shape[1] // sum(blocks)
    rows = [row for row, on in zip(B.split(size), blocks, strict=True) if on]
    return torch.cat([row[:, i * r : (i + 1) * r] for i, row in enumerate(rows)])


def product_svd(A: Tensor, B: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the singular value decomposition of ``scaling * B A`` without forming the product.

    With thin QR factors B = Q_B R_B and A^T = Q_A R_A it is enough to decompose the r x r matrix R_B R_A^T.

    Args:
        A: (r, in).
        B: (out, r).
        scaling: see `scaling_of`.

    Returns:
        U (out, k), S (k,) in falling order and Vh (k, in) with k = min(r, in, out), in fp64.

    >>> U, S, Vh = product_svd(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]]), 0.5)
    >>> S.tolist()
    [5.0]
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T * scaling, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.T


def balanced_factors(U: Tensor, S: Tensor, Vh: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Returns the best factors of rank r of a matrix (Eckart and Young 1936), each with half of the singular values.

    Args:
        U: (out, k).
        S: (k,), in falling order.
        Vh: (k, in).
        r: the rank of the result; zeros are added if it exceeds k.

    Returns:
        A (r, in) and B (out, r), in fp32, with ``B A`` nearest to ``U diag(S) Vh``.
    """
    root = S[:r].sqrt()
    A, B = root[:, None] * Vh[:r], U[:, :r] * root
    missing = r - len(root)
    A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    return A.float().contiguous(), B.float().contiguous()


def effective_rank(S: Tensor) -> float:
    """Returns how many singular values carry a matrix: exp of the entropy of their shares (Roy and Vetterli 2007).

    >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])), 6), effective_rank(torch.zeros(3))
    (2.0, 0.0)
    """
    total = S.sum()
    if total == 0:
        return 0.0
    share = S[S > 0].double() / total
    return float(torch.exp(-(share * share.log()).sum()))


def dora_weight(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Computes ``m (W + delta) / ||W + delta||``, row by row: DoRA's weight (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    The norm counts as a constant in the backward pass (section 4.3 of the paper).

    Args:
        weight: W (out, in).
        delta: (out, in), as `delta_weight` makes it.
        magnitude: m (out,).

    Returns:
        (out, in), in at least fp32.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
    updated = weight.to(wide) + delta.to(wide)
    norms = _not_zero(torch.linalg.vector_norm(updated, dim=1, keepdim=True))
    return updated * (magnitude.to(wide)[:, None] / norms.detach())


def dora_norms(weight: Tensor, squares: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Computes ``||W + scaling B A||``, row by row, without a matrix of W's size.

        ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T    for rows w of W and b of B

    Args:
        weight: W (out, in), in any floating dtype.
        squares: ``||w||^2`` of each row (out,), in at least fp32 (`row_squares`).
        A: (r, in).
        B: (out, r).
        scaling: see `scaling_of`.

    Returns:
        (out,), in the dtype of `squares`.
    """
    crossed = F.linear(weight, A.to(weight.dtype)).to(squares.dtype)
    A, B = A.to(squares.dtype), B.to(squares.dtype) * scaling
    return _not_zero((squares + ((2 * crossed + B @ (A @ A.T)) * B).sum(1)).clamp(min=0).sqrt())


def _not_zero(norms: Tensor) -> Tensor:
    """Norms to divide by: a row of zeros stays one."""
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)


def row_squares(weight: Tensor) -> Tensor:
    """Returns the squared norm of each row of W (out, in), in at least fp32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    # A few rows at a time: a wide copy of a large table would double its memory.
    return torch.cat([rows.to(wide).square().sum(1) for rows in weight.split(max(1, 2**22 // weight.shape[1]))])


def scale_outputs(
    y: Tensor, scale: Tensor | None, bias: Tensor | None = None, *, channels: int = 0, in_place: bool = False
) -> Tensor:
    """Computes ``scale * (y - bias) + bias``, rounded as y is: a scale near 1 is never rounded to bf16 itself.

    Args:
        y: (..., out), or with `channels` (..., out, *size).
        scale: (out,); None: 1.
        bias: (out,), if y holds one.
        channels: how many dimensions follow that of the outputs.
        in_place: whether the result takes the place of y, which nothing else may need then.

    >>> scale_outputs(torch.tensor([[3.0, 5.0]]), torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])).tolist()
    [[5.0, 5.0]]
    """
    if scale is None:
        return y
    return cast(Tensor, _ScaledOutputs.apply(y, scale, bias, channels, in_place))  # type: ignore[no-untyped-call]


class _ScaledOutputs(torch.autograd.Function):
    """See `scale_outputs`.  What is kept for the backward pass is the result, which its readers often keep as well."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, bias: Tensor | None, channels: int, in_place: bool) -> Tensor:
        shape = (-1, *(1,) * channels)
        step = (scale - 1).to(y.dtype).view(shape)
        result = y.addcmul_(y, step) if in_place else torch.addcmul(y, y, step)
        if in_place:
            ctx.mark_dirty(y)
        if bias is not None:
            result -= (bias * (scale - 1)).to(y.dtype).view(shape)
        ctx.save_for_backward(result, scale, bias)
        ctx.channels = channels
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        result, scale, bias = ctx.saved_tensors
        shape, outputs = (-1, *(1,) * ctx.channels), gradient.dim() - 1 - ctx.channels
        others = [dimension for dimension in range(gradient.dim()) if dimension != outputs]
        of_scale, of_bias = None, None
        if ctx.needs_input_grad[1]:
            scaled = result if bias is None else result - bias.to(result.dtype).view(shape)
            if ctx.channels:
                total = (gradient * scaled).sum(others, dtype=scale.dtype)
            else:
                total = _dots(gradient, scaled, scale.dtype)
            of_scale = torch.where(scale == 0, 0, total / scale)  # a row of zeros stays one
        if ctx.needs_input_grad[2]:
            of_bias = ((1 - scale) * gradient.sum(others, dtype=scale.dtype)).to(bias.dtype)
        of_y = torch.addcmul(gradient, gradient, (scale - 1).to(gradient.dtype).view(shape))
        return of_y, of_scale, of_bias, None, None


def _dots(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sums of ``one * other`` (..., out) over all but the last dimension; (out,) in a wider dtype.

    A few rows at a time stay in the cache, and their wide copies small.
    """
    total = one.new_zeros(one.shape[-1], dtype=dtype)
    pairs = zip(*(each.reshape(-1, each.shape[-1]).split(_ROWS_AT_ONCE) for each in (one, other)), strict=True)
    for rows, others in pairs:
        total += (rows.to(dtype) * others).sum(0)
    return total


def pissa_factors(weight: Tensor, r: int, scaling: float, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns the factors that PiSSA starts from, the r largest singular values of W (Meng 2024, arXiv:2404.02948).

    While PiSSA trains, the base is W - scaling B0 A0; so against W itself the update is scaling (B A - B0 A0), which is
    a plain one of rank 2 r.

    Args:
        weight: W (out, in).
        r: the rank.
        scaling: see `scaling_of`.
        niter: approximate, with random numbers and this many subspace iterations (Halko et al. 2009): much faster.

    Returns:
        A0 (r, in) and B0 (out, r), in fp32, with ``scaling * B0 A0`` the best approximation of W of rank r.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight.float(), q=r, niter=niter)
        Vh = V.T
    return balanced_factors(U, S / scaling, Vh, r)


def olora_factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Returns the factors that OLoRA starts from: the QR decomposition of W, cut (Büyükakyüz 2024, arXiv:2406.01775).

    As with PiSSA, the base is W - scaling B0 A0 while it trains.

    Args:
        weight: W (out, in).
        r: the rank.

    Returns:
        A0 (r, in) and B0 (out, r), in fp32.
    """
    Q, R = torch.linalg.qr(weight.float())
    return R[:r].contiguous(), Q[:, :r].contiguous()
