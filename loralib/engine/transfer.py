"""Copies of tensors to a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns a copy of a CPU tensor on a device.

    A plain copy to a GPU waits until the GPU has finished all earlier work.  From pinned memory, the copy is queued,
    and the program continues.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
