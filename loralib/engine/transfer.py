"""Tensors on their way to a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns a tensor of the CPU on a device.

    A plain copy to a GPU waits until the GPU has done all that it was given before.  From pinned memory it takes its
    turn, and the program goes on.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
