"""Converts biases of B (PEFT's lora_bias) to biases of layers, as what they add does not depend on the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..combine import depends_on_base, update_of
from ..errors import AdapterError, MergeError, list_faults
from ..layers import is_conv1d

__all__ = ["BIAS", "add_biases", "biases_of_B", "fields_for"]

BIAS = ".lora_B.bias"  # suffix of such a tensor's name


def biases_of_B(adapter: Adapter) -> dict[str, Tensor]:
    """Returns what the biases of B add to modules' outputs, in fp32."""
    modules = [name.removesuffix(BIAS) for name in adapter.tensors if name.endswith(BIAS)]
    if modules and depends_on_base(adapter):
        raise AdapterError(
            "lora_bias together with DoRA or a changed base: PEFT defines no such adapter; copy it again"
        )
    return {name: update_of(adapter, name).scaling * adapter.tensors[name + BIAS].float() for name in modules}


def fields_for(model: nn.Module, biases: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Returns which config fields of a model add biases to layers that lack them, with these layers' names.

    Raises:
        MergeError: the model cannot hold such a bias; from_pretrained would drop it.
    """
    config = getattr(model, "config", None)
    modules = dict(model.named_modules())
    faults = [f"{name}: the model has no such module" for name in biases if name not in modules]
    without = [name for name in biases if name in modules and getattr(modules[name], "bias", None) is None]
    needed = dict[str, list[str]]()
    for name in without if config is not None else ():
        leaf = name.rpartition(".")[2]
        field = next(
            (f for f, leaves in _BIAS_FIELDS.items() if leaf in leaves and getattr(config, f, None) is False), None
        )
        if field is None:
            faults.append(f"{name}: {type(model).__name__} has no bias in this module, and no setting to add one")
        else:
            needed[field] = [each for each in modules if each.rpartition(".")[2] in _BIAS_FIELDS[field]]
    if faults:
        raise MergeError(
            list_faults(
                "biases of B (lora_bias) cannot be merged",
                faults,
                "PEFT can apply such an adapter without merging: PeftModel.from_pretrained(base, DIRECTORY).",
            )
        )
    return needed


# Settings of transformers' models that add biases to layers.
_BIAS_FIELDS: Mapping[str, tuple[str, ...]] = {
    "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
}


def add_biases(model: nn.Module, biases: Mapping[str, Tensor], fields: Mapping[str, list[str]]) -> None:
    """Adds biases to the layers of a model; `fields` is the result of `fields_for`."""
    for field, names in fields.items():
        setattr(cast(Any, model).config, field, True)
        for name in names:  # layers without an update get zeros, since the setting affects all of them
            biases = {**biases, name: biases.get(name, torch.zeros(()))}
    for name, value in biases.items():
        layer: Any = model.get_submodule(name)
        weight, old = layer.weight, getattr(layer, "bias", None)
        size = layer.weight.shape[1] if is_conv1d(layer) else layer.weight.shape[0]
        total = value.to(weight.device).expand(size) + (0 if old is None else old.detach().float())
        layer._parameters["bias"] = nn.Parameter(total.to(weight.dtype), requires_grad=False)
