"""Gradients of models in fp16, whose numbers end at 6e-8: scaled on their way back, and the scale taken out again.

The gradient of one token's loss, divided by the tokens of an update, is a number that fp16 has few digits of, or none.
So the pass back starts from a gradient that is some power of two larger, which changes no digit.  The trained factors
are fp32, and there the power is divided out again (Micikevicius et al. 2018, section 3.2).  A gradient that overflows
on its way is computed again from a smaller start.  The start does not depend on earlier steps, so that a run which is
interrupted and resumed computes the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

__all__ = ["computes_in_half", "scaled_backward"]

# The weight of one token's loss where the pass back starts, and what it falls by where that overflows.
_START: Final = 2.0**4
_STEP: Final = 2.0**4
_SMALLEST: Final = 2.0**-24


def computes_in_half(model: nn.Module) -> bool:
    """Returns whether a model, or a part of it, is in fp16."""
    return any(parameter.dtype == torch.float16 for parameter in model.parameters())


def scaled_backward(compute: Callable[[float], Tensor], parameters: Sequence[nn.Parameter], scale: float) -> Tensor:
    """Adds gradients to parameters, as `compute` alone does, but without what fp16 rounds away.

    Args:
        compute: adds the gradient of a given factor times the loss, and returns the loss ().
        parameters: those whose gradients it adds to.
        scale: the factor that is asked for.

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
    """Returns whether no number of any tensor is infinite or NaN."""
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
