"""Checkpoints of transformers' Trainer, which reads them back itself: to resume, and to load the best model.

It recognises PEFT's models by their class, and expects weights of the whole model in the checkpoints of all others. It
finds a model.safetensors with only the trained tensors there, and leaves the other parameters unchanged.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import nn

from ..injection import injection_of
from .tensors import write_safetensors

__all__ = ["is_trainer_checkpoint", "save_trained_weights"]


def is_trainer_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Tells whether a directory is named like a Trainer's checkpoint.

    >>> is_trainer_checkpoint("out/checkpoint-500"), is_trainer_checkpoint("out")
    (True, False)
    """
    return re.fullmatch(r"checkpoint-\d+", Path(directory).name) is not None


def save_trained_weights(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the trained tensors to model.safetensors, under their names in the model.

    Args:
        model: adapted by `loralib.inject`.
        directory: the checkpoint's directory.
    """
    record = injection_of(model)
    in_full = set() if record is None else set(record.originals)
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name in trained | in_full}
    write_safetensors(Path(directory) / "model.safetensors", tensors)
