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
from itertools import accumulate, pairwise
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
from .kernels import Factors, GroupOperands
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


CastFactors = Mapping[LoRALinear, tuple[Tensor, Tensor]]  # A (r, in), and B^T with the scaling in it (r, out)


class _RowLinear:
    """One linear of the base, with the layers that runs have in its place."""

    def __init__(self, name: str, module: nn.Module, layers: Sequence[LoRALinear | None], *, fast: bool) -> None:
        self.name, self.module, self.layers = name, module, layers
        self._fast = fast and FrozenLinear.accepts(module)
        self._frozen = FrozenWeight(weight_of(module), prepack=False) if self._fast else None

    def __call__(self, rows: Sequence[int], factors: CastFactors, x: Tensor) -> Tensor:
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
    """y (T, out) for x (T, in): the formulas at the top of this file, in one call each way where there are kernels."""

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
        ctx.weight, ctx.bias, ctx.counts, ctx.have = weight, bias, counts, have
        runs, kernels = _runs_of(factors, have, weight), weight.kernels
        ctx.kernels = kernels if kernels is not None and kernels.accept_factors(*runs) else None
        if ctx.kernels is not None:
            operands = GroupOperands([weight.weight], [bias], runs, runs, counts)
            h, outputs = ctx.kernels.lora(x, x, operands)
            ctx.save_for_backward(x, h, *factors)
            return cast(Tensor, outputs[0])
        added = x.new_empty(len(x), len(weight.weight))
        h = x.new_empty(len(x), max(len(A) for A, _ in runs))
        for (A, (B,)), part, of_part, into in zip(runs, *_rows(counts, x, h, added), strict=True):
            torch.mm(torch.mm(part, A.T, out=of_part[:, : len(A)]), B, out=into)
        ctx.save_for_backward(x, h, *factors)
        return weight.times(x, bias=bias, added=added)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, h, *factors = ctx.saved_tensors
        weight, counts, wants_x = ctx.weight, ctx.counts, ctx.needs_input_grad[0]
        of_factors = [torch.empty_like(factor) for factor in factors]
        runs, gradients = (_runs_of(each, ctx.have, weight) for each in (factors, of_factors))
        if ctx.kernels is not None:
            operands = GroupOperands([weight.weight], [ctx.bias], runs, gradients, counts)
            of_x, _ = ctx.kernels.lora_back([gradient], x, h, operands, wants_x=wants_x, wants_seen=False)
            return of_x, None, None, None, None, *of_factors
        of_x = torch.empty_like(x) if wants_x else None
        parts = zip(runs, gradients, *_rows(counts, x, h, gradient, range(len(x))), strict=True)
        for (A, (B,)), (of_A, (of_B,)), part, of_part, g, places in parts:
            u = g @ B.T
            torch.mm(u.T, part, out=of_A)
            torch.mm(of_part[:, : len(A)].T, g, out=of_B)
            if of_x is not None and places:
                torch.mm(u, A, out=of_x[places.start : places.stop])
        if of_x is not None:
            of_x = weight.times_transposed(gradient, added=of_x)
        return of_x, None, None, None, None, *of_factors


def _runs_of(factors: Sequence[Tensor], have: Sequence[bool], weight: FrozenWeight) -> list[Factors]:
    """Returns A and B of each run; of those without an adapter here, of rank 0."""
    pairs = iter(factors)
    out, width = weight.weight.shape
    nothing = torch.empty(0, dtype=weight.weight.dtype)
    none = Factors(nothing.view(0, width), [nothing.view(0, out)])
    return [Factors(next(pairs), [next(pairs)]) if has else none for has in have]


def _rows(counts: Sequence[int], *of_all: Any) -> Iterator[list[Any]]:
    """Yields, for each of some tensors or ranges, its parts that belong to the runs."""
    ends = list(accumulate(counts, initial=0))
    for each in of_all:
        yield [each[begin:end] for begin, end in pairwise(ends)]


def _factors_of(linears: Sequence[_RowLinear], rows: Sequence[int]) -> CastFactors:
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
            results += [A.to(dtype, copy=True), B.T.to(dtype, memory_format=torch.contiguous_format)]
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
