"""Casts the factors of all adapted linear layers at once for a pass, and maps their gradients back through autograd.

A small model has hundreds of factors, and calling an operator on a single one costs more than the operation itself.
A single `_CastFactors` node maps them to the operands of groups of layers (`adapted_linears.py`) for a whole pass, A_i
and scaling_i B_i^T in the dtype of the base; its backward returns each parameter's gradient.  So gradient
accumulation, hooks and anomaly mode work as usual.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layers import LoRALinear
from .kernels import Factors, loaded

__all__ = ["FactorBuffers", "GroupFactors", "cast_factors"]


class FactorBuffers:
    """Tensors with the shapes of a group's cast factors, or of their gradients.

    The B of a fused projection is expanded to block-diagonal form here, as in `delta.block_diagonal_B`.

    Args:
        layers: the group's layers; None: a linear layer without LoRA, treated as rank 0.
        shapes: (out_i, in) of each layer.
        kind: dtype and device.

    Attributes:
        ranks: r_i of each layer.
        A: (sum of r_i, in).
        A_of: the rows of A that belong to each layer, (r_i, in).
        B: B_i of each layer, transposed: (r_i, out_i).
        B_blocks: for each layer, views of its B for each block of lora_B, as (rows of the block, r).
    """

    def __init__(
        self, layers: Sequence[LoRALinear | None], shapes: Sequence[tuple[int, int]], kind: Mapping[str, Any]
    ) -> None:
        self.ranks = [0 if layer is None else len(layer.factors()[0]) for layer in layers]
        self.A = torch.zeros(sum(self.ranks), shapes[0][1], **kind)
        self.B = [torch.zeros(rank, out, **kind) for rank, (out, _) in zip(self.ranks, shapes, strict=True)]
        self.A_of = list(self.A.split(self.ranks))
        self.B_blocks: list[list[Tensor]] = []
        for layer, B in zip(layers, self.B, strict=True):
            if layer is None or layer.blocks is None:
                self.B_blocks.append([B.T])
                continue
            blocks = layer.blocks
            rows = [block for block, on in zip(B.T.split(B.shape[1] // len(blocks)), blocks, strict=True) if on]
            self.B_blocks.append([row[:, at * layer.r : (at + 1) * layer.r] for at, row in enumerate(rows)])

    def of(self, numbers: Sequence[int]) -> Factors:
        """Returns the factors of all layers of the group, or of one."""
        A = self.A if len(numbers) == len(self.ranks) else self.A_of[numbers[0]]
        return Factors(A, [self.B[number] for number in numbers])


class GroupFactors:
    """The cast factors of layers that read the same input, and their gradients.

    Args:
        layers: as for `FactorBuffers`.
        weights: W_i (out_i, in) of each layer.

    Attributes:
        layers: the group's layers.
        factors: A_i, and scaling_i B_i transposed, in the dtype of the base; refilled in each pass.
        gradients: the gradients of `factors`.
        sources: the uncast factors of each layer in this pass.
        casts: A_i and B_i of each layer as part of the pass's autograd graph, if there is one.
        written: the layers whose gradients in this pass have been assigned a buffer.
    """

    def __init__(self, layers: Sequence[LoRALinear | None], weights: Sequence[Tensor]) -> None:
        self.layers = list(layers)
        shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
        kind = {"dtype": weights[0].dtype, "device": weights[0].device}
        self._buffers = functools.partial(FactorBuffers, self.layers, shapes, kind)
        self.factors, self.gradients = self._buffers(), self._buffers()
        self.sources: list[tuple[Tensor, Tensor]] = []
        self.casts: list[Tensor] = []
        self.written: set[int] = set()

    def fit(self) -> bool:
        """Returns whether the layers' factors and weights still match the buffers' shapes and dtype."""
        kind = (self.factors.A.dtype, self.factors.A.device)
        buffers = zip(self.layers, self.factors.ranks, self.factors.A_of, self.factors.B_blocks, strict=True)
        return all(
            layer is None
            or (
                (layer.base_weight.dtype, layer.base_weight.device) == kind
                and layer.r == r
                and layer.lora_A.shape[1] == A.shape[1]
                and len(layer.lora_B) == sum(map(len, blocks))
            )
            for layer, r, A, blocks in buffers
        )

    @property
    def scalings(self) -> list[float]:
        """scaling_i of each layer."""
        return [1.0 if layer is None else layer.scaling for layer in self.layers]

    def begin(self) -> None:
        """Reads the layers' current factors, and discards the gradients of the previous pass."""
        self.written.clear()
        self.sources = [
            (torch.empty(A.shape), torch.empty(B.shape[::-1])) if layer is None else _sources(layer)
            for layer, A, B in zip(self.layers, self.factors.A_of, self.factors.B, strict=True)
        ]

    def casts_of(self, numbers: Sequence[int]) -> list[Tensor]:
        """Returns A_i and B_i of some layers, as part of the pass's autograd graph."""
        return [factor for each in numbers for factor in self.casts[2 * each : 2 * each + 2]]

    def room_for_gradients(self, numbers: Sequence[int]) -> FactorBuffers:
        """Returns buffers for the gradients of some layers; a layer that runs again in a pass gets new buffers."""
        again = not self.written.isdisjoint(numbers)
        self.written.update(numbers)
        return self._buffers() if again else self.gradients


@contextmanager
def cast_factors(groups: Sequence[GroupFactors]) -> Iterator[None]:
    """Casts the current factors of all groups for one pass, forward and backward."""
    for group in groups:
        group.begin()
    try:
        if groups and torch.is_grad_enabled():
            factors = [factor for group in groups for pair in group.sources for factor in pair]
            casts = iter(_CastFactors.apply(groups, *factors))  # type: ignore[no-untyped-call]
            for group in groups:
                group.casts = [next(casts) for _ in range(2 * len(group.layers))]
        else:
            _cast(groups)
        yield
    finally:
        for group in groups:
            group.casts, group.sources = [], []


@torch.no_grad()
def _cast(groups: Sequence[GroupFactors]) -> None:
    """Copies the current factors into the buffers that the groups multiply with."""
    own: list[Tensor] = []
    copies: list[Tensor] = []
    scalings: list[float] = []
    for group in groups:
        each = zip(group.scalings, group.sources, group.factors.A_of, group.factors.B_blocks, strict=True)
        for scaling, (source_A, source_B), A, B in each:
            own += [source_A, *_row_blocks(source_B, len(B))]
            copies += [A, *B]
            scalings += [1.0, *[scaling] * len(B)]
    _copy_scaled(own, copies, scalings)


class _CastFactors(torch.autograd.Function):
    """All factors as used by their groups: A_i, and scaling_i B_i^T, in the dtype of the base."""

    @staticmethod
    def forward(ctx: Any, groups: Sequence[GroupFactors], *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.dtype, ctx.shapes = groups, factors[0].dtype, [factor.shape for factor in factors]
        _cast(groups)
        casts = (pair for group in groups for pair in zip(group.factors.A_of, group.factors.B, strict=True))
        return tuple(factor.detach() for pair in casts for factor in pair)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        groups: Sequence[GroupFactors] = ctx.groups
        layers = [(group, number, scaling) for group in groups for number, scaling in enumerate(group.scalings)]
        # One tensor per group, in the parameters' own dtype, so that nothing is rounded afterwards.  One tensor for all
        # would not fit into any freed block of memory, so the system would have to map every page anew.
        sizes = iter([shape.numel() for shape in ctx.shapes])
        of_groups = [list(itertools.islice(sizes, 2 * len(group.layers))) for group in groups]
        parts = [part for of in of_groups for part in torch.empty(sum(of), dtype=ctx.dtype).split(of)]
        results: list[Tensor | None] = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        own: list[Tensor] = []
        copies: list[Tensor] = []
        scalings: list[float] = []
        for at, (group, number, scaling) in enumerate(layers):
            grad_A, grad_B = gradients[2 * at : 2 * at + 2]
            new_A, new_B = cast("list[Tensor]", results[2 * at : 2 * at + 2])
            if grad_A is None or grad_B is None:  # the layer is not part of the differentiated graph
                results[2 * at : 2 * at + 2] = [None, None]
                continue
            kept = group.gradients
            if grad_B is not kept.B[number]:  # a sum over several calls of the layer
                kept.A_of[number].copy_(grad_A)
                kept.B[number].copy_(grad_B)
            blocks = kept.B_blocks[number]
            own += [new_A, *_row_blocks(new_B, len(blocks))]
            copies += [kept.A_of[number], *blocks]
            scalings += [1.0, *[scaling] * len(blocks)]
        for group in groups:
            group.written.clear()
        _copy_scaled(own, copies, scalings, back=True)
        return None, *results


def _copy_scaled(own: list[Tensor], casts: list[Tensor], scalings: list[float], *, back: bool = False) -> None:
    """Sets casts to factors times scalings, or the reverse with `back`, for hundreds at once; rounds only once."""
    if not own:
        return
    kernels = loaded()
    if kernels is not None and kernels.accept_copies(own, casts):
        kernels.copy_scaled(own, casts, scalings, back=back)
    elif not back:
        torch._foreach_copy_(casts, list(torch._foreach_mul(own, scalings)))
    else:
        torch._foreach_copy_(own, casts)
        torch._foreach_mul_(own, scalings)


def _row_blocks(B: Tensor, count: int) -> Sequence[Tensor]:
    """Returns the rows of a lora_B that belong to each adapted block of its output."""
    return (B,) if count == 1 else B.split(len(B) // count)


def _sources(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """Returns a layer's factors; the blocks of lora_B are expanded only when they are cast."""
    plain = type(layer).factors is LoRALinear.factors
    return (layer.lora_A, layer.lora_B) if plain else layer.factors()
