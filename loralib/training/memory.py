"""Memory during a run: what it will need, what to keep, and what to say when it runs out."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..budget import free_on, training_budget
from ..engine.forward import device_of
from ..errors import ConfigError, TrainingError
from ..wrapping import is_spread

__all__ = ["explain_out_of_memory", "freeze_objects", "gradient_checkpointing", "keep_freed_memory", "memory_estimate"]

# Parameters of glibc's mallopt(3).  Setting either ends glibc's own adjustment of both, so a run leaves them where that
# would have ended up: blocks of up to 32 MiB come from the heap, of which 64 MiB may lie idle at its end.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MMAP_USUAL, _TRIM_USUAL, _MMAP_LEAN = 32 << 20, 64 << 20, 1 << 20


@contextmanager
def keep_freed_memory(lean: bool = False) -> Iterator[None]:
    """Keeps memory that the process frees for its next step, instead of returning it to the system.

    A step frees large tensors that the next one allocates again.  glibc returns such blocks to the system, which hands
    them out again page by page, each cleared first.  An allocator that the environment configures is left alone.

    Args:
        lean: return large blocks after all, where memory matters more than time.  Before glibc 2.38 a freed block has
            no room for an aligned one of its own size, so that kept memory is full of holes.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    if lean:
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_LEAN)
    elif not libc.mallopt(_MMAP_THRESHOLD, 1 << 30):  # older versions refuse so much
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_USUAL)
    if not lean:
        libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_USUAL)
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_USUAL)
        libc.malloc_trim(0)


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


def _glibc() -> Any:
    """The C library if it is glibc with default settings; other allocators keep memory, or have no such setting."""
    if not sys.platform.startswith("linux"):
        return None
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None


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
        raise ConfigError(f"gradient_checkpointing: {type(model).__name__} does not offer it; leave it out")
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
