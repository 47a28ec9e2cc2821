"""Linear layers with frozen weights, prepacked where that pays off; shared by training and generation.

oneDNN reorders a bf16 weight into the processor's layout at every product.  It can keep a copy in that layout, which
gives the same products.  A copy pays off if a frozen weight is used repeatedly, and memory has room for it.  For the
many rows of a training step, our kernels need no copy, if they can be compiled.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bases.quant import QuantizedWeight
from ..delta import low_rank, state_of
from ..layers import LoRALayer, LoRALinear, is_conv1d
from .kernels import FEW_ROWS, Kernels, RowUpdate, RowUpdates, loaded
from .placement import Overrides, own_forward

__all__ = [
    "MAX_PREPACKED_BYTES",
    "FrozenLinear",
    "FrozenWeight",
    "PrepackedWeight",
    "can_prepack",
    "kernel_overrides",
    "prepacked_overrides",
]

# Copies for larger models could fill the memory; and the larger the products, the smaller the gain.
MAX_PREPACKED_BYTES: Final = 2**30


def can_prepack(weight: Tensor | None) -> bool:
    """Returns whether prepacking a weight (out, in) pays off: plain bf16, on an x86 processor with bf16 units.

    Args:
        weight: the weight of a linear layer, if it has one.
    """
    return (
        weight is not None
        and _has_bf16_units()
        and type(weight.data) is Tensor
        and not weight.is_inference()
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.dim() == 2
    )


@functools.cache
def _has_bf16_units() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def kernels_for(weight: Tensor | None) -> Kernels | None:
    """Returns the compiled kernels, if they can multiply with this weight (out, in) without copying it."""
    kernels = loaded()
    return kernels if kernels is not None and kernels.accept_weight(weight) else None


class PrepackedWeight:
    """A prepacked copy of a weight W (out, in), with its product.

    Args:
        weight: W, for which `can_prepack` is true; or a transposed view of such a weight.
    """

    def __init__(self, weight: Tensor) -> None:
        self._copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def times(self, x: Tensor, *, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """Returns ``x W^T + bias + added``, rounded once.

        Args:
            x: (..., in) in the weight's dtype.
            bias: (out,).
            added: (..., out), in the weight's dtype.
        """
        if added is None:
            return torch.ops.mkldnn._linear_pointwise(x, self._copy, bias, "none", [], "")  # type: ignore[no-any-return]
        return torch.ops.mkldnn._linear_pointwise.binary(x, added, self._copy, bias, "add")  # type: ignore[no-any-return]


class FrozenWeight:
    """A weight W (out, in) that is not trained: products with it and with its transpose.

    Args:
        weight: W.
        prepack: whether to use prepacked copies, created when first needed.

    Attributes:
        weight: W, detached from autograd.
        kernels: our kernels, if they can multiply with it without a copy.
    """

    def __init__(self, weight: Tensor, prepack: bool) -> None:
        self.weight, self._seen, self._prepack = weight.detach(), state_of(weight), prepack
        self._transposed = self.weight.T
        self.kernels = kernels_for(weight)
        self._copies: dict[str, PrepackedWeight] = {}

    def refreshed(self, weight: Tensor) -> FrozenWeight:
        """Returns this object if the weight is unchanged; a new one if something was merged or loaded since."""
        return self if state_of(weight) == self._seen else FrozenWeight(weight, self._prepack)

    def times(self, x: Tensor, *, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """Returns ``x W^T + bias + added``.

        Args:
            x: (..., in); (T, in) with `added`.
            bias: (out,).
            added: (T, out); may be overwritten by the result.
        """
        if self._prepack:
            return self._copy("forward", self.weight).times(x, bias=bias, added=added)
        if added is not None and bias is not None:
            added = added.add_(bias)
        few = x.numel() <= FEW_ROWS * x.shape[-1] and not isinstance(self.weight, QuantizedWeight)
        if self.kernels is not None and not few:
            y = self.kernels.product(x.reshape(-1, x.shape[-1]), self.weight, bias if added is None else added)
            return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)  # a view could not be modified in place
        return F.linear(x, self.weight, bias) if added is None else added.addmm_(x, self.weight.T)

    def times_transposed(self, gradient: Tensor, *, added: Tensor | None = None) -> Tensor:
        """Returns ``gradient W + added``.

        Args:
            gradient: (T, out).
            added: (T, in); may be overwritten by the result.
        """
        if self._prepack:
            return self._copy("backward", self._transposed).times(gradient, added=added)
        if self.kernels is not None:
            return self.kernels.product(gradient, self._transposed, added)
        return gradient @ self.weight if added is None else added.addmm_(gradient, self.weight)

    def _copy(self, direction: str, weight: Tensor) -> PrepackedWeight:
        if direction not in self._copies:
            self._copies[direction] = PrepackedWeight(weight)
        return self._copies[direction]


class FrozenLinear:
    """Overrides a linear layer with a frozen weight; a layer with LoRA adds its update to the product.

    Args:
        module: a linear layer for which `accepts` is true.
        prepack: see `FrozenWeight`.
    """

    def __init__(self, module: nn.Module, prepack: bool) -> None:
        self._module: Any = module
        self._kind = type(module)
        self._frozen = FrozenWeight(weight_of(module), prepack)
        self._version, self._address = -1, 0  # of the weight when last checked
        self._update: _Update | None = None

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Returns whether a module is a plain linear layer, with or without LoRA, that stores its own weight."""
        kind: Any = type(module)
        if isinstance(module, LoRALinear):
            if kind.forward is not LoRALinear.forward or kind._base_forward is not LoRALinear._base_forward:
                return False
            kind = next(base for base in kind.__mro__ if not issubclass(base, LoRALayer))
        plain = kind.forward is nn.Linear.forward or (is_conv1d(kind) and kind.__name__ == "Conv1D")
        weight = module._parameters.get("weight")
        return plain and (type(weight) is nn.Parameter or isinstance(weight, QuantizedWeight))

    def __call__(self, x: Tensor) -> Tensor:
        module = self._module
        weight, bias = module._parameters["weight"], module._parameters["bias"]  # faster than module.weight
        wants_gradient = weight.requires_grad or (bias is not None and bias.requires_grad)
        trained = wants_gradient and torch.is_grad_enabled()
        usual = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype) and type(module) is self._kind
        if trained or not usual or x.is_inference() or x.dim() < 2 or not x.numel() or torch.is_autocast_enabled("cpu"):
            return cast(Tensor, own_forward(module, x))
        if weight._version != self._version or _address(weight) != self._address:
            self._frozen = self._frozen.refreshed(weight_of(module))
            self._version, self._address = weight._version, _address(weight)
        y = frozen_product(x, self._frozen, bias)
        if isinstance(module, LoRALinear) and module._active:
            if not self._add_to_few_rows(module, x, y):
                y = y + low_rank(module._drop(x), *module.factors(), module.scaling)
            y = module.finished(y)
        return y

    def forget_update(self) -> None:
        """Makes the next call read a LoRA layer's update again."""
        self._update = None

    def _add_to_few_rows(self, layer: LoRALinear, x: Tensor, y: Tensor) -> bool:
        """Adds a layer's low-rank update to y in one kernel call; returns False if this is not possible.

        PyTorch needs seven operators for it, whose overhead exceeds the time of the products for a row or two.
        """
        rows = x.numel() // x.shape[-1]
        plain = x.is_contiguous() and y.is_contiguous() and not (layer.lora_dropout and layer.training)
        if rows > FEW_ROWS or not plain or torch.is_grad_enabled():
            return False
        if self._update is None or self._update.is_outdated(layer):
            self._update = _Update(layer, x.dtype)
        add = self._update.of_rows(rows)
        if add is not None:
            add(x, y)
        return add is not None


class _Update:
    """A snapshot of a layer's low-rank update, with factors cast to the dtype of its inputs."""

    def __init__(self, layer: LoRALinear, dtype: torch.dtype) -> None:
        self._seen, self._kernels = _tensors_of(layer), loaded()
        A, B = (factor.detach().to(dtype) for factor in layer.factors())
        self._whole = RowUpdate((), A.contiguous(), B.T.contiguous(), layer.scaling)
        self._calls: dict[int, RowUpdates] = {}

    def is_outdated(self, layer: LoRALinear) -> bool:
        """Whether the layer's update has changed since."""
        return self._seen != _tensors_of(layer) or self._whole.scale != layer.scaling

    def of_rows(self, count: int) -> RowUpdates | None:
        """Returns a function that adds the update to this many rows; None if the kernel does not support it."""
        if count not in self._calls:
            update = self._whole._replace(rows=range(count))
            if self._kernels is None or not self._kernels.accept_row_updates([update]):
                return None
            self._calls[count] = self._kernels.row_updates([update])
        return self._calls[count]


def _tensors_of(layer: LoRALinear) -> list[tuple[int, int | None]]:
    """Returns values that change whenever the tensors of an update change."""
    held = [t for name, t in (*layer._parameters.items(), *layer._buffers.items()) if name not in ("weight", "bias")]
    return [(t.data_ptr(), None if t.is_inference() else t._version) for t in held if t is not None]


def _address(tensor: Tensor) -> int:
    return (tensor.codes if isinstance(tensor, QuantizedWeight) else tensor).data_ptr()


def frozen_product(x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
    """Returns ``x W^T + bias`` for x (..., in), differentiable with respect to x only."""
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _FrozenProduct.apply(x, weight, bias))  # type: ignore[no-untyped-call]
    return weight.times(x, bias=bias)


class _FrozenProduct(torch.autograd.Function):
    """``x W^T + bias`` for x (..., in), differentiable with respect to x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.shape = weight, x.shape
        return weight.times(x, bias=bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows = gradient.reshape(-1, gradient.shape[-1])
        return cast(FrozenWeight, ctx.weight).times_transposed(rows).view(ctx.shape), None, None


def weight_of(module: Any) -> Tensor:
    """Returns the weight that a linear layer computes with, merged or not, as (out, in)."""
    weight: Tensor = module.weight
    stored_transposed = module.fan_in_fan_out if isinstance(module, LoRALinear) else is_conv1d(type(module))
    return weight.T if stored_transposed else weight


def kernel_overrides(modules: Iterable[nn.Module]) -> Overrides:
    """Returns overrides for the linear layers that our kernels compute faster than PyTorch in generation.

    These have quantised weights, which are multiplied directly, or LoRA, whose update of few rows is one call.
    """

    def gains(module: nn.Module) -> bool:
        if isinstance(module._parameters.get("weight"), QuantizedWeight) and kernels_for(weight_of(module)) is not None:
            return True
        return isinstance(module, LoRALinear) and module.r > 0 and loaded() is not None

    return {m: FrozenLinear(m, prepack=False) for m in modules if FrozenLinear.accepts(m) and gains(m)}


def prepacked_overrides(modules: Iterable[nn.Module]) -> Overrides:
    """Returns overrides with prepacked weights where they pay off; none if the copies would be too large."""
    linears = [m for m in modules if FrozenLinear.accepts(m) and can_prepack(weight_of(m))]
    if sum(weight_of(module).nbytes for module in linears) > MAX_PREPACKED_BYTES:
        return {}
    return {module: FrozenLinear(module, prepack=True) for module in linears}
