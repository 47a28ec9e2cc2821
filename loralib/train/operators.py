"""Small operators of transformers' models in fewer passes over memory, for the time of a step.

Between the products of a small model, such operators are a good part of a step.  What is put in their place computes
the same formula; in bf16 it rounds once where theirs rounds twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Operators"]


class Operators:
    """The modules of one model that have a shorter way."""

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        for module in model.modules():
            forward = None if "forward" in module.__dict__ else _shorter(module)
            if forward is not None:
                self._forwards.append((module, forward))

    @contextmanager
    def shorter(self) -> Iterator[None]:
        """Takes the shorter ways for the time of a step."""
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in self._forwards:
                del module.__dict__["forward"]


def _shorter(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    name = type(module).__name__
    if name == "NewGELUActivation":
        # Eight operators that keep five tensors are one in torch: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))),
        # equation 2 of arXiv:1606.08415.
        return functools.partial(F.gelu, approximate="tanh")
    if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        forward = functools.partial(_rms_norm, module)
        return forward if _same(module, forward) else None
    return None


def _same(norm: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether a norm computes what its name says: tried on a few numbers, with a weight that is not all ones."""
    weight = cast(Tensor, norm.weight)
    if weight.dim() != 1 or weight.requires_grad:
        return False
    x = torch.linspace(-3, 2, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
    with torch.no_grad():
        expected = norm(x)
        return torch.allclose(forward(x), expected, rtol=4 * torch.finfo(weight.dtype).eps, atol=0)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    if norm.weight.requires_grad or norm.weight.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        return cast(Tensor, type(norm).forward(norm, x))
    return cast(Tensor, _RMSNorm.apply(x, norm.weight, norm.variance_epsilon))  # type: ignore[no-untyped-call]


_INPUT_ONLY = [True, False, False]


class _RMSNorm(torch.autograd.Function):
    """``w x / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4) with a frozen w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return torch.mul(x * factor, weight, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, factor = ctx.saved_tensors
        # With f the factor and u = w g: f (u - f^2 x mean(u x)).  LayerNorm's gradient with mean 0 is that less
        # f mean(u), and one operator has it.
        wide, width = factor.dtype, x.shape[-1]
        of_layer_norm = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(),
            x,
            [width],
            torch.zeros_like(factor),
            factor,
            weight.to(wide),
            None,
            [True, False, False],
        )[0]
        missing = (gradient @ weight)[..., None].to(wide) * factor / width
        return of_layer_norm.add_(missing), None, None
