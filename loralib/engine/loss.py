"""The head and its loss, chunk by chunk: logits are never held whole, and the same pass makes the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Predictions", "head_loss"]

_BLOCK = 16  # rows of logits that stay in a core's cache while loss and gradient are made from them


class Predictions(NamedTuple):
    """What is predicted from which hidden state; all on the CPU.

    Attributes:
        rows: (N,) which of the states makes the prediction, ascending.
        targets: (N,) the token id to predict.
        weights: (N,) how often it counts, float32.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor


def head_loss(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    predictions: Predictions,
    *,
    gradient_scale: float | None,
    label_smoothing: float = 0.0,
    chunk: int = 256,
) -> tuple[Tensor, Tensor | None]:
    """Computes the summed loss of predictions and, in the same pass, its gradient.

    With label smoothing e the loss of one prediction is ``(1 - e) * -log p[target] + e * mean over v of -log p[v]``.

    Args:
        head: hidden states (C, D) to logits (C, V), whatever the model does there (soft-capping, scaling, LoRA).  It
            runs under autograd, so that its own trainable parameters get their gradients.
        states: (R, D) the hidden states that predict something.
        predictions: which state predicts what, and with which weight.
        gradient_scale: the gradient is that of gradient_scale * loss; None: no gradient.
        label_smoothing: e, from 0 to below 1.
        chunk: how many states go through the head at once.

    Returns:
        The loss () on the states' device, and its gradient in `states` (None if not wanted, or if nothing below the
        head is trained).
    """
    leaf, device = states.detach(), states.device
    total = torch.zeros((), device=device)
    gradient = torch.empty_like(leaf) if gradient_scale is not None and states.requires_grad else None
    starts = range(0, len(leaf), chunk)
    bounds = _bounds(predictions.rows, [*starts, len(leaf)])  # on the CPU: nothing has to wait for the device
    weight_of_state = torch.zeros(len(leaf)).index_add_(0, predictions.rows, predictions.weights).to(device)
    rows, targets, weights = (x.to(device) for x in predictions)
    # On the CPU a block's logits stay in cache; elsewhere each operator takes a whole chunk.
    block = _BLOCK if device.type == "cpu" else chunk
    for number, start in enumerate(starts):
        part = leaf[start : start + chunk]
        mine = slice(bounds[number], bounds[number + 1])
        with torch.set_grad_enabled(gradient_scale is not None):
            part.requires_grad_(gradient is not None)
            logits = head(part)
        grad = torch.empty_like(logits) if logits.requires_grad else None
        firsts = range(0, len(part), block)
        inner = _bounds(predictions.rows[mine], [start + first for first in (*firsts, len(part))])
        for place, first in enumerate(firsts):
            of = slice(mine.start + inner[place], mine.start + inner[place + 1])
            loss, slope = _loss_and_slope(
                logits.detach()[first : first + block],
                rows[of] - (start + first),
                targets[of],
                weights[of],
                weight_of_state[start + first : start + first + block][: len(part) - first],
                label_smoothing,
                1.0 if gradient_scale is None else gradient_scale,
            )
            total += loss
            if grad is not None:
                grad[first : first + block] = slope
        if grad is not None:
            torch.autograd.backward(logits, grad)
        if gradient is not None:
            assert part.grad is not None
            gradient[start : start + chunk] = part.grad
    return total, gradient


def _bounds(rows: Tensor, limits: list[int]) -> list[int]:
    """Returns where in the ascending `rows` each limit is reached."""
    places: list[int] = torch.searchsorted(rows, torch.tensor(limits)).tolist()
    return places


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
    slope = torch.softmax(wide, -1)
    log_p = slope[rows, targets].log_()
    # Underflow is rare, so on the CPU, where checking is free, log_softmax is only computed when it is needed.
    if wide.device.type != "cpu" or not bool(torch.isfinite(log_p).all()):
        log_p = torch.log_softmax(wide, -1)[rows, targets]
    loss = -(1 - label_smoothing) * torch.dot(log_p, weights)
    # d loss / d logits = weight * (p - (1 - e) * onehot - e / V), made where p was.
    if label_smoothing:
        loss -= label_smoothing * torch.dot(torch.log_softmax(wide, -1).mean(-1), state_weights)
        slope -= label_smoothing / slope.shape[-1]
    slope *= state_weights[:, None] * scale
    slope.index_put_((rows, targets), weights * ((label_smoothing - 1) * scale), accumulate=True)
    return loss, slope
