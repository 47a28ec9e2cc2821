"""DoRA's scaling of a layer's outputs, with its gradients in one pass over memory.

With y = s z for rows z (T, out), the layer's output before scaling, and g the gradient of y,

    the gradient in z is s g, and that in s is sum(g z) = sum(g y) / s, over all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layers import LoRALayer, LoRALinear
from .kernels import Kernels, loaded

__all__ = ["finished"]


def finished(layers: Sequence[LoRALinear | None], output: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """Returns the final output for products (T, out), possibly in place; see `LoRALinear.finished`.

    Args:
        layers: the layer of each run with rows in the output; None: a run leaves the base's outputs as they are.
        output: with the low-rank updates already added.
        rows: number of rows of each run; None: there is only one.
    """
    if all(layer is None or _is_plain(layer) for layer in layers):
        return output
    counts, kernels = [len(output)] if rows is None else list(rows), loaded()
    simple = kernels is not None and kernels.accept(output) and output.is_contiguous()
    if simple and all(layer is None or _is_only_scaled(layer) for layer in layers):
        scales = [None if layer is None else layer.output_scale() for layer in layers]
        if all(scale is None or scale.dtype == torch.float32 for scale in scales):
            return cast(Tensor, _Scaled.apply(output, kernels, counts, *scales))  # type: ignore[no-untyped-call]
    if len(layers) == 1 and layers[0] is not None:
        return layers[0].finished(output, in_place=True)
    parts = zip(output.split(counts), layers, strict=True)
    return torch.cat([part if layer is None else layer.finished(part) for part, layer in parts])


def _is_plain(layer: LoRALinear) -> bool:
    kind = type(layer)
    return kind.output_scale is LoRALayer.output_scale and kind.output_shift is LoRALayer.output_shift


def _is_only_scaled(layer: LoRALinear) -> bool:
    return layer._parameters.get("bias") is None and layer.output_shift() is None


class _Scaled(torch.autograd.Function):
    """``scale * z`` for the rows of each run.

    The backward pass keeps the result instead of z, since its consumers often keep it as well.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, kernels: Kernels, counts: list[int], *scales: Tensor | None) -> Tensor:
        # scale - 1, so that a scale near 1 is not itself rounded to bf16
        steps = [None if scale is None else (scale - 1).to(z.dtype) for scale in scales]
        for part, step in zip(z.split(counts), steps, strict=True):
            if step is not None:
                part.addcmul_(part, step)
        ctx.mark_dirty(z)
        ctx.save_for_backward(z, *scales, *steps)
        ctx.kernels, ctx.counts = kernels, counts
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, *kept = ctx.saved_tensors
        scales, steps = kept[: len(ctx.counts)], kept[len(ctx.counts) :]
        grads_z, grads = list[Tensor](), list[Tensor | None]()
        parts = zip(gradient.split(ctx.counts), y.split(ctx.counts), scales, steps, strict=True)
        for of_part, part, scale, step in parts:
            if scale is None:
                grads_z.append(of_part)
                grads.append(None)
            else:
                grad_z, sums = ctx.kernels.scaled_back(of_part, part, step)
                grads_z.append(grad_z)
                grads.append(torch.where(scale == 0, 0, sums / scale))  # a row of zeros stays zero
        return grads_z[0] if len(grads_z) == 1 else torch.cat(grads_z), None, None, *grads
