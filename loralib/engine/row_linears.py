"""Many adapters over one base in a training step: the rows of a pass belong to runs, each with factors of its own.

The rows x (T, in) of a pass lie run by run.  With x_k the rows of run k,

    y = x W^T + bias + [x_k A_k^T (scaling_k B_k)^T for each run k, below one another]

so that the product with the base weight is one for all runs, and each run's low-rank path is a slice.  Backward, with g
the gradient in y and u_k = g_k scaling_k B_k: the gradient in x is ``g W + [u_k A_k]``, those of the factors are
``u_k^T x_k`` and ``scaling_k g_k^T h_k``.  No row of one run meets a factor of another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..delta import low_rank
from ..errors import UnsupportedModelError
from ..injection import adapted_layers
from ..layers import LoRALinear
from ..wrapping import output_head
from .adapted_linears import has_factors, is_frozen
from .frozen_linear import FrozenLinear, FrozenWeight, weight_of
from .placement import Overrides, own_forward

__all__ = ["RowLinears", "why_not_shared"]


def why_not_shared(model: nn.Module) -> str:
    """Returns why an adapted model cannot train in a pass that it shares with others, or ""."""
    layers = adapted_layers(model)
    head = output_head(model)
    in_layers = {id(tensor) for _, layer in layers for tensor in layer.trained_tensors().values()}
    if any(p.requires_grad and id(p) not in in_layers for p in model.parameters()):
        return "weights of the base are trained, too"
    for name, layer in layers:
        plain = has_factors(layer) and type(layer).factors is LoRALinear.factors and is_frozen(layer)
        if not plain or layer.output_scale() is not None or layer.output_shift() is not None:
            return f"{name} is more than a linear layer with plain LoRA"
        if layer.lora_dropout:
            return "dropout draws random numbers, which are the run's own"
        if layer is head:
            return f"{name}, the head, is adapted"
    return ""


class RowLinears:
    """The linears of a base over which several adapted models train; the counterpart of `TrainingLinears`.

    Args:
        base: the model without an adapter, of which the adapted ones are twins that share its weights.
        twins: the adapted models, one for each run.
        fast: whether to use what was made for CPUs, or PyTorch's operators alone, as in the formula of `LoRALinear`.

    Attributes:
        modules: those that may be overridden.
        prepacked_bytes: 0: there are no copies.
        rows: how many rows of the pass each run has; None: the base alone is computed.
    """

    prepacked_bytes = 0

    def __init__(self, base: nn.Module, twins: Sequence[nn.Module], *, fast: bool) -> None:
        of: dict[str, list[LoRALinear | None]] = {}
        for number, twin in enumerate(twins):
            for name, layer in adapted_layers(twin):
                of.setdefault(name, [None] * len(twins))[number] = cast(LoRALinear, layer)
        self._linears = [_RowLinear(name, base.get_submodule(name), layers, fast=fast) for name, layers in of.items()]
        self._others: Overrides = {}
        if fast:
            adapted = {each.module for each in self._linears}
            frozen = (m for m in base.modules() if m not in adapted and FrozenLinear.accepts(m))
            self._others = {m: FrozenLinear(m, prepack=False) for m in frozen}
        self.modules: list[nn.Module] = [each.module for each in self._linears] + list(self._others)
        self.rows: Sequence[int] | None = None

    @contextmanager
    def finding_groups(self) -> Iterator[Overrides]:
        """Yields no overrides: each linear is computed by itself."""
        yield {}

    @contextmanager
    def ready(self) -> Iterator[Overrides]:
        """Yields the overrides of one pass, forward and backward."""
        if self.rows is None:
            yield self._others
            return
        rows = list(self.rows)
        factors = _factors_of(self._linears, rows)
        yield {
            **self._others,
            **{each.module: functools.partial(each, rows, factors) for each in self._linears},
        }


Factors = Mapping[LoRALinear, tuple[Tensor, Tensor]]  # A (r, in), and B^T with the scaling in it (r, out)


class _RowLinear:
    """One linear of the base, with the layers that runs have in its place."""

    def __init__(self, name: str, module: nn.Module, layers: Sequence[LoRALinear | None], *, fast: bool) -> None:
        self.name, self.module, self.layers = name, module, layers
        self._fast = fast and FrozenLinear.accepts(module)
        self._frozen = FrozenWeight(weight_of(module), prepack=False) if self._fast else None

    def __call__(self, rows: Sequence[int], factors: Factors, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != sum(rows):
            raise UnsupportedModelError(
                f"{self.name} computes {len(flat)} rows where the pass has {sum(rows)}, so that runs cannot be told "
                "apart there. Leave it out of target_modules, or train the runs one after the other."
            )
        own = [(layer, count) for layer, count in zip(self.layers, rows, strict=True) if count]
        bias = cast("Tensor | None", self.module._parameters.get("bias"))
        if self._frozen is None or x.dtype != self._frozen.weight.dtype:
            y = own_forward(self.module, x)
            parts = [
                part.new_zeros(len(part), y.shape[-1])
                if layer is None
                else low_rank(part, *layer.factors(), layer.scaling).to(y.dtype)
                for part, (layer, _) in zip(flat.split([count for _, count in own]), own, strict=True)
            ]
            return cast(Tensor, y + torch.cat(parts).view_as(y))
        self._frozen = self._frozen.refreshed(weight_of(self.module))
        given = [factor for layer, _ in own if layer is not None for factor in factors[layer]]
        have = [layer is not None for layer, _ in own]
        counts = [count for _, count in own]
        y = _RowProduct.apply(flat, self._frozen, bias, counts, have, *given)  # type: ignore[no-untyped-call]
        return cast(Tensor, y).view(*x.shape[:-1], -1)


class _RowProduct(torch.autograd.Function):
    """y (T, out) for x (T, in): the formulas at the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        counts: list[int],
        have: list[bool],
        *factors: Tensor,
    ) -> Tensor:
        added = x.new_empty(len(x), len(weight.weight))
        pairs, kept = iter(factors), list[Tensor]()
        for part, into, has in zip(x.split(counts), added.split(counts), have, strict=True):
            if not has:
                into.zero_()
                continue
            A, B = next(pairs), next(pairs)
            h = part @ A.T
            torch.mm(h, B, out=into)
            kept.append(h)
        ctx.weight, ctx.counts, ctx.have = weight, counts, have
        ctx.save_for_backward(x, *kept, *factors)
        return weight.times(x, bias=bias, added=added)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        counts, number = ctx.counts, sum(ctx.have)
        hs, pairs = iter(rest[:number]), iter(rest[number:])
        of_x = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        of_factors: list[Tensor] = []
        at = 0
        for part, g, has in zip(x.split(counts), gradient.split(counts), ctx.have, strict=True):
            into = None if of_x is None else of_x[at : at + len(part)]
            at += len(part)
            if not has:
                if into is not None:
                    into.zero_()
                continue
            A, B, h = next(pairs), next(pairs), next(hs)
            u = g @ B.T
            of_factors += [u.T @ part, h.T @ g]
            if into is not None:
                torch.mm(u, A, out=into)
        if of_x is not None:
            of_x = ctx.weight.times_transposed(gradient, added=of_x)
        return of_x, None, None, None, None, *of_factors


def _factors_of(linears: Sequence[_RowLinear], rows: Sequence[int]) -> Factors:
    """Returns what the layers of the runs in a pass multiply with, in the dtype of the base: all cast at once."""
    layers = [
        layer
        for each in linears
        if each._frozen is not None
        for layer, count in zip(each.layers, rows, strict=True)
        if layer is not None and count
    ]
    if not layers:
        return {}
    given = [factor for layer in layers for factor in layer.factors()]
    scalings = [layer.scaling for layer in layers]
    dtypes = [layer.base_weight.dtype for layer in layers]
    cast_factors = _Cast.apply(scalings, dtypes, *given)  # type: ignore[no-untyped-call]
    return {layer: (cast_factors[2 * i], cast_factors[2 * i + 1]) for i, layer in enumerate(layers)}


class _Cast(torch.autograd.Function):
    """A_k, and scaling_k B_k^T, of many layers, in the dtypes of their base weights."""

    @staticmethod
    def forward(ctx: Any, scalings: list[float], dtypes: list[torch.dtype], *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.scalings, ctx.dtypes = scalings, [factor.dtype for factor in factors]
        ctx.set_materialize_grads(False)
        scaled = torch._foreach_mul(list(factors[1::2]), scalings)
        results: list[Tensor] = []
        for A, B, dtype in zip(factors[::2], scaled, dtypes, strict=True):
            results += [A.to(dtype, copy=True), B.T.to(dtype)]
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_A = [None if g is None else g.to(dtype) for g, dtype in zip(gradients[::2], ctx.dtypes[::2], strict=True)]
        of_B = [
            None if g is None else g.T.to(dtype, copy=True, memory_format=torch.contiguous_format).mul_(scaling)
            for g, dtype, scaling in zip(gradients[1::2], ctx.dtypes[1::2], ctx.scalings, strict=True)
        ]
        return None, None, *[each for pair in zip(of_A, of_B, strict=True) for each in pair]
