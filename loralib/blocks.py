"""Checks that the equal blocks of a fused projection, from which `enable_lora` chooses, match how the model splits it.

GPT-2's projection holds query, key and value one after the other.  GPT-NeoX, BLOOM and Falcon interleave them by head,
and with grouped-query attention they differ in size: a third of such outputs is not the query, key or value but a part
of each.  The model itself can tell: attention over a single token returns the value unchanged, whatever query and key
are, so the outputs of the projection that affect the result are the values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .modes import evaluating
from .targets import TargetModule

__all__ = ["mixed_blocks"]

_TEXTS = 8  # sequences, each of one token


def mixed_blocks(model: nn.Module, targets: Sequence[TargetModule]) -> list[str]:
    """Finds partly adapted fused projections whose equal blocks do not match how the model splits them.

    Models that do not accept ``input_ids`` cannot be tested and are assumed to match.

    Returns:
        One sentence for each mismatch.
    """
    partial = [target for target in targets if target.blocks is not None and not all(target.blocks)]
    if not partial or not hasattr(model, "config"):
        return []
    faults = []
    for target, used in zip(partial, _used_outputs(model, [target.module for target in partial]), strict=True):
        blocks = target.blocks or ()
        shares = [float(block.float().mean()) for block in used.chunk(len(blocks))] if used is not None else []
        if any(0.1 < share < 0.9 for share in shares):
            faults.append(
                f"{target.name}: enable_lora takes {len(blocks)} equal blocks for query, key and value, but "
                f"{type(model).__name__} arranges its outputs by head, or in unequal parts: the values are "
                f"{', '.join(f'{share:.0%}' for share in shares)} of the blocks. Adapt the whole module, without "
                "enable_lora"
            )
    return faults


def _used_outputs(model: nn.Module, modules: Sequence[nn.Module]) -> list[Tensor | None]:
    """Returns, for each module, a mask of its outputs (out,) that affect the model's result on single tokens."""
    leaves: dict[nn.Module, Tensor] = {}

    def cut(module: nn.Module, _: object, output: Tensor) -> Tensor:
        leaves[module] = output.detach().requires_grad_()
        return leaves[module]

    hooks = [module.register_forward_hook(cut) for module in modules]
    try:
        device = next(model.parameters()).device
        ids = torch.arange(3, 3 + _TEXTS, device=device)[:, None] % getattr(model.config, "vocab_size", 3 + _TEXTS)
        with evaluating(model.modules()), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            result: Tensor = model(input_ids=ids)[0]
            loss = result.float().pow(2).sum()
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    except Exception:  # the model needs other inputs, or has no values (on "meta")
        return [None] * len(modules)
    finally:
        for hook in hooks:
            hook.remove()
    found = dict(zip(leaves, gradients, strict=True))
    return [None if (g := found.get(module)) is None else _above_noise(g) for module in modules]


def _above_noise(gradient: Tensor) -> Tensor | None:
    sizes = gradient.float().abs().flatten(0, -2).amax(0)
    return sizes > 1e-3 * sizes.max() if sizes.max() > 0 else None
