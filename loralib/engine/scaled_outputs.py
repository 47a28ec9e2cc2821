"""DoRA's scaling of a layer's outputs, with its gradients in one pass over memory.

With y = s z for rows z (T, out), the layer's output before scaling, and g the gradient of y,

    the gradient in z is s g, and that in s is sum(g z) = sum(g y) / s, over all rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layers import LoRALinear
from .kernels import Kernels, loaded

__all__ = ["finished"]


def finished(layer: LoRALinear, output: Tensor) -> Tensor:
    """Returns a layer's final output for its products (T, out), possibly in place; see `LoRALinear.finished`."""
    kernels = loaded()
    simple = kernels is not None and kernels.accept(output) and output.is_contiguous() and layer.bias is None
    scale = layer.output_scale() if simple and layer.output_shift() is None else None
    if scale is None or scale.dtype != torch.float32:
        return layer.finished(output, in_place=True)
    return cast(Tensor, _Scaled.apply(output, scale, kernels))  # type: ignore[no-untyped-call]


class _Scaled(torch.autograd.Function):
    """``scale * z``; the backward pass keeps the result instead of z, since its consumers often keep it as well."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, kernels: Kernels) -> Tensor:
        step = (scale - 1).to(z.dtype)  # so that a scale near 1 is not itself rounded to bf16
        y = z.addcmul_(z, step)
        ctx.mark_dirty(z)
        ctx.save_for_backward(y, scale, step)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        y, scale, step = ctx.saved_tensors
        grad_z, sums = ctx.kernels.scaled_back(gradient, y, step)
        return grad_z, torch.where(scale == 0, 0, sums / scale), None  # a row of zeros stays zero
