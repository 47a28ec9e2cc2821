"""GGUF LoRA files: the adapters that llama.cpp and what is built on it read.

The file says one alpha for all modules; llama.cpp scales each update by alpha / rank, with the rank that the tensors
have.  Modules carry llama.cpp's names (``blk.0.attn_q``), so a base model is needed to translate.  Llama's rotary
embedding takes the rows of q and k in another order there than in transformers; so their B is reordered.

The reader trusts no number in a file before it has compared it with the file's size.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import BASE, Adapter, with_ranks
from ..combine import check_sound, factors
from ..config import LoraConfig
from ..errors import AdapterError, FormatError, MissingDependencyError, list_faults
from ..files import write_whole
from .tensors import check_names, read_bytes

__all__ = ["gguf_names", "is_gguf", "parse_gguf", "read_gguf", "write_gguf"]

_TYPE, _ADAPTER, _ALPHA, _ARCHITECTURE = "general.type", "adapter.type", "adapter.lora.alpha", "general.architecture"


@dataclass(frozen=True)
class _Family:
    """How llama.cpp lays out a kind of model.

    Attributes:
        architecture: its name there.
        reordered: whether the rows of q_proj and k_proj are in another order than in transformers.
    """

    architecture: str
    reordered: bool = False


# transformers' model_type -> layout; each is compared with llama.cpp's own logits in the tests.
_FAMILIES: Mapping[str, _Family] = {
    "gemma2": _Family("gemma2"),
    "gemma3_text": _Family("gemma3"),
    "gpt2": _Family("gpt2"),
    "llama": _Family("llama", reordered=True),
    "mistral": _Family("llama", reordered=True),
    "phi3": _Family("phi3"),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3"),
}


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Tells whether a file begins like a GGUF file."""
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def gguf_names(model: nn.Module) -> dict[str, str]:
    """Returns llama.cpp's names of the modules of a model that it applies adapters to.

    Args:
        model: a causal language model of transformers; its weights are not looked at.

    Raises:
        AdapterError: the layout of this kind of model is not known.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError("GGUF files need the package gguf: pip install gguf") from error
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if kind not in _FAMILIES:
        raise AdapterError(
            f"the layout of {kind or type(model).__name__} in llama.cpp is not known here, only that of "
            f"{', '.join(_FAMILIES)}. Write the portable PEFT directory (--target peft) and give that to llama.cpp's "
            "convert_lora_to_gguf.py."
        )
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    config: Any = model.config
    table = gguf.get_tensor_name_map(numbers[_FAMILIES[kind].architecture], config.num_hidden_layers)
    names = {}
    for name, module in model.named_modules():
        # Position embeddings are looked up past the adapter.
        if hasattr(module, "weight") and (found := table.get_name(name)) and found != "position_embd":
            names[name] = found
    return names


def write_gguf(
    adapter: Adapter, path: str | os.PathLike[str], model: nn.Module, *, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a GGUF LoRA file.

    Args:
        adapter: a portable one (`loralib.formats.portable`): one alpha, linear layers and embeddings only.
        path: the file.
        model: the base, for its names and numbers of heads.
        dtype: of the tensors: fp32, fp16 or bf16.

    Raises:
        AdapterError: the adapter cannot be expressed in the format, or the model's layout is not known.
        OutputError: the file cannot be written.
    """
    check_sound(adapter)
    names = gguf_names(model)
    import gguf

    config = adapter.config
    faults = [f"{name}: no place for it in llama.cpp" for name in adapter.modules if name not in names]
    if config.use_rslora or config.alpha_pattern or config.enable_lora or config.use_dora or config.changes_base:
        faults.append("the scaling is not one alpha over the rank of each module")
    if faults:
        raise AdapterError(list_faults("the adapter cannot be written as GGUF", faults, "Make it portable first."))
    stored: dict[str, Tensor] = {}
    for name in adapter.modules:
        A, B = factors(adapter, name)
        if f"{name}.lora_A" not in adapter.tensors:
            A = A.T  # llama.cpp looks rows of A up, as it does with the embedding itself
        else:
            B = _reordered(B, _heads(model, name), there=True)
        stored[f"{names[name]}.weight.lora_a"], stored[f"{names[name]}.weight.lora_b"] = A, B
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    kind = gguf.GGMLQuantizationType[kinds[dtype]]

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, _FAMILIES[model.config.model_type].architecture)  # type: ignore[union-attr,index]
        try:
            writer.add_type("adapter")
            writer.add_string(_ADAPTER, "lora")
            writer.add_float32(_ALPHA, float(config.lora_alpha))
            if BASE in adapter.metadata:
                writer.add_string(BASE, adapter.metadata[BASE])
            for name, tensor in stored.items():
                values = gguf.quants.quantize(tensor.detach().cpu().float().contiguous().numpy(), kind)
                writer.add_tensor(name, values, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    write_whole(path, write)


def read_gguf(path: str | os.PathLike[str], model: nn.Module) -> Adapter:
    """Reads a GGUF LoRA file as a value.

    Args:
        path: the file.
        model: the base, for its names and numbers of heads.

    Raises:
        AdapterError: the adapter is for another kind of model.
        FormatError: the file is corrupt, or no GGUF LoRA.
    """
    fields, stored = read_bytes(path, parse_gguf)
    found = {key: fields.get(key) for key in (_TYPE, _ADAPTER)}
    if found != {_TYPE: "adapter", _ADAPTER: "lora"}:
        raise FormatError(f"{path} is a GGUF file, but no LoRA adapter: it says {found}")
    alpha = fields.get(_ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise FormatError(f"{path}: {_ALPHA} is {alpha!r}, expected a finite number")
    modules = {there: here for here, there in gguf_names(model).items()}
    architecture = _FAMILIES[model.config.model_type].architecture  # type: ignore[union-attr,index]
    if fields.get(_ARCHITECTURE) != architecture:
        raise AdapterError(
            f"{path} is an adapter for the architecture {fields.get(_ARCHITECTURE)!r}, and the base model "
            f"{type(model).__name__} is {architecture!r}; give the base that it was made for"
        )
    tensors: dict[str, Tensor] = {}
    ranks, alphas, faults = dict[str, int](), dict[str, float](), []
    for there in dict.fromkeys(name.rpartition(".")[0] for name in stored):
        name = modules.get(there.removesuffix(".weight"))
        A, B = stored.get(f"{there}.lora_a"), stored.get(f"{there}.lora_b")
        if name is None or A is None or B is None or A.dim() != 2 or B.dim() != 2:
            shapes = {n: tuple(t.shape) for n, t in stored.items() if n.startswith(f"{there}.")}
            faults.append(f"{there}: {shapes}, expected lora_a and lora_b of a module of {type(model).__name__}")
            continue
        kind = "lora_"
        if isinstance(model.get_submodule(name), nn.Embedding):
            kind, A = "lora_embedding_", A.T.contiguous()
        elif _heads(model, name) and B.shape[0] % (2 * _heads(model, name)) == 0:
            B = _reordered(B, _heads(model, name), there=False)
        tensors[f"{name}.{kind}A"], tensors[f"{name}.{kind}B"] = A, B
        # llama.cpp takes no alpha for "scaling 1".
        ranks[name], alphas[name] = A.shape[0], alpha or float(A.shape[0])
    if faults or not tensors:
        raise AdapterError(list_faults(f"{path} does not fit the base model", faults or ["it holds no tensors"]))
    if any(rank < 1 for rank in ranks.values()):
        raise FormatError(f"{path} holds tensors without values")
    config = with_ranks(LoraConfig(target_modules=list(ranks), task_type="CAUSAL_LM"), ranks, alphas)
    base = fields.get(BASE)
    return Adapter(config, tensors, {BASE: base} if isinstance(base, str) else {})


def _heads(model: nn.Module, name: str) -> int:
    """Returns into how many heads the rows of a module must be reordered; 0 for none."""
    config: Any = model.config
    leaf = name.rpartition(".")[2]
    if not _FAMILIES[config.model_type].reordered or leaf not in ("q_proj", "k_proj"):
        return 0
    return int(config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads)


def _reordered(B: Tensor, heads: int, *, there: bool) -> Tensor:
    """Reorders rows: in a head of 2n rows, llama.cpp rotates row 2i with 2i + 1, transformers i with i + n."""
    if not heads:
        return B
    half = B.shape[0] // heads // 2
    split = (heads, 2, half) if there else (heads, half, 2)
    return B.reshape(*split, -1).transpose(1, 2).reshape(B.shape)


# Reading.

_MAGIC, _ARRAY, _STRING = b"GGUF", 9, 8
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_DEPTH = 4  # of arrays in arrays


def parse_gguf(data: bytes | memoryview) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the fields and tensors of a GGUF file (versions 2 and 3, little-endian).

    Args:
        data: the whole file.

    Returns:
        The fields by name; and the tensors by name, quantised ones as fp32.

    Raises:
        FormatError: a number in the file does not fit its size, or a name stands twice.
    """
    reader = _Reader(memoryview(data))
    if bytes(reader.take(4)) != _MAGIC:
        raise FormatError("not a GGUF file: it does not begin with 'GGUF'")
    version = reader.number("<I")
    if version not in (2, 3):
        raise FormatError(f"GGUF version {version}, expected 2 or 3 (little-endian)")
    count, keys = reader.number("<Q"), reader.number("<Q")
    fields: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.string()
        if key in fields:
            raise FormatError(f"the field {key!r} stands twice")
        fields[key] = reader.value(reader.number("<I"))
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise FormatError(f"general.alignment is {alignment!r}, expected a power of two")
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = reader.string()
        if name in places:
            raise FormatError(f"the tensor {name!r} stands twice")
        axes = reader.number("<I")
        if axes > 4:
            raise FormatError(f"{name}: {axes} axes, expected at most 4")
        shape = tuple(reversed([reader.number("<Q") for _ in range(axes)]))
        places[name] = shape, reader.number("<I"), reader.number("<Q")
    check_names([*fields, *places])
    start = -(-reader.at // alignment) * alignment
    spans = []
    for name, (shape, kind, offset) in places.items():
        begin, size = start + offset, _size(name, shape, kind)
        if offset % alignment or begin + size > len(data):
            raise FormatError(f"{name}: {size:,} bytes at {begin:,} do not fit a file of {len(data):,} bytes")
        spans.append((begin, begin + size, name))
    # Before anything is copied: a thousand names for the same bytes would take a thousand times the file's size.
    for (_, end, first), (begin, _, second) in itertools.pairwise(sorted(span for span in spans if span[0] < span[1])):
        if begin < end:
            raise FormatError(f"the tensors {first!r} and {second!r} overlap")
    tensors = {name: _tensor(reader.data[begin:end], *places[name][:2]) for begin, end, name in spans}
    return fields, tensors


class _Reader:
    """Takes values off the front of a file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise FormatError(f"the file ends early: {size:,} bytes are announced at {self.at:,} of {len(self.data):,}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        try:
            return str(self.take(self.number("<Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"a name or text is not UTF-8: {error}") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise FormatError(f"a field of type {kind} at {self.at:,}, which GGUF does not have")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            form = _SCALARS[inner]
            return memoryview(bytes(self.take(count * struct.calcsize(form)))).cast(form[1])  # type: ignore[call-overload]
        # Each further value takes bytes of the file, so that the count cannot run away.
        return [self.value(inner, depth + 1) for _ in range(count)]


def _size(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Returns how many bytes a tensor takes."""
    import gguf

    try:
        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise FormatError(f"{name}: tensors of type {kind} are not known") from error
    if not shape or max(shape) >= 2**40 or shape[-1] % block:
        raise FormatError(f"{name}: shape {shape} is too large, or does not divide into blocks of {block}")
    return math.prod(shape) // block * width


_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
_PLAIN |= {24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64}


def _tensor(data: memoryview, shape: tuple[int, ...], kind: int) -> Tensor:
    if kind in _PLAIN:
        # A copy: the file may go away.
        return torch.frombuffer(bytearray(data) or bytearray(8), dtype=_PLAIN[kind])[: math.prod(shape)].view(shape)
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType(kind)
    packed = np.frombuffer(data, dtype=np.uint8).reshape(gguf.quant_shape_to_byte_shape((*shape,), kind))
    try:
        return torch.from_numpy(gguf.quants.dequantize(packed, kind).reshape(shape).copy())
    except NotImplementedError as error:
        raise FormatError(f"tensors of the type {kind.name} cannot be read") from error
