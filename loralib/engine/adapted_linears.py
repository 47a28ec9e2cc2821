"""LoRA's linears in a training step: those that read the same input are one call, the backward pass written out.

For the input x of q, k and v (or of a gate and its up projection), with A their A_i stacked:

    h = x A^T,    y_i = x W_i^T + bias_i + h_i (scaling_i B_i)^T

A small model's step is made of thousands of small operations, and most of them are LoRA's: casts of factors, thin
products, scalings, sums of gradients.  Here the products of a group are one call each way (`kernels.c`), or updates are
added where the base's output is written, and all factors are cast at once when a pass begins.

Gradients go through autograd: `_CastFactors` maps the factors to what the groups multiply with, for the whole pass in
one node, and its backward hands each parameter its gradient.  So accumulation, hooks and anomaly mode work as in any
module.  Only on CPUs, where this was measured.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..layers import LoRALayer, LoRALinear
from .frozen_linear import MAX_PREPACKED_BYTES, FrozenLinear, FrozenWeight, can_prepack, kernels_for, weight_of
from .kernels import Factors, GroupOperands, Kernels, loaded
from .placement import Override, Overrides, own_forward
from .scaled_outputs import finished

__all__ = ["LayerGroup", "PendingOutputs", "TrainingLinears", "groups_of", "has_factors", "is_frozen", "record_call"]


class TrainingLinears:
    """The linears of one model in a training step, with LoRA and without.

    Args:
        body: the modules whose adapted linears are put into groups.
        modules: all modules of the model; of a model that is not on a CPU, none.

    Attributes:
        modules: those that may be overridden.
        prepacked_bytes: what prepacked copies of frozen weights will take, once a step has run both ways.
    """

    def __init__(self, body: Sequence[nn.Module], modules: Sequence[nn.Module]) -> None:
        self._layers = [m for m in body if has_factors(m)]
        others = [m for m in modules if _gains(m)]
        weights = [weight_of(module) for module in (*self._layers, *others)]
        copies = 2 * sum(weight.nbytes for weight in weights if _needs_copy(weight))  # one for each direction
        self._prepacks = copies <= MAX_PREPACKED_BYTES
        self.prepacked_bytes = copies if self._prepacks else 0
        if not self._prepacks:
            others = [module for module in others if not _needs_copy(weight_of(module))]
        self.modules: list[nn.Module] = [*self._layers, *others]
        self._others: Overrides = {module: FrozenLinear(module, _needs_copy(weight_of(module))) for module in others}
        self._groups: list[_Group] = []

    @contextmanager
    def finding_groups(self) -> Iterator[Overrides]:
        """Yields overrides that note which layers read the same tensor; run a pass through the model inside."""
        calls: list[tuple[LoRALinear, Tensor]] = []
        yield {layer: functools.partial(record_call, calls, layer) for layer in self._layers}
        self._groups = [_Group(layers, self._prepacks) for layers in groups_of(calls)]

    @contextmanager
    def ready(self) -> Iterator[Overrides]:
        """Casts all factors for one pass, forward and backward; gives the overrides of that pass."""
        groups = [group for group in self._groups if group.is_usable()]
        overrides: dict[nn.Module, Override] = dict(self._others)
        for group in groups:
            group.begin()
            overrides.update({layer: functools.partial(group.run, number) for number, layer in enumerate(group.layers)})
        try:
            if groups and torch.is_grad_enabled():
                factors = [factor for group in groups for pair in group.sources for factor in pair]
                casts = iter(_CastFactors.apply(groups, *factors))  # type: ignore[no-untyped-call]
                for group in groups:
                    group.casts = [next(casts) for _ in range(2 * len(group.layers))]
            else:
                _cast(groups)
            yield overrides
        finally:
            for group in groups:
                group.pending, group.casts, group.sources = PendingOutputs(), [], []


# For all groups at once: there are hundreds of factors, and an operator on one of them alone costs more than its
# work.


@torch.no_grad()
def _cast(groups: Sequence[_Group]) -> None:
    """Copies the current factors into the buffers that the groups multiply with."""
    factors: list[Tensor] = []
    copies: list[Tensor] = []
    scalings: list[float] = []
    for group in groups:
        each = zip(group.layers, group.sources, group.factors.A_of, group.factors.B_blocks, strict=True)
        for layer, (source_A, source_B), A, B in each:
            factors += [source_A, *_row_blocks(source_B, len(B))]
            copies += [A, *B]
            scalings += [1.0, *[layer.scaling] * len(B)]
    _copy_scaled(factors, copies, scalings)


class _CastFactors(torch.autograd.Function):
    """All factors, as their groups multiply with them: A_i, and scaling_i B_i^T, in the dtype of the base."""

    @staticmethod
    def forward(ctx: Any, groups: list[_Group], *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.dtype, ctx.shapes = groups, factors[0].dtype, [factor.shape for factor in factors]
        _cast(groups)
        casts = (pair for group in groups for pair in zip(group.factors.A_of, group.factors.B, strict=True))
        return tuple(factor.detach() for pair in casts for factor in pair)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        groups: list[_Group] = ctx.groups
        layers = [(group, number) for group in groups for number in range(len(group.layers))]
        # One tensor for all, in the parameters' own dtype, so that nothing is rounded after this.
        sizes = [shape.numel() for shape in ctx.shapes]
        parts = torch.empty(sum(sizes), dtype=ctx.dtype).split(sizes)
        results: list[Tensor | None] = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        wide: list[Tensor] = []
        copies: list[Tensor] = []
        scalings: list[float] = []
        for at, (group, number) in enumerate(layers):
            grad_A, grad_B = gradients[2 * at : 2 * at + 2]
            new_A, new_B = cast("list[Tensor]", results[2 * at : 2 * at + 2])
            if grad_A is None or grad_B is None:  # the layer took no part in what was differentiated
                results[2 * at : 2 * at + 2] = [None, None]
                continue
            kept, layer = group.gradients, group.layers[number]
            if grad_B is not kept.B[number]:  # a sum over several calls of the layer
                kept.A_of[number].copy_(grad_A)
                kept.B[number].copy_(grad_B)
            blocks = kept.B_blocks[number]
            wide += [new_A, *_row_blocks(new_B, len(blocks))]
            copies += [kept.A_of[number], *blocks]
            scalings += [1.0, *[layer.scaling] * len(blocks)]
        for group in groups:
            group.written.clear()
        _copy_scaled(copies, wide, scalings)
        return None, *results


def _copy_scaled(sources: list[Tensor], targets: list[Tensor], scalings: list[float]) -> None:
    """Sets targets to sources times scalings, for hundreds of tensors at once; rounds once, to the narrower dtype."""
    if not targets:
        return
    if targets[0].dtype.itemsize < sources[0].dtype.itemsize:
        torch._foreach_copy_(targets, list(torch._foreach_mul(sources, scalings)))
    else:
        torch._foreach_copy_(targets, sources)
        torch._foreach_mul_(targets, scalings)


def _row_blocks(B: Tensor, count: int) -> Sequence[Tensor]:
    """Returns the rows of a lora_B that belong to each adapted block of its output."""
    return (B,) if count == 1 else B.split(len(B) // count)


# Which layers go together.


def has_factors(module: nn.Module) -> TypeGuard[LoRALinear]:
    """Returns whether a module is a linear with LoRA whose output is computed as usual."""
    return isinstance(module, LoRALinear) and module.r > 0 and FrozenLinear.accepts(module)


def _gains(module: nn.Module) -> bool:
    """Whether a linear without LoRA has a faster override."""
    if isinstance(module, LoRALayer) or not FrozenLinear.accepts(module):
        return False
    weight = weight_of(module)
    return not weight.requires_grad and (can_prepack(weight) or kernels_for(weight) is not None)


def _needs_copy(weight: Tensor) -> bool:
    return can_prepack(weight) and kernels_for(weight) is None


def _base_weight(layer: LoRALinear) -> Tensor:
    """W as (out, in), also while the layer is merged."""
    return layer.base_weight.T if layer.fan_in_fan_out else layer.base_weight


def record_call(calls: list[tuple[LoRALinear, Tensor]], layer: LoRALinear, x: Tensor) -> Tensor:
    """Notes that a layer was called with a tensor, and computes its own forward."""
    calls.append((layer, x))
    return cast(Tensor, own_forward(layer, x))


def groups_of(calls: Sequence[tuple[LoRALinear, Tensor]]) -> list[list[LoRALinear]]:
    """Puts layers that were called one after another with the same tensor into one group."""
    groups: list[list[LoRALinear]] = []
    known: set[LoRALinear] = set()
    previous: Tensor | None = None
    for layer, x in calls:
        if layer not in known and x is previous and _dtype(layer) == _dtype(groups[-1][0]):
            groups[-1].append(layer)
        elif layer not in known:
            groups.append([layer])
        known.add(layer)
        previous = x
    return groups


def _dtype(layer: LoRALinear) -> tuple[torch.dtype, torch.device]:
    return layer.base_weight.dtype, layer.base_weight.device


# A group.


class _Buffers:
    """Tensors in the shapes of a group's cast factors, or of their gradients.

    The B of a fused projection is spread out block-diagonally here, as in `delta.block_diagonal_B`.

    Attributes:
        ranks: r_i of each layer.
        A: (sum of r_i, in).
        A_of: its rows of each layer, (r_i, in).
        B: of each layer, transposed: (r_i, out_i).
        B_blocks: of each layer, the views of that for each block of its lora_B, as (rows of the block, r).
    """

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        weight = layers[0].base_weight
        shapes = [[tuple(factor.shape) for factor in layer.factors()] for layer in layers]
        self.ranks = [shape_A[0] for shape_A, _ in shapes]
        self.A = weight.new_zeros(sum(self.ranks), shapes[0][0][1])
        self.B = [weight.new_zeros(shape_B[1], shape_B[0]) for _, shape_B in shapes]
        self.A_of = list(self.A.split(self.ranks))
        self.B_blocks: list[list[Tensor]] = []
        for layer, B in zip(layers, self.B, strict=True):
            if layer.blocks is None:
                self.B_blocks.append([B.T])
                continue
            blocks = layer.blocks
            rows = [block for block, on in zip(B.T.split(B.shape[1] // len(blocks)), blocks, strict=True) if on]
            self.B_blocks.append([row[:, at * layer.r : (at + 1) * layer.r] for at, row in enumerate(rows)])

    def of(self, numbers: Sequence[int]) -> Factors:
        """Returns those of all layers of the group, or of one."""
        A = self.A if len(numbers) == len(self.ranks) else self.A_of[numbers[0]]
        return Factors(A, [self.B[number] for number in numbers])


@dataclass
class PendingOutputs:
    """Outputs that were computed with that of the first layer of a group, and were not asked for yet."""

    x: Tensor | None = None
    made_for: tuple[int, bool] = (0, False)
    outputs: dict[int, Tensor] = field(default_factory=dict)


class LayerGroup:
    """Layers that read the same input: called one by one, and computed together.

    Attributes:
        layers: those of the group, in the order in which they are called.
        pending: what was computed for layers that have not been called yet.
    """

    def __init__(self, layers: list[LoRALinear]) -> None:
        self.layers = layers
        self.pending = PendingOutputs()

    def run(self, number: int, x: Tensor) -> Tensor:
        """Returns one layer's output; that of the first layer is computed together with those of the others."""
        layer, pending = self.layers[number], self.pending
        usual = x.dtype == layer.base_weight.dtype and not torch.is_autocast_enabled(x.device.type)
        if not (usual and self._is_ready()) or x.is_inference() or x.dim() < 2 or not x.numel():
            return cast(Tensor, own_forward(layer, x))
        made_for = (x._version, torch.is_grad_enabled())
        if pending.x is x and pending.made_for == made_for and number in pending.outputs:
            output = pending.outputs.pop(number)
            if not pending.outputs:
                self.pending = PendingOutputs()
            return self._finished(layer, output, x)
        drops = any(each.lora_dropout and each.training for each in self.layers)
        numbers = (number,) if number or drops else tuple(range(len(self.layers)))
        outputs = self._outputs(x, layer._drop(x) if drops else None, numbers)
        first, *others = outputs
        del outputs
        if others:
            self.pending = PendingOutputs(x, made_for, dict(zip(numbers[1:], others, strict=True)))
        return self._finished(layer, first, x)

    @staticmethod
    def _finished(layer: LoRALinear, output: Tensor, x: Tensor) -> Tensor:
        """Returns a layer's output (..., out) for x, of which (T, out) is what the products make."""
        return finished(layer, output).view(*x.shape[:-1], output.shape[-1])

    def _is_ready(self) -> bool:
        """Returns whether a pass has begun for which the layers are computed together."""
        raise NotImplementedError

    def _outputs(self, x: Tensor, dropped: Tensor | None, numbers: tuple[int, ...]) -> Sequence[Tensor]:
        """Returns outputs (T, out_i) of some layers for x (..., in); low-rank paths see `dropped` if it is given."""
        raise NotImplementedError


class _Group(LayerGroup):
    """What the layers of a group multiply with in the base's dtype, and the gradients of that."""

    def __init__(self, layers: list[LoRALinear], prepack: bool) -> None:
        super().__init__(layers)
        self._ranks = [layer.r for layer in layers]
        weights = [_base_weight(layer) for layer in layers]
        self.weights = [FrozenWeight(weight, prepack and _needs_copy(weight)) for weight in weights]
        self.factors, self.gradients = _Buffers(layers), _Buffers(layers)  # the factors' B are scaled
        self.sources: list[tuple[Tensor, Tensor]] = []  # the factors of each layer in this pass
        self.casts: list[Tensor] = []  # A_i and B_i of each layer as parts of the pass's graph, where there is one
        self.written: set[int] = set()  # the layers whose gradients of this pass are there
        self._kernels = self._usable_kernels()
        self._operands: dict[tuple[int, ...], GroupOperands] = {}
        self._biases: list[int] = []  # their addresses

    def is_usable(self) -> bool:
        """Returns whether all layers are what they were and compute as usual: active, with a frozen weight and bias."""
        kind = (self.factors.A.dtype, self.factors.A.device)
        return all(
            isinstance(layer, LoRALinear)  # it may have been removed since
            and layer._active
            and _dtype(layer) == kind
            and layer.r == r
            and layer.lora_A.shape[1] == A.shape[1]
            and len(layer.lora_B) == sum(map(len, blocks))
            and is_frozen(layer)
            for layer, r, A, blocks in zip(
                self.layers, self._ranks, self.factors.A_of, self.factors.B_blocks, strict=True
            )
        )

    def begin(self) -> None:
        """Takes the current weights, and forgets the gradients of the previous pass."""
        self.written.clear()
        self.sources = [_sources(layer) for layer in self.layers]
        weights = [known.refreshed(_base_weight(layer)) for known, layer in zip(self.weights, self.layers, strict=True)]
        biases = [0 if bias is None else bias.data_ptr() for bias in map(_bias, self.layers)]
        if biases != self._biases or not all(map(operator.is_, weights, self.weights)):
            self.weights, self._biases, self._operands = weights, biases, {}
            self._kernels = self._usable_kernels()

    def _usable_kernels(self) -> Kernels | None:
        """Returns the kernels, if they accept what the layers multiply with."""
        kernels = loaded()
        if kernels is None or not all(kernels.accept_weight(each.weight) for each in self.weights):
            return None
        return kernels if kernels.accept_factors(self.factors.of(range(len(self.layers)))) else None

    def _operands_of(self, numbers: tuple[int, ...], gradients: _Buffers) -> GroupOperands:
        """Returns what some of the layers multiply with, for the kernels, and where their gradients go."""
        if gradients is self.gradients and numbers in self._operands:
            return self._operands[numbers]
        weights = [self.weights[number].weight for number in numbers]
        biases = [_bias(self.layers[number]) for number in numbers]
        operands = GroupOperands(weights, biases, [self.factors.of(numbers)], [gradients.of(numbers)])
        if gradients is self.gradients:
            self._operands[numbers] = operands
        return operands

    def _is_ready(self) -> bool:
        return bool(self.casts) or not torch.is_grad_enabled()

    def _outputs(self, x: Tensor, dropped: Tensor | None, numbers: tuple[int, ...]) -> Sequence[Tensor]:
        casts = [factor for each in numbers for factor in self.casts[2 * each : 2 * each + 2]]
        outputs: tuple[Tensor, ...] = _GroupProduct.apply(x, dropped, self, numbers, *casts)  # type: ignore[no-untyped-call]
        return outputs

    def multiply(self, rows: Tensor, seen: Tensor, numbers: tuple[int, ...]) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns h (T, R) and the outputs (T, out_i) for rows (T, in), of which the low-rank path sees `seen`."""
        if self._kernels is not None:
            return self._kernels.lora(rows, seen, self._operands_of(numbers, self.gradients))
        h, updates = _lora(seen, self.factors.of(numbers))
        return h, [
            self.weights[number].times(rows, bias=_bias(self.layers[number]), added=update)
            for number, update in zip(numbers, updates, strict=True)
        ]

    def differentiate(
        self,
        gradients: Sequence[Tensor | None],
        seen: Tensor,
        h: Tensor,
        numbers: tuple[int, ...],
        into: _Buffers,
        *,
        wants_x: bool,
        wants_seen: bool | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Writes the factors' gradients for those in the outputs; returns those in x and in what dropout left of it.

        Args:
            gradients: of each output, or None where nothing depends on it.
            seen: as for `multiply`.
            h: from `multiply`.
            numbers: as for `multiply`.
            into: where the factors' gradients go.
            wants_x: whether the gradient in x is wanted.
            wants_seen: whether that in `seen` is wanted; None: `seen` is x.
        """
        given = [gradient for gradient in gradients if gradient is not None]
        if self._kernels is not None and len(given) == len(numbers):
            operands = self._operands_of(numbers, into)
            return self._kernels.lora_back(given, seen, h, operands, wants_x=wants_x, wants_seen=bool(wants_seen))
        low_rank_input = wants_x if wants_seen is None else wants_seen
        of_seen = _lora_back(gradients, seen, h, self.factors.of(numbers), into.of(numbers), wants_x=low_rank_input)
        of_x, of_dropped = (of_seen, None) if wants_seen is None else (None, of_seen)
        for number, gradient in zip(numbers, gradients, strict=True):
            if wants_x and gradient is not None:
                of_x = self.weights[number].times_transposed(gradient, added=of_x)
        return of_x, of_dropped


class _GroupProduct(torch.autograd.Function):
    """Outputs (T, out_i) of some of a group's layers for x (..., in); low-rank paths see `dropped`, if it is there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, group: _Group, numbers: tuple[int, ...], *casts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.numbers, ctx.shape, ctx.drops = group, numbers, x.shape, dropped is not None
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if dropped is None else dropped.reshape(-1, x.shape[-1])
        h, outputs = group.multiply(rows, seen, numbers)
        ctx.save_for_backward(seen, h)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        group, numbers = cast(_Group, ctx.group), ctx.numbers
        seen, h = ctx.saved_tensors
        again = not group.written.isdisjoint(numbers)  # layers that run more than once in a pass: autograd adds up
        into = _Buffers(group.layers) if again else group.gradients
        group.written.update(numbers)
        wants_seen = ctx.needs_input_grad[1] if ctx.drops else None
        of_inputs = group.differentiate(
            gradients, seen, h, numbers, into, wants_x=ctx.needs_input_grad[0], wants_seen=wants_seen
        )
        of_x, of_dropped = (None if each is None else each.view(ctx.shape) for each in of_inputs)
        of_casts: list[Tensor | None] = []
        for number, gradient in zip(numbers, gradients, strict=True):
            of_casts += [None, None] if gradient is None else [into.A_of[number], into.B[number]]
        return of_x, of_dropped, None, None, *of_casts


def is_frozen(layer: LoRALinear) -> bool:
    """Whether the base weight and its bias are not trained, and the kernels can read the bias."""
    weight, bias = layer.base_weight, _bias(layer)
    if weight.requires_grad:
        return False
    return bias is None or (not bias.requires_grad and bias.dtype == weight.dtype and bias.is_contiguous())


def _sources(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """Returns a layer's factors, with lora_B as it is: blocks are spread out where they are cast."""
    plain = type(layer).factors is LoRALinear.factors
    return (layer.lora_A, layer.lora_B) if plain else layer.factors()


def _bias(layer: LoRALinear) -> Tensor | None:
    return cast("Tensor | None", layer.bias)


# The same in PyTorch's operators: without kernels, and for an output that nothing depends on.


def _lora(x: Tensor, factors: Factors) -> tuple[Tensor, list[Tensor]]:
    """Returns h = x A^T (T, R) and the updates h_i B_i (T, out_i)."""
    h = F.linear(x, factors.A)
    return h, [part @ b for part, b in zip(h.split([len(b) for b in factors.B], 1), factors.B, strict=True)]


def _lora_back(
    gradients: Sequence[Tensor | None], x: Tensor, h: Tensor, factors: Factors, into: Factors, *, wants_x: bool
) -> Tensor | None:
    """Writes the factors' gradients, and returns that in x; a gradient that is None is 0."""
    ranks = [len(b) for b in factors.B]
    of_h = torch.zeros_like(h)
    splits = zip(gradients, h.split(ranks, 1), of_h.split(ranks, 1), factors.B, into.B, strict=True)
    for gradient, h_i, of_h_i, b, of_b in splits:
        if gradient is not None:
            torch.mm(gradient, b.T, out=of_h_i)
            torch.mm(h_i.T, gradient, out=of_b)
    torch.mm(of_h.T, x, out=into.A)
    return of_h @ factors.A if wants_x else None
