"""Head and loss in Liger's fused kernel, if liger-kernel is installed: it reads a chunk's logits once.

Liger supports one target per hidden state, and no weights.  In a packed row, one state may predict several tokens, and
a token may count for several examples that share it: such states are repeated, which is exact.  Liger itself
synchronises with the device twice per batch.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn

from .loss import HeadLoss, Predictions

__all__ = ["LigerLoss", "has_liger"]


@functools.cache
def has_liger() -> bool:
    """Returns whether liger-kernel is installed, and triton, without which it cannot be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))


class LigerLoss:
    """The loss of a model whose head is a plain product with a frozen weight.

    Args:
        head: the model's output embeddings.
    """

    def __init__(self, head: nn.Linear) -> None:
        self._head = head

    @staticmethod
    def accepts(head: Any) -> bool:
        """Returns whether a head is a plain frozen linear layer; whether its output is modified must be tested."""
        if type(head) is not nn.Linear:
            return False
        hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
        return not any(hooks) and not any(parameter.requires_grad for parameter in head.parameters())

    def is_usable(self) -> bool:
        """Returns whether the head is unchanged."""
        return self.accepts(self._head)

    def __call__(
        self,
        states: Tensor,
        predictions: Predictions,
        count: int,
        *,
        gradient_scale: float | None,
        label_smoothing: float = 0.0,
    ) -> HeadLoss:
        """Computes the same loss as `head_loss`.

        Args:
            states: (R, D) hidden states.
            predictions: see `head_loss`.
            count: the sum of the predictions' weights.
            gradient_scale: see `head_loss`.
            label_smoothing: see `head_loss`.
        """
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        # The number of rows is known here, which avoids synchronising with the device.
        repeats = predictions.weights.long()
        rows, targets = (
            torch.repeat_interleave(each, repeats, output_size=count)
            for each in (predictions.rows, predictions.targets)
        )
        compute = LigerFusedLinearCrossEntropyLoss(reduction="sum", label_smoothing=label_smoothing)
        loss = cast(Tensor, compute(self._head.weight, states.index_select(0, rows), targets, self._head.bias))
        scale = 1.0 if gradient_scale is None else gradient_scale
        return HeadLoss(loss.detach(), loss * scale)
