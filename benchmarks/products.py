"""The floor under a training step: the products of a base's frozen weights with the rows of a batch, both ways."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from loralib.engine.frozen_linear import FrozenWeight

__all__ = ["seconds_of_products"]


def seconds_of_products(base: nn.Module, tokens: int, predictions: int) -> float:
    """Returns the seconds that a step's products with the base's weights take on their own; no step can be faster.

    Args:
        base: a model in bf16, without an adapter.
        tokens: rows that pass through the body.
        predictions: rows that pass through the head.
    """
    head: Any = base.get_output_embeddings()  # type: ignore[operator]
    linears = [(module, tokens) for module in base.modules() if type(module) is nn.Linear and module is not head]
    return sum(_best(module, rows) for module, rows in [*linears, (head, predictions)])


def _best(module: nn.Linear, rows: int) -> float:
    weight = FrozenWeight(module.weight, prepack=False)
    out, width = weight.weight.shape
    x, gradient = torch.randn(rows, width).bfloat16(), torch.randn(rows, out).bfloat16()
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        weight.times(x)
        weight.times_transposed(gradient)
        best = min(best, time.perf_counter() - started)
    return best
