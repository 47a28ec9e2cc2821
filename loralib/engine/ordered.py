"""Products with frozen weights, in the order in which the processor multiplies them.

PyTorch brings a weight into that order at every product.  oneDNN can keep a copy that lies so already; the products are
the same.  The copy pays where a frozen weight is used again and again, and where memory has room for it.  For the many
rows of a training step, kernels of ours (`loralib.kernels`) need no copy, where they are to be had.
"""

from __future__ import annotations

import functools
import platform
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import Kernels, loaded

__all__ = ["MOST_BYTES", "FrozenWeight", "OrderedWeight", "can_order", "kernels_for"]

# Copies of larger models could fill the memory; and the larger the products, the less there is to gain.
MOST_BYTES: Final = 2**30


def can_order(weight: Tensor | None) -> bool:
    """Returns whether a weight (out, in) gains by it: a plain bf16 tensor of an x86 processor that has units for bf16.

    Args:
        weight: the weight of a linear, if it has one.
    """
    return (
        weight is not None
        and _has_units()
        and type(weight.data) is Tensor
        and not weight.is_inference()
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.dim() == 2
    )


@functools.cache
def _has_units() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def kernels_for(weight: Tensor | None) -> Kernels | None:
    """Returns the kernels, if they multiply with this weight (out, in) as it lies."""
    kernels = loaded()
    return kernels if kernels is not None and kernels.take_weight(weight) else None


class OrderedWeight:
    """A copy of a weight W (out, in) that lies so, and products with it.

    Args:
        weight: W, for which `can_order` is true; or a transposed view of such a weight.
    """

    def __init__(self, weight: Tensor) -> None:
        self._source = weight.detach()
        self._version = weight._version
        self._order = torch.ops.mkldnn._reorder_linear_weight(self._source.contiguous())

    def is_of(self, weight: Tensor) -> bool:
        """Returns whether it is the copy of what this weight holds: others may have been merged or loaded since."""
        return _is_same(weight, self._source, self._version)

    def times(self, x: Tensor, *, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """Returns ``x W^T + bias + added``, rounded once.

        Args:
            x: (..., in) in the weight's dtype.
            bias: (out,).
            added: (..., out), in the weight's dtype.
        """
        if added is None:
            return torch.ops.mkldnn._linear_pointwise(x, self._order, bias, "none", [], "")  # type: ignore[no-any-return]
        return torch.ops.mkldnn._linear_pointwise.binary(x, added, self._order, bias, "add")  # type: ignore[no-any-return]


class FrozenWeight:
    """A weight W (out, in) that is not trained: products with it and with its transpose, for passes both ways.

    Args:
        weight: W.
        ordered: whether to keep copies in the processor's order, where that gains something.  They are made when they
            are first needed.

    Attributes:
        weight: W, without a gradient.
    """

    def __init__(self, weight: Tensor, ordered: bool) -> None:
        self.weight, self._version, self._wanted = weight.detach(), weight._version, ordered
        self._kernels = kernels_for(weight)
        self._ordered = ordered and self._kernels is None and can_order(weight)
        self._copies: dict[str, OrderedWeight] = {}

    def now(self, weight: Tensor) -> FrozenWeight:
        """Returns the one of this weight as it is now: itself, or another where another was merged or loaded since."""
        same = _is_same(weight, self.weight, self._version)
        return self if same else FrozenWeight(weight, self._wanted)

    def times(self, x: Tensor, *, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """Returns ``x W^T + bias + added``.

        Args:
            x: (T, in).
            bias: (out,).
            added: (T, out); the result may take its place.
        """
        if self._ordered:
            return self._copy("forward", self.weight).times(x, bias=bias, added=added)
        if added is not None and bias is not None:
            added = added.add_(bias)
        if self._kernels is not None:
            return self._kernels.product(x, self.weight, bias if added is None else added)
        return F.linear(x, self.weight, bias) if added is None else added.addmm_(x, self.weight.T)

    def back(self, gradient: Tensor, *, added: Tensor | None = None) -> Tensor:
        """Returns ``gradient W + added``.

        Args:
            gradient: (T, out).
            added: (T, in); the result may take its place.
        """
        if self._ordered:
            return self._copy("backward", self.weight.T).times(gradient, added=added)
        if self._kernels is not None:
            return self._kernels.product(gradient, self.weight.T, added)
        return gradient @ self.weight if added is None else added.addmm_(gradient, self.weight)

    def _copy(self, way: str, weight: Tensor) -> OrderedWeight:
        if way not in self._copies:
            self._copies[way] = OrderedWeight(weight)
        return self._copies[way]


def _is_same(weight: Tensor, known: Tensor, version: int) -> bool:
    """Returns whether a weight is the known tensor, with the same values as at that version of it."""
    return (
        weight.data_ptr() == known.data_ptr()
        and (weight.shape, weight.stride(), weight.dtype) == (known.shape, known.stride(), known.dtype)
        and weight._version == version
    )
