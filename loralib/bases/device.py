"""Choosing the device and the dtype of a base model, by name or by default."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Final, cast

import torch

from ..errors import ConfigError, did_you_mean

__all__ = ["DTYPES", "pick_device", "pick_dtype"]

DTYPES: Final = ("auto", "fp32", "bf16", "fp16")  # the names in flags and settings
_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Returns the device with this name, or the best one available: CUDA, then Apple's MPS, then the CPU.

    Raises:
        ConfigError: there is no such device on this machine.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    available: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device is None:
        return torch.device(next((kind for kind, check in available.items() if check()), "cpu"))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        hint = did_you_mean(str(device), ["cpu", *available])
        raise ConfigError(f"device is {str(device)!r}, expected cpu, cuda or mps.{hint}") from error
    if chosen.type in available and not available[chosen.type]():
        raise ConfigError(f"device is {str(device)!r}, but PyTorch finds no such device here. Use --device cpu.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {str(device)!r}, but there are only {torch.cuda.device_count()} CUDA devices. Use a lower "
            "number."
        )
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Returns the dtype with this name; for None or "auto": bf16 if the device is fast in it, else fp32.

    Raises:
        ConfigError: there is no such dtype.

    >>> pick_dtype("bf16", torch.device("cpu"))
    torch.bfloat16
    """
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if _is_fast_in_bf16(device.type) else torch.float32
    chosen = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(dtype.lower().removeprefix("torch."))
    if chosen not in _DTYPES.values():
        raise ConfigError(f"dtype is {str(dtype)!r}, expected bf16, fp16 or fp32.{did_you_mean(str(dtype), _DTYPES)}")
    return cast(torch.dtype, chosen)


@functools.cache
def _is_fast_in_bf16(device_type: str) -> bool:
    """Tells whether bf16 is worth using on a device.

    CUDA reports it.  On other devices no flag is reliable (a CPU may emulate bf16, slowly), so a matrix product is
    timed: with bf16 units it is 3 to 5 times as fast as in fp32, without them slower; 1.5 times separates the two.
    """
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    try:
        factors = {dtype: torch.ones(384, 384, dtype=dtype, device=device_type) for dtype in best}
        for _ in range(6):  # interleaved, keeping the fastest: the machine may be busy
            for dtype, factor in factors.items():
                start = time.perf_counter()
                (factor @ factor)[0, 0].item()  # item() waits for the device
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    except (RuntimeError, TypeError):  # old versions of MPS have no bf16
        return False
    return best[torch.float32] > 1.5 * best[torch.bfloat16]
