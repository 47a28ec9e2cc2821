"""Gradients of fp16 models, which underflow below 6e-8: scaled in the backward pass, and unscaled afterwards.

The gradient of one token's loss, divided by the number of tokens in an update, has few significant digits in fp16, or
none.  So the backward pass starts from a gradient scaled by a power of two, which changes no digit.  The trained
factors are fp32, where the scale is divided out again (Micikevicius et al. 2018, section 3.2).  A gradient that
overflows is recomputed with a smaller scale.  The initial scale does not depend on earlier steps, so that a run which
is interrupted and resumed computes the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

__all__ = ["computes_in_half", "scaled_backward"]

# Weight of one token's loss at the start of the backward pass, and the factor by which it shrinks after an overflow.
_START: Final = 2.0**4
_STEP: Final = 2.0**4
_SMALLEST: Final = 2.0**-24


def computes_in_half(model: nn.Module) -> bool:
    """Returns whether any part of a model is in fp16."""
    return any(parameter.dtype == torch.float16 for parameter in model.parameters())


def scaled_backward(compute: Callable[[float], Tensor], parameters: Sequence[nn.Parameter], scale: float) -> Tensor:
    """Adds gradients to parameters as `compute` would on its own, but without fp16 underflow.

    Args:
        compute: adds the gradient of a given factor times the loss, and returns the loss ().
        parameters: the parameters whose gradients it adds to.
        scale: the requested factor.

    Returns:
        The loss ().
    """
    earlier = [parameter.grad for parameter in parameters]
    start = _START
    while True:
        power = 2.0 ** round(math.log2(start / scale)) if scale else 1.0
        for parameter in parameters:
            parameter.grad = None
        loss = compute(scale * power)
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if all_finite(found) or not all_finite([loss]) or start <= _SMALLEST:
            break
        start /= _STEP
    for parameter, before in zip(parameters, earlier, strict=True):
        if parameter.grad is None:
            parameter.grad = before
        else:
            parameter.grad /= power
            if before is not None:
                parameter.grad = before.add_(parameter.grad)
    return loss


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Returns whether all tensors are free of infinities and NaN."""
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
