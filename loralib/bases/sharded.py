"""Base models whose weights are sharded over processes: each process reads only its own shard.

The model is built without weights, PyTorch's `fully_shard` determines which process holds which rows of each tensor,
and each process reads its rows from the safetensors files directly into their final memory.
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
from .gguf import from_pretrained_args

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["agreed", "empty_model", "in_turn", "of_first", "read_share", "read_whole", "shard", "stored_tensors"]

_T = TypeVar("_T")

_CHUNK: Final = 8 << 20  # buffer size in bytes; nothing else is held between file and weights
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Freezes a model and shards its parameters over the processes of a mesh (FSDP2): block by block, then the rest.

    Each process holds some rows of each tensor.  A block is gathered while it computes; everything outside the blocks
    (embedding, last norm, head) stays gathered from the forward pass to the end of the backward pass.

    Args:
        model: without an adapter; its parameters may be on the meta device.
        mesh: one-dimensional.
    """
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False)  # must come first: for gathered weights, FSDP2 would record it on temporary copies
    blocks: list[Any] = decoder_blocks(model)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for block, following in itertools.pairwise(blocks):  # gathers the next block while this one computes
        block.set_modules_to_forward_prefetch([following])


def empty_model(path: Path, dtype: torch.dtype) -> Any:
    """Builds the causal language model that a directory's config.json describes, with parameters on the meta device.

    Buffers have their values, unless these come from a file.
    """
    import transformers
    from accelerate import init_empty_weights

    where, options = from_pretrained_args(path)
    config = transformers.AutoConfig.from_pretrained(where, **options, local_files_only=True, trust_remote_code=False)
    causal: Any = transformers.AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = causal.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(path), local_files_only=True)
    return model


def read_share(model: nn.Module, path: Path, mesh: DeviceMesh, device: torch.device) -> str:
    """Shards an empty model over processes, and reads this process's shard of its weights.

    Args:
        model: result of `empty_model`.
        path: the directory with the model's safetensors files.
        mesh: one-dimensional.
        device: device for the weights.

    Returns:
        "", or why shards cannot be read individually; in that case the model is unchanged.

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
    """Location of a tensor: its safetensors file, dtype and shape, and its offset in bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


def _places(model: nn.Module, path: Path) -> tuple[dict[tuple[str, ...], StoredTensor], str]:
    """Locates each tensor of a model, with all of its names; also returns why one cannot be read unchanged."""
    stored = stored_tensors(path)
    if not stored:
        return {}, "its weights are not in safetensors files"
    if why := _why_converted(model):
        return {}, why
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # a file may contain only the body, without the head
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
    """Returns the tensors in a directory's safetensors files by name; empty if transformers would read other files."""
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
    """Returns why this model's weights cannot simply be read by name (transformers converts them); "" if they can."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return "this release of transformers does not reveal how it reads weights"
    if any(getattr(rule, "operations", None) for rule in get_model_conversion_mapping(cast(Any, model))):
        return f"transformers converts the weights of {type(model).__name__} while it reads them"
    return ""


# From a place in a file to a tensor.


def read_whole(place: StoredTensor) -> Tensor:
    """Reads a tensor from its file, in the dtype stored there."""
    value = torch.empty(place.shape, dtype=place.dtype)
    _fill(value, place, 0, bytearray(_CHUNK))
    return value


def _read(tensor: Tensor, place: StoredTensor, device: torch.device, buffer: bytearray) -> Tensor:
    """Reads a tensor, or this process's rows of it if it is sharded, to replace an empty one."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        if not isinstance(tensor, DTensor):
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            _fill(value, place, 0, buffer)
            return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        mesh, rows = tensor.device_mesh, tensor.shape[0]
        first = min(mesh.get_local_rank() * math.ceil(rows / mesh.size()), rows)  # the way torch.chunk splits rows
        value = torch.empty(tensor.to_local().shape, dtype=tensor.dtype, device=device)
        _fill(value, place, first * math.prod(tensor.shape[1:]), buffer)
        shared = DTensor.from_local(
            value, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        return nn.Parameter(shared, tensor.requires_grad)


def _fill(value: Tensor, place: StoredTensor, skip: int, buffer: bytearray) -> None:
    """Reads consecutive numbers of a tensor, after skipping the first `skip`, and converts their dtype."""
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


# Collective operations.


def agreed(mesh: DeviceMesh, action: Callable[[], _T]) -> _T:
    """Runs an action on every process of a mesh; if it fails on one, all raise its error.

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
    """Runs an action, such as a download, on the first process of each machine, and then on the others there.

    Raises:
        BaseModelError: it failed on one of them.
    """
    first = os.environ.get("LOCAL_RANK", str(mesh.get_local_rank())) == "0"
    result = agreed(mesh, lambda: action() if first else None)
    return cast(_T, agreed(mesh, lambda: result if first else action()))


def of_first(mesh: DeviceMesh, value: _T) -> _T:
    """Returns the value of the mesh's first process on all processes."""
    values = [value]
    group = mesh.get_group()
    torch.distributed.broadcast_object_list(values, torch.distributed.get_global_rank(group, 0), group)
    return values[0]
