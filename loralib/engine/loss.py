"""The head and its loss, chunk by chunk: logits are never held whole, and the same pass makes the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.packing import Pack

__all__ = ["head_loss"]

_BLOCK = 16  # rows of logits that stay in a core's cache while loss and gradient are made from them


def head_loss(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    pack: Pack,
    *,
    gradient_scale: float | None,
    label_smoothing: float = 0.0,
    chunk: int = 256,
) -> tuple[float, Tensor | None]:
    """Computes the summed loss of a pack's predictions and, in the same pass, its gradient.

    With label smoothing e the loss of one prediction is ``(1 - e) * -log p[target] + e * mean over v of -log p[v]``.

    Args:
        head: hidden states (C, D) to logits (C, V), whatever the model does there (soft-capping, scaling, LoRA).  It
            runs under autograd, so that its own trainable parameters get their gradients.
        states: (R, D) the hidden states at `pack.states`.
        pack: which state predicts what, and with which weight.
        gradient_scale: the gradient is that of gradient_scale * loss; None: no gradient.
        label_smoothing: e, from 0 to below 1.
        chunk: how many states go through the head at once.

    Returns:
        The loss, and its gradient in `states` (None if not wanted, or if nothing below the head is trained).
    """
    leaf = states.detach()
    total = torch.zeros((), device=leaf.device)
    gradient = torch.empty_like(leaf) if gradient_scale is not None and states.requires_grad else None
    weight_of_state = torch.zeros(len(leaf), device=leaf.device).index_add_(0, pack.rows, pack.weights)
    first_row = torch.searchsorted(pack.rows, torch.arange(0, len(leaf) + chunk, chunk, device=leaf.device)).tolist()
    for number, start in enumerate(range(0, len(leaf), chunk)):
        part = leaf[start : start + chunk]
        mine = slice(first_row[number], first_row[number + 1])
        rows, targets, weights = pack.rows[mine] - start, pack.targets[mine], pack.weights[mine]
        state_weights = weight_of_state[start : start + chunk]
        with torch.set_grad_enabled(gradient_scale is not None):
            part.requires_grad_(gradient is not None)
            logits = head(part)
        grad = torch.empty_like(logits) if logits.requires_grad else None
        for first in range(0, len(part), _BLOCK):
            block = slice(first, first + _BLOCK)
            of = slice(*torch.searchsorted(rows, torch.tensor([first, first + _BLOCK], device=rows.device)).tolist())
            loss, slope = _loss_and_slope(
                logits.detach()[block],
                rows[of] - first,
                targets[of],
                weights[of],
                state_weights[block],
                label_smoothing,
                1.0 if gradient_scale is None else gradient_scale,
            )
            total += loss
            if grad is not None:
                grad[block] = slope
        if grad is not None:
            torch.autograd.backward(logits, grad)
        if gradient is not None:
            assert part.grad is not None
            gradient[start : start + chunk] = part.grad
    return float(total), gradient


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
    if not bool(torch.isfinite(log_p).all()):  # a probability that underflows: seldom, so not paid for always
        log_p = torch.log_softmax(wide, -1)[rows, targets]
    loss = -(1 - label_smoothing) * torch.dot(log_p, weights)
    # d loss / d logits = weight * (p - (1 - e) * onehot - e / V), made where p was.
    if label_smoothing:
        loss -= label_smoothing * torch.dot(torch.log_softmax(wide, -1).mean(-1), state_weights)
        slope -= label_smoothing / slope.shape[-1]
    slope *= state_weights[:, None] * scale
    slope.index_put_((rows, targets), weights * ((label_smoothing - 1) * scale), accumulate=True)
    return loss, slope
