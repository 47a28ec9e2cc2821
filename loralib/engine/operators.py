"""Small operators of transformers' models in fewer passes over memory, for the time of a step.

Between the products of a small model, such operators are a good part of a step.  What is put in their place computes
the same formula; in bf16 it rounds once where theirs rounds twice.
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels import Kernels, loaded

__all__ = ["Operators"]


class Operators:
    """The operators of one model that have a shorter way.  Only on CPUs, where this was measured."""

    def __init__(self, model: nn.Module) -> None:
        forwards = [(module, forward) for module in model.modules() if (forward := _shorter(module)) is not None]
        # What takes an operator's place, and under which name of which namespace: a module's, or a file's globals.
        self._places = [(module.__dict__, "forward", forward) for module, forward in forwards]
        self._places += [
            (space, _ROTATE, functools.partial(_rotate, space[_ROTATE]))
            for space in {id(space): space for space in map(_globals, model.modules())}.values()
            if _rotates_as_usual(space.get(_ROTATE))
        ]

    @classmethod
    def of(cls, model: nn.Module) -> Operators:
        """Returns those of a model, looked for once: to try each takes longer than a short text."""
        if model not in _KNOWN:
            _KNOWN[model] = cls(model)
        return _KNOWN[model]

    @contextmanager
    def shorter(self) -> Iterator[None]:
        """Takes the shorter ways for the time of a step."""
        taken = [each for each in self._places if each[1] == _ROTATE or each[1] not in each[0]]
        before = [space.get(name) for space, name, _ in taken]
        for space, name, way in taken:
            space[name] = way
        try:
            yield
        finally:
            for (space, name, _), old in zip(taken, before, strict=True):
                if old is None:
                    del space[name]
                else:
                    space[name] = old


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Operators] = weakref.WeakKeyDictionary()


def _shorter(module: nn.Module) -> Callable[..., Tensor] | None:
    forward: Callable[..., Tensor] | None = None
    if type(module).__name__ == "NewGELUActivation":
        # Eight operators that keep five tensors are one.
        forward = functools.partial(_gelu, module)
    elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        forward = functools.partial(_rms_norm, module)
    elif module._modules.keys() == _GATED:
        return functools.partial(_gated, module) if _gates_as_usual(module) else None
    return forward if forward is not None and _same(module) else None


@torch.no_grad()
def _same(module: nn.Module) -> bool:
    """Whether a module computes what its name says: tried on a copy, with a weight that is not all ones."""
    try:
        twin = copy.deepcopy(module).float().requires_grad_(False)
        for weight in twin.parameters():
            weight.copy_(torch.linspace(-1, 2, weight.numel()).view(weight.shape))
        width = next((len(weight) for weight in twin.parameters()), 16)
        x = torch.linspace(-3, 2, 2 * width).view(2, width)
        shorter = _rms_norm if hasattr(twin, "variance_epsilon") else _gelu
        return torch.allclose(shorter(twin, x), twin(x), rtol=1e-5, atol=1e-6)
    except Exception:  # whatever a module of that name is, it is not what was thought
        return False


def _gelu(module: nn.Module, x: Tensor) -> Tensor:
    kernels = loaded()
    if kernels is None or not kernels.take(x):
        return F.gelu(x, approximate="tanh")
    return cast(Tensor, _GELU.apply(x))  # type: ignore[no-untyped-call]


class _GELU(torch.autograd.Function):
    """``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`` (Hendrycks and Gimpel 2016, arXiv:1606.08415, eq. 2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return cast(Kernels, loaded()).gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return cast(Kernels, loaded()).gelu_back(gradient, *ctx.saved_tensors)


def _rms_norm(norm: Any, *given: Any, **named: Any) -> Tensor:
    x = given[0] if len(given) == 1 and not named else None
    usual = x is not None and norm.weight.dtype == x.dtype and x.device.type == "cpu"
    learns = norm.weight.requires_grad and torch.is_grad_enabled()
    if not usual or learns or torch.is_autocast_enabled("cpu"):
        return cast(Tensor, type(norm).forward(norm, *given, **named))
    return cast(Tensor, _RMSNorm.apply(x, norm.weight, norm.variance_epsilon))  # type: ignore[no-untyped-call]


_INPUT_ONLY = [True, False, False]


class _RMSNorm(torch.autograd.Function):
    """``w x / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4) with a frozen w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kernels = loaded()
        if kernels is not None and kernels.take(x, weight):
            y, factor = kernels.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, factor)
            return y
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return torch.mul(x * factor, weight, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, factor = ctx.saved_tensors
        kernels = loaded()
        if kernels is not None and kernels.take(gradient, x, weight):
            return kernels.rms_norm_back(gradient, x, weight, factor), None, None
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
        missing = (gradient @ weight)[..., None] * (factor / width).to(gradient.dtype)
        return of_layer_norm.add_(missing), None, None


_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # the parts of such a block, as transformers calls them


@torch.no_grad()
def _gates_as_usual(block: nn.Module) -> bool:
    """Whether a block computes ``down(silu(gate(x)) * up(x))``: tried with other parts."""
    twin = copy.copy(block)
    twin._modules = {**block._modules, "gate_proj": _Line(2, -1), "up_proj": _Line(1, 3), "down_proj": _Line(0.5, 0)}
    x = torch.linspace(-3, 2, 8)[None]
    try:
        return torch.allclose(twin(x), 0.5 * F.silu(2 * x - 1) * (x + 3), rtol=1e-5, atol=1e-6)
    except Exception:  # whatever a block of such parts is, it is not what was thought
        return False


class _Line(nn.Module):
    def __init__(self, slope: float, start: float) -> None:
        super().__init__()
        self.slope, self.start = slope, start

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + self.start


def _gated(block: Any, x: Tensor) -> Tensor:
    gate, up = block.gate_proj(x), block.up_proj(x)
    kernels = loaded()
    if kernels is not None and kernels.take(gate, up) and gate.shape == up.shape:
        hidden = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    else:
        hidden = block.act_fn(gate) * up
    return cast(Tensor, block.down_proj(hidden))


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` (Shazeer 2020, arXiv:2002.05202, eq. 5)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return cast(Kernels, loaded()).swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return cast(Kernels, loaded()).swiglu_back(gradient, *ctx.saved_tensors)


_ROTATE = "apply_rotary_pos_emb"  # what the files of transformers' models call it


def _globals(module: nn.Module) -> dict[str, Any]:
    """The globals of the file that a module's class is from."""
    return vars(sys.modules.get(type(module).__module__, object))


@torch.no_grad()
def _rotates_as_usual(function: Callable[..., Any] | None) -> bool:
    """Whether a model's function turns q and k as `_Rotate` does: tried."""
    if function is None:
        return False
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(1, heads, 3, 8, generator=draw) for heads in (4, 2, 1, 1))
    try:
        theirs = function(q, k, cos[0], sin[0])
    except Exception:  # whatever a function of that name is, it is not what was thought
        return False
    ours = (_Rotate.apply(x, cos, sin) for x in (q, k))  # type: ignore[no-untyped-call]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def _rotate(theirs: Callable[..., Any], *given: Any, **named: Any) -> Any:
    usual = len(given) == 4 and not named and all(isinstance(x, Tensor) for x in given)
    if usual:
        q, k, cos, sin = given
        usual = q.device.type == "cpu" and {k.dtype, cos.dtype, sin.dtype} == {q.dtype}
        usual = usual and cos.shape[-1] == q.shape[-1] and not (cos.requires_grad or sin.requires_grad)
    if not usual:
        return theirs(*given, **named)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotate(torch.autograd.Function):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34) of x (B, H, T, D), D in two halves.

    With x = (x1, x2): (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        kernels = loaded()
        if kernels is not None and kernels.take_heads(x, cos, sin):
            return kernels.rotate(x, cos, sin, back=False)
        (x1, x2), (sin1, sin2) = x.chunk(2, -1), sin.chunk(2, -1)
        out = x * cos
        out1, out2 = out.chunk(2, -1)
        out1.addcmul_(x2, sin1, value=-1)
        out2.addcmul_(x1, sin2)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        kernels = loaded()
        if kernels is not None and kernels.take_heads(gradient, cos, sin):
            return kernels.rotate(gradient, cos, sin, back=True), None, None
        (g1, g2), (sin1, sin2) = gradient.chunk(2, -1), sin.chunk(2, -1)
        grad = gradient * cos
        grad1, grad2 = grad.chunk(2, -1)
        grad1.addcmul_(g2, sin2)
        grad2.addcmul_(g1, sin1, value=-1)
        return grad, None, None
