"""Base models whose weights are spread over processes: each reads its own share of them, and never the whole.

The model is built without weights, PyTorch's `fully_shard` decides who holds which rows of which tensor, and each
process reads its rows from the safetensors files into the memory where they stay.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import BaseModelError
from ..formats.tensors import read_header
from ..wrapping import decoder_blocks, named_tensors, submodule
from .gguf import whereabouts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["agreed", "empty_model", "in_turn", "of_first", "read_share", "read_whole", "shard", "stored_tensors"]

_T = TypeVar("_T")

_CHUNK: Final = 8 << 20  # bytes: all that is held between the file and the weights
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Freezes a model and spreads its parameters over the processes of a mesh (FSDP2): block by block, then the rest.

    A process holds its rows of each tensor.  The whole of a block exists while it computes; the whole of what is
    outside the blocks (embedding, last norm, head) from the forward pass to the end of the backward pass.

    Args:
        model: without an adapter; its parameters may be on the meta device.
        mesh: of one dimension.
    """
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False)  # not later: while weights are whole, FSDP2 notes it on copies that it throws away
    blocks: list[Any] = decoder_blocks(model)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for block, following in itertools.pairwise(blocks):  # the next one comes while this one computes
        block.set_modules_to_forward_prefetch([following])


def empty_model(path: Path, dtype: torch.dtype) -> Any:
    """Builds the causal language model that a directory's config.json describes: its parameters are on the meta device.

    Buffers have their values, unless these come from a file.
    """
    import transformers
    from accelerate import init_empty_weights

    where, options = whereabouts(path)
    config = transformers.AutoConfig.from_pretrained(where, **options, local_files_only=True, trust_remote_code=False)
    causal: Any = transformers.AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = causal.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(path), local_files_only=True)
    return model


def read_share(model: nn.Module, path: Path, mesh: DeviceMesh, device: torch.device) -> str:
    """Spreads an empty model over processes, and reads this process's share of its weights.

    Args:
        model: of `empty_model`.
        path: the directory with the model's safetensors files.
        mesh: of one dimension.
        device: where the weights go.

    Returns:
        "", or why a share cannot be read apart from the rest; then the model is as it was.

    Raises:
        FormatError: a file is damaged.
        OSError: a file cannot be read.
    """
    places, why = _places(model, path)
    if why:
        return why
    shard(model, mesh)
    buffer = bytearray(_CHUNK)
    for names, place in places.items():
        module, leaf = submodule(model, names[0].rpartition(".")[0]), names[0].rpartition(".")[2]
        value = _read(getattr(module, leaf), place, device, buffer)
        for name in names:
            module, leaf = submodule(model, name.rpartition(".")[0]), name.rpartition(".")[2]
            held: Any = module._parameters if leaf in module._parameters else module._buffers
            held[leaf] = value
    for module in model.modules():
        for leaf, computed in module._buffers.items():
            module._buffers[leaf] = None if computed is None else computed.to(device)
    return ""


# From names to places in files.


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: in which safetensors file, as what, and how many bytes from its beginning."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


def _places(model: nn.Module, path: Path) -> tuple[dict[tuple[str, ...], StoredTensor], str]:
    """Finds each tensor of a model, by all names that it has there; also returns why one cannot be read as it is."""
    stored = stored_tensors(path)
    if not stored:
        return {}, "its weights are not in safetensors files"
    if why := _why_converted(model):
        return {}, why
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # a file may hold the body alone, without its head
    names = defaultdict[int, list[str]](list)
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    places = {}
    for same in names.values():
        found = [stored[key] for name in same for key in (name, name.removeprefix(prefix)) if key in stored]
        if len(set(found)) != 1 or found[0].shape != tensors[same[0]].shape:
            what = (
                "missing from its files"
                if not found
                else "in its files more than once"
                if len(found) > 1
                else "another"
            )
            return {}, f"{same[0]} is {what}"
        places[tuple(same)] = found[0]
    return places, ""


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors in a directory's safetensors files by name; none where transformers reads other files."""
    index, files = path / "model.safetensors.index.json", [path / "model.safetensors"]
    if not files[0].is_file():
        if not index.is_file():
            return {}
        files = [
            path / name for name in sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        ]
    places = {}
    for file in files:
        entries, start = read_header(file)
        for name, entry in entries.items():
            if entry["dtype"] in _DTYPES:
                begin = start + entry["data_offsets"][0]
                places[name] = StoredTensor(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), begin)
    return places


def _why_converted(model: nn.Module) -> str:
    """Tells whether transformers does more to this model's weights than to read them by their names."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return "this release of transformers does not reveal how it reads weights"
    if any(getattr(rule, "operations", None) for rule in get_model_conversion_mapping(cast(Any, model))):
        return f"transformers converts the weights of {type(model).__name__} while it reads them"
    return ""


# From a place in a file to a tensor.


def read_whole(place: StoredTensor) -> Tensor:
    """Reads a tensor from its file, in the dtype that it has there."""
    value = torch.empty(place.shape, dtype=place.dtype)
    _fill(value, place, 0, bytearray(_CHUNK))
    return value


def _read(tensor: Tensor, place: StoredTensor, device: torch.device, buffer: bytearray) -> Tensor:
    """Reads a tensor, or this process's rows of it if it is spread, to take the place of an empty one."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        if not isinstance(tensor, DTensor):
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            _fill(value, place, 0, buffer)
            return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        mesh, rows = tensor.device_mesh, tensor.shape[0]
        first = min(mesh.get_local_rank() * math.ceil(rows / mesh.size()), rows)  # as torch.chunk counts
        value = torch.empty(tensor.to_local().shape, dtype=tensor.dtype, device=device)
        _fill(value, place, first * math.prod(tensor.shape[1:]), buffer)
        shared = DTensor.from_local(
            value, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        return nn.Parameter(shared, tensor.requires_grad)


def _fill(value: Tensor, place: StoredTensor, skip: int, buffer: bytearray) -> None:
    """Reads numbers one after the other from a file, `skip` of which come first, and converts their dtype."""
    size = place.dtype.itemsize
    flat, view, done = value.view(-1), memoryview(buffer), 0
    with place.file.open("rb", buffering=0) as file:
        file.seek(place.begin + skip * size)
        while done < len(flat):
            count = min(len(flat) - done, len(buffer) // size)
            if file.readinto(view[: count * size]) != count * size:
                raise BaseModelError(f"{place.file} ended while it was read; download the model again")
            flat[done : done + count].copy_(torch.frombuffer(buffer, dtype=place.dtype, count=count))
            done += count


# What processes do together.


def agreed(mesh: DeviceMesh, action: Callable[[], _T]) -> _T:
    """Does something on every process of a mesh; where it fails on one, all raise that error.

    Raises:
        BaseModelError: it failed, here or elsewhere.
    """
    result: Any = None
    fault = ""
    try:
        result = action()
    except Exception as error:
        fault = f"{error}"
    faults: list[Any] = [None] * mesh.size()
    torch.distributed.all_gather_object(faults, fault, group=mesh.get_group())
    for number, text in enumerate(faults):
        if text:
            raise BaseModelError(text if number == 0 else f"on rank {number}: {text}")
    return cast(_T, result)


def in_turn(mesh: DeviceMesh, action: Callable[[], _T]) -> _T:
    """Does something on the first process of each machine, such as a download, and then on the others, which find it.

    Raises:
        BaseModelError: it failed on one of them.
    """
    first = os.environ.get("LOCAL_RANK", str(mesh.get_local_rank())) == "0"
    result = agreed(mesh, lambda: action() if first else None)
    return cast(_T, agreed(mesh, lambda: result if first else action()))


def of_first(mesh: DeviceMesh, value: _T) -> _T:
    """Returns the value that the first process of a mesh has, on all of them."""
    values = [value]
    group = mesh.get_group()
    torch.distributed.broadcast_object_list(values, torch.distributed.get_global_rank(group, 0), group)
    return values[0]
