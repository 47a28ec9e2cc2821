"""Every LoRA formula, in one place: forward, merging, export and serving all call these functions.

Hu et al. 2021 (arXiv:2106.09685), section 4.1: a frozen weight W is updated by a product of two thin matrices,

    h = W x + scaling * B A x,        scaling = lora_alpha / r,

with A (r, in) and B (out, r).  Letters in shapes: r is the rank, k the number of enabled blocks, n that of all blocks.
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
    "all_finite",
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

_ROWS_AT_ONCE: Final = 128  # chunk size for summing products of two activations


def scaling_of(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """Returns the scaling factor of the low-rank update.

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

    A and B may have a wider dtype than x (fp32 factors on a bf16 base); it is they that are cast, as they are small.

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
    # Scaling is applied to the r-wide intermediate: r multiplications per row instead of `out`.
    return F.linear(F.linear(x, A.to(x.dtype)) * scaling, B.to(x.dtype))


def grouped_linear(x: Tensor, weights: Tensor, counts: Sequence[int], biases: Tensor | None = None) -> Tensor:
    """Computes ``W[e] x + b[e]`` for rows sorted by group e: first those of group 0, and so on.

    No weight is copied, and weights of empty groups are never touched.  Only the rows are kept for the backward pass.

    Args:
        x: (S, in), sorted by group.
        weights: (E, out, in), one per group.
        counts: number of rows in each of the E groups.  Rows beyond the last group belong to none, and yield zeros.
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
    # One split: slicing would give every slice a gradient of the size of x.
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

    All code that reads a base weight's values or shape calls this, so that another kind of storage needs support only
    here.  A sharded weight (FSDP2) is gathered, in which every process must take part; a quantised weight
    (`loralib.bases.quant`) is dequantised.
    """
    whole = getattr(weight, "full_tensor", None) or getattr(weight, "dense", None)
    return weight if whole is None else cast(Tensor, whole())


def stored_bytes(weight: Tensor) -> int:
    """Returns the number of bytes in which a base weight is stored."""
    return int(getattr(weight, "stored_bytes", weight.nbytes))


def state_of(weight: Tensor) -> tuple[Any, ...]:
    """Returns a key that changes when a weight's values change, unless they are written past its version counter."""
    held: Tensor = getattr(weight, "codes", weight)  # a quantised weight has no memory of its own
    version = None if weight.is_inference() else weight._version
    return held.data_ptr(), version, weight.dtype, weight.shape, weight.stride()


def add_delta(weight: Tensor, delta: Tensor) -> Tensor:
    """Computes ``W + delta`` in at least fp32 and rounds once, to W's dtype.

    Args:
        weight: W, of any floating dtype.
        delta: same shape, as returned by `delta_weight`.
    """
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite values; torch.isfinite does not support 8-bit floats."""
    return bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all())


def block_diagonal_B(B: Tensor, blocks: Sequence[bool]) -> Tensor:
    """Expands the B of a fused projection so that it becomes a plain low-rank update of rank r * k.

    Microsoft's MergedLinear adapts k of n equal output blocks, each with its own r rows of A and block of B.  With B
    laid out block-diagonally, and zero rows for blocks that are not adapted, this is one plain product B A.

    Args:
        B: (k * out / n, r), the enabled blocks stacked.
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
    """Undoes `block_diagonal_B` by extracting the blocks on the diagonal.

    >>> diagonal_blocks(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), [True, False, True]).tolist()
    [[1.0], [2.0]]
    """
    size, r = B.shape[0] // len(blocks), B.shape[1] // sum(blocks)
    rows = [row for row, on in zip(B.split(size), blocks, strict=True) if on]
    return torch.cat([row[:, i * r : (i + 1) * r] for i, row in enumerate(rows)])


def product_svd(A: Tensor, B: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the singular value decomposition of ``scaling * B A`` without forming the product.

    After thin QR factorisations B = Q_B R_B and A^T = Q_A R_A, only the r x r matrix R_B R_A^T has to be decomposed.

    Args:
        A: (r, in).
        B: (out, r).
        scaling: see `scaling_of`.

    Returns:
        U (out, k), S (k,) in descending order and Vh (k, in) with k = min(r, in, out), in fp64.

    >>> U, S, Vh = product_svd(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]]), 0.5)
    >>> S.tolist()
    [5.0]
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T * scaling, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.T


def balanced_factors(U: Tensor, S: Tensor, Vh: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Returns a matrix's best factors of rank r (Eckart and Young 1936), singular values split evenly between them.

    Args:
        U: (out, k).
        S: (k,), in descending order.
        Vh: (k, in).
        r: the rank of the result; zeros are added if it exceeds k.

    Returns:
        A (r, in) and B (out, r), in fp32, with ``B A`` closest to ``U diag(S) Vh``.
    """
    root = S[:r].sqrt()
    A, B = root[:, None] * Vh[:r], U[:, :r] * root
    missing = r - len(root)
    A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    return A.float().contiguous(), B.float().contiguous()


def effective_rank(S: Tensor) -> float:
    """Returns the effective rank: exp of the entropy of the normalised singular values (Roy and Vetterli 2007).

    >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])), 6), effective_rank(torch.zeros(3))
    (2.0, 0.0)
    """
    total = S.sum()
    if total == 0:
        return 0.0
    share = S[S > 0].double() / total
    return float(torch.exp(-(share * share.log()).sum()))


def dora_weight(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Computes DoRA's weight, ``m (W + delta) / ||W + delta||`` row by row (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    The norm is treated as a constant in the backward pass (section 4.3 of the paper).

    Args:
        weight: W (out, in).
        delta: (out, in), as returned by `delta_weight`.
        magnitude: m (out,).

    Returns:
        (out, in), in at least fp32.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
    updated = weight.to(wide) + delta.to(wide)
    norms = _not_zero(torch.linalg.vector_norm(updated, dim=1, keepdim=True))
    return updated * (magnitude.to(wide)[:, None] / norms.detach())


def dora_norms(weight: Tensor, squares: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Computes ``||W + scaling B A||`` row by row, without creating a matrix of W's size.

        ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T    for rows w of W and b of B

    Args:
        weight: W (out, in), of any floating dtype.
        squares: ``||w||^2`` of each row (out,), in at least fp32 (see `row_squares`).
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
    """Replaces zero norms, so that dividing by them leaves zero rows zero."""
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)


def row_squares(weight: Tensor) -> Tensor:
    """Returns the squared norm of each row of W (out, in), in at least fp32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    # A few rows at a time: a copy of a large table in a wider dtype would double its memory.
    return torch.cat([rows.to(wide).square().sum(1) for rows in weight.split(max(1, 2**22 // weight.shape[1]))])


def scale_outputs(
    y: Tensor, scale: Tensor | None, bias: Tensor | None = None, *, channels: int = 0, in_place: bool = False
) -> Tensor:
    """Computes ``scale * (y - bias) + bias`` in y's dtype, without rounding a scale near 1 to bf16 itself.

    Args:
        y: (..., out), or (..., out, *size) with `channels`.
        scale: (out,); None means 1.
        bias: (out,), if y includes one.
        channels: number of dimensions after the output dimension.
        in_place: whether the result may overwrite y, which nothing else may need then.

    >>> scale_outputs(torch.tensor([[3.0, 5.0]]), torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])).tolist()
    [[5.0, 5.0]]
    """
    if scale is None:
        return y
    return cast(Tensor, _ScaledOutputs.apply(y, scale, bias, channels, in_place))  # type: ignore[no-untyped-call]


class _ScaledOutputs(torch.autograd.Function):
    """See `scale_outputs`.  Only the result is kept for the backward pass; whoever reads it often keeps it anyway."""

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
            of_scale = torch.where(scale == 0, 0, total / scale)  # zero rows stay zero
        if ctx.needs_input_grad[2]:
            of_bias = ((1 - scale) * gradient.sum(others, dtype=scale.dtype)).to(bias.dtype)
        of_y = torch.addcmul(gradient, gradient, (scale - 1).to(gradient.dtype).view(shape))
        return of_y, of_scale, of_bias, None, None


def _dots(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sums of ``one * other`` (..., out) over all but the last dimension; (out,) in a wider dtype.

    Works on a few rows at a time, so that they stay in the cache and their copies in a wider dtype stay small.
    """
    total = one.new_zeros(one.shape[-1], dtype=dtype)
    pairs = zip(*(each.reshape(-1, each.shape[-1]).split(_ROWS_AT_ONCE) for each in (one, other)), strict=True)
    for rows, others in pairs:
        total += (rows.to(dtype) * others).sum(0)
    return total


def pissa_factors(weight: Tensor, r: int, scaling: float, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns the initial factors of PiSSA: the top r singular components of W (Meng 2024, arXiv:2404.02948).

    While PiSSA trains, the base is W - scaling B0 A0; relative to W, the update is scaling (B A - B0 A0), of rank 2 r.
    a plain one of rank 2 r.

    Args:
        weight: W (out, in).
        r: the rank.
        scaling: see `scaling_of`.
        niter: if given, use a randomised SVD with this many subspace iterations (Halko et al. 2009): much faster.

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
    """Returns the initial factors of OLoRA: the truncated QR decomposition of W (Büyükakyüz 2024, arXiv:2406.01775).

    As with PiSSA, the base is W - scaling B0 A0 during training.

    Args:
        weight: W (out, in).
        r: the rank.

    Returns:
        A0 (r, in) and B0 (out, r), in fp32.
    """
    Q, R = torch.linalg.qr(weight.float())
    return R[:r].contiguous(), Q[:, :r].contiguous()
