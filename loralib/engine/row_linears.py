"""Many adapters over one base in a training step: each row of a pass belongs to a run that has its own factors.

The rows x (T, in) of a pass are ordered by run.  With x_k the rows of run k,

    y = x W^T + bias + [x_k A_k^T (scaling_k B_k)^T for each run k, stacked vertically]

so that all runs share one product with the base weight, and each run's low-rank path is a slice.  In the backward pass,
with g the gradient of y and u_k = g_k scaling_k B_k, the gradient of x is ``g W + [u_k A_k]``, and those of the factors
are ``u_k^T x_k`` and ``scaling_k g_k^T h_k``.  No row of a run meets another run's factors.  What a variant does after
the products (DoRA's scale, a bias of B), and dropout before them, applies to the rows of its run as well.  As in
`adapted_linears.py`, layers that read the same input are computed together, and all runs' factors are cast at once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..delta import low_rank
from ..errors import UnsupportedModelError
from ..injection import adapted_layers
from ..layers import LoRALinear
from ..wrapping import output_head
from .adapted_linears import GroupProducts, LinearGroup, PendingOutputs, groups_of, has_factors, is_frozen, record_call
from .cast_factors import GroupFactors, cast_factors
from .frozen_linear import FrozenLinear, FrozenWeight, weight_of
from .placement import Overrides, own_forward
from .scaled_outputs import finished

__all__ = ["RowLinears", "why_not_shared"]


def why_not_shared(model: nn.Module) -> str:
    """Returns why an adapted model cannot share training passes with others, or "" if it can."""
    layers = adapted_layers(model)
    head = output_head(model)
    in_layers = {id(tensor) for _, layer in layers for tensor in layer.trained_tensors().values()}
    if any(p.requires_grad and id(p) not in in_layers for p in model.parameters()):
        return "weights of the base are trained too"
    for name, layer in layers:
        if not (has_factors(layer) and is_frozen(layer)):
            return f"{name} is not just a linear layer with LoRA"
        if layer.lora_dropout and layer.lora_A.device.type != "cpu":
            return "dropout draws random numbers from the device's generator, of which there is only one"
        if layer is head:
            return f"{name}, the head, is adapted"
    return ""


class RowLinears:
    """The linear layers of a base on which several adapters train; the counterpart of `TrainingLinears`.

    Args:
        base: the model without an adapter; the adapted ones are twins that share its weights.
        twins: the adapted models, one per run.
        fast: whether to use the CPU engine; otherwise PyTorch's operators only, following the formula of `LoRALinear`.

    Attributes:
        modules: the modules that may be overridden.
        prepacked_bytes: 0: weights are not copied.
        rows: number of rows of each run in the pass; None: only the base is computed.
        random: the generator of each run, for dropout.
    """

    prepacked_bytes = 0

    def __init__(self, base: nn.Module, twins: Sequence[nn.Module], *, fast: bool) -> None:
        self._layers: dict[nn.Module, list[LoRALinear | None]] = {}  # each run's layer in place of a linear layer
        self._names: dict[nn.Module, str] = {}
        for number, twin in enumerate(twins):
            for name, layer in adapted_layers(twin):
                module = base.get_submodule(name)
                self._names[module] = name
                self._layers.setdefault(module, [None] * len(twins))[number] = cast(LoRALinear, layer)
        self._fast = {module for module in self._layers if fast and FrozenLinear.accepts(module)}
        self._others: Overrides = {}
        if fast:
            frozen = (m for m in base.modules() if m not in self._layers and FrozenLinear.accepts(m))
            self._others = {m: FrozenLinear(m, prepack=False) for m in frozen}
        self.modules: list[nn.Module] = [*self._layers, *self._others]
        self.rows: Sequence[int] | None = None
        self.random: Sequence[torch.Generator] = []
        self._together: list[list[nn.Module]] = [[module] for module in self._layers]

    @functools.cached_property
    def _groups(self) -> list[_RowGroup]:
        """The groups, created for the first pass because they allocate buffers for the factors of all runs."""
        return [
            _RowGroup(
                modules,
                [self._names[module] for module in modules],
                [self._layers[module] for module in modules],
                fast=self._fast.issuperset(modules),
            )
            for modules in self._together
        ]

    @contextmanager
    def finding_groups(self) -> Iterator[Overrides]:
        """Yields overrides that record which layers read the same tensor; run a pass through the model inside."""
        calls: list[tuple[nn.Module, Tensor]] = []
        yield {module: functools.partial(record_call, calls, module) for module in self._fast}
        groups = groups_of(calls)
        called = {module for group in groups for module in group}
        self._together = [*groups, *([module] for module in self._layers if module not in called)]

    @contextmanager
    def ready(self) -> Iterator[Overrides]:
        """Yields the overrides for one pass, forward and backward."""
        if self.rows is None:
            yield self._others
            return
        overrides = dict(self._others)
        factors: list[GroupFactors] = []
        for group in self._groups:
            factors += group.begin(self.rows, self.random)
            overrides.update({module: functools.partial(group.run, at) for at, module in enumerate(group.layers)})
        try:
            with cast_factors(factors):
                yield overrides
        finally:
            for group in self._groups:
                group.pending = PendingOutputs()


class _RowGroup(LinearGroup[nn.Module]):
    """Linear layers of the base that read the same input, with the runs' adapted layers that replace them.

    Args:
        modules: the base's linear layers.
        names: the name of each.
        layers: for each, the runs' layers that replace it.
        fast: as for `RowLinears`.
    """

    def __init__(
        self, modules: list[nn.Module], names: list[str], layers: list[list[LoRALinear | None]], *, fast: bool
    ) -> None:
        super().__init__(modules)
        self._names, self._of_runs, self._fast = names, layers, fast
        self._rows: Sequence[int] = []
        self._random: Sequence[torch.Generator] = []
        weights = [weight_of(module) for module in modules] if fast else []
        self._runs = [GroupFactors(own, weights) for own in zip(*layers, strict=True)] if fast else []
        self._products = GroupProducts([FrozenWeight(weight, prepack=False) for weight in weights])

    def begin(self, rows: Sequence[int], random: Sequence[torch.Generator]) -> list[GroupFactors]:
        """Sets each run's number of rows in the next pass, and its generator; returns the factors of runs with rows."""
        self._rows, self._random = rows, random
        if not self._fast:
            return []
        runs = [run for run, count in zip(self._runs, rows, strict=True) if count]
        biases = [cast("Tensor | None", module._parameters.get("bias")) for module in self.layers]
        self._products.begin(list(map(weight_of, self.layers)), biases, runs, [count for count in rows if count])
        return runs

    def _is_ready(self) -> bool:
        return self._fast

    def _alone(self, number: int, x: Tensor) -> Tensor:
        y = own_forward(self.layers[number], x)
        ys, outputs = y.reshape(-1, y.shape[-1]).split(list(self._rows)), []
        for run, part in enumerate(self._checked(x, number).split(list(self._rows))):
            layer = self._of_runs[number][run]
            if layer is None or not len(part):
                outputs.append(ys[run])
                continue
            update = low_rank(self._drop(number, run, part), *layer.factors(), layer.scaling)
            outputs.append(layer.finished(ys[run] + update.to(y.dtype)))
        return torch.cat(outputs).view_as(y)

    def _finished(self, number: int, output: Tensor, x: Tensor) -> Tensor:
        runs = [(layer, count) for layer, count in zip(self._of_runs[number], self._rows, strict=True) if count]
        output = finished([layer for layer, _ in runs], output, [count for _, count in runs])
        return super()._finished(number, output, x)

    def _dropped(self, number: int, x: Tensor) -> Tensor | None:
        if not self.layers[number].training or not any(map(_drops, itertools.chain(*self._of_runs))):
            return None
        parts = self._checked(x, number).split(list(self._rows))
        return torch.cat([self._drop(number, run, part) for run, part in enumerate(parts)]).view(x.shape)

    def _drop(self, number: int, run: int, rows: Tensor) -> Tensor:
        """Returns rows of a run after dropout, with the mask that `functional.dropout` draws in a run by itself."""
        layer = self._of_runs[number][run]
        if not _drops(layer) or not self.layers[number].training or not len(rows):
            return rows
        kept = 1 - cast(LoRALinear, layer).lora_dropout
        return rows * torch.empty_like(rows).bernoulli_(kept, generator=self._random[run]).div_(kept)

    def _outputs(self, x: Tensor, dropped: Tensor | None, numbers: tuple[int, ...]) -> Sequence[Tensor]:
        self._checked(x, numbers[0])
        return self._products.outputs(x, dropped, numbers)

    def _checked(self, x: Tensor, number: int) -> Tensor:
        """Returns x (T, in), after checking that its rows are those of the pass.

        Raises:
            UnsupportedModelError: it has a different number of rows.
        """
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != sum(self._rows):
            raise UnsupportedModelError(
                f"{self._names[number]} computes {len(flat)} rows, but the pass has {sum(self._rows)}, so runs cannot "
                "be told apart there. Leave it out of target_modules, or train the runs one by one."
            )
        return flat


def _drops(layer: LoRALinear | None) -> bool:
    return layer is not None and layer.lora_dropout > 0
