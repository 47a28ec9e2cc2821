"""Memory during a run: what it will need, what to keep, and what to say when it runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..budget import free_on, training_budget
from ..engine.forward import device_of
from ..errors import ConfigError, TrainingError
from ..wrapping import is_spread

__all__ = ["explain_out_of_memory", "freeze_objects", "gradient_checkpointing", "memory_estimate"]


@contextmanager
def freeze_objects() -> Iterator[None]:
    """Exempts the objects that exist now from Python's garbage collection.

    PyTorch and transformers hold half a million objects, which stay.  Walking over them took 0.2 s every 30 steps of a
    small model.
    """
    gc.collect()  # garbage would be frozen, too
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Recomputes activations in the backward pass instead of storing them.

    Raises:
        ConfigError: the model does not offer it.
    """
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5
    enable = getattr(model, f"{kind}_checkpointing_enable", None)
    disable = getattr(model, f"{kind}_checkpointing_disable", None)
    if not callable(enable) or not callable(disable):
        raise ConfigError(f"gradient_checkpointing: {type(model).__name__} does not support it; leave it out")
    was_on = bool(getattr(model, f"is_{kind}_checkpointing", False))
    enable({"use_reentrant": False})  # the reentrant kind trains nothing below a frozen embedding
    try:
        yield
    finally:
        if not was_on:
            disable()


# How allocators report it: PyTorch's on Linux and macOS, on Windows, on CUDA and MPS, cuBLAS.
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


@contextmanager
def explain_out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turns whatever says that memory ran out into a TrainingError with advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(message in str(error) for message in _MESSAGES):
            raise
        raise TrainingError(f"memory ran out. {advice()}") from error


def memory_estimate(
    model: nn.Module, tokens: int, checkpointing: bool, *, planned: bool = False
) -> tuple[float, float | None]:
    """Estimates the bytes that training an adapted model needs, with so many tokens in a step (see `training_budget`).

    Also returns how many bytes the machine has free, None where it does not say.  `planned`: what will be needed beside
    the model that is there, before it has an adapter; then each linear counts as adapted.
    """
    sharded = is_spread(model)
    processes = torch.distributed.get_world_size() if sharded else 1
    budget = training_budget(
        model,
        tokens,
        checkpointing=checkpointing,
        processes=processes,
        sharded=sharded,
        adapted=True if planned else None,
    )
    needed = budget.total - budget.program - (budget.weights if planned else 0)
    return needed, free_on(device_of(model))
