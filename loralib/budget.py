"""What training and serving a model need in memory, from its modules alone: they may have no weights yet.

One formula serves `loralib plan`, which knows a model from its config.json, and runs, which know the model itself.
Weights and optimiser are counted; what a step keeps for the backward pass follows from how the engine computes a block,
and how well it does is measured in benchmarks/plan.json.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from .bases.quant import Int8Weight, QuantizedWeight, class_of, is_quantized_table
from .console import size
from .delta import stored_bytes
from .engine.frozen_linear import MAX_PREPACKED_BYTES, can_prepack, kernels_for
from .engine.limits import text_config
from .errors import BaseModelError, UnsupportedModelError
from .files import free_memory
from .injection import adapted_layers
from .layers import LoRALayer, LoRALinear, is_conv1d
from .variants import expert_stacks, holds_experts, is_transposed, kept_per_token
from .wrapping import decoder_blocks

__all__ = [
    "BYTES_PER_TRAINED",
    "Budget",
    "cache_per_token",
    "free_on",
    "require_room",
    "serving_budget",
    "traffic",
    "training_budget",
]

_FP32: Final = 4
BYTES_PER_TRAINED: Final = 5 * _FP32  # the number, its value at the start, its gradient, AdamW's two moments
_CHUNK: Final = 256  # positions whose logits exist at once (see `head_loss`)
# Allocators leave holes between blocks, which come and go in other orders: measured 1.12 (SmolLM2) to 1.37 (GPT-2) with
# glibc 2.36.  With gradient checkpointing large blocks are given back (see `keep_freed_memory`), and leave none.
_HOLES: Final = 1.2
_PROGRAM: Final = 420 << 20  # bytes of Python, PyTorch, transformers and all else that is imported


@dataclass(frozen=True)
class Budget:
    """Bytes that one process needs.

    Attributes:
        weights: of the frozen base: all, or a process's share of them.
        gathered: whole tensors that exist while they are computed with, beside the shares.
        copies: of weights in the processor's own order.
        adapter: the trained numbers, and their values at the start.
        gradients: of the trained numbers; over several processes, also the flat buffer that is summed.
        optimizer: the two moments of AdamW.
        activations: what the backward pass needs of the forward pass.
        head: logits of a chunk of positions, and their gradients.
        cache: keys and values of the tokens of all requests.
        program: what is imported.
    """

    weights: float = 0.0
    gathered: float = 0.0
    copies: float = 0.0
    adapter: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    cache: float = 0.0
    program: float = float(_PROGRAM)

    @property
    def total(self) -> float:
        """The sum of all."""
        return sum(self.rows().values())

    def rows(self) -> dict[str, float]:
        """Returns each item by name."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}


def training_budget(
    model: nn.Module,
    tokens: int,
    *,
    checkpointing: bool = False,
    processes: int = 1,
    sharded: bool = False,
    quantize: str = "none",
    adapted: bool | None = None,
    device: str | None = None,
) -> Budget:
    """Returns what training an adapter needs on one process.

    Args:
        model: with its adapter, on any device, the meta device included.
        tokens: that a step computes on this process.
        checkpointing: whether activations are computed again in the backward pass.
        processes: how many take part.
        sharded: whether the base's weights are spread over them.
        quantize: "none", "int8" or "nf4": how the linears of the blocks are stored.
        adapted: count each linear of the blocks as adapted, or none; default: those that are.
        device: the kind of device that the model will be on; default: the one where it is.
    """
    blocks = decoder_blocks(model) or [model]
    layers: Container[nn.Module] = {layer for _, layer in adapted_layers(model)} if adapted is None else ()
    trained = sum(p.numel() for p in model.parameters() if adapted is None and p.requires_grad)
    kept = [_kept_per_token(block, layers, bool(adapted)) for block in blocks]
    head = _logits(model, _CHUNK)
    if checkpointing:  # a block at a time is computed again, when the logits are gone
        again = max(0.0, tokens * max(kept, default=0.0) - head)
        activations = tokens * len(blocks) * _width(model) * _itemsize(model) + again
    else:
        activations = tokens * sum(kept) * _HOLES
    flat = _FP32 * trained if processes > 1 else 0
    on_cpu = (device or next(model.parameters()).device.type) == "cpu"
    return Budget(
        **_base(model, processes if sharded else 1, quantize),
        copies=_copies(model) if on_cpu and quantize == "none" and not sharded else 0.0,
        adapter=2 * _FP32 * trained,
        gradients=_FP32 * trained + flat,
        optimizer=2 * _FP32 * trained,
        activations=activations,
        head=head,
    )


def traffic(model: nn.Module, processes: int, *, sharded: bool = False, batches: int = 1) -> dict[str, float]:
    """Returns the bytes that each process sends for an update.

    Of a ring of N processes, each sends (N - 1) / N of what is gathered, and twice that of what is reduced.

    Args:
        model: with its adapter, on any device.
        processes: N.
        sharded: whether the base's weights are spread over them.
        batches: whose gradients add up to an update.

    Returns:
        ``reduced``, for the adapter's gradients, once an update in fp32; and ``gathered``, for the base's weights: for
        each batch the blocks forward and backward, and once what is outside of them.
    """
    sent = (processes - 1) / processes
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = sum(_stored(block, "none") for block in decoder_blocks(model))
    whole = float(sum(map(stored_bytes, _frozen(model))))
    return {
        "reduced": 2 * sent * _FP32 * trained,
        "gathered": batches * sent * (blocks + whole) if sharded else 0.0,
    }


def free_on(device: torch.device) -> float | None:
    """Returns the bytes that are free on a device, or on this machine for one that shares its memory; None: unknown."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def require_room(model: nn.Module, name: str, processes: int, free: float | None) -> None:
    """Checks that a process has room for its share of a base and what is gathered of it, before anything is loaded.

    Args:
        model: the base, without weights.
        name: of the base.
        processes: over which it is to be spread.
        free: bytes that this process may take; None: not known.

    Raises:
        BaseModelError: it has not.
    """
    budget = training_budget(model, 0, processes=processes, sharded=True, adapted=False)
    needed = budget.weights + budget.gathered + budget.head
    if free is not None and needed > free:
        raise BaseModelError(
            f"each of {processes:,} processes needs {size(needed)} for its share of {name} and for the weights "
            f"gathered from the others, but has {size(free)}. Start more processes, or choose a smaller model; "
            f"`loralib plan --model {name} --gpus N --gpu_memory GB` shows what fits."
        )


def serving_budget(model: nn.Module, requests: int, context: int, *, quantize: str = "none") -> Budget:
    """Returns what serving needs, with so many requests at once of so many tokens each, prompt and answer together.

    Args:
        model: see `training_budget`.
        requests: that are answered at the same time.
        context: tokens of each.
        quantize: see `training_budget`.

    Raises:
        UnsupportedModelError: its config does not say how large keys and values are.
    """
    return Budget(
        **_base(model, 1, quantize),
        head=_logits(model, requests),
        cache=requests * context * cache_per_token(model),
    )


def cache_per_token(model: nn.Module) -> float:
    """Returns the bytes of keys and values that a token has in all layers."""
    config = text_config(model)
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    if not (heads and layers and width):
        raise UnsupportedModelError(f"the config of {type(model).__name__} does not state the size of keys and values")
    each = getattr(config, "head_dim", None) or width // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return float(2 * layers * shared * each * _itemsize(model))


# Weights.


def _base(model: nn.Module, shares: int, quantize: str) -> dict[str, float]:
    """Returns the items that hold the base's weights."""
    blocks = decoder_blocks(model) or [model]
    inside = {id(p) for block in blocks for p in block.parameters()}
    sizes = [_stored(block, quantize) for block in blocks]
    outside = float(sum(stored_bytes(p) for p in _frozen(model) if id(p) not in inside))
    tables = {id(m.weight): _weight(m) for m in model.modules() if is_quantized_table(m, model, quantize)}
    outside += sum(Int8Weight.bytes_of(*table.shape) - stored_bytes(table) for table in tables.values())
    whole = sum(sizes) + outside
    if shares == 1:
        shapes = [] if quantize == "none" else [shape for block in blocks for _, shape in _matrices(block)]
        dense = max(map(math.prod, shapes), default=0)  # one at a time
        return {"weights": whole, "gathered": float(dense * _itemsize(model))}
    # A block exists twice for a moment: as it arrives, and as its tensors.
    return {"weights": whole / shares, "gathered": 2 * max(sizes, default=0.0) + outside}


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    """Yields the parameters of the base: all that an adapter does not bring along."""
    own = {
        id(p) for layer in module.modules() if isinstance(layer, LoRALayer) for p in layer.trained_tensors().values()
    }
    return (parameter for parameter in module.parameters() if id(parameter) not in own)


def _stored(block: nn.Module, quantize: str) -> float:
    """Returns the bytes of a block's frozen weights as they are stored."""
    size = float(sum(map(stored_bytes, _frozen(block))))
    if quantize == "none":
        return size
    kind, itemsize = class_of(quantize), _itemsize(block)
    return size + sum(n * (kind.bytes_of(*shape) - math.prod(shape) * itemsize) for n, shape in _matrices(block))


def _matrices(block: nn.Module) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields how many weights of outputs and inputs there are: one of each linear, and those of a layer's experts."""
    for path, module in block.named_modules():
        is_linear = isinstance(module, nn.Linear | LoRALinear) or is_conv1d(module)  # and no router of experts
        if is_linear and (shape := _shape(module)) is not None:
            yield 1, shape
        for name in expert_stacks(path, module):
            experts, one, other = cast(Tensor, module._parameters[name]).shape
            yield experts, ((other, one) if is_transposed(module) else (one, other))


def _copies(model: nn.Module) -> float:
    """Returns the bytes of prepacked weights on this machine's CPU (see `FrozenWeight`)."""
    size = 0
    for weight in _linears(model):
        if isinstance(weight, QuantizedWeight):
            continue
        like = torch.empty(weight.shape, dtype=weight.dtype)  # takes no memory before it is written
        size += 2 * like.nbytes if can_prepack(like) and kernels_for(like) is None else 0
    return float(size) if size <= MAX_PREPACKED_BYTES else 0.0


def _linears(module: nn.Module) -> Iterator[Tensor]:
    """Yields the weight of each linear in a module."""
    return (_weight(child) for child in module.modules() if _shape(child) is not None)


def _weight(module: nn.Module) -> Any:
    return getattr(module, "base_weight" if isinstance(module, LoRALayer) else "weight", None)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Returns outputs and inputs of a linear, adapted or not; None for another module."""
    weight = _weight(module)
    if isinstance(module, nn.Embedding) or not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    transposed = is_conv1d(module) or getattr(module, "fan_in_fan_out", False)
    return (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])


# Activations.


def _kept_per_token(block: nn.Module, layers: Container[nn.Module], all_adapted: bool) -> float:
    """Returns the bytes that a block keeps of a token for the backward pass, computed as the engine does.

    They are the inputs of adapted linears, once where several read the same (q, k and v, a gate and its up projection);
    the outputs that attention and activation functions compute with, which are those of all linears but the last of
    their module; the inputs of norms; and what LoRA's A makes of the inputs.  For experts see `kept_per_token`.
    """
    numbers = 0
    for name, parent in block.named_modules():
        if holds_experts(name, parent):
            numbers += kept_per_token(parent, all_adapted or parent in layers)
            continue
        linears = [(child, shape) for child in parent.children() if (shape := _shape(child)) is not None]
        read = set[int]()
        for place, (child, (outputs, inputs)) in enumerate(linears):
            last = place == len(linears) - 1 and place > 0
            adapted = all_adapted or child in layers
            attended = last and "attention" in type(parent).__name__.lower()  # attention itself keeps its result
            if (adapted or attended) and (last or inputs not in read):
                numbers += inputs
            read |= {inputs} if adapted and not last else set()
            numbers += (0 if last else outputs) + (getattr(child, "r", 0) if adapted else 0)
        numbers += sum(_normed(parent, name, child) for name, child in parent.named_children())
    return float(numbers * _itemsize(block))


def _normed(parent: nn.Module, name: str, module: nn.Module) -> int:
    """Returns how many numbers of a token a norm reads; 0 for another module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or "norm" not in type(module).__name__.lower():
        return 0
    of_heads = _shape(getattr(parent, f"{name[0]}_proj", parent))  # q_norm and k_norm have the width of a head
    return weight.shape[0] if of_heads is None else of_heads[0]


def _width(model: nn.Module) -> int:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max((table.embedding_dim for table in tables), default=0)


def _logits(model: nn.Module, rows: int) -> float:
    """Returns the bytes of so many rows of logits and gradients: in the weights' dtype, and in fp32."""
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    return float(rows * vocabulary * 8)


def _itemsize(module: nn.Module) -> int:
    return next((parameter.element_size() for parameter in _frozen(module)), _FP32)
