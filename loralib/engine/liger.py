"""Head and loss in Liger's fused kernel, where liger-kernel is installed: it reads a chunk's logits once.

Liger has one target per hidden state and no weights.  A packed row may predict several tokens from one state, and one
token for several examples that share it: such states are repeated, which is exact.  Liger waits for the device twice
per batch on its own account.
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
        """Returns whether a head is a plain frozen linear layer; whether the model adds to it has to be tried."""
        if type(head) is not nn.Linear:
            return False
        hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
        return not any(hooks) and not any(parameter.requires_grad for parameter in head.parameters())

    def is_usable(self) -> bool:
        """Returns whether the head is still what it was."""
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
        """Computes what `head_loss` does.

        Args:
            states: (R, D) hidden states.
            predictions: see `head_loss`.
            count: the sum of their weights.
            gradient_scale: see `head_loss`.
            label_smoothing: see `head_loss`.
        """
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        # How many rows come out is known here, so that nobody has to ask the device.
        repeats = predictions.weights.long()
        rows, targets = (
            torch.repeat_interleave(each, repeats, output_size=count)
            for each in (predictions.rows, predictions.targets)
        )
        compute = LigerFusedLinearCrossEntropyLoss(reduction="sum", label_smoothing=label_smoothing)
        loss = cast(Tensor, compute(self._head.weight, states.index_select(0, rows), targets, self._head.bias))
        scale = 1.0 if gradient_scale is None else gradient_scale
        return HeadLoss(loss.detach(), loss * scale)
