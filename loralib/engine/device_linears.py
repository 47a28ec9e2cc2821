"""Linear layers with LoRA in a training step on GPUs: layers that share an input are one autograd node.

For the input x (T, in) of q, k and v (or of a gate and its up projection), with the A_i stacked to A and scaled B_i:

    h = x A^T,    y_i = x W_i^T + bias_i + h_i B_i^T

and, given the gradients g_i of the outputs,

    u_i = g_i B_i,    dA = u^T x,    dB_i = g_i^T h_i,    dx = sum_i g_i W_i + u A

x is stored once per group, and read once for all A_i in each direction.  These are plain products on any device.  Casts
and scalings of the factors remain ordinary operators, differentiated by autograd.  None of this is used in compiled
blocks, where torch.compile works on the layers' own formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import LoRALinear
from .adapted_linears import LayerGroup, PendingOutputs, groups_of, has_factors, is_frozen, record_call
from .frozen_linear import weight_of
from .placement import Overrides

__all__ = ["DeviceLinears"]


class DeviceLinears:
    """The adapted linear layers of one model; the counterpart of `TrainingLinears`, which is for CPUs.

    Args:
        body: the modules whose adapted linear layers are grouped by input.

    Attributes:
        modules: the modules that may be overridden.
        prepacked_bytes: 0: weights are not copied.
    """

    prepacked_bytes = 0

    def __init__(self, body: Sequence[nn.Module]) -> None:
        self.modules: list[nn.Module] = [module for module in body if has_factors(module)]
        self._groups: list[_DeviceGroup] = []

    @contextmanager
    def finding_groups(self) -> Iterator[Overrides]:
        """Yields overrides that record which layers read the same tensor; run a pass through the model inside."""
        calls: list[tuple[LoRALinear, Tensor]] = []
        yield {layer: functools.partial(record_call, calls, cast(LoRALinear, layer)) for layer in self.modules}
        self._groups = [_DeviceGroup(layers) for layers in groups_of(calls)]

    @contextmanager
    def ready(self) -> Iterator[Overrides]:
        """Yields the overrides for one pass, forward and backward."""
        groups = [group for group in self._groups if group.is_usable()]
        try:
            yield {
                layer: functools.partial(group.run, number)
                for group in groups
                for number, layer in enumerate(group.layers)
            }
        finally:
            for group in groups:
                group.pending = PendingOutputs()


class _DeviceGroup(LayerGroup):
    """Layers that read the same input."""

    def is_usable(self) -> bool:
        """Returns whether all layers are unchanged and compute as usual: active, with a frozen weight and bias."""
        return all(has_factors(layer) and layer._active and is_frozen(layer) for layer in self.layers)

    def _is_ready(self) -> bool:
        return True

    def _outputs(self, x: Tensor, dropped: Tensor | None, numbers: tuple[int, ...]) -> Sequence[Tensor]:
        layers = [self.layers[number] for number in numbers]
        factors = [layer.factors() for layer in layers]
        A = [a.to(x.dtype) for a, _ in factors]
        B = [(b * layer.scaling).to(x.dtype) for (_, b), layer in zip(factors, layers, strict=True)]
        biases = [cast("Tensor | None", layer.bias) for layer in layers]
        given = (*map(weight_of, layers), *biases, *A, *B)
        return cast("tuple[Tensor, ...]", _JointProduct.apply(x, dropped, *given))  # type: ignore[no-untyped-call]


class _JointProduct(torch.autograd.Function):
    """Outputs (T, out_i) for x (..., in), given all W_i, bias_i, A_i and B_i: the formulas at the top of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, *given: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        weights, biases, A, B = _quarters(given)
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if dropped is None else dropped.reshape(rows.shape)
        h = seen @ torch.cat(A).T
        parts = zip(weights, biases, h.split([len(a) for a in A], 1), B, strict=True)
        outputs = tuple(F.linear(rows, weight, bias).addmm_(h_i, b.T) for weight, bias, h_i, b in parts)
        ctx.shape, ctx.drops = x.shape, dropped is not None
        ctx.save_for_backward(seen, h, *weights, *A, *B)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        seen, h, *kept = ctx.saved_tensors
        count = len(gradients)
        weights, A, B = kept[:count], kept[count : 2 * count], kept[2 * count :]
        ranks = [len(a) for a in A]
        u = torch.zeros_like(h)
        grad_x: Tensor | None = None
        grad_B: list[Tensor | None] = []
        for g, h_i, u_i, weight, b in zip(gradients, h.split(ranks, 1), u.split(ranks, 1), weights, B, strict=True):
            if g is None:  # nothing depends on this output
                grad_B.append(None)
                continue
            torch.mm(g, b, out=u_i)
            grad_B.append(g.T @ h_i)
            if ctx.needs_input_grad[0]:
                grad_x = g @ weight if grad_x is None else grad_x.addmm_(g, weight)
        grad_A = [None if g is None else a for g, a in zip(gradients, (u.T @ seen).split(ranks), strict=True)]
        grad_dropped = None
        if ctx.drops and ctx.needs_input_grad[1]:
            grad_dropped = (u @ torch.cat(A)).view(ctx.shape)
        elif not ctx.drops and grad_x is not None:
            grad_x = grad_x.addmm_(u, torch.cat(A))
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, grad_dropped, *[None] * (2 * count), *grad_A, *grad_B


def _quarters(given: Sequence[Any]) -> Iterator[list[Any]]:
    size = len(given) // 4
    return (list(given[start : start + size]) for start in range(0, len(given), size))
