"""Small operators of transformers' models in fewer passes over memory, for the time of a step.

Between the products of a small model, such operators are a good part of a step.  What is put in their place computes
the same formula; in bf16 it rounds once where theirs rounds twice.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Operators"]


class Operators:
    """The modules of one model that have a shorter way.  Only on CPUs, where this was measured."""

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        for module in model.modules():
            forward = _shorter(module)
            if forward is not None:
                self._forwards.append((module, forward))

    @contextmanager
    def shorter(self) -> Iterator[None]:
        """Takes the shorter ways for the time of a step."""
        taken = [each for each in self._forwards if "forward" not in each[0].__dict__]
        for module, forward in taken:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in taken:
                del module.__dict__["forward"]


def _shorter(module: nn.Module) -> Callable[..., Tensor] | None:
    forward: Callable[..., Tensor] | None = None
    if type(module).__name__ == "NewGELUActivation":
        # Eight operators that keep five tensors are one in torch: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))),
        # equation 2 of arXiv:1606.08415.
        forward = functools.partial(_gelu, module)
    elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        forward = functools.partial(_rms_norm, module)
    return forward if forward is not None and _same(module) else None


@torch.no_grad()
def _same(module: nn.Module) -> bool:
    """Whether a module computes what its name says: tried on a copy, with a weight that is not all ones."""
    try:
        twin = copy.deepcopy(module).float().requires_grad_(False)
        for weight in twin.parameters():
            weight.copy_(torch.linspace(-1, 2, weight.numel()).view(weight.shape))
        width = next((len(weight) for weight in twin.parameters()), 8)
        x = torch.linspace(-3, 2, 2 * width).view(2, width)
        shorter = _rms_norm if hasattr(twin, "variance_epsilon") else _gelu
        return torch.allclose(shorter(twin, x), twin(x), rtol=1e-5, atol=1e-6)
    except Exception:  # whatever a module of that name is, it is not what was thought
        return False


def _gelu(module: nn.Module, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _rms_norm(norm: Any, *given: Any, **named: Any) -> Tensor:
    x = given[0] if len(given) == 1 and not named else None
    usual = x is not None and not norm.weight.requires_grad and norm.weight.dtype == x.dtype and x.device.type == "cpu"
    if not usual or torch.is_autocast_enabled("cpu"):
        return cast(Tensor, type(norm).forward(norm, *given, **named))
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
