"""Microsoft's two helper functions."""

from __future__ import annotations

from torch import Tensor, nn

from .errors import BiasModeError
from .layers import LoRALayer

__all__ = ["lora_state_dict", "mark_only_lora_as_trainable"]


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freezes every parameter but LoRA's own and, if asked for, biases.

    Args:
        model: holds LoRA layers.
        bias: 'none'; 'all' for every parameter with "bias" in its name; 'lora_only' for those of LoRA layers.

    Raises:
        BiasModeError: another value of `bias`.
    """
    chosen = _bias_names(model, bias, adapted_only=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name in chosen)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Returns the entries of the state dict that an adapter consists of.

    Args:
        model: holds LoRA layers.
        bias: 'none'; 'all' adds every parameter with "bias" in its name (never buffers, such as GPT-2's causal mask);
            'lora_only' adds the biases of adapted layers.

    Raises:
        BiasModeError: another value of `bias`.
    """
    chosen = _bias_names(model, bias, adapted_only=True)
    return {name: value for name, value in model.state_dict().items() if "lora_" in name or name in chosen}


def _bias_names(model: nn.Module, bias: str, adapted_only: bool) -> set[str]:
    if bias not in ("none", "all", "lora_only"):
        raise BiasModeError(f"bias is {bias!r}, expected 'none', 'all' or 'lora_only'")
    if bias == "all":
        return {name for name, _ in model.named_parameters() if "bias" in name and "lora_" not in name}
    if bias == "none":
        return set()
    # Microsoft trains the bias of a LoRA layer with r=0 but does not save it.
    return {
        f"{name}.bias" if name else "bias"
        for name, module in model.named_modules()
        if isinstance(module, LoRALayer)
        and getattr(module, "bias", None) is not None
        and (module.r > 0 or not adapted_only)
    }
