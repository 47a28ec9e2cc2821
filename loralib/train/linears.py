"""Adapted linears in few operations: those that read the same input together, the backward pass written out.

For the inputs x of q, k and v (or of a gate and its up projection), with A the A of all of them below one another:

    h = x A^T,    y_i = x W_i^T + scaling_i * h_i B_i^T

A small model's step is made of thousands of small operations, and most of them are LoRA's: casts of factors, thin
products, scalings, sums of gradients.  Here one thin product takes the place of several, updates are added where the
base's output was written, all factors are cast at once when a step begins, and all their gradients when it ends.
Only on CPUs, where this was measured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inject import adapted_layers
from ..layers import LinearPath, LoRALayer

__all__ = ["Linears"]


class Linears:
    """The adapted linears of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [cast(LinearPath, layer) for _, layer in adapted_layers(model) if _is_plain(layer)]
        self._groups: list[_Group] = []

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Notes which of them read the same tensor, from the passes through the model that are done meanwhile."""
        calls: list[tuple[LinearPath, Tensor]] = []
        try:
            for layer in self._layers:
                layer.__dict__["forward"] = functools.partial(_record, calls, layer)
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)
            self._groups = _groups(calls)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Computes those together for the time of a step; at its end, their gradients are in the factors' `grad`."""
        usable = [group for group in self._groups if group.is_usable()]
        try:
            for group in usable:
                group.begin()
                for number, layer in enumerate(group.layers):
                    layer.__dict__["forward"] = functools.partial(group.run, number)
            yield
            for group in usable:
                group.give_gradients()
        finally:
            for group in usable:
                group.waiting = _Waiting()
                for layer in group.layers:
                    layer.__dict__.pop("forward", None)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes ``x W^T + bias + scaling * B A x`` and nothing else."""
    if not isinstance(layer, LinearPath) or "forward" in layer.__dict__ or layer.base_weight.device.type != "cpu":
        return False
    if type(layer).forward is not LinearPath.forward or type(layer)._base_forward is not LinearPath._base_forward:
        return False
    base = next(cls for cls in type(layer).__mro__ if "forward" in cls.__dict__ and not issubclass(cls, LoRALayer))
    return base is nn.Linear or f"{base.__module__}.{base.__name__}" == "transformers.pytorch_utils.Conv1D"


def _kind(layer: LoRALayer) -> tuple[torch.dtype, torch.device]:
    return layer.base_weight.dtype, layer.base_weight.device


def _is_usual(layer: LinearPath) -> bool:
    frozen = (layer.base_weight, cast("Tensor | None", layer.bias))
    if any(parameter is not None and parameter.requires_grad for parameter in frozen):
        return False
    factors: tuple[Any, Any] = (layer.lora_A, layer.lora_B)
    # Their gradients do not pass through autograd here, so nobody may wait for them there.
    return all(p.requires_grad and not p._backward_hooks and not p._post_accumulate_grad_hooks for p in factors)


def _record(calls: list[tuple[LinearPath, Tensor]], layer: LinearPath, x: Tensor) -> Tensor:
    calls.append((layer, x))
    return LinearPath.forward(layer, x)


def _groups(calls: Sequence[tuple[LinearPath, Tensor]]) -> list[_Group]:
    """Puts layers that were called one after another with the same tensor into one group."""
    groups: list[list[LinearPath]] = []
    known: set[LinearPath] = set()
    previous: Tensor | None = None
    for layer, x in calls:
        if layer not in known and x is previous and _kind(layer) == _kind(groups[-1][0]):
            groups[-1].append(layer)
        elif layer not in known:
            groups.append([layer])
        known.add(layer)
        previous = x
    return [_Group(layers) for layers in groups]


@dataclass
class _Waiting:
    """What was computed with the first layer of a group, and is not asked for yet."""

    x: Tensor | None = None
    made_for: tuple[int, bool] = (0, False)
    outputs: dict[int, Tensor] = field(default_factory=dict)


class _Factors:
    """Tensors in the shapes of a group's factors: A (sum of r, in), and each layer's B transposed (r, out).

    The B of a fused projection is spread out block-diagonally here, as in `delta.block_diagonal_B`.

    Attributes:
        ranks: r of each layer.
        A, B: the tensors.
        of_A, of_B: where each layer's lora_A, and each block of its lora_B, lies in them.
    """

    def __init__(self, layers: Sequence[LinearPath]) -> None:
        weight = layers[0].base_weight
        shapes = [[tuple(factor.shape) for factor in layer._factors()] for layer in layers]
        self.ranks = [shape_A[0] for shape_A, _ in shapes]
        self.A = weight.new_zeros(sum(self.ranks), shapes[0][0][1])
        self.B = [weight.new_zeros(shape_B[1], shape_B[0]) for _, shape_B in shapes]
        self.of_A = list(self.A.split(self.ranks))
        self.of_B: list[list[Tensor]] = []
        for layer, B in zip(layers, self.B, strict=True):
            blocks = layer.blocks or (True,)
            rows = [block for block, on in zip(B.T.split(B.shape[1] // len(blocks)), blocks, strict=True) if on]
            self.of_B.append([row[:, at * layer.r : (at + 1) * layer.r] for at, row in enumerate(rows)])


class _Group:
    """Layers that read the same input; what they multiply with, in the base's dtype; and the gradients of that."""

    def __init__(self, layers: list[LinearPath]) -> None:
        self.layers = layers
        self.waiting = _Waiting()
        self.factors, self.gradients = _Factors(layers), _Factors(layers)  # the factors' B are scaled
        self.touched: set[int] = set()  # the layers whose gradients are there
        self.anchor = torch.zeros((), requires_grad=True)  # makes outputs part of the graph, even if x is not

    def is_usable(self) -> bool:
        """Whether all layers are what they were and compute as usual: W and its bias frozen, both factors trained."""
        kind = (self.factors.A.dtype, self.factors.A.device)
        return all(
            isinstance(layer, LinearPath)  # and not taken back to what it was before
            and "forward" not in layer.__dict__
            and layer._active
            and _kind(layer) == kind
            and layer.lora_A.shape == of_A.shape
            and len(layer.lora_B) == sum(map(len, of_B))
            and _is_usual(layer)
            for layer, of_A, of_B in zip(self.layers, self.factors.of_A, self.factors.of_B, strict=True)
        )

    @torch.no_grad()
    def begin(self) -> None:
        """Takes the factors as they are now."""
        self.touched.clear()
        torch._foreach_copy_(self.factors.of_A, [layer.lora_A for layer in self.layers])
        for layer, parts in zip(self.layers, self.factors.of_B, strict=True):
            torch._foreach_copy_(parts, layer.lora_B.split(len(layer.lora_B) // len(parts)))
        torch._foreach_mul_(self.factors.B, [layer.scaling for layer in self.layers])

    @torch.no_grad()
    def give_gradients(self) -> None:
        """Adds to the `grad` of the factors what the backward pass has left here."""
        for number in self.touched:
            layer, of_B = self.layers[number], self.gradients.of_B[number]
            _grad(layer.lora_A).add_(self.gradients.of_A[number])
            grad_B = _grad(layer.lora_B)
            for part, gradient in zip(grad_B.split(len(grad_B) // len(of_B)), of_B, strict=True):
                part.add_(gradient, alpha=layer.scaling)

    def run(self, number: int, x: Tensor) -> Tensor:
        """Returns one layer's output, from where it waits if the first layer of the group has just read this x."""
        layer, waiting = self.layers[number], self.waiting
        usual = x.dtype == layer.base_weight.dtype and not torch.is_autocast_enabled(x.device.type)
        if not usual or x.is_inference() or x.dim() < 2 or not x.numel():
            return LinearPath.forward(layer, x)
        made_for = (x._version, torch.is_grad_enabled())
        if waiting.x is x and waiting.made_for == made_for and number in waiting.outputs:
            output = waiting.outputs.pop(number)
            if not waiting.outputs:
                self.waiting = _Waiting()
            return output
        drops = any(each.lora_dropout and each.training for each in self.layers)
        numbers = (number,) if number or drops else tuple(range(len(self.layers)))
        dropped = layer._drop(x) if drops else None
        found: tuple[Tensor, ...] = _Together.apply(x, dropped, self.anchor, self, numbers)  # type: ignore[no-untyped-call]
        first, *others = (output.view(*x.shape[:-1], output.shape[-1]) for output in found)
        if others:
            self.waiting = _Waiting(x, made_for, dict(zip(numbers[1:], others, strict=True)))
        return first


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class _Together(torch.autograd.Function):
    """Outputs (T, out) of some of a group's layers for x (..., in); low-rank paths see `dropped`, if there is one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, anchor: Tensor, group: _Group, numbers: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.numbers, ctx.shape, ctx.drops = group, numbers, x.shape, dropped is not None
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if dropped is None else dropped.reshape(-1, x.shape[-1])
        h = F.linear(seen, _A(group.factors, numbers))
        ctx.save_for_backward(seen, h)
        outputs = []
        for number, part in zip(numbers, _parts(group, numbers, h), strict=True):
            layer = group.layers[number]
            y = F.linear(rows, _weight(layer), cast("Tensor | None", layer.bias))
            outputs.append(y.addmm_(part, group.factors.B[number]))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        group, numbers = cast(_Group, ctx.group), ctx.numbers
        seen, h = ctx.saved_tensors
        grad_x: Tensor | None = None
        grads_h = []
        again = group.touched.intersection(numbers)  # layers that run more than once in a pass
        if again:
            for number in set(numbers) - again:  # the product for all A adds to what is there
                group.gradients.of_A[number].zero_()
        for number, part, gradient in zip(numbers, _parts(group, numbers, h), gradients, strict=True):
            B, grad_B = group.factors.B[number], group.gradients.B[number]
            if gradient is None:
                grads_h.append(torch.zeros_like(part))
                continue
            grads_h.append(gradient @ B.T)
            torch.addmm(grad_B, part.T, gradient, beta=int(number in group.touched), out=grad_B)
            group.touched.add(number)
            if ctx.needs_input_grad[0]:
                weight = _weight(group.layers[number])
                grad_x = gradient @ weight if grad_x is None else grad_x.addmm_(gradient, weight)
        grad_h = grads_h[0] if len(grads_h) == 1 else torch.cat(grads_h, 1)
        grad_A, A = _A(group.gradients, numbers), _A(group.factors, numbers)
        torch.addmm(grad_A, grad_h.T, seen, beta=int(bool(again)), out=grad_A)
        grad_dropped = (grad_h @ A).view(ctx.shape) if ctx.drops and ctx.needs_input_grad[1] else None
        if grad_x is not None:
            grad_x = (grad_x if ctx.drops else grad_x.addmm_(grad_h, A)).view(ctx.shape)
        return grad_x, grad_dropped, None, None, None


def _A(factors: _Factors, numbers: tuple[int, ...]) -> Tensor:
    return factors.A if len(numbers) == len(factors.ranks) else factors.of_A[numbers[0]]


def _parts(group: _Group, numbers: tuple[int, ...], h: Tensor) -> Sequence[Tensor]:
    return h.split([group.factors.ranks[number] for number in numbers], 1) if len(numbers) > 1 else (h,)


def _weight(layer: LinearPath) -> Tensor:
    """W as (out, in)."""
    return layer.base_weight.T if layer.fan_in_fan_out else layer.base_weight
