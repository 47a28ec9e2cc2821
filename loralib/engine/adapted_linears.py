"""Linear layers with LoRA in a training step: layers that share an input run as one call, with a manual backward pass.

For the input x of q, k and v (or of a gate and its up projection), with the A_i stacked to A:

    h = x A^T,    y_i = x W_i^T + bias_i + h_i (scaling_i B_i)^T

A training step of a small model consists of thousands of small operations, most of them LoRA's: casts of factors, thin
products, scalings, sums of gradients.  Here the products of a group take one call in each direction (`kernels.c`), or
updates are added as the base's output is written; all factors are cast when a pass begins (`cast_factors.py`).
Several adapters may share the products, each with its own rows (`row_linears.py`).  Measured, and used, only on CPUs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..layers import LoRALayer, LoRALinear
from .cast_factors import FactorBuffers, GroupFactors, cast_factors
from .frozen_linear import MAX_PREPACKED_BYTES, FrozenLinear, FrozenWeight, can_prepack, kernels_for, weight_of
from .kernels import Factors, GroupOperands, Kernels, loaded
from .placement import Override, Overrides, own_forward
from .scaled_outputs import finished

__all__ = [
    "GroupProducts",
    "LayerGroup",
    "LinearGroup",
    "PendingOutputs",
    "TrainingLinears",
    "groups_of",
    "has_factors",
    "is_frozen",
    "record_call",
]

Linear = TypeVar("Linear", bound=nn.Module)


class TrainingLinears:
    """The linear layers of one model in a training step, with and without LoRA.

    Args:
        body: the modules whose adapted linear layers are grouped by input.
        modules: all modules of the model; empty if the model is not on a CPU.

    Attributes:
        modules: the modules that may be overridden.
        prepacked_bytes: size of the prepacked copies of frozen weights, once a forward and a backward pass have run.
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
        self._groups: list[_TrainingGroup] = []

    @contextmanager
    def finding_groups(self) -> Iterator[Overrides]:
        """Yields overrides that record which layers read the same tensor; run a pass through the model inside."""
        calls: list[tuple[LoRALinear, Tensor]] = []
        yield {layer: functools.partial(record_call, calls, layer) for layer in self._layers}
        self._groups = [_TrainingGroup(layers, self._prepacks) for layers in groups_of(calls)]

    @contextmanager
    def ready(self) -> Iterator[Overrides]:
        """Casts all factors for one pass, forward and backward; yields the overrides for that pass."""
        groups = [group for group in self._groups if group.is_usable()]
        overrides: dict[nn.Module, Override] = dict(self._others)
        for group in groups:
            group.begin()
            overrides.update({layer: functools.partial(group.run, number) for number, layer in enumerate(group.layers)})
        try:
            with cast_factors([group.own for group in groups]):
                yield overrides
        finally:
            for group in groups:
                group.pending = PendingOutputs()


# Grouping layers.


def has_factors(module: nn.Module) -> TypeGuard[LoRALinear]:
    """Returns whether a module is a linear layer with LoRA that uses the standard forward."""
    return isinstance(module, LoRALinear) and module.r > 0 and FrozenLinear.accepts(module)


def _gains(module: nn.Module) -> bool:
    """Whether a linear layer without LoRA can be computed faster by an override."""
    if isinstance(module, LoRALayer) or not FrozenLinear.accepts(module):
        return False
    weight = weight_of(module)
    return not weight.requires_grad and (can_prepack(weight) or kernels_for(weight) is not None)


def _needs_copy(weight: Tensor) -> bool:
    return can_prepack(weight) and kernels_for(weight) is None


def _base_weight(layer: LoRALinear) -> Tensor:
    """Returns the base weight W as (out, in), even while the layer is merged."""
    return layer.base_weight.T if layer.fan_in_fan_out else layer.base_weight


def record_call(calls: list[tuple[Linear, Tensor]], layer: Linear, x: Tensor) -> Tensor:
    """Records a layer's call and its input, and returns the output of the layer's own forward."""
    calls.append((layer, x))
    return cast(Tensor, own_forward(layer, x))


def groups_of(calls: Sequence[tuple[Linear, Tensor]]) -> list[list[Linear]]:
    """Groups layers that were called consecutively with the same tensor."""
    groups: list[list[Linear]] = []
    known: set[Linear] = set()
    previous: Tensor | None = None
    for layer, x in calls:
        if layer not in known and x is previous and _dtype(layer) == _dtype(groups[-1][0]):
            groups[-1].append(layer)
        elif layer not in known:
            groups.append([layer])
        known.add(layer)
        previous = x
    return groups


def _dtype(layer: nn.Module) -> tuple[torch.dtype, torch.device]:
    weight = layer.base_weight if isinstance(layer, LoRALayer) else cast(Tensor, layer.weight)
    return weight.dtype, weight.device


# A group.


@dataclass
class PendingOutputs:
    """Outputs computed together with that of a group's first layer, but not yet requested."""

    x: Tensor | None = None
    made_for: tuple[int, bool] = (0, False)
    outputs: dict[int, Tensor] = field(default_factory=dict)


class LinearGroup(Generic[Linear]):
    """Linear layers that read the same input: called one by one, but computed together.

    Attributes:
        layers: the group's layers, in the order in which they are called.
        pending: outputs of layers that have not been called yet.
    """

    def __init__(self, layers: list[Linear]) -> None:
        self.layers = layers
        self.pending = PendingOutputs()

    def run(self, number: int, x: Tensor) -> Tensor:
        """Returns one layer's output; a call of the first layer computes the outputs of the others as well."""
        pending = self.pending
        usual = x.dtype == _dtype(self.layers[number])[0] and not torch.is_autocast_enabled(x.device.type)
        if not (usual and self._is_ready()) or x.is_inference() or x.dim() < 2 or not x.numel():
            return self._alone(number, x)
        made_for = (x._version, torch.is_grad_enabled())
        if pending.x is x and pending.made_for == made_for and number in pending.outputs:
            output = pending.outputs.pop(number)
            if not pending.outputs:
                self.pending = PendingOutputs()
            return self._finished(number, output, x)
        dropped = self._dropped(number, x)
        numbers = (number,) if number or dropped is not None else tuple(range(len(self.layers)))
        outputs = self._outputs(x, dropped, numbers)
        first, *others = outputs
        del outputs
        if others:
            self.pending = PendingOutputs(x, made_for, dict(zip(numbers[1:], others, strict=True)))
        return self._finished(number, first, x)

    def _finished(self, number: int, output: Tensor, x: Tensor) -> Tensor:
        """Returns a layer's output (..., out) for x, given its output (T, out) from the products."""
        return output.view(*x.shape[:-1], output.shape[-1])

    def _dropped(self, number: int, x: Tensor) -> Tensor | None:
        """Returns the dropped-out input of a layer's low-rank path, which differs between layers; None: no dropout."""
        return None

    def _is_ready(self) -> bool:
        """Returns whether a pass has begun in which the layers are computed together."""
        raise NotImplementedError

    def _alone(self, number: int, x: Tensor) -> Tensor:
        """Returns a layer's output for an input that cannot be computed together with the other layers."""
        return cast(Tensor, own_forward(self.layers[number], x))

    def _outputs(self, x: Tensor, dropped: Tensor | None, numbers: tuple[int, ...]) -> Sequence[Tensor]:
        """Returns outputs (T, out_i) of some layers for x (..., in); low-rank paths read `dropped` if it is given."""
        raise NotImplementedError


class LayerGroup(LinearGroup[LoRALinear]):
    """Layers with LoRA that read the same input."""

    def _finished(self, number: int, output: Tensor, x: Tensor) -> Tensor:
        return super()._finished(number, finished([self.layers[number]], output), x)

    def _dropped(self, number: int, x: Tensor) -> Tensor | None:
        drops = any(each.lora_dropout and each.training for each in self.layers)
        return self.layers[number]._drop(x) if drops else None


class _TrainingGroup(LayerGroup):
    """Layers with LoRA in a training step."""

    def __init__(self, layers: list[LoRALinear], prepack: bool) -> None:
        super().__init__(layers)
        weights = [_base_weight(layer) for layer in layers]
        self.own = GroupFactors(layers, weights)
        self._products = GroupProducts([FrozenWeight(w, prepack and _needs_copy(w)) for w in weights])

    def is_usable(self) -> bool:
        """Returns whether all layers are unchanged and compute as usual: active, with a frozen weight and bias."""
        layers = self.layers  # a layer's adapter may have been removed since
        active = all(isinstance(each, LoRALinear) and each._active and is_frozen(each) for each in layers)
        return active and self.own.fit()

    def begin(self) -> None:
        """Prepares the products with the current weights."""
        self._products.begin([_base_weight(layer) for layer in self.layers], list(map(_bias, self.layers)), [self.own])

    def _is_ready(self) -> bool:
        return bool(self.own.casts) or not torch.is_grad_enabled()

    def _outputs(self, x: Tensor, dropped: Tensor | None, numbers: tuple[int, ...]) -> Sequence[Tensor]:
        return self._products.outputs(x, dropped, numbers)


class GroupProducts:
    """The products of linear layers that read the same input, with the low-rank paths of one adapter or several runs.

    Args:
        weights: W_i of the layers.
    """

    def __init__(self, weights: list[FrozenWeight]) -> None:
        self.weights = weights
        self.runs: list[GroupFactors] = []
        self._rows: Sequence[int] | None = None
        self._biases: list[Tensor | None] = []
        self._known: list[int] | None = None  # addresses of the biases, and ids of the runs
        self._kernels: Kernels | None = None
        self._operands: dict[tuple[int, ...], GroupOperands] = {}

    def begin(
        self,
        weights: Sequence[Tensor],
        biases: list[Tensor | None],
        runs: list[GroupFactors],
        rows: Sequence[int] | None = None,
    ) -> None:
        """Sets the weights, biases, factors and rows that the next pass uses.

        Args:
            weights: W_i (out_i, in).
            biases: (out_i,), or None.
            runs: the factors of the only adapter, or of each run that has rows in the pass.
            rows: number of rows of each run; None: all rows belong to one adapter.
        """
        current = [known.refreshed(weight) for known, weight in zip(self.weights, weights, strict=True)]
        known = [*[0 if bias is None else bias.data_ptr() for bias in biases], *map(id, runs)]
        self._rows = rows
        if known == self._known and all(map(operator.is_, current, self.weights)):
            return
        self.weights, self._biases, self.runs, self._known, self._operands = current, biases, runs, known, {}
        self._kernels, kernels = None, loaded()
        if kernels is not None and all(kernels.accept_weight(each.weight) for each in current):
            if kernels.accept_factors(*[run.factors.of(range(len(biases))) for run in runs]):
                self._kernels = kernels

    def outputs(self, x: Tensor, dropped: Tensor | None, numbers: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Returns outputs (T, out_i) of some layers for x (..., in); low-rank paths read `dropped` if it is given."""
        casts = [factor for run in self.runs for factor in run.casts_of(numbers)]
        return cast("tuple[Tensor, ...]", _GroupProduct.apply(x, dropped, self, numbers, *casts))  # type: ignore[no-untyped-call]

    def multiply(self, rows: Tensor, seen: Tensor, numbers: tuple[int, ...]) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns h (T, R) and the outputs (T, out_i) for rows (T, in), where the low-rank path reads `seen` instead.

        R is the largest sum of ranks of any run; the columns of h beyond a run's own ranks are undefined.
        """
        if self._kernels is not None:
            operands = self._operands_of(numbers, [run.gradients for run in self.runs])
            return self._kernels.lora(rows, seen, operands)
        of_runs = [
            _low_rank_outputs(part, run.factors.of(numbers))
            for part, run in zip(self._split(seen), self.runs, strict=True)
        ]
        h = _joined([of_run for of_run, _ in of_runs])
        return h, [
            self.weights[number].times(rows, bias=self._biases[number], added=_joined(updates))
            for number, *updates in zip(numbers, *[updates for _, updates in of_runs], strict=True)
        ]

    def differentiate(
        self,
        gradients: Sequence[Tensor | None],
        seen: Tensor,
        h: Tensor,
        numbers: tuple[int, ...],
        into: Sequence[FactorBuffers],
        *,
        wants_x: bool,
        wants_seen: bool | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Writes the factors' gradients, given those of the outputs; returns the gradients of x and of `seen`.

        Args:
            gradients: gradient of each output, or None if nothing depends on it.
            seen: as for `multiply`.
            h: from `multiply`.
            numbers: as for `multiply`.
            into: where to write the gradients of each run's factors.
            wants_x: whether the gradient of x is needed.
            wants_seen: whether the gradient of `seen` is needed; None: `seen` is x.
        """
        given = [gradient for gradient in gradients if gradient is not None]
        if self._kernels is not None and len(given) == len(numbers):
            operands = self._operands_of(numbers, into)
            return self._kernels.lora_back(given, seen, h, operands, wants_x=wants_x, wants_seen=bool(wants_seen))
        low_rank_input = wants_x if wants_seen is None else wants_seen
        parts = zip(*map(self._split, (seen, h, *gradients)), strict=True)
        grad_parts = [
            _low_rank_gradients(own, x, h_k, run.factors.of(numbers), to.of(numbers), wants_x=low_rank_input)
            for run, to, (x, h_k, *own) in zip(self.runs, into, parts, strict=True)
        ]
        grad_seen = _joined(cast(list[Tensor], grad_parts)) if low_rank_input else None
        grad_x, grad_dropped = (grad_seen, None) if wants_seen is None else (None, grad_seen)
        for number, gradient in zip(numbers, gradients, strict=True):
            if wants_x and gradient is not None:
                grad_x = self.weights[number].times_transposed(gradient, added=grad_x)
        return grad_x, grad_dropped

    def _operands_of(self, numbers: tuple[int, ...], into: Sequence[FactorBuffers]) -> GroupOperands:
        """Returns the kernels' operands for some of the layers, including where gradients are written."""
        usual = all(to is run.gradients for to, run in zip(into, self.runs, strict=True))
        operands = self._operands.get(numbers) if usual else None
        if operands is None:
            operands = GroupOperands(
                [self.weights[number].weight for number in numbers],
                [self._biases[number] for number in numbers],
                [run.factors.of(numbers) for run in self.runs],
                [to.of(numbers) for to in into],
            )
        if usual:
            self._operands[numbers] = operands
        operands.rows = self._rows
        return operands

    def _split(self, of_all: Tensor | None) -> Sequence[Any]:
        """Splits a tensor, or None, into the rows of each run."""
        if of_all is None or self._rows is None:
            return [of_all] * len(self.runs)
        return cast(Sequence[Tensor], of_all.split(list(self._rows)))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates the rows of all runs, padded to the widest."""
    if len(parts) == 1:
        return parts[0]
    widest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, widest - part.shape[1])) for part in parts])


class _GroupProduct(torch.autograd.Function):
    """Outputs (T, out_i) of some of a group's layers for x (..., in); low-rank paths read `dropped` if it is given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, products: GroupProducts, numbers: tuple[int, ...], *casts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.products, ctx.numbers, ctx.shape, ctx.drops = products, numbers, x.shape, dropped is not None
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if dropped is None else dropped.reshape(-1, x.shape[-1])
        h, outputs = products.multiply(rows, seen, numbers)
        ctx.save_for_backward(seen, h)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        products, numbers = cast(GroupProducts, ctx.products), ctx.numbers
        seen, h = ctx.saved_tensors
        into = [run.room_for_gradients(numbers) for run in products.runs]
        wants_seen = ctx.needs_input_grad[1] if ctx.drops else None
        grad_inputs = products.differentiate(
            gradients, seen, h, numbers, into, wants_x=ctx.needs_input_grad[0], wants_seen=wants_seen
        )
        grad_x, grad_dropped = (None if each is None else each.view(ctx.shape) for each in grad_inputs)
        grad_casts: list[Tensor | None] = []
        for buffers in into:
            for number, gradient in zip(numbers, gradients, strict=True):
                grad_casts += [None, None] if gradient is None else [buffers.A_of[number], buffers.B[number]]
        return grad_x, grad_dropped, None, None, *grad_casts


def is_frozen(layer: LoRALinear) -> bool:
    """Whether neither base weight nor bias is trained, and the kernels can read the bias."""
    weight, bias = layer.base_weight, _bias(layer)
    if weight.requires_grad:
        return False
    return bias is None or (not bias.requires_grad and bias.dtype == weight.dtype and bias.is_contiguous())


def _bias(layer: LoRALinear) -> Tensor | None:
    return cast("Tensor | None", layer.bias)


# The same with PyTorch's operators: used without kernels, and if nothing depends on some output.


def _low_rank_outputs(x: Tensor, factors: Factors) -> tuple[Tensor, list[Tensor]]:
    """Returns h = x A^T (T, R) and the updates h_i B_i (T, out_i)."""
    h = F.linear(x, factors.A)
    return h, [part @ b for part, b in zip(h.split([len(b) for b in factors.B], 1), factors.B, strict=True)]


def _low_rank_gradients(
    gradients: Sequence[Tensor | None], x: Tensor, h: Tensor, factors: Factors, into: Factors, *, wants_x: bool
) -> Tensor | None:
    """Writes the factors' gradients, and returns the gradient of x; a gradient of None counts as 0."""
    ranks = [len(b) for b in factors.B]
    h = h[:, : sum(ranks)]
    grad_h = torch.zeros_like(h)
    splits = zip(gradients, h.split(ranks, 1), grad_h.split(ranks, 1), factors.B, into.B, strict=True)
    for gradient, h_i, grad_h_i, b, grad_b in splits:
        if gradient is not None:
            torch.mm(gradient, b.T, out=grad_h_i)
            torch.mm(h_i.T, gradient, out=grad_b)
    torch.mm(grad_h.T, x, out=into.A)
    return grad_h @ factors.A if wants_x else None
