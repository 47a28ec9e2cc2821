"""The checkpoints of transformers' Trainer, which reads them back by itself: to resume, and to load the best model.

It knows PEFT's models by their class, and looks into the checkpoints of all others for weights of the whole model.
There it finds a model.safetensors with the tensors that train; what is not in it, it leaves as it is.
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
    """Tells whether a directory has the name of a Trainer's checkpoint.

    >>> is_trainer_checkpoint("out/checkpoint-500"), is_trainer_checkpoint("out")
    (True, False)
    """
    return re.fullmatch(r"checkpoint-\d+", Path(directory).name) is not None


def save_trained_weights(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the tensors that train to model.safetensors, under the names that they have in the model.

    Args:
        model: adapted by `loralib.inject`.
        directory: of the checkpoint.
    """
    record = injection_of(model)
    in_full = set() if record is None else set(record.originals)
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name in trained | in_full}
    write_safetensors(Path(directory) / "model.safetensors", tensors)
