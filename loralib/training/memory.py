"""Memory during a run: estimating it, saving it, and explaining when it runs out."""

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
    """Exempts all existing objects from Python's garbage collection.

    PyTorch and transformers hold half a million permanent objects.  Scanning them took 0.2 s every 30 steps of a small
    model.
    """
    gc.collect()  # otherwise garbage would be frozen as well
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Recomputes activations in the backward pass instead of storing them.

    Raises:
        ConfigError: the model does not support it.
    """
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5
    enable = getattr(model, f"{kind}_checkpointing_enable", None)
    disable = getattr(model, f"{kind}_checkpointing_disable", None)
    if not callable(enable) or not callable(disable):
        raise ConfigError(f"gradient_checkpointing: {type(model).__name__} does not support it; leave it out")
    was_on = bool(getattr(model, f"is_{kind}_checkpointing", False))
    enable({"use_reentrant": False})  # reentrant checkpointing trains nothing below a frozen embedding
    try:
        yield
    finally:
        if not was_on:
            disable()


# Messages of allocators: PyTorch's on Linux and macOS, on Windows, on CUDA and MPS; cuBLAS.
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


@contextmanager
def explain_out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turns any error that means out of memory into a TrainingError with advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(message in str(error) for message in _MESSAGES):
            raise
        raise TrainingError(f"memory ran out. {advice()}") from error


def memory_estimate(
    model: nn.Module, tokens: int, checkpointing: bool, *, planned: bool = False
) -> tuple[float, float | None]:
    """Estimates the bytes needed to train an adapted model, with this many tokens per step (see `training_budget`).

    Also returns the free bytes on the device, or None if unknown.  With `planned`, counts what will be needed in
    addition to a model that has no adapter yet; every linear layer then counts as adapted.
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
