"""Models inside other libraries' wrappers: names and modules as in the unwrapped model.

torch.compile, DataParallel, FSDP, accelerate and others wrap a model, or a part of it, in a module that inserts a
component of its own into every name below it (``_orig_mod.``, ``module.``).  An adapter's names contain none of these.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import TargetError

__all__ = [
    "adapting_spread",
    "decoder_blocks",
    "gathered",
    "input_table",
    "is_sharded",
    "is_spread",
    "may_adapt",
    "named_modules",
    "named_parameters",
    "named_tensors",
    "output_head",
    "plain_name",
    "refuse_process_groups",
    "submodule",
    "unwrapped",
    "writes_files",
]

# Names that PyTorch's wrappers give to the module inside.
_PRIVATE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Libraries whose wrappers call it `module`; a user's own module of that name is part of the model.
_SYNCHRONISE = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
_LIBRARIES = ("torch", "accelerate", "deepspeed", "fairscale", "lightning", "lightning_fabric", "pytorch_lightning")


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside its wrappers: torch.compile, DataParallel, DDP, FSDP, accelerate, DeepSpeed and others.

    >>> layer = nn.Linear(2, 2)
    >>> unwrapped(nn.DataParallel(layer)) is layer, unwrapped(layer) is layer
    (True, True)
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    modules = getattr(model, "_modules", {})
    for name in _PRIVATE:
        if isinstance(modules.get(name), nn.Module):
            return cast(nn.Module, modules[name])
    home = type(model).__module__
    if home.partition(".")[0] in _LIBRARIES and not home.startswith("torch.nn.modules"):
        inner = getattr(model, "module", None)
        return inner if isinstance(inner, nn.Module) and inner is not model else None
    return None


def refuse_process_groups(model: nn.Module, why: str) -> None:
    """Refuses a model that several processes train together: its wrapper has fixed which parameters it synchronises.

    Args:
        model: with its wrappers.
        why: continues the message "the model is inside DistributedDataParallel, ".

    Raises:
        TargetError: the model has such a wrapper.
    """
    while (inner := _inside(model)) is not None:
        kind = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in _SYNCHRONISE), None)
        if kind is not None:
            raise TargetError(f"the model is inside {kind}, {why}")
        model = inner


def plain_name(name: str) -> str:
    """Returns a dotted name without the components inserted by PyTorch's wrappers.

    >>> plain_name("_orig_mod.layers.0._checkpoint_wrapped_module.q_proj")
    'layers.0.q_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _PRIVATE)


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Returns the modules of a model by name, like ``nn.Module.named_modules``, but without wrappers."""
    found, seen = dict[str, nn.Module](), set[int]()

    def walk(name: str, module: nn.Module) -> None:
        module = unwrapped(module)
        if remove_duplicate and id(module) in seen:
            return
        seen.add(id(module))
        found[name] = module
        for leaf, child in module._modules.items():
            if child is not None:
                walk(f"{name}.{leaf}" if name else leaf, child)

    walk("", model)
    return found


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns a model's parameters under every name that they have, without the wrappers' components."""
    return {
        f"{name}.{leaf}" if name else leaf: parameter
        for name, module in named_modules(model, remove_duplicate=False).items()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers by name, as in a state dict, without the wrappers' components."""
    return {
        f"{name}.{leaf}" if name else leaf: tensor
        for name, module in named_modules(model, remove_duplicate=False).items()
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and leaf not in module._non_persistent_buffers_set
    }


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns the module with this name (see `named_modules`).

    Raises:
        KeyError: there is no such module.
    """
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        module = unwrapped(cast(nn.Module, module._modules[part]))
    return module


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter is only this process's shard of a tensor: under FSDP2, FSDP1 or DeepSpeed ZeRO stage 3."""
    return hasattr(tensor, "full_tensor") or bool(getattr(tensor, "_fsdp_flattened", False)) or hasattr(tensor, "ds_id")


def is_spread(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded across processes, whose wrappers keep references to them."""
    kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    return not kinds.isdisjoint(("FullyShardedDataParallel", "FSDPModule")) or any(map(is_sharded, model.parameters()))


@contextlib.contextmanager
def adapting_spread() -> Iterator[None]:
    """Allows models under FSDP2 to be adapted in a ``with`` block, by a caller that reduces the adapter's gradients.

    FSDP2 does so only for parameters that existed when it sharded the weights; elsewhere such models are refused.
    """
    token = _ADAPTS_SPREAD.set(True)
    try:
        yield
    finally:
        _ADAPTS_SPREAD.reset(token)


_ADAPTS_SPREAD = contextvars.ContextVar("adapting_spread", default=False)


def may_adapt(weight: Tensor) -> bool:
    """Whether a weight is unsharded; or sharded by FSDP2, inside `adapting_spread`."""
    return not is_sharded(weight) or (_ADAPTS_SPREAD.get() and hasattr(weight, "full_tensor"))


def input_table(model: nn.Module) -> nn.Module | None:
    """Returns the token embedding of a transformers model; None if there is none."""
    return _asked(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the module that computes the logits of a transformers model; None if there is none."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):  # not a transformers model, or no such module
        return None
    return found if isinstance(found, nn.Module) else None


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks that a model stacks: the members of the ModuleList that holds the most parameters.

    >>> model = nn.ModuleDict({"table": nn.Embedding(9, 4), "layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
    >>> len(decoder_blocks(model))
    3
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    # With nested lists the outer one comes first, which max() keeps on a tie.
    largest = max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=None)
    return [] if largest is None else list(largest)


def writes_files(model: nn.Module) -> bool:
    """Whether this process writes files for all: under FSDP, where every process helps to gather, only rank 0 does."""
    return not is_spread(model) or not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Provides the full parameters of a model under FSDP1 in a ``with`` block; every process must take part."""
    fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if fsdp is None or not any(isinstance(module, fsdp) for module in model.modules()):
        yield
        return
    with fsdp.summon_full_params(model, writeback=False):
        yield
