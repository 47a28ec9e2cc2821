"""Linears in few operations: adapted ones that read the same input together, the backward pass written out.

For the inputs x of q, k and v (or of a gate and its up projection), with A the A of all of them below one another:

    h = x A^T,    y_i = x W_i^T + scaling_i * h_i B_i^T

A small model's step is made of thousands of small operations, and most of them are LoRA's: casts of factors, thin
products, scalings, sums of gradients.  Here all products of a group are one call each way (`loralib.kernels`), or
updates are added where the base's output is written; all factors are cast at once when a step begins, and all their
gradients when it ends.
Other linears whose weights are frozen multiply in the same way (`loralib.ordered`).  Only on CPUs, where this was
measured.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..injection import adapted_layers
from ..layers import LoRALayer, LoRALinear
from .kernels import Factors, Kernels, Mirrors, Operands, loaded
from .ordered import MOST_BYTES, FrozenWeight, can_order, kernels_for

__all__ = ["Linears"]


class Linears:
    """The linears of one model.

    Attributes:
        copies_bytes: what copies of frozen weights in the processor's order will take, once a step has run both ways.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [cast(LoRALinear, layer) for _, layer in adapted_layers(model) if _is_plain(layer)]
        self._groups: list[_Group] = []
        self._factors: Mirrors | None = None  # as of the step before
        self._gradients: Mirrors | None = None
        others = [_Frozen(module) for module in model.modules() if _Frozen.takes(module)]
        weights = [*(_weight(layer) for layer in self._layers), *(other.weight for other in others)]
        copies = 2 * sum(weight.nbytes for weight in weights if _wants_copies(weight))  # one for each way
        self._ordered = copies <= MOST_BYTES
        self._others = [other for other in others if self._ordered or not _wants_copies(other.weight)]
        self.copies_bytes = copies if self._ordered else 0

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Notes which of them read the same tensor, from the passes through the model that are done meanwhile."""
        calls: list[tuple[LoRALinear, Tensor]] = []
        try:
            for layer in self._layers:
                layer.__dict__["forward"] = functools.partial(_record, calls, layer)
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)
            self._groups = [_Group(layers, self._ordered) for layers in _groups(calls)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Computes those together for the time of a step; at its end, their gradients are in the factors' `grad`."""
        usable = [group for group in self._groups if group.is_usable()]
        others = [other for other in self._others if other.is_usable()]
        try:
            self._factors = _take_factors(usable, self._factors)
            for group in usable:
                group.begin()
                for number, layer in enumerate(group.layers):
                    layer.__dict__["forward"] = functools.partial(group.run, number)
            for other in others:
                other.begin()
                other.module.__dict__["forward"] = other.run
            yield
            self._gradients = _give_gradients(usable, self._gradients)
        finally:
            for group in usable:
                group.waiting = _Waiting()
                for layer in group.layers:
                    layer.__dict__.pop("forward", None)
            for other in others:
                other.module.__dict__.pop("forward", None)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes ``x W^T + bias + scaling * B A x`` and nothing else."""
    if not isinstance(layer, LoRALinear) or "forward" in layer.__dict__ or layer.base_weight.device.type != "cpu":
        return False
    if type(layer).forward is not LoRALinear.forward or type(layer)._base_forward is not LoRALinear._base_forward:
        return False
    base = next(cls for cls in type(layer).__mro__ if "forward" in cls.__dict__ and not issubclass(cls, LoRALayer))
    return base is nn.Linear or _is_conv1d(base)


def _is_conv1d(kind: type[Any]) -> bool:
    """Whether a class is transformers' linear with a transposed weight (without loading transformers)."""
    return f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D"


def _kind(layer: LoRALayer) -> tuple[torch.dtype, torch.device]:
    return layer.base_weight.dtype, layer.base_weight.device


def _is_usual(layer: LoRALinear) -> bool:
    weight, bias = layer.base_weight, _bias(layer)
    if weight.requires_grad:
        return False
    if bias is not None and (bias.requires_grad or bias.dtype != weight.dtype or not bias.is_contiguous()):
        return False
    factors: tuple[Any, Any] = (layer.lora_A, layer.lora_B)
    # Their gradients do not pass through autograd here, so nobody may wait for them there.
    return all(p.requires_grad and not p._backward_hooks and not p._post_accumulate_grad_hooks for p in factors)


def _record(calls: list[tuple[LoRALinear, Tensor]], layer: LoRALinear, x: Tensor) -> Tensor:
    calls.append((layer, x))
    return LoRALinear.forward(layer, x)


def _groups(calls: Sequence[tuple[LoRALinear, Tensor]]) -> list[list[LoRALinear]]:
    """Puts layers that were called one after another with the same tensor into one group."""
    groups: list[list[LoRALinear]] = []
    known: set[LoRALinear] = set()
    previous: Tensor | None = None
    for layer, x in calls:
        if layer not in known and x is previous and _kind(layer) == _kind(groups[-1][0]):
            groups[-1].append(layer)
        elif layer not in known:
            groups.append([layer])
        known.add(layer)
        previous = x
    return groups


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

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
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

    def of(self, numbers: Sequence[int]) -> Factors:
        """Returns those of all layers of the group, or of one."""
        A = self.A if len(numbers) == len(self.ranks) else self.of_A[numbers[0]]
        return Factors(A, [self.B[number] for number in numbers])


class _Group:
    """Layers that read the same input; what they multiply with, in the base's dtype; and the gradients of that."""

    def __init__(self, layers: list[LoRALinear], ordered: bool) -> None:
        self.layers = layers
        self.weights = [FrozenWeight(_weight(layer), ordered) for layer in layers]
        self.waiting = _Waiting()
        self.factors, self.gradients = _Factors(layers), _Factors(layers)  # the factors' B are scaled
        self.touched: set[int] = set()  # the layers whose gradients are there
        self.kernels = self._taking()
        self._operands: dict[tuple[int, ...], Operands] = {}
        self._biases: list[int] = []  # their places
        self.anchor = torch.zeros((), requires_grad=True)  # makes outputs part of the graph, even if x is not

    def is_usable(self) -> bool:
        """Whether all layers are what they were and compute as usual: W and its bias frozen, both factors trained."""
        kind = (self.factors.A.dtype, self.factors.A.device)
        return all(
            isinstance(layer, LoRALinear)  # and not taken back to what it was before
            and "forward" not in layer.__dict__
            and layer._active
            and _kind(layer) == kind
            and layer.lora_A.shape == of_A.shape
            and len(layer.lora_B) == sum(map(len, of_B))
            and _is_usual(layer)
            for layer, of_A, of_B in zip(self.layers, self.factors.of_A, self.factors.of_B, strict=True)
        )

    def begin(self) -> None:
        """Takes weights as they are now, and forgets the gradients of the step before."""
        self.touched.clear()
        weights = [known.now(_weight(layer)) for known, layer in zip(self.weights, self.layers, strict=True)]
        biases = [0 if bias is None else bias.data_ptr() for bias in map(_bias, self.layers)]
        if biases != self._biases or not all(map(operator.is_, weights, self.weights)):
            self.weights, self._biases, self._operands = weights, biases, {}
            self.kernels = self._taking()

    def _taking(self) -> Kernels | None:
        """The kernels, if they take what the layers multiply with."""
        kernels = loaded()
        if kernels is None or not all(kernels.take_weight(each.weight) for each in self.weights):
            return None
        return kernels if kernels.take_factors(self.factors.of(range(len(self.layers)))) else None

    def operands(self, numbers: tuple[int, ...]) -> Operands:
        """Returns what some of the layers multiply with, for the kernels."""
        if numbers not in self._operands:
            weights = [self.weights[number].weight for number in numbers]
            biases = [_bias(self.layers[number]) for number in numbers]
            self._operands[numbers] = Operands(weights, biases, self.factors.of(numbers), self.gradients.of(numbers))
        return self._operands[numbers]

    def run(self, number: int, x: Tensor) -> Tensor:
        """Returns one layer's output, from where it waits if the first layer of the group has just read this x."""
        layer, waiting = self.layers[number], self.waiting
        usual = x.dtype == layer.base_weight.dtype and not torch.is_autocast_enabled(x.device.type)
        if not usual or x.is_inference() or x.dim() < 2 or not x.numel():
            return LoRALinear.forward(layer, x)
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


# For all groups at once: there are hundreds of factors, and an operator on one of them alone costs more than its work.


@torch.no_grad()
def _take_factors(groups: Sequence[_Group], known: Mirrors | None) -> Mirrors | None:
    """Copies the factors as they are now to where the groups multiply with them."""
    into: list[Tensor] = []
    factors: list[Tensor] = []
    scalings: list[float] = []
    for group in groups:
        for layer, of_A, of_B in zip(group.layers, group.factors.of_A, group.factors.of_B, strict=True):
            into += [of_A, *of_B]
            factors += [layer.lora_A, *_rows(layer.lora_B, len(of_B))]
            scalings += [1.0, *[layer.scaling] * len(of_B)]
    return _mirror(factors, into, scalings, known, back=False)


@torch.no_grad()
def _give_gradients(groups: Sequence[_Group], known: Mirrors | None) -> Mirrors | None:
    """Adds to the `grad` of the factors what the backward pass has left with the groups."""
    layers = [(group, number) for group in groups for number in sorted(group.touched)]
    parameters = [p for group, number in layers for p in (group.layers[number].lora_A, group.layers[number].lora_B)]
    if not parameters:
        return known
    # In the parameters' own dtype, so that nothing is rounded after this.
    flat = torch.empty(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    new = [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]
    into: list[Tensor] = []
    gradients: list[Tensor] = []
    scalings: list[float] = []
    for (group, number), new_A, new_B in zip(layers, new[::2], new[1::2], strict=True):
        of_B = group.gradients.of_B[number]
        into += [new_A, *_rows(new_B, len(of_B))]
        gradients += [group.gradients.of_A[number], *of_B]
        scalings += [1.0, *[group.layers[number].scaling] * len(of_B)]
    mirrors = _mirror(into, gradients, scalings, known, back=True)
    for parameter, gradient in zip(parameters, new, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)
    return mirrors


def _mirror(
    wide: list[Tensor], tensors: list[Tensor], scalings: list[float], known: Mirrors | None, *, back: bool
) -> Mirrors | None:
    """Makes tensors of wide ones times scalings, or (back) the wide ones of them.

    Returns:
        The tensors as mirrors, those of the step before if it was they; None without kernels.
    """
    if not tensors:
        return None
    kernels = loaded()
    if kernels is not None and all(x.dtype == torch.float32 and x.is_contiguous() for x in wide):
        if known is None or list(map(id, known.tensors)) != list(map(id, tensors)):
            known = Mirrors(tensors) if kernels.take_mirrors(tensors) else None
        if known is not None:
            kernels.mirror(wide, known, scalings, back=back)
            return known
    into, given = (wide, tensors) if back else (tensors, wide)
    torch._foreach_copy_(into, given)
    torch._foreach_mul_(into, scalings)
    return None


def _rows(B: Tensor, parts: int) -> Sequence[Tensor]:
    """The rows of a lora_B that belong to each part of its output."""
    return (B,) if parts == 1 else B.split(len(B) // parts)


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
        if group.kernels is not None:
            h, outputs = group.kernels.lora(rows, seen, group.operands(numbers))
        else:
            h, updates = _lora(seen, group.factors.of(numbers))
            outputs = [
                group.weights[number].times(rows, bias=_bias(group.layers[number]), added=update)
                for number, update in zip(numbers, updates, strict=True)
            ]
        ctx.save_for_backward(seen, h)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        group, numbers = cast(_Group, ctx.group), ctx.numbers
        seen, h = ctx.saved_tensors
        again = [number in group.touched for number in numbers]  # layers that run more than once in a pass
        wants_x, wants_dropped = ctx.needs_input_grad[0], ctx.drops and ctx.needs_input_grad[1]
        given = [gradient for gradient in gradients if gradient is not None]
        of_x: Tensor | None
        of_dropped: Tensor | None
        if group.kernels is not None and len(given) == len(numbers):
            of_x, of_dropped = group.kernels.lora_back(
                given, seen, h, group.operands(numbers), again, wants_x=wants_x, wants_seen=wants_dropped
            )
        else:
            factors, found = group.factors.of(numbers), group.gradients.of(numbers)
            of_seen = _lora_back(gradients, seen, h, factors, found, again, wants_x=wants_x or wants_dropped)
            of_x, of_dropped = (None, of_seen) if ctx.drops else (of_seen, None)
            for number, gradient in zip(numbers, gradients, strict=True):
                if wants_x and gradient is not None:
                    of_x = group.weights[number].back(gradient, added=of_x)
        group.touched.update(number for number, g in zip(numbers, gradients, strict=True) if g is not None)
        grad_x, grad_dropped = (None if each is None else each.view(ctx.shape) for each in (of_x, of_dropped))
        return grad_x, grad_dropped, None, None, None


# Without kernels (`loralib.kernels`), and for an output that nobody has used:


def _lora(x: Tensor, factors: Factors) -> tuple[Tensor, list[Tensor]]:
    """What `Kernels.lora` computes, in PyTorch's operators."""
    h = F.linear(x, factors.A)
    return h, [part @ b for part, b in zip(h.split([len(b) for b in factors.B], 1), factors.B, strict=True)]


def _lora_back(
    gradients: Sequence[Tensor | None],
    x: Tensor,
    h: Tensor,
    factors: Factors,
    found: Factors,
    again: Sequence[bool],
    *,
    wants_x: bool,
) -> Tensor | None:
    """What `Kernels.lora_back` computes, in PyTorch's operators; a gradient that is None is 0."""
    ranks = [len(b) for b in factors.B]
    of_h = torch.zeros_like(h)
    for gradient, h_i, of_h_i, b, of_b, more in zip(
        gradients, h.split(ranks, 1), of_h.split(ranks, 1), factors.B, found.B, again, strict=True
    ):
        if gradient is not None:
            torch.mm(gradient, b.T, out=of_h_i)
            torch.addmm(of_b, h_i.T, gradient, beta=int(more), out=of_b)
    if not any(again):
        torch.mm(of_h.T, x, out=found.A)
    else:
        for of_a, of_h_i, more in zip(found.A.split(ranks), of_h.split(ranks, 1), again, strict=True):
            torch.addmm(of_a, of_h_i.T, x, beta=int(more), out=of_a)
    return of_h @ factors.A if wants_x else None


class _Frozen:
    """A linear without LoRA whose weight is not trained, such as most heads."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.product = FrozenWeight(self.weight, True)

    @property
    def weight(self) -> Tensor:
        """W as (out, in)."""
        weight: Tensor = self.module.weight
        return weight.T if _is_conv1d(type(self.module)) else weight

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is one that gains by it."""
        plain = type(module) is nn.Linear or _is_conv1d(type(module))
        weight = cast("Tensor | None", module._parameters.get("weight"))
        return plain and (can_order(weight) or kernels_for(weight) is not None)

    def is_usable(self) -> bool:
        """Whether it is what it was."""
        plain = self.takes(self.module) and "forward" not in self.module.__dict__
        parameters = list(self.module.parameters())
        return plain and not any(p.requires_grad or p.dtype != self.weight.dtype for p in parameters)

    def begin(self) -> None:
        """Takes the weight as it is now."""
        self.product = self.product.now(self.weight)

    def run(self, x: Tensor) -> Tensor:
        """Returns its output."""
        usual = x.dtype == self.module.weight.dtype and not torch.is_autocast_enabled(x.device.type)
        if not usual or x.is_inference() or x.dim() < 2 or not x.numel():
            return cast(Tensor, type(self.module).forward(self.module, x))
        return cast(Tensor, _Product.apply(x, self.product, self.module.bias))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """``x W^T + bias`` for x (..., in), where nothing but x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.shape = weight, x.shape
        return weight.times(x.reshape(-1, x.shape[-1]), bias=bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows = gradient.reshape(-1, gradient.shape[-1])
        return cast(FrozenWeight, ctx.weight).back(rows).view(ctx.shape), None, None


def _bias(layer: LoRALinear) -> Tensor | None:
    return cast("Tensor | None", layer.bias)


def _wants_copies(weight: Tensor) -> bool:
    return can_order(weight) and kernels_for(weight) is None


def _weight(layer: LoRALinear) -> Tensor:
    """W as (out, in)."""
    return layer.base_weight.T if layer.fan_in_fan_out else layer.base_weight
