"""Quantising a base while reading it, and bases quantised by other tools.

Each weight is quantised as transformers reads it, so the whole model never exists in memory in 16 bits.  This uses
transformers' extension point: a quantizer registered under a name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from ..console import counted
from ..errors import BaseModelError, first_line
from . import bnb
from .quant import (
    QuantizedWeight,
    is_quantized_table,
    is_turned,
    quantize,
    quantize_model,
    quantize_table,
    quantized_weights,
)

__all__ = [
    "UNQUANTIZED",
    "finish_reading",
    "method_of",
    "quantizing",
    "replacing",
    "stored_quantization",
    "take_over",
    "way_out",
]

_NAME = "loralib"
# The way out for a base that was quantised in a way that cannot be read.
UNQUANTIZED: Final = "Use the model that it was made from, with --quantize nf4 or int8."


def quantizing(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns arguments for ``from_pretrained`` that make it quantise weights while reading them.

    Args:
        kind: one of `loralib.bases.quant.KINDS`.
        dtype: dtype of the weights before quantisation.
    """
    tables = set[str]()

    def made(name: str, value: Tensor, module: nn.Module) -> Tensor:
        weight = value.to(dtype)
        return quantize_table(weight) if name in tables else quantize(weight, kind, turned=is_turned(module))

    def wanted(name: str, model: nn.Module) -> bool:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and is_quantized_table(module, model, kind):
            tables.add(name)
        return name in tables or leaf in quantized_weights(path, module, model)

    return {"quantization_config": _config_class()(wanted, made)}


def replacing(modules: Mapping[str, str], weight_of: Callable[[str], Tensor]) -> dict[str, Any]:
    """Returns arguments for ``from_pretrained`` that make it take some weights from elsewhere.

    Args:
        modules: maps parameter names to the argument for `weight_of`.
        weight_of: returns the weight for such an argument.
    """

    def made(name: str, value: Tensor, module: nn.Module) -> Tensor:
        return weight_of(modules[name])

    return {"quantization_config": _config_class()(lambda name, model: name in modules, made)}


def finish_reading(model: Any) -> None:
    """Makes transformers treat a model that was read this way as an ordinary one.

    Weights that keep their dtype are copied: as views of the file they would keep all of it in memory.
    """
    for parameter in model.parameters():
        if not isinstance(parameter, QuantizedWeight) and parameter.device.type == "cpu":
            parameter.data = parameter.detach().clone()
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    vars(model).pop("_weight_conversions", None)  # save_pretrained would undo how the weights were read
    for module in model.modules():
        vars(getattr(module, "config", model.config)).pop("_is_quantized", None)


def stored_quantization(path: Path) -> dict[str, Any] | None:
    """Returns the quantization_config of a model in a directory that another tool quantised; None for other models."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        found = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
        if not found and (old := path / "quantize_config.json").is_file():  # early releases of AutoGPTQ
            found = {"quant_method": "gptq", **json.loads(old.read_text(encoding="utf-8"))}
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def method_of(stored: Mapping[str, Any]) -> str:
    """Returns the name of the method in a quantization_config; old ones of bitsandbytes do not give it."""
    named = stored.get("quant_method")
    return str(named) if named else "bitsandbytes" if any(key.startswith("load_in_") for key in stored) else "unknown"


def way_out(stored: Mapping[str, Any]) -> str:
    """Returns what to do about a base with this quantization_config that cannot be read."""
    return f"It was quantised by another tool (quant_method {method_of(stored)!r}). {UNQUANTIZED}"


def take_over(model: Any, name: str, method: str, dtype: torch.dtype, kind: str | None = None) -> str:
    """Converts a base that another tool quantised to plain linear layers, still quantised if the format is supported.

    Args:
        model: as read by transformers.
        name: the base's name, for messages.
        method: see `method_of`.
        dtype: dtype of its weights; transformers may have kept the one that the base was saved in.
        kind: one of `loralib.bases.quant.KINDS`: convert the weights to it; None: keep them.

    Returns:
        A summary for the user.

    Raises:
        BaseModelError: neither loralib nor transformers can dequantise its weights.
    """
    if method == "bitsandbytes":
        kept, dense = bnb.take_over(model, dtype)
        made = f"; {counted(dense, 'weight')} of another kind dequantised" if dense else ""
        said = f"{counted(kept, 'weight')} kept as they are{made}"
    else:
        _dequantize(model, name, method)
        said = "its weights are now dense and take as much memory as those of an unquantised model"
    finish_reading(model)
    for parameter in model.parameters():
        if not isinstance(parameter, QuantizedWeight) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if kind is not None:
        said = f"{counted(quantize_model(model, kind), 'weight')} converted to {kind}"
    return f"{name} was quantised by {method}: {said}"


def _dequantize(model: Any, name: str, method: str) -> None:
    if not getattr(model, "is_quantized", False):
        return  # transformers has done it while reading, as for FP8 and MXFP4 where there is no GPU
    try:
        model.dequantize()
    except Exception as error:
        raise BaseModelError(
            f"{name} was quantised by {method}, and transformers cannot dequantise it: {first_line(error)}. "
            f"{UNQUANTIZED}"
        ) from error


@functools.cache
def _config_class() -> Any:
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Quantize(ConversionOps):
        def __init__(self, config: Any) -> None:
            self.config = config

        def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
            found = {}
            for name, value in input_dict.items():
                module = model.get_submodule(name.rpartition(".")[0])
                weight = self.config.made(name, value[0] if isinstance(value, list) else value, module)
                found[name] = nn.Parameter(weight, requires_grad=False)
            return found

    class Quantizer(HfQuantizer):
        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return bool(cast(Any, self.quantization_config).wanted(param_name, model))

        def get_quantize_ops(self) -> Any:
            return Quantize(self.quantization_config)

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    class Config(QuantizationConfigMixin):
        def __init__(self, wanted: Callable[..., bool], made: Callable[..., Tensor]) -> None:
            self.quant_method, self.wanted, self.made = cast(Any, _NAME), wanted, made

    register_quantization_config(_NAME)(Config)
    register_quantizer(_NAME)(Quantizer)
    return Config
