"""Optimisers and learning-rate schedules: the standard ones and those of the LoRA paper's code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..injection import adapted_layers
from ..layers import LoRAEmbedding
from .config import TrainConfig

__all__ = ["lr_factor", "make_optimizer", "parameter_groups", "reaches_peak"]


def lr_factor(config: TrainConfig, update: int, updates: int) -> float:
    """Returns the learning rate of an update, numbered from 0, as a fraction of its peak.

    The standard schedules never spend an update on a rate of 0; the paper's warm-up starts at 0, and its cosine does
    not account for the warm-up.

    >>> [round(lr_factor(TrainConfig(warmup_steps=2), update, 6), 2) for update in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup, ticks = config.warmup_steps or 0, _ticks(config)
    step, total = (update + 1) * ticks - 1, updates * ticks
    paper = config.arithmetic == "paper"
    if step < warmup:
        return (step if paper else step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine" and paper:
        return 0.5 * (1 + math.cos(math.pi * step / total))
    left = max(0.0, (total - step) / max(1, total - warmup))
    return left if config.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def reaches_peak(config: TrainConfig, updates: int) -> bool:
    """Whether a run with this many updates reaches the peak learning rate."""
    return (config.warmup_steps or 0) <= updates * _ticks(config)


def _ticks(config: TrainConfig) -> int:
    """How often the schedule advances per update: the paper's code does so for every batch."""
    return config.grad_accum if config.arithmetic == "paper" else 1


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups the trained parameters (those with ``requires_grad``) by peak learning rate, which is stored as "peak".

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B starts at zero and should learn `loraplus_lr_ratio` times faster than
    A.  For embeddings it is A that starts at zero, and B is random, so their factors keep the common rate.
    """
    layers = [] if config.loraplus_lr_ratio == 1 else adapted_layers(model)
    fast = [
        tensor
        for _, layer in layers
        if not isinstance(layer, LoRAEmbedding)
        for name, tensor in layer.trained_tensors().items()
        if name in layer.output_factors and tensor.requires_grad
    ]
    fast_ids = {id(tensor) for tensor in fast}
    common = [p for p in model.parameters() if p.requires_grad and id(p) not in fast_ids]
    groups = [
        {"params": common, "peak": config.peak_lr},
        {"params": fast, "peak": config.peak_lr * config.loraplus_lr_ratio},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: Sequence[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """Creates AdamW: torch's fused version or the paper's."""
    common: dict[str, Any] = {
        "lr": config.peak_lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    if config.arithmetic == "paper":
        return PaperAdamW(groups, {**common, "correct_bias": config.correct_bias})
    return torch.optim.AdamW(groups, fused=True, **common)


class PaperAdamW(torch.optim.Optimizer):
    """AdamW with the arithmetic of the LoRA paper's code.

    It differs from torch's: eps is added to sqrt(v) before bias correction, weight decay is applied after the Adam
    update (with the scheduled rate), and bias correction can be disabled.  For gradient g at update t:

        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
        p = p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
        p = p - lr * weight_decay * p
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Applies one update to every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                t = int(state["step"])
                state["exp_avg"].mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                rate = group["lr"]
                if group["correct_bias"]:
                    rate *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
                parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate)
                if group["weight_decay"]:
                    parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
