"""Bases quantised by GPTQ or AWQ, read from their safetensors files without the libraries that wrote them.

Both store ``W = (q - zero) * scale``, with a zero and a scale for each group of an output's inputs.  With 4 bits this
is the format of `Q4Weight`, so values do not change; if inputs are grouped in another order (GPTQ's ``desc_act``), or
the number of bits differs, weights are dequantised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..console import counted
from ..delta import dense
from ..errors import BaseModelError, list_faults
from ..injection import samples_of
from ..layers import is_conv1d
from .quant import GGUF_BLOCK, Q4Weight, pack_nibbles, quantize, quantize_model
from .quantized_reading import UNQUANTIZED, finish_reading, replacing, stored_quantization
from .sharded import empty_model, read_whole, stored_tensors

__all__ = ["packing_of", "read_packed"]

_INTS: Final = 32  # size in bits of the integers that codes are packed into
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # which of the integer's 8 outputs each 4 bits hold
_TENSORS: Final = ("qweight", "qzeros", "scales", "g_idx")


def packing_of(path: Path) -> dict[str, Any] | None:
    """Returns the quantization_config if GPTQ or AWQ packed the model in a directory; None for other models."""
    config = stored_quantization(path)
    return config if config is not None and config.get("quant_method") in ("gptq", "awq") else None


def read_packed(
    path: Path, name: str, packing: Mapping[str, Any], dtype: torch.dtype, kind: str | None
) -> tuple[Any, str]:
    """Reads a causal language model that was packed by GPTQ or AWQ.

    Args:
        path: the directory.
        name: the model's name, for messages.
        packing: see `packing_of`.
        dtype: dtype of unpacked weights, and of the results of matrix products.
        kind: one of `loralib.bases.quant.KINDS`: requantise the packed numbers to it; None: keep them.

    Returns:
        The model, and a summary for the user.

    Raises:
        BaseModelError: its packing is not supported, or it is incomplete.
    """
    _check(packing, name)
    stored = stored_tensors(path)
    packed = {key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")}
    if not packed:
        raise BaseModelError(
            f"{name} claims to be packed by {packing['quant_method']}, but no safetensors file contains packed weights"
        )
    done, faults = Counter[str](), list[BaseModelError]()

    def unpacked(module: str) -> Tensor:
        parts = {each: read_whole(stored[key]) for each in _TENSORS if (key := f"{module}.{each}") in stored}
        try:
            weight = _unpacked(parts, packing, dtype, module)
        except BaseModelError as error:  # transformers would replace the message by its own
            faults.append(error)
            raise
        done["kept" if isinstance(weight, Q4Weight) and kind is None and module in layers else "dense"] += 1
        return weight

    def weight_of(module: str) -> Tensor:
        weight = unpacked(module)
        if kind is not None:
            weight = quantize(dense(weight), kind)
        return weight.T if is_conv1d(layers[module]) else weight

    empty = empty_model(path, dtype)
    vars(empty.config).pop("quantization_config", None)
    # Experts are packed one by one, and transformers stacks them: it needs their numbers. So do names of other models.
    layers = {name: module for name, module in empty.named_modules() if name in packed}
    state = {key: read_whole(place) for key, place in stored.items() if key.rpartition(".")[0] not in packed}
    state |= {f"{module}.weight": _placeholder(layers[module]) for module in layers}
    state |= {f"{module}.weight": dense(unpacked(module)) for module in sorted(packed - layers.keys())}
    state |= {key: read_whole(stored[key]) for module in packed if (key := f"{module}.bias") in stored}
    try:
        model, info = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            **replacing({f"{module}.weight": module for module in layers}, weight_of),
        )
    except Exception as error:
        raise (faults[0] if faults else error) from None
    finish_reading(model)
    if kind is not None:
        quantize_model(model, kind)
    others = [f"missing     {each}" for each in sorted(info["missing_keys"])]
    others += [f"unexpected  {each}" for each in sorted(info["unexpected_keys"])]
    if others:
        raise BaseModelError(
            list_faults(f"{name} does not contain what {type(model).__name__} needs", others, UNQUANTIZED)
        )
    said = [f"{counted(done['kept'], 'weight')} kept in 4 bits"] * (done["kept"] > 0)
    otherwise = "dequantised" if kind is None else f"converted to {kind}"
    said += [f"{counted(done['dense'], 'weight')} {otherwise}"] * (done["dense"] > 0)
    return model, f"{name} was quantised by {packing['quant_method'].upper()}: {', '.join(said)}"


def _check(packing: Mapping[str, Any], name: str) -> None:
    """Refuses unsupported kinds of packing."""
    method, bits = packing["quant_method"], packing.get("bits", packing.get("w_bit", 4))
    form = packing.get("checkpoint_format", "gptq") if method == "gptq" else packing.get("version", "gemm")
    known = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm", "GEMM")}[method]
    if bits not in ((2, 4, 8) if method == "gptq" else (4,)) or form not in known:
        raise BaseModelError(
            f"{name} was quantised by {method} to {bits!r} bits as {form!r}, which loralib does not read. {UNQUANTIZED}"
        )


def _placeholder(layer: Any) -> Tensor:
    """Returns a tensor with the shape of a layer's weight that takes no memory."""
    return torch.zeros(()).expand(layer.weight.shape)


def _unpacked(parts: Mapping[str, Tensor], packing: Mapping[str, Any], dtype: torch.dtype, module: str) -> Tensor:
    """Returns the weight (out, in) of a linear layer: kept in 4 bits, or dense."""
    try:
        codes, zeros, groups = (_gptq if packing["quant_method"] == "gptq" else _awq)(parts, packing)
        scales = parts["scales"].T.contiguous()  # (out, groups)
        width = codes.shape[1]
        size = -(-width // scales.shape[1])  # size of a group
        in_order = torch.equal(groups, torch.arange(width) // size)
        if int(packing.get("bits", 4)) == 4 and in_order and not size % GGUF_BLOCK and scales.dtype == torch.float16:
            return _kept(codes, zeros, scales, size, dtype)
        of_group = scales.float()[:, groups]
        return ((codes - zeros[:, groups].float()) * of_group).to(dtype)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise BaseModelError(
            f"{module}: its packed tensors do not match each other ({error}). {UNQUANTIZED}"
        ) from error


def _kept(codes: Tensor, zeros: Tensor, scales: Tensor, size: int, dtype: torch.dtype) -> Q4Weight:
    blocks = size // GGUF_BLOCK
    shared = scales.repeat_interleave(blocks // (blocks & -blocks), 1).view(-1)  # by a power of two of blocks each
    parts = {
        "codes": pack_nibbles(codes),
        "scales": shared,
        "minima": -shared,
        "scale_codes": torch.empty(0, dtype=torch.uint8),
        "minimum_codes": zeros.to(torch.uint8).repeat_interleave(blocks, 1).view(-1),
    }
    weight = Q4Weight(parts, codes.shape, dtype, False, torch.empty(0))
    weight.samples = samples_of(weight.dense()).clone()
    return weight


_Codes = tuple[Tensor, Tensor, Tensor]  # codes (out, in), zeros (out, groups), and the group of each input


def _gptq(parts: Mapping[str, Tensor], packing: Mapping[str, Any]) -> _Codes:
    """Each integer holds codes of consecutive inputs, or zeros of consecutive outputs, the first in the lowest bits.

    The original format stores each zero minus one.
    """
    bits = int(packing.get("bits", 4))
    codes = _fields(parts["qweight"].T.contiguous(), bits)
    zeros = _fields(parts["qzeros"], bits).T + (packing.get("checkpoint_format", "gptq") == "gptq")
    width, groups = codes.shape[1], zeros.shape[1]
    order = parts.get("g_idx", torch.arange(width) // -(-width // groups)).long()
    return codes, zeros, order


def _awq(parts: Mapping[str, Tensor], packing: Mapping[str, Any]) -> _Codes:
    """Each integer holds codes or zeros of 8 outputs, those with even numbers first."""
    places = torch.tensor(_AWQ_ORDER).argsort()
    codes, zeros = (_fields(parts[name], 4).unflatten(1, (-1, 8))[..., places].flatten(1).T for name in _TENSORS[:2])
    codes = codes.contiguous()
    return codes, zeros, torch.arange(codes.shape[1]) // -(-codes.shape[1] // zeros.shape[1])


def _fields(numbers: Tensor, bits: int) -> Tensor:
    """Splits 32-bit integers (n, m) into fields, lowest bits first: (n, m * 32 / bits) bytes."""
    shifts = torch.arange(0, _INTS, bits, dtype=torch.int32)
    fields: Tensor = numbers[..., None] >> shifts & 2**bits - 1
    return fields.to(torch.uint8).flatten(1)
