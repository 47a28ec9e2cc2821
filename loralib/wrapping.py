"""Models inside other libraries' wrappers: names and modules as the model itself has them.

torch.compile, DataParallel, FSDP, accelerate and others put a module around a model or around a part of it, and a step
of its own into every name below (``_orig_mod.``, ``module.``).  An adapter's names have none of these steps.
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

# Names that PyTorch's own wrappers give to what is inside.
_PRIVATE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Where wrappers that call it `module` come from; a user's own module of that name is a part of the model.
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
    """Refuses a model that several processes train together: its wrapper keeps a list of what it synchronises.

    Args:
        model: with its wrappers.
        why: goes on after "the model is inside DistributedDataParallel, ".

    Raises:
        TargetError: the model is wrapped so.
    """
    while (inner := _inside(model)) is not None:
        kind = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in _SYNCHRONISE), None)
        if kind is not None:
            raise TargetError(f"the model is inside {kind}, {why}")
        model = inner


def plain_name(name: str) -> str:
    """Returns a dotted name without the steps that PyTorch's wrappers put into it.

    >>> plain_name("_orig_mod.layers.0._checkpoint_wrapped_module.q_proj")
    'layers.0.q_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _PRIVATE)


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Returns the modules inside a model by name, as ``nn.Module.named_modules`` does, without any wrappers."""
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
    """Returns a model's parameters by every name that they have, without the steps of wrappers."""
    return {
        f"{name}.{leaf}" if name else leaf: parameter
        for name, module in named_modules(model, remove_duplicate=False).items()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers by name, as a state dict has them, without the steps of wrappers."""
    return {
        f"{name}.{leaf}" if name else leaf: tensor
        for name, module in named_modules(model, remove_duplicate=False).items()
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and leaf not in module._non_persistent_buffers_set
    }


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns the module of that name (see `named_modules`).

    Raises:
        KeyError: there is none.
    """
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        module = unwrapped(cast(nn.Module, module._modules[part]))
    return module


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter is one process' share of a tensor: under FSDP2, FSDP1 or DeepSpeed's stage 3."""
    return hasattr(tensor, "full_tensor") or bool(getattr(tensor, "_fsdp_flattened", False)) or hasattr(tensor, "ds_id")


def is_spread(model: nn.Module) -> bool:
    """Whether a model's parameters are spread over processes, which keep the weights that they compute with."""
    kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    return not kinds.isdisjoint(("FullyShardedDataParallel", "FSDPModule")) or any(map(is_sharded, model.parameters()))


@contextlib.contextmanager
def adapting_spread() -> Iterator[None]:
    """Lets models under FSDP2 be adapted in a ``with`` block: by whom adds up the adapter's gradients over processes.

    FSDP2 does that only for what was there when it spread the weights, so elsewhere such models are refused.
    """
    token = _ADAPTS_SPREAD.set(True)
    try:
        yield
    finally:
        _ADAPTS_SPREAD.reset(token)


_ADAPTS_SPREAD = contextvars.ContextVar("adapting_spread", default=False)


def may_adapt(weight: Tensor) -> bool:
    """Whether a weight is whole; or spread by FSDP2, inside `adapting_spread`."""
    return not is_sharded(weight) or (_ADAPTS_SPREAD.get() and hasattr(weight, "full_tensor"))


def input_table(model: nn.Module) -> nn.Module | None:
    """Returns the module that looks tokens up, in a model of transformers; None where there is none."""
    return _asked(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the module that makes the logits, in a model of transformers; None where there is none."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):  # not of transformers, or without such a module
        return None
    return found if isinstance(found, nn.Module) else None


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks that a model is a stack of: the members of the list of modules that holds most parameters.

    >>> model = nn.ModuleDict({"table": nn.Embedding(9, 4), "layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
    >>> len(decoder_blocks(model))
    3
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    # Of lists within lists the outer one comes first, which max() keeps.
    largest = max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=None)
    return [] if largest is None else list(largest)


def writes_files(model: nn.Module) -> bool:
    """Whether this process writes what all have: under FSDP, where all must help to gather it, the first one does."""
    return not is_spread(model) or not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Holds the whole parameters of a model under FSDP1 inside a ``with`` block; every process must take part."""
    fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if fsdp is None or not any(isinstance(module, fsdp) for module in model.modules()):
        yield
        return
    with fsdp.summon_full_params(model, writeback=False):
        yield
