"""The two helper functions of Microsoft's loralib."""

from __future__ import annotations

from torch import Tensor, nn

from .delta import dense
from .errors import BiasModeError
from .layers import LoRALayer
from .wrapping import gathered, named_modules, named_parameters, named_tensors

__all__ = ["lora_state_dict", "mark_only_lora_as_trainable"]


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freezes every parameter except LoRA's own and, on request, biases.

    Args:
        model: holds LoRA layers.
        bias: 'none'; 'all' for every parameter with "bias" in its name; 'lora_only' for those of LoRA layers.

    Raises:
        BiasModeError: another value of `bias`.
    """
    chosen = _chosen_names(model, bias, adapted_only=False)
    for name, parameter in named_parameters(model).items():
        parameter.requires_grad_(name in chosen)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Returns the entries of the state dict that make up an adapter.

    Args:
        model: holds LoRA layers.
        bias: 'none'; 'all' adds every parameter with "bias" in its name (never buffers, such as GPT-2's causal mask);
            'lora_only' adds the biases of adapted layers.

    Raises:
        BiasModeError: another value of `bias`.
    """
    chosen = _chosen_names(model, bias, adapted_only=True)
    with gathered(model):
        return {name: dense(value.detach()) for name, value in named_tensors(model).items() if name in chosen}


def _chosen_names(model: nn.Module, bias: str, adapted_only: bool) -> set[str]:
    """Returns the names of LoRA's own tensors and of the requested biases."""
    if bias not in ("none", "all", "lora_only"):
        raise BiasModeError(f"bias is {bias!r}, expected 'none', 'all' or 'lora_only'")
    modules, parameters = named_modules(model, remove_duplicate=False), set(named_parameters(model))
    injected = any("_halves" in type(module).__dict__ for module in modules.values())
    # In a model of Microsoft's layers, every name that contains "lora_" counts as LoRA's, even in a user's own module
    # (Microsoft's rule).  After inject() the tensors are known, and a module of the base may be called lora_head.
    lora = (
        {
            f"{name}.{leaf}" if name else leaf
            for name, module in modules.items()
            if isinstance(module, LoRALayer)
            for leaf in module.trained_tensors()
        }
        if injected
        else {name for name in named_tensors(model) if "lora_" in name}
    )
    if bias == "all":
        return lora | {name for name in parameters if "bias" in name}
    if bias == "none":
        return lora
    # Microsoft's loralib trains the bias of a LoRA layer with r=0 but does not save it.
    return lora | {
        f"{name}.bias" if name else "bias"
        for name, module in modules.items()
        if isinstance(module, LoRALayer)
        and getattr(module, "bias", None) is not None
        and (module.r > 0 or not adapted_only)
    }
