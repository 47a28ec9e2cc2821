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
from torch import Tensor, nn

from ..delta import stored_bytes
from ..errors import ConfigError, TrainingError
from ..files import free_memory
from ..injection import adapted_layers
from ..layers import is_conv1d

__all__ = ["explain_out_of_memory", "freeze_objects", "gradient_checkpointing", "keep_freed_memory", "memory_estimate"]

# Parameters of glibc's mallopt(3).  Setting either ends glibc's own adjustment of both, so a run leaves them where that
# would have ended up: blocks of up to 32 MiB come from the heap, of which 64 MiB may lie idle at its end.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MMAP_USUAL, _TRIM_USUAL = 32 << 20, 64 << 20


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keeps memory that the process frees for its next step, instead of returning it to the system.

    A step frees large tensors that the next one allocates again.  glibc returns such blocks to the system, which hands
    them out again page by page, each cleared first.  An allocator that the environment configures is left alone.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    if not libc.mallopt(_MMAP_THRESHOLD, 1 << 30):  # older versions refuse so much
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_USUAL)
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
    model: nn.Module, tokens: int, checkpointing: bool, prepacked_bytes: int = 0, *, planned: bool = False
) -> tuple[float, float | None]:
    """Estimates the bytes that training an adapted model needs, with so many tokens in a step.

    `prepacked_bytes` are those of the prepacked copies of frozen weights (see `Step`).  Also returns how many bytes the
    machine has free, None where it does not say.  `planned`: what will be needed beside the model that is there, before
    it has an adapter; then each linear counts as adapted.

    Weights are exact.  The rest was measured on SmolLM2 and GPT-2: for the backward pass a token keeps the inputs of
    the linears, 3.5 times where they are adapted (with what norms, activations and attention keep around them), twice
    where they are not.
    """
    weights = 0 if planned else sum(map(stored_bytes, model.parameters())) + prepacked_bytes
    # Gradient, two moments and the initial values, all in fp32.
    trained = 0 if planned else sum(p.numel() for p in model.parameters() if p.requires_grad) * 16
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    adapted = {layer for _, layer in adapted_layers(model)}
    activations = 0.0  # of one token
    for module in model.modules():
        is_adapted = module in adapted
        weight = getattr(module, "base_weight" if is_adapted else "weight", None)
        if isinstance(module, nn.Embedding) or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        if not is_adapted and weight.shape[0] == vocabulary:  # the head computes in chunks
            continue
        width = weight.shape[0 if is_conv1d(module) or getattr(module, "fan_in_fan_out", False) else 1]
        activations += (3.5 if is_adapted or planned else 2) * width * weight.element_size()
    head_chunk = 256 * vocabulary * 8
    device = next(model.parameters()).device
    free = float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()
    return weights + trained + tokens * activations * (0.25 if checkpointing else 1.0) + head_chunk, free
