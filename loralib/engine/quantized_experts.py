"""Quantised experts, each of which is multiplied directly, without dequantising all of them.

transformers multiplies with the weights of all experts at once, which would require the whole stack to be dequantised.
Here each expert's weight is a `FrozenWeight`, whose codes our kernels unpack during the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.quant import QuantizedWeight
from ..delta import grouped_product
from ..errors import TargetError
from ..variants.experts import base_product, expert_weights, experts_forward, stored_as_rows
from .frozen_linear import FrozenWeight, frozen_product
from .placement import Overrides

__all__ = ["expert_overrides"]


def expert_overrides(modules: Iterable[nn.Module]) -> Overrides:
    """Returns overrides for the modules with quantised experts that compute as `experts_forward` does."""
    return {module: _QuantizedExperts(module) for module in modules if _accepts(module)}


def _accepts(module: nn.Module) -> bool:
    held: list[Any] = list(module._parameters.values())
    if not any(isinstance(each, QuantizedWeight) and each.dim() == 3 for each in held):
        return False
    try:
        return bool(expert_weights(module))
    except TargetError:  # they compute in an unsupported way
        return False


class _QuantizedExperts:
    """The forward of a layer's experts, adapted or not."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: dict[str, tuple[Tensor | None, list[FrozenWeight]]] = {}

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self._module, hidden_states, top_k_index, top_k_weights, self._product)

    def _product(self, layer: nn.Module, name: str, x: Tensor, counts: Sequence[int]) -> Tensor:
        stack: Any = layer._parameters[name]
        biases = layer._parameters.get(f"{name}_bias")
        trains_bias = biases is not None and biases.requires_grad and torch.is_grad_enabled()
        usual = isinstance(stack, QuantizedWeight) and x.dtype == stack.dtype  # otherwise merged, or under autocast
        if not usual or trains_bias or torch.is_autocast_enabled(x.device.type):
            return base_product(layer, name, x, counts)
        weights = self._weights_of(layer, name)
        bias_of = [None] * len(weights) if biases is None else biases.unbind()
        width = weights[0].weight.shape[0]
        return grouped_product(x, counts, width, lambda n, rows: frozen_product(rows, weights[n], bias_of[n]))

    def _weights_of(self, layer: nn.Module, name: str) -> list[FrozenWeight]:
        """Returns each expert's weight (out, in), looked up once."""
        seen, weights = self._known.get(name, (None, []))
        if seen is not layer._parameters[name]:
            weights = [FrozenWeight(weight, prepack=False) for weight in stored_as_rows(layer, name).unbind()]
            self._known[name] = layer._parameters[name], weights
        return weights
