"""The head and its loss, chunk by chunk: the full logits are never stored, and gradients come from the same pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .transfer import to_device

__all__ = ["HeadLoss", "Predictions", "head_log_probs", "head_loss", "in_blocks"]

_BLOCK = 16  # rows of logits that fit into a core's cache while their loss and gradient are computed


class Predictions(NamedTuple):
    """Which tokens are predicted from which hidden states.

    Attributes:
        rows: (N,) index of the state that makes each prediction, ascending.
        targets: (N,) the token id to predict.
        weights: (N,) weight of the prediction, float32.
        state_weights: (R,) the sum of the weights of each state's predictions.
        cpu_rows: `rows` on the CPU, which avoids waiting for a device.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor
    state_weights: Tensor
    cpu_rows: Tensor

    @classmethod
    def of(cls, rows: Tensor, targets: Tensor, weights: Tensor, states: int, device: torch.device) -> Predictions:
        """Returns predictions on a device; call it before the forward pass, so that copies do not wait for it.

        Args:
            rows: see the attributes; on the CPU, like targets and weights.
            targets: see the attributes.
            weights: see the attributes.
            states: R, the number of hidden states.
            device: the device of the states.
        """
        state_weights = torch.zeros(states).index_add_(0, rows, weights)
        there = [to_device(each, device) for each in (rows, targets, weights, state_weights)]
        return cls(there[0], there[1], there[2], there[3], rows)


class HeadLoss(NamedTuple):
    """The result of `head_loss`.

    Attributes:
        total: () the summed loss, without a gradient.
        objective: () gradient_scale times the total, whose `backward` passes on the gradients already computed.
        state_losses: (R,) the loss of each state's predictions; None if it is not known separately.
    """

    total: Tensor
    objective: Tensor
    state_losses: Tensor | None = None


def in_blocks(logits: Tensor) -> bool:
    """Returns whether a chunk's logits are processed in blocks that stay in cache, as on CPUs, not as a whole."""
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
        head: maps hidden states (C, D) to logits (C, V), including soft-capping, scaling or LoRA.
        states: (R, D) the hidden states that make predictions.
        predictions: which states predict which tokens, and with which weights.
        gradient_scale: the gradient of gradient_scale * loss is computed; None: no gradient.
        label_smoothing: e, from 0 to below 1.
        chunk: number of states that go through the head at once.

    Returns:
        The loss, and an objective differentiable in the states and in all parameters trained in the head.
    """
    gradients = _Gradients(states) if gradient_scale is not None else None
    state_losses = torch.empty(len(states), device=states.device)
    scale = 1.0 if gradient_scale is None else gradient_scale
    for start in range(0, len(states), chunk):
        part = states.detach()[start : start + chunk]
        with torch.set_grad_enabled(gradients is not None):
            logits = head(part.requires_grad_(gradients is not None and states.requires_grad))
        state_losses[start : start + chunk], slope = _chunk_loss(logits, predictions, start, label_smoothing, scale)
        if gradients is not None and slope is not None:
            gradients.add(start, part, logits, slope)
    total = state_losses.sum()
    objective = total if gradients is None else gradients.attached_to(total * scale)
    return HeadLoss(total, objective, state_losses)


def head_log_probs(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, *, chunk: int = 256) -> Tensor:
    """Returns the log-probability (N,) of one target after each state, for objectives that are functions of these.

    The gradient of log p in a state is a scalar, known only in the backward pass, times onehot - p propagated through
    the head.  The latter is computed here, in the same pass, so that the full logits are never stored, nor recomputed
    (unless the head itself is trained).

    Args:
        head: see `head_loss`.
        states: (N, D) hidden states; a state that predicts several tokens is repeated for each of them.
        targets: (N,) the token ids to predict.
        chunk: number of states that go through the head at once.
    """
    needs_gradient = torch.is_grad_enabled()
    found, leaves = states.new_empty(len(states), dtype=torch.float32), dict[Tensor, None]()
    grad_states = torch.empty_like(states) if needs_gradient and states.requires_grad else None
    for start in range(0, len(states), chunk):
        part, here = states.detach()[start : start + chunk], slice(start, start + chunk)
        with torch.set_grad_enabled(needs_gradient):
            logits = head(part.requires_grad_(grad_states is not None))
        found[here], slope = _chunk_log_probs(logits, targets[here])
        if slope is not None:
            leaves |= dict.fromkeys(_leaves(logits, part))
        if slope is not None and grad_states is not None and not leaves:
            (grad_states[here],) = torch.autograd.grad(logits, part, slope)
    if not needs_gradient:
        return found
    recompute = _HeadRecompute(head, states, targets, chunk) if leaves else None
    result: Tensor = _LogProbs.apply(found, grad_states, recompute, states, *leaves)  # type: ignore[no-untyped-call]
    return result


def _chunk_log_probs(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Returns log p (C,) of the targets in logits (C, V), and the gradient of weights * log p in the logits (C, V)."""
    slope = torch.empty_like(logits) if logits.requires_grad else None
    found = torch.empty(len(logits), device=logits.device)
    block = _BLOCK if in_blocks(logits) else max(1, len(logits))
    for start in range(0, len(logits), block):
        here = slice(start, start + block)
        wanted = targets[here]
        rows = torch.arange(len(wanted), device=logits.device)
        p, found[here] = _probabilities(logits.detach()[here], rows, wanted)
        if slope is not None:
            p.neg_()[rows, wanted] += 1
            slope[here] = p if weights is None else p * weights[here, None]
    return found, slope


class _HeadRecompute(NamedTuple):
    """Runs a trained head a second time, once the weight of each log-probability is known."""

    head: Callable[[Tensor], Tensor]
    states: Tensor
    targets: Tensor
    chunk: int

    def gradients(self, weights: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the weighted sum in the states and in the head's trained tensors."""
        made = _Gradients(self.states)
        for start in range(0, len(self.states), self.chunk):
            here = slice(start, start + self.chunk)
            with torch.enable_grad():
                part = self.states.detach()[here].requires_grad_(self.states.requires_grad)
                logits = self.head(part)
            _, slope = _chunk_log_probs(logits, self.targets[here], weights[here])
            assert slope is not None
            made.add(start, part, logits, slope)
        return made.grad_states, *(made.grad_leaves.get(leaf) for leaf in leaves)


class _LogProbs(torch.autograd.Function):
    """Log-probabilities whose gradients in the states are known up to a factor for each."""

    @staticmethod
    def forward(
        ctx: Any,
        found: Tensor,
        grad_states: Tensor | None,
        recompute: _HeadRecompute | None,
        states: Tensor,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.grad_states, ctx.recompute, ctx.leaves = grad_states, recompute, leaves
        return found.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.recompute is not None:
            return None, None, None, *ctx.recompute.gradients(weights, ctx.leaves)
        grad_states = ctx.grad_states
        return None, None, None, None if grad_states is None else grad_states * weights[:, None].to(grad_states.dtype)


def _chunk_loss(
    logits: Tensor, predictions: Predictions, start: int, label_smoothing: float, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Returns the losses (C,) of logits (C, V) of the states from `start` on, and the gradient of scale * their sum."""
    rows, targets, weights, state_weights, cpu_rows = predictions
    block = _BLOCK if in_blocks(logits) else len(logits)
    starts = range(start, start + len(logits), block)
    limits = torch.tensor([*starts, start + len(logits)])
    bounds: list[int] = torch.searchsorted(cpu_rows, limits).tolist()
    losses = torch.empty(len(logits), device=logits.device)
    slope = torch.empty_like(logits) if logits.requires_grad else None
    for first, begin, end in zip(starts, bounds, bounds[1:], strict=False):
        here = slice(first - start, first - start + block)
        losses[here], of_block = _loss_and_slope(
            logits.detach()[here],
            rows[begin:end] - first,
            targets[begin:end],
            weights[begin:end],
            state_weights[first : min(first + block, start + len(logits))],
            label_smoothing,
            scale,
        )
        if slope is not None:
            slope[here] = of_block
    return losses, slope


class _Gradients:
    """Gradients of the loss in hidden states and in the head's trained tensors, summed over chunks.

    They enter the model's backward pass as one node, so that autograd accumulates each parameter's gradient once per
    step, as required by hooks, DDP and optimisers that run in the backward pass.
    """

    def __init__(self, states: Tensor) -> None:
        self._states = states
        self.grad_states = torch.empty_like(states) if states.requires_grad else None
        self.grad_leaves: dict[Tensor, Tensor] = {}

    def add(self, start: int, part: Tensor, logits: Tensor, slope: Tensor) -> None:
        """Adds the gradients of one chunk: its states (C, D), their logits (C, V), and the gradient in the logits."""
        leaves = _leaves(logits, part)
        inputs = [part, *leaves] if part.requires_grad else leaves
        results = list(torch.autograd.grad(logits, inputs, slope))
        if self.grad_states is not None:
            self.grad_states[start : start + len(part)] = results.pop(0)
        for leaf, gradient in zip(leaves, results, strict=True):
            self.grad_leaves[leaf] = self.grad_leaves[leaf] + gradient if leaf in self.grad_leaves else gradient

    def attached_to(self, objective: Tensor) -> Tensor:
        """Returns the objective () as a function of the states and the head's parameters."""
        inputs = [*([] if self.grad_states is None else [self._states]), *self.grad_leaves]
        gradients = [*([] if self.grad_states is None else [self.grad_states]), *self.grad_leaves.values()]
        result: Tensor = _Attached.apply(objective, gradients, *inputs)  # type: ignore[no-untyped-call]
        return result


class _Attached(torch.autograd.Function):
    """A value whose gradients in some tensors are already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(known * gradient for known in ctx.gradients)


def _leaves(logits: Tensor, part: Tensor) -> list[Tensor]:
    """Returns the trained tensors that logits depend on, except for the hidden states themselves."""
    leaves: dict[Tensor, None] = {}
    nodes, seen = [logits.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # set on nodes that accumulate a gradient
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
    """Returns the losses of some rows of logits (C, V), and the gradient of scale * their sum (C, V), in fp32."""
    slope, log_p = _probabilities(logits, rows, targets)
    losses = torch.zeros(len(logits), device=logits.device)
    losses.index_add_(0, rows, log_p * weights, alpha=label_smoothing - 1)
    # d loss / d logits = weight * (p - (1 - e) * onehot - e / V), computed in place of p.
    if label_smoothing:
        losses -= label_smoothing * torch.log_softmax(logits.float(), -1).mean(-1) * state_weights
        slope -= label_smoothing / slope.shape[-1]
    slope *= state_weights[:, None] * scale
    slope.index_put_((rows, targets), weights * ((label_smoothing - 1) * scale), accumulate=True)
    return losses, slope


def _probabilities(logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the probabilities (C, V) of logits, in fp32, and the logarithms of some of them (N,)."""
    wide = logits.float()
    if in_blocks(logits):
        p = torch.softmax(wide, -1)
        log_p = p[rows, targets].log_()
        if not bool(torch.isfinite(log_p).all()):  # underflow, which is rare
            log_p = torch.log_softmax(wide, -1)[rows, targets]
    else:  # checking for underflow would wait for the device, so the log-softmax comes first
        p = torch.log_softmax(wide, -1)
        log_p = p[rows, targets]
        p.exp_()
    return p, log_p
