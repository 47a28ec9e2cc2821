"""Small operators of transformers' models with fewer passes over memory.

Between the matrix products of a small model, such operators take a good part of a step.  Each override computes the
formula that the module's name implies, and is tested on the user's own module before it is used; in bf16 it rounds once
where theirs rounds twice.  Only on CPUs, where the benefit was measured.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels import Kernels, loaded
from .placement import Override, Overrides, own_forward

__all__ = ["operator_overrides"]

_VERDICTS: Final[dict[Any, bool]] = {}  # whether modules of these classes, or this function, pass their check


def operator_overrides(model: nn.Module) -> Overrides:
    """Returns the faster functions for all modules of a model for which one exists."""
    rebound: dict[Any, Any] = {}
    overrides = {module: _faster(module, rebound) for module in model.modules()}
    return {module: override for module, override in overrides.items() if override is not None}


def _faster(module: nn.Module, rebound: dict[Any, Any]) -> Override | None:
    kind = type(module)
    if kind.__name__ == "NewGELUActivation":
        # Replaces eight operators, which keep five tensors, with one.
        return functools.partial(_gelu, loaded(), module) if _verdict(_same, module, kind) else None
    if kind.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return functools.partial(_rms_norm, loaded(), module) if _verdict(_same, module, kind) else None
    if module._modules.keys() == _GATED:
        activation = cast(nn.Module, module._modules["act_fn"])
        usual = _verdict(_gates_as_usual, module, type(module), type(activation))
        return functools.partial(_gated, loaded(), module, activation) if usual else None
    return _rotating(module, rebound)


def _verdict(check: Callable[[Any], bool], tried: Any, *key: Any) -> bool:
    """Returns a check's result, computed once per key: the classes that determine it, or the function itself."""
    if key not in _VERDICTS:
        _VERDICTS[key] = check(tried)
    return _VERDICTS[key]


@torch.no_grad()
def _same(module: nn.Module) -> bool:
    """Whether a module computes what its name says, tested on a copy with a weight that is not all ones."""
    try:
        twin = copy.deepcopy(module).float().requires_grad_(False)
        for weight in twin.parameters():
            weight.copy_(torch.linspace(-1, 2, weight.numel()).view(weight.shape))
        width = next((len(weight) for weight in twin.parameters()), 16)
        x = torch.linspace(-3, 2, 2 * width).view(2, width)
        shorter = _rms_norm if hasattr(twin, "variance_epsilon") else _gelu
        return torch.allclose(shorter(loaded(), twin, x), twin(x), rtol=1e-5, atol=1e-6)
    except Exception:  # a module that fails here does not compute what its name says
        return False


class _NoSaveContext:
    """A context for a forward that discards tensors, because no backward follows."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def _applied(function: Any, *given: Any) -> Any:
    """Applies an autograd function; without gradients, only its forward, which halves the cost of such a call."""
    return function.apply(*given) if torch.is_grad_enabled() else function.forward(_NoSaveContext(), *given)


def _gelu(kernels: Kernels | None, module: nn.Module, x: Tensor) -> Tensor:
    if kernels is None or not kernels.accept(x):
        return F.gelu(x, approximate="tanh")
    return cast(Tensor, _applied(_GELU, x, kernels))


class _GELU(torch.autograd.Function):
    """``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`` (Hendrycks and Gimpel 2016, arXiv:1606.08415, eq. 2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kernels = kernels
        return kernels.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.kernels.gelu_back(gradient, *ctx.saved_tensors), None


def _rms_norm(kernels: Kernels | None, norm: Any, *given: Any, **named: Any) -> Tensor:
    x = given[0] if len(given) == 1 and not named else None
    weight = norm.weight  # None in some instances of a class
    usual = x is not None and weight is not None and weight.dtype == x.dtype and x.device.type == "cpu"
    if not usual or torch.is_autocast_enabled("cpu") or (weight.requires_grad and torch.is_grad_enabled()):
        return cast(Tensor, own_forward(norm, *given, **named))
    return cast(Tensor, _applied(_RMSNorm, x, weight, norm.variance_epsilon, kernels))


class _RMSNorm(torch.autograd.Function):
    """``w x / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4) with a frozen w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: Kernels | None) -> Tensor:
        ctx.kernels = kernels
        if kernels is not None and kernels.accept(x, weight):
            y, factor = kernels.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, factor)
            return y
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return torch.mul(x * factor, weight, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, factor = ctx.saved_tensors
        kernels: Kernels | None = ctx.kernels
        if kernels is not None and kernels.accept(gradient, x, weight):
            return kernels.rms_norm_back(gradient, x, weight, factor), None, None, None
        # With f the factor and u = w g: f (u - f^2 x mean(u x)).  LayerNorm's gradient for mean 0 is that minus
        # f mean(u), and takes a single operator.
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
        missing = (gradient @ weight)[..., None] * (factor / width).to(gradient.dtype)
        return of_layer_norm.add_(missing), None, None, None


_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # the submodules of such a block, as named by transformers


@torch.no_grad()
def _gates_as_usual(block: nn.Module) -> bool:
    """Whether a block computes ``down(silu(gate(x)) * up(x))``, tested with substitute submodules."""
    twin = copy.copy(block)
    twin.__dict__.pop("forward", None)  # a switch would compute the original
    twin._modules = {**block._modules, "gate_proj": _Line(2, -1), "up_proj": _Line(1, 3), "down_proj": _Line(0.5, 0)}
    x = torch.linspace(-3, 2, 8)[None]
    try:
        return torch.allclose(twin(x), 0.5 * F.silu(2 * x - 1) * (x + 3), rtol=1e-5, atol=1e-6)
    except Exception:  # a block that fails here does not compute what its name says
        return False


class _Line(nn.Module):
    def __init__(self, slope: float, start: float) -> None:
        super().__init__()
        self.slope, self.start = slope, start

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + self.start


def _gated(kernels: Kernels | None, block: Any, activation: nn.Module, x: Tensor) -> Tensor:
    hooks = (activation._forward_hooks, activation._forward_pre_hooks, activation._backward_hooks)
    if block.act_fn is not activation or any(hooks):  # replaced since, or observed by hooks
        return cast(Tensor, own_forward(block, x))
    gate, up = block.gate_proj(x), block.up_proj(x)
    if kernels is not None and kernels.accept(gate, up) and gate.shape == up.shape:
        hidden = _applied(_SwiGLU, gate, up, kernels)
    else:
        hidden = block.act_fn(gate) * up
    return cast(Tensor, block.down_proj(hidden))


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` (Shazeer 2020, arXiv:2002.05202, eq. 5)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.kernels.swiglu_back(gradient, *ctx.saved_tensors), None


_ROTATE: Final = "apply_rotary_pos_emb"  # the function's name in transformers' modeling files


def _rotating(module: nn.Module, rebound: dict[Any, Any]) -> Override | None:
    """Returns an attention module's forward that rotates queries and keys with `_rotate`, if it uses such a function.

    It is the class's own code, in which only that one name is rebound: neither the class nor its file is modified.
    (transformers' own mechanism for replacing the function needs a package of kernels from the Hub.)

    Args:
        module: any module.
        rebound: such forwards, keyed by the original; filled here.
    """
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or _ROTATE not in forward.__code__.co_names:
        return None
    if forward not in rebound:
        theirs = forward.__globals__.get(_ROTATE)
        usual = theirs is not None and _verdict(_rotates_as_usual, theirs, theirs)
        rebound[forward] = (
            _with_name(forward, functools.partial(_rotate, loaded(), cast(Any, theirs))) if usual else None
        )
    return None if rebound[forward] is None else types.MethodType(rebound[forward], module)


def _with_name(forward: types.FunctionType, rotate: Callable[..., Any]) -> types.FunctionType:
    names = {**forward.__globals__, _ROTATE: rotate}
    result = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    result.__kwdefaults__ = forward.__kwdefaults__
    return result


@torch.no_grad()
def _rotates_as_usual(function: Callable[..., Any]) -> bool:
    """Whether a model's function rotates q and k as `_Rotate` does, tested on random numbers."""
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(1, heads, 3, 8, generator=draw) for heads in (4, 2, 1, 1))
    try:
        theirs = function(q, k, cos[0], sin[0])
    except Exception:  # a function that fails here does not compute what its name says
        return False
    ours = (_Rotate.apply(x, cos, sin, loaded()) for x in (q, k))  # type: ignore[no-untyped-call]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def _rotate(kernels: Kernels | None, theirs: Callable[..., Any], *given: Any, **named: Any) -> Any:
    usual = len(given) == 4 and not named and all(isinstance(x, Tensor) for x in given)
    if usual:
        q, k, cos, sin = given
        usual = q.device.type == "cpu" and {k.dtype, cos.dtype, sin.dtype} == {q.dtype}
        usual = usual and cos.shape[-1] == q.shape[-1] and not (cos.requires_grad or sin.requires_grad)
    if not usual:
        return theirs(*given, **named)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _applied(_Rotate, q, cos, sin, kernels), _applied(_Rotate, k, cos, sin, kernels)


class _Rotate(torch.autograd.Function):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34) of x (B, H, T, D), with D split into two halves.

    With x = (x1, x2): (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        if kernels is not None and kernels.accept_heads(x, cos, sin):
            return kernels.rotate(x, cos, sin, back=False)
        (x1, x2), (sin1, sin2) = x.chunk(2, -1), sin.chunk(2, -1)
        out = x * cos
        out1, out2 = out.chunk(2, -1)
        out1.addcmul_(x2, sin1, value=-1)
        out2.addcmul_(x1, sin2)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        kernels: Kernels | None = ctx.kernels
        if kernels is not None and kernels.accept_heads(gradient, cos, sin):
            return kernels.rotate(gradient, cos, sin, back=True), None, None, None
        (g1, g2), (sin1, sin2) = gradient.chunk(2, -1), sin.chunk(2, -1)
        grad = gradient * cos
        grad1, grad2 = grad.chunk(2, -1)
        grad1.addcmul_(g2, sin2)
        grad2.addcmul_(g1, sin1, value=-1)
        return grad, None, None, None
