"""The memory that training and serving need, computed from the modules alone, which may have no weights yet.

`loralib plan`, which knows a model only by its config.json, and runs, which have the model itself, share one formula.
Weights and optimiser state are counted exactly; what a step keeps for the backward pass is derived from how the engine
computes a block.  benchmarks/plan.json records how accurate the estimates are.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields
from typing import Any, Final

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
from .variants import expert_stacks, holds_experts, kept_per_token, stored_as_rows
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
BYTES_PER_TRAINED: Final = 5 * _FP32  # the parameter, its initial value, its gradient, AdamW's two moments
_CHUNK: Final = 256  # number of positions whose logits exist at the same time (see `head_loss`)
# Fragmentation: blocks are not freed in the order they were allocated.  Measured: 1.12 (SmolLM2) to 1.37 (GPT-2) with
# glibc 2.36.  With gradient checkpointing, large blocks are returned to the system (see `keep_freed_memory`).
_HOLES: Final = 1.2
_PROGRAM: Final = 420 << 20  # memory of Python, PyTorch, transformers and all other imports


@dataclass(frozen=True)
class Budget:
    """Memory that one process needs, in bytes.

    Attributes:
        weights: the frozen base: all of it, or this process's shard.
        gathered: full tensors that exist temporarily for computation, besides the shards.
        copies: weights prepacked into the CPU's preferred layout.
        adapter: the trained parameters, and their initial values.
        gradients: of the trained parameters; with several processes, also the flat buffer that is all-reduced.
        optimizer: the two moments of AdamW.
        activations: what the forward pass keeps for the backward pass.
        head: logits for one chunk of positions, and their gradients.
        cache: keys and values for the tokens of all requests.
        program: imported code.
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
        """The sum of all items."""
        return sum(self.rows().values())

    def rows(self) -> dict[str, float]:
        """Returns the items by name."""
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
    """Returns the memory that one process needs to train an adapter.

    Args:
        model: with its adapter, on any device, the meta device included.
        tokens: number of tokens that a step processes on this process.
        checkpointing: whether activations are recomputed in the backward pass.
        processes: number of processes.
        sharded: whether the base's weights are sharded across them.
        quantize: "none", "int8" or "nf4": how the linear layers of the blocks are stored.
        adapted: whether to count all linear layers of the blocks as adapted, or none; default: those that are.
        device: the type of device that the model will be on; default: the one it is on.
    """
    blocks = decoder_blocks(model) or [model]
    layers: Container[nn.Module] = {layer for _, layer in adapted_layers(model)} if adapted is None else ()
    trained = sum(p.numel() for p in model.parameters() if adapted is None and p.requires_grad)
    kept = [_kept_per_token(block, layers, bool(adapted)) for block in blocks]
    head = _logits(model, _CHUNK)
    if checkpointing:  # blocks are recomputed one at a time, after the logits have been freed
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
    """Returns the number of bytes that each process sends per update.

    In a ring of N processes, each sends (N - 1) / N of what is gathered, and twice that of what is reduced.

    Args:
        model: with its adapter, on any device.
        processes: N.
        sharded: whether the base's weights are sharded across them.
        batches: number of batches whose gradients are accumulated per update.

    Returns:
        ``reduced``: the adapter's gradients, once per update in fp32; and ``gathered``: the base's weights, which for
        each batch are the blocks twice (forward and backward) and everything else once.
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
    """Returns the free bytes of a device, or of this machine if the device shares its memory; None: unknown."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def require_room(model: nn.Module, name: str, processes: int, free: float | None) -> None:
    """Checks, before anything is loaded, that a process has room for its shard of a base and what it gathers.

    Args:
        model: the base, without weights.
        name: the name of the base.
        processes: number of processes to shard it across.
        free: bytes that this process may use; None: unknown.

    Raises:
        BaseModelError: there is not enough room.
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
    """Returns the memory that serving a number of concurrent requests needs.

    Args:
        model: see `training_budget`.
        requests: number of requests answered at the same time.
        context: tokens per request, prompt and answer together.
        quantize: see `training_budget`.

    Raises:
        UnsupportedModelError: the model's config does not tell the size of keys and values.
    """
    return Budget(
        **_base(model, 1, quantize),
        head=_logits(model, requests),
        cache=requests * context * cache_per_token(model),
    )


def cache_per_token(model: nn.Module) -> float:
    """Returns the bytes of the keys and values of one token, over all layers."""
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
    """Returns the budget items for the base's weights."""
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
    # A block briefly exists twice: as the gathered buffer, and as its tensors.
    return {"weights": whole / shares, "gathered": 2 * max(sizes, default=0.0) + outside}


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    """Yields the parameters of the base, without those that belong to the adapter."""
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
            experts, outputs, inputs = stored_as_rows(module, name).shape
            yield experts, (outputs, inputs)


def _copies(model: nn.Module) -> float:
    """Returns the bytes of prepacked weights on this machine's CPU (see `FrozenWeight`)."""
    size = 0
    for weight in _linears(model):
        if isinstance(weight, QuantizedWeight):
            continue
        like = torch.empty(weight.shape, dtype=weight.dtype)  # torch.empty takes no memory until it is written to
        size += 2 * like.nbytes if can_prepack(like) and kernels_for(like) is None else 0
    return float(size) if size <= MAX_PREPACKED_BYTES else 0.0


def _linears(module: nn.Module) -> Iterator[Tensor]:
    """Yields the weight of each linear layer in a module."""
    return (_weight(child) for child in module.modules() if _shape(child) is not None)


def _weight(module: nn.Module) -> Any:
    return getattr(module, "base_weight" if isinstance(module, LoRALayer) else "weight", None)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Returns the number of outputs and inputs of a linear layer, adapted or not; None for other modules."""
    weight = _weight(module)
    if isinstance(module, nn.Embedding) or not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    transposed = is_conv1d(module) or getattr(module, "fan_in_fan_out", False)
    return (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])


# Activations.


def _kept_per_token(block: nn.Module, layers: Container[nn.Module], all_adapted: bool) -> float:
    """Returns the bytes that a block keeps per token for the backward pass, computed as the engine computes it.

    These are the inputs of adapted linear layers, counted once if several share them (q, k and v; a gate and its up
    projection); the outputs needed by attention and activation functions, which are those of all linear layers but the
    last of their module; the inputs of norms; and A's outputs.  For experts, see `kept_per_token`.
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
            attended = last and "attention" in type(parent).__name__.lower()  # attention keeps its own result anyway
            if (adapted or attended) and (last or inputs not in read):
                numbers += inputs
            read |= {inputs} if adapted and not last else set()
            numbers += (0 if last else outputs) + (getattr(child, "r", 0) if adapted else 0)
        numbers += sum(_normed(parent, name, child) for name, child in parent.named_children())
    return float(numbers * _itemsize(block))


def _normed(parent: nn.Module, name: str, module: nn.Module) -> int:
    """Returns the number of values per token that a norm reads; 0 for other modules."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or "norm" not in type(module).__name__.lower():
        return 0
    of_heads = _shape(getattr(parent, f"{name[0]}_proj", parent))  # q_norm's and k_norm's weights are one head wide
    return weight.shape[0] if of_heads is None else of_heads[0]


def _width(model: nn.Module) -> int:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max((table.embedding_dim for table in tables), default=0)


def _logits(model: nn.Module, rows: int) -> float:
    """Returns the bytes of `rows` rows of logits and gradients, in the weights' dtype and in fp32."""
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    return float(rows * vocabulary * 8)


def _itemsize(module: nn.Module) -> int:
    return next((parameter.element_size() for parameter in _frozen(module)), _FP32)
