"""The head and its loss, chunk by chunk: logits are never held whole, and the same pass makes the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .transfer import to_device

__all__ = ["HeadLoss", "Predictions", "head_loss", "in_blocks"]

_BLOCK = 16  # rows of logits that stay in a core's cache while loss and gradient are made from them


class Predictions(NamedTuple):
    """What is predicted from which hidden state.

    Attributes:
        rows: (N,) which of the states makes the prediction, ascending.
        targets: (N,) the token id to predict.
        weights: (N,) how often it counts, float32.
        state_weights: (R,) the sum of the weights of each state.
        cpu_rows: `rows` on the CPU, so that nothing has to wait for a device.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor
    state_weights: Tensor
    cpu_rows: Tensor

    @classmethod
    def of(cls, rows: Tensor, targets: Tensor, weights: Tensor, states: int, device: torch.device) -> Predictions:
        """Returns predictions on a device; call it before the forward pass, so that copies do not wait for that.

        Args:
            rows: see the attributes; on the CPU, as targets and weights.
            targets: see the attributes.
            weights: see the attributes.
            states: R, the number of hidden states.
            device: that of the states.
        """
        state_weights = torch.zeros(states).index_add_(0, rows, weights)
        there = [to_device(each, device) for each in (rows, targets, weights, state_weights)]
        return cls(there[0], there[1], there[2], there[3], rows)


class HeadLoss(NamedTuple):
    """What `head_loss` returns.

    Attributes:
        total: () the summed loss, without a gradient.
        objective: () gradient_scale times that, whose `backward` hands on the gradients that were made with it.
    """

    total: Tensor
    objective: Tensor


def in_blocks(logits: Tensor) -> bool:
    """Returns whether a chunk's logits are worked on in blocks that stay in cache, as on CPUs, or as a whole."""
    return logits.device.type == "cpu"


def head_loss(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    predictions: Predictions,
    *,
    gradient_scale: float | None,
    label_smoothing: float = 0.0,
    chunk: int = 256,
) -> HeadLoss:
    """Computes the summed loss of predictions and, in the same pass, its gradient.

    With label smoothing e the loss of one prediction is ``(1 - e) * -log p[target] + e * mean over v of -log p[v]``.

    Args:
        head: hidden states (C, D) to logits (C, V), whatever the model does there (soft-capping, scaling, LoRA).
        states: (R, D) the hidden states that predict something.
        predictions: which state predicts what, and with which weight.
        gradient_scale: the gradient is that of gradient_scale * loss; None: no gradient.
        label_smoothing: e, from 0 to below 1.
        chunk: how many states go through the head at once.

    Returns:
        The loss, and what to differentiate: in the states, and in all parameters that the head trains.
    """
    gradients = _Gradients(states) if gradient_scale is not None else None
    total = torch.zeros((), device=states.device)
    scale = 1.0 if gradient_scale is None else gradient_scale
    for start in range(0, len(states), chunk):
        part = states.detach()[start : start + chunk]
        with torch.set_grad_enabled(gradients is not None):
            logits = head(part.requires_grad_(gradients is not None and states.requires_grad))
        loss, slope = _chunk_loss(logits, predictions, start, label_smoothing, scale)
        total += loss
        if gradients is not None and slope is not None:
            gradients.add(start, part, logits, slope)
    objective = total if gradients is None else gradients.attached_to(total * scale)
    return HeadLoss(total, objective)


def _chunk_loss(
    logits: Tensor, predictions: Predictions, start: int, label_smoothing: float, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Returns the loss of logits (C, V) of the states from `start` on, and the gradient of scale * loss in them."""
    rows, targets, weights, state_weights, cpu_rows = predictions
    block = _BLOCK if in_blocks(logits) else len(logits)
    starts = range(start, start + len(logits), block)
    limits = torch.tensor([*starts, start + len(logits)])
    bounds: list[int] = torch.searchsorted(cpu_rows, limits).tolist()
    total, slope = torch.zeros((), device=logits.device), torch.empty_like(logits) if logits.requires_grad else None
    for first, begin, end in zip(starts, bounds, bounds[1:], strict=False):
        here = slice(first - start, first - start + block)
        loss, of_block = _loss_and_slope(
            logits.detach()[here],
            rows[begin:end] - first,
            targets[begin:end],
            weights[begin:end],
            state_weights[first : min(first + block, start + len(logits))],
            label_smoothing,
            scale,
        )
        total += loss
        if slope is not None:
            slope[here] = of_block
    return total, slope


class _Gradients:
    """Gradients of the loss in hidden states and in what the head trains, added up over chunks.

    They enter the backward pass of the whole model as those of one node: autograd accumulates each parameter once a
    step, as hooks, DDP and optimisers in the backward pass expect.
    """

    def __init__(self, states: Tensor) -> None:
        self._states = states
        self._of_states = torch.empty_like(states) if states.requires_grad else None
        self._of_leaves: dict[Tensor, Tensor] = {}

    def add(self, start: int, part: Tensor, logits: Tensor, slope: Tensor) -> None:
        """Adds those of one chunk: its states (C, D), their logits (C, V), and the gradient in these."""
        leaves = _leaves(logits, part)
        inputs = [part, *leaves] if part.requires_grad else leaves
        results = list(torch.autograd.grad(logits, inputs, slope))
        if self._of_states is not None:
            self._of_states[start : start + len(part)] = results.pop(0)
        for leaf, gradient in zip(leaves, results, strict=True):
            self._of_leaves[leaf] = self._of_leaves[leaf] + gradient if leaf in self._of_leaves else gradient

    def attached_to(self, objective: Tensor) -> Tensor:
        """Returns the objective () as a function of the states and the head's parameters."""
        inputs = [*([] if self._of_states is None else [self._states]), *self._of_leaves]
        gradients = [*([] if self._of_states is None else [self._of_states]), *self._of_leaves.values()]
        result: Tensor = _Attached.apply(objective, gradients, *inputs)  # type: ignore[no-untyped-call]
        return result


class _Attached(torch.autograd.Function):
    """A value whose gradients in some tensors are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(known * gradient for known in ctx.gradients)


def _leaves(logits: Tensor, part: Tensor) -> list[Tensor]:
    """Returns the trained tensors that logits were made of, but for the hidden states themselves."""
    leaves: dict[Tensor, None] = {}
    nodes, seen = [logits.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of a node that accumulates a gradient
        if leaf is not None and leaf is not part:
            leaves[leaf] = None
        nodes += [child for child, _ in node.next_functions]
    return list(leaves)


def _loss_and_slope(
    logits: Tensor,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor,
    state_weights: Tensor,
    label_smoothing: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns the loss of some rows of logits, and the gradient of scale * loss in them, (C, V), in fp32."""
    wide = logits.float()
    if in_blocks(logits):
        slope = torch.softmax(wide, -1)
        log_p = slope[rows, targets].log_()
        if not bool(torch.isfinite(log_p).all()):  # underflow, which is rare
            log_p = torch.log_softmax(wide, -1)[rows, targets]
    else:  # a device is not asked: what cannot underflow comes first
        slope = torch.log_softmax(wide, -1)
        log_p = slope[rows, targets]
        slope.exp_()
    loss = -(1 - label_smoothing) * torch.dot(log_p, weights)
    # d loss / d logits = weight * (p - (1 - e) * onehot - e / V), made where p was.
    if label_smoothing:
        loss -= label_smoothing * torch.dot(torch.log_softmax(wide, -1).mean(-1), state_weights)
        slope -= label_smoothing / slope.shape[-1]
    slope *= state_weights[:, None] * scale
    slope.index_put_((rows, targets), weights * ((label_smoothing - 1) * scale), accumulate=True)
    return loss, slope
