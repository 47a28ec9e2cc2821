"""GGUF LoRA files: the adapter format of llama.cpp and tools built on it.

A file has a single alpha for all modules; llama.cpp scales each update by alpha / rank, with the tensors' rank. Modules
have llama.cpp's names (``blk.0.attn_q``), whose translation requires the base model.  llama.cpp's rotary embedding
expects the rows of q and k in a different order than transformers, so their B is reordered.

Files are written with the package gguf, but not read with it: its GGUFReader does not check counts against the file
size (49 bytes that announce a list of 2**40 values keep it busy for days, with memory use growing).
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter import BASE, Adapter, kind_of
from ..combine import check_sound, factors, more_than_low_rank
from ..config import LoraConfig, with_ranks
from ..errors import AdapterError, FormatError, MissingDependencyError, list_faults
from ..files import write_whole
from .tensors import check_names, read_bytes

__all__ = ["GGUFTensor", "gguf_header", "gguf_names", "is_gguf", "parse_gguf", "read_gguf", "write_gguf"]

_TYPE, _ADAPTER, _ALPHA, _ARCHITECTURE = "general.type", "adapter.type", "adapter.lora.alpha", "general.architecture"


# transformers' model_type -> llama.cpp's architecture; tests compare each with llama.cpp's own logits.
_ARCHITECTURES: Mapping[str, str] = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Tells whether a file begins like a GGUF file."""
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def gguf_names(model: nn.Module) -> dict[str, str]:
    """Returns llama.cpp's name for each module that it applies adapters to.

    Args:
        model: a causal language model of transformers; its weights are not read.

    Raises:
        AdapterError: this kind of model is not supported.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError("GGUF files need the package gguf: pip install gguf") from error
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if kind not in _ARCHITECTURES:
        raise AdapterError(
            f"GGUF adapters for {kind or type(model).__name__} are not supported, only for "
            f"{', '.join(_ARCHITECTURES)}. Write a portable PEFT directory (--target peft) and convert it with "
            "llama.cpp's convert_lora_to_gguf.py."
        )
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    config: Any = model.config
    table = gguf.get_tensor_name_map(numbers[_ARCHITECTURES[kind]], config.num_hidden_layers)
    names = {}
    for name, module in model.named_modules():
        # llama.cpp ignores adapters for position embeddings.
        if hasattr(module, "weight") and (theirs := table.get_name(name)) and theirs != "position_embd":
            names[name] = theirs
    return names


def write_gguf(
    adapter: Adapter, path: str | os.PathLike[str], model: nn.Module, *, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a GGUF LoRA file.

    Args:
        adapter: portable (see `loralib.formats.portable`): one alpha, linear layers and embeddings only.
        path: the file.
        model: the base, for its names and numbers of heads.
        dtype: dtype of the tensors: fp32, fp16 or bf16.

    Raises:
        AdapterError: the format cannot express the adapter, or this kind of model is not supported.
        OutputError: the file cannot be written.
    """
    check_sound(adapter)
    names = gguf_names(model)
    import gguf

    config = adapter.config
    faults = [
        f"{name}: llama.cpp does not apply adapters to this module" for name in adapter.modules if name not in names
    ]
    if config.use_rslora or config.alpha_pattern or config.enable_lora:
        faults.append("the scaling is not the same alpha divided by each module's rank")
    faults += more_than_low_rank(adapter)
    if faults:
        raise AdapterError(list_faults("the adapter cannot be written as GGUF", faults, "Make it portable first."))
    stored: dict[str, Tensor] = {}
    for name in adapter.modules:
        A, B = factors(adapter, name)
        if f"{name}.lora_A" not in adapter.tensors:
            A = A.T  # llama.cpp looks up rows of A, as in the embedding itself
        else:
            B = reorder_rows(B, permuted_heads(model, name), to_gguf=True)
        stored[f"{names[name]}.weight.lora_a"], stored[f"{names[name]}.weight.lora_b"] = A, B
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    kind = gguf.GGMLQuantizationType[kinds[dtype]]

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURES[model.config.model_type])  # type: ignore[union-attr,index]
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
    """Reads a GGUF LoRA file.

    Args:
        path: the file.
        model: the base, for its names and numbers of heads.

    Raises:
        AdapterError: the adapter is for another kind of model.
        FormatError: the file is corrupt, or not a GGUF LoRA.
    """
    fields, stored = read_bytes(path, parse_gguf)
    kind = {key: fields.get(key) for key in (_TYPE, _ADAPTER)}
    if kind != {_TYPE: "adapter", _ADAPTER: "lora"}:
        raise FormatError(f"{path} is a GGUF file, but not a LoRA adapter: its kind is {kind}")
    alpha = fields.get(_ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise FormatError(f"{path}: {_ALPHA} is {alpha!r}, expected a finite number")
    modules = {theirs: ours for ours, theirs in gguf_names(model).items()}
    architecture = _ARCHITECTURES[model.config.model_type]  # type: ignore[union-attr,index]
    if fields.get(_ARCHITECTURE) != architecture:
        raise AdapterError(
            f"{path} is an adapter for the architecture {fields.get(_ARCHITECTURE)!r}, but the base model "
            f"{type(model).__name__} is {architecture!r}; give the base model that it was trained on"
        )
    tensors: dict[str, Tensor] = {}
    ranks, alphas, faults = dict[str, int](), dict[str, float](), []
    for theirs in dict.fromkeys(name.rpartition(".")[0] for name in stored):
        name = modules.get(theirs.removesuffix(".weight"))
        A, B = stored.get(f"{theirs}.lora_a"), stored.get(f"{theirs}.lora_b")
        if name is None or A is None or B is None or A.dim() != 2 or B.dim() != 2:
            shapes = {n: tuple(t.shape) for n, t in stored.items() if n.startswith(f"{theirs}.")}
            faults.append(f"{theirs}: {shapes}, expected lora_a and lora_b of a module of {type(model).__name__}")
            continue
        key = "lora_"
        if isinstance(model.get_submodule(name), nn.Embedding):
            key, A = "lora_embedding_", A.T.contiguous()
        elif permuted_heads(model, name) and B.shape[0] % (2 * permuted_heads(model, name)) == 0:
            B = reorder_rows(B, permuted_heads(model, name), to_gguf=False)
        tensors[f"{name}.{key}A"], tensors[f"{name}.{key}B"] = A, B
        # In llama.cpp, a missing alpha means a scaling of 1.
        ranks[name], alphas[name] = A.shape[0], alpha or float(A.shape[0])
    if faults or not tensors:
        raise AdapterError(list_faults(f"{path} does not fit the base model", faults or ["it contains no tensors"]))
    if any(rank < 1 for rank in ranks.values()):
        raise FormatError(f"{path} contains empty tensors")
    config = with_ranks(LoraConfig(target_modules=list(ranks), task_type="CAUSAL_LM"), ranks, alphas)
    base = fields.get(BASE)
    return Adapter(config, tensors, kind_of(model) | ({BASE: base} if isinstance(base, str) else {}))


def permuted_heads(model: nn.Module, name: str) -> int:
    """Returns the number of heads whose rows are ordered differently in llama.cpp; 0 if the order is the same."""
    config: Any = model.config
    leaf = name.rpartition(".")[2]
    if _ARCHITECTURES.get(getattr(config, "model_type", "")) != "llama" or leaf not in ("q_proj", "k_proj"):
        return 0
    return int(config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads)


def reorder_rows(B: Tensor, heads: int, *, to_gguf: bool) -> Tensor:
    """Reorders rows: in a head of 2n rows, llama.cpp rotates row 2i with 2i + 1, transformers i with i + n."""
    if not heads:
        return B
    half = B.shape[0] // heads // 2
    split = (heads, 2, half) if to_gguf else (heads, half, 2)
    return B.reshape(*split, -1).transpose(1, 2).reshape(B.shape)


# Reading: no number in a file is trusted before it has been checked against the file size.

_MAGIC, _ARRAY, _STRING = b"GGUF", 9, 8
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


def parse_gguf(data: bytes | memoryview) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the fields and tensors of a GGUF file (versions 2 and 3, little-endian).

    Args:
        data: the whole file.

    Returns:
        The fields by name, with None for lists, which do not matter for adapters; and the tensors by name, dequantised
        to fp32.

    Raises:
        FormatError: a number is inconsistent with the file size, or a name occurs twice.
    """
    fields, stored = gguf_header(data)
    view = memoryview(data)
    return fields, {name: _tensor(view[each.begin : each.end], each.shape, each.kind) for name, each in stored.items()}


class GGUFTensor(NamedTuple):
    """Location of a tensor in a GGUF file: its shape, ggml type number, first byte, and the byte after its last."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    end: int


def gguf_header(data: bytes | memoryview) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Reads the fields of a GGUF file and the locations of its tensors; see `parse_gguf`."""
    reader = _Reader(memoryview(data))
    if bytes(reader.take(4)) != _MAGIC:
        raise FormatError("not a GGUF file: it does not begin with 'GGUF'")
    version = reader.number("<I")
    if version not in (2, 3):
        raise FormatError(f"GGUF version {version}, expected 2 or 3 (little-endian)")
    tensor_count, field_count = reader.number("<Q"), reader.number("<Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = reader.string()
        if key in fields:
            raise FormatError(f"the field {key!r} occurs twice")
        fields[key] = reader.value()
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}  # shape, type, offset
    for _ in range(tensor_count):
        name = reader.string()
        if name in infos:
            raise FormatError(f"the tensor {name!r} occurs twice")
        axes = reader.number("<I")
        if axes > 4:
            raise FormatError(f"{name} has {axes} axes, expected at most 4")
        shape = tuple(reader.number("<Q") for _ in range(axes))[::-1]
        infos[name] = shape, reader.number("<I"), reader.number("<Q")
    check_names([*fields, *infos])
    spans = _spans(infos, fields.get("general.alignment", 32), reader.position, len(data))
    return fields, {name: GGUFTensor(*infos[name][:2], begin, end) for begin, end, name in spans}


def _spans(
    infos: Mapping[str, tuple[tuple[int, ...], int, int]], alignment: object, header_end: int, file_size: int
) -> list[tuple[int, int, str]]:
    """Returns the first byte of each tensor, the byte after its last, and its name."""
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise FormatError(f"general.alignment is {alignment!r}, expected a power of two")
    start = -(-header_end // alignment) * alignment
    spans = []
    for name, (shape, kind, offset) in infos.items():
        begin, size = start + offset, _size(name, shape, kind)
        if offset % alignment or begin + size > file_size:
            raise FormatError(f"{name}: {size:,} bytes at {begin:,} do not fit into a file of {file_size:,} bytes")
        spans.append((begin, begin + size, name))
    # Checked before copying: a thousand names for the same bytes would take a thousand times the file size.
    for (_, end, first), (begin, _, second) in itertools.pairwise(sorted(span for span in spans if span[0] < span[1])):
        if begin < end:
            raise FormatError(f"the tensors {first!r} and {second!r} overlap")
    return spans


class _Reader:
    """Reads values sequentially from a file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def take(self, size: int) -> memoryview:
        left = len(self.data) - self.position
        if size > left:
            raise FormatError(
                f"the file ends early: expected {size:,} bytes at {self.position:,}, but {left:,} are left"
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        try:
            return str(self.take(self.number("<Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"a name or text is not UTF-8: {error}") from error

    def value(self) -> Any:
        """Returns the next value, which is preceded by its type; skips a list and returns None."""
        kind = self.number("<I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise FormatError(f"a field at {self.position:,} has type {kind}, which GGUF does not define")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(count):  # each consumes bytes of the file, so a huge count fails quickly
                self.string()
        else:
            raise FormatError(f"a list at {self.position:,} has type {inner}, expected a list of numbers or texts")
        return None


def _size(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Returns the size of a tensor in bytes."""
    import gguf

    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise FormatError(f"{name}: unknown tensor type {kind}") from error
    if not shape or max(shape) >= 2**40 or shape[-1] % block:
        raise FormatError(f"{name}: shape {shape} is too large, or not divisible into blocks of {block}")
    return math.prod(shape) // block * block_bytes


def _tensor(data: memoryview, shape: tuple[int, ...], kind: int) -> Tensor:
    if kind in _PLAIN:
        if not data:  # frombuffer rejects empty data
            return torch.empty(shape, dtype=_PLAIN[kind])
        return torch.frombuffer(bytearray(data), dtype=_PLAIN[kind]).view(shape)  # copies the data
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType(kind)
    packed = np.frombuffer(data, dtype=np.uint8).reshape(gguf.quant_shape_to_byte_shape((*shape,), kind))
    try:
        return torch.from_numpy(gguf.quants.dequantize(packed, kind).reshape(shape).copy())
    except NotImplementedError as error:
        raise FormatError(f"tensors of type {kind.name} cannot be read") from error
