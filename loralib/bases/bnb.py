"""Support for bitsandbytes, in this file only: bases quantised by it, and its fast dequantisation on GPUs.

Its layers are not used: on CPUs with bf16 units, version 0.50 repacks a 4-bit weight at the first evaluation, after
which no gradient passes through it, without any error.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..injection import samples_of
from ..layers import is_conv1d
from .quant import BLOCK, BLOCKS, Int8Weight, NF4Weight, QuantizedWeight, absmax_map, levels

__all__ = ["dequantized", "is_available", "take_over"]


def take_over(model: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    """Replaces the layers that bitsandbytes put into a model with the original layer types, using the same codes.

    NF4 in blocks of 64 with double quantisation, and int8, are kept; FP4 and other block sizes are dequantised.

    Args:
        model: as read by transformers.
        dtype: dtype of its other weights, used by the linear layers as well: the one that bitsandbytes records differs.

    Returns:
        How many weights were kept quantised, and how many were dequantised.
    """
    kept = dense = 0
    for name, module in list(model.named_modules()):
        if not type(module).__module__.startswith("bitsandbytes."):
            continue
        weight = _weight_of(cast(Any, module), dtype)
        kept, dense = kept + isinstance(weight, QuantizedWeight), dense + (not isinstance(weight, QuantizedWeight))
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, _as_before(cast(Any, module), weight))
    return kept, dense


def _weight_of(module: Any, dtype: torch.dtype) -> Tensor:
    """Returns the weight (out, in) of one of its linear layers, still quantised if the format is supported."""
    shape = torch.Size((module.out_features, module.in_features))
    if module.weight.is_floating_point() and module.weight.shape == shape:  # its config says more than its file holds
        return cast(Tensor, module.weight.data).to(dtype)
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        parts = {"codes": module.weight.CB.data, "scales": module.weight.SCB.float() / 127}
        return _with_samples(Int8Weight(parts, shape, dtype, False, torch.empty(0)))
    known = state.quant_type == "nf4" and state.nested and (state.blocksize, state.state2.blocksize) == (BLOCK, BLOCKS)
    if not known:
        return cast(Tensor, _functional().dequantize_4bit(module.weight.data, state)).view(shape).to(dtype)
    parts = {
        "codes": module.weight.data.view(torch.uint8).view(-1),  # bnb_4bit_quant_storage may be another dtype
        "absmax_codes": state.absmax,
        "absmax_scales": state.state2.absmax,
        "offset": state.offset,
    }
    return _with_samples(NF4Weight(parts, shape, dtype, False, torch.empty(0)))


def _with_samples(weight: QuantizedWeight) -> QuantizedWeight:
    """Adds samples of the dequantised weight for fingerprints, since the original weight is not available."""
    weight.samples = samples_of(weight.dense()).clone()
    return weight


def _as_before(module: Any, weight: Tensor) -> nn.Module:
    """Creates a linear layer of the original class; GPT-2's Conv1D stores its weight transposed."""
    source: type[nn.Module] = getattr(module, "source_cls", None) or nn.Linear
    with torch.device("meta"):
        if is_conv1d(source):
            linear: Any = cast(Any, source)(module.out_features, module.in_features)
            weight = weight.T
        else:
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.data, requires_grad=False)
    return cast(nn.Module, linear.train(module.training))


def dequantized(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Returns the dense weight (out, in), using bitsandbytes' kernel."""
    functional = _functional()
    of_absmax = functional.QuantState(
        absmax=weight.absmax_scales, blocksize=BLOCKS, code=absmax_map().to(weight.device), dtype=torch.float32
    )
    state = functional.QuantState(
        absmax=weight.absmax_codes,
        shape=weight.stored_shape,
        code=levels().to(weight.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=weight.offset,
        state2=of_absmax,
    )
    return cast(Tensor, functional.dequantize_4bit(weight.codes.view(-1, 1), state))


@functools.cache
def is_available() -> bool:
    """Whether bitsandbytes is installed."""
    try:
        _functional()
    except ImportError:
        return False
    return True


def _functional() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional
