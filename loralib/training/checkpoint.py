"""Resumable training state: written aside, synced, read back and only then renamed; the last few are kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, FormatError, OutputError, TrainingError, list_faults
from ..files import remove_file
from ..formats.tensors import read_safetensors, write_safetensors

__all__ = [
    "Checkpoint",
    "Progress",
    "checkpoint_files",
    "last_checkpoint",
    "remove_checkpoints",
    "remove_leftovers",
    "save_checkpoint",
]

_STATE = "loralib.checkpoint"
_DIGEST = "loralib.sha256"  # safetensors has no checksum of its own: a flipped bit would go unnoticed


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: updates done.
        epoch: epochs done.
        update: updates done in the current epoch: the place in the data.
        examples, tokens, trained_tokens: seen so far.
        epoch_loss, epoch_weight: sum of losses and of their weights in the current epoch.
        train_losses: average training loss of each epoch done.
        valid_losses: ``[step, loss]`` of each validation.
        best: lowest validation loss of an adapter (not the base's).
        bad: validations since.
        metrics_bytes: length of metrics.jsonl; what a crash left behind it is cut off on resuming.
        finished: whether the run came to its end.
    """

    step: int = 0
    epoch: int = 0
    update: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    epoch_loss: float = 0.0
    epoch_weight: float = 0.0
    train_losses: list[float] = field(default_factory=list)
    valid_losses: list[list[float]] = field(default_factory=list)
    best: float | None = None
    bad: int = 0
    metrics_bytes: int = 0
    finished: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
        progress: how far it came.
        settings: what must be the same when it goes on (see `require_same`).
        parameters: the trained parameters by name.
        initial: what they were before the first update, by name (to tell whether anything was learned).
        optimizer: the optimiser's state: ``{number: {name: tensor}}``.
        rng: states of the random generators by device.
    """

    progress: Progress
    settings: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    initial: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Tensor]]
    rng: Mapping[str, Tensor]

    def require_same(self, settings: Mapping[str, Any], path: Path) -> None:
        """Refuses to go on with other settings, which would be neither the old run nor a new one.

        Raises:
            TrainingError: names every setting that differs.
        """
        faults = [
            f"{name}: {self.settings.get(name)!r} then, {settings.get(name)!r} now"
            for name in sorted({*self.settings, *settings})
            if self.settings.get(name) != settings.get(name)
        ]
        if faults:
            raise TrainingError(
                list_faults(
                    f"{path} belongs to a run with other settings",
                    faults,
                    "Resume with the settings of then, or start anew with --overwrite or another --output_dir.",
                )
            )

    def require_fitting(self, parameters: Mapping[str, Tensor], path: Path) -> None:
        """Refuses to go on with a model whose adapter is another one.

        Raises:
            TrainingError: names every parameter that differs.
        """
        theirs = {name: tuple(tensor.shape) for name, tensor in self.parameters.items()}
        ours = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        faults = [
            f"{name}: {theirs.get(name, 'absent')} then, {ours.get(name, 'absent')} now"
            for name in sorted({*theirs, *ours})
            if theirs.get(name) != ours.get(name)
        ]
        if faults:
            raise TrainingError(
                list_faults(f"{path} belongs to a model with another adapter", faults, "Inject the one of then.")
            )


def save_checkpoint(directory: Path, state: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint and removes all but the last `keep`.

    Args:
        directory: where checkpoints live.
        state: what to save.
        keep: how many files may stay.

    Returns:
        The file.

    Raises:
        OutputError: it cannot be written, or does not read back as it was written; older ones are untouched.
    """
    path = directory / f"step-{state.progress.step:08}.safetensors"
    tensors = {f"parameter/{name}": tensor for name, tensor in state.parameters.items()}
    tensors |= {f"initial/{name}": tensor for name, tensor in state.initial.items()}
    tensors |= {f"rng/{name}": tensor for name, tensor in state.rng.items()}
    for number, values in state.optimizer.items():
        tensors |= {f"optimizer/{number}/{name}": tensor for name, tensor in values.items()}
    about = json.dumps({"progress": asdict(state.progress), "settings": dict(state.settings)})
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = _digest(about, plain)

    def check(temporary: Path) -> None:
        back, metadata = read_safetensors(temporary)
        if metadata.get(_STATE) != about or back.keys() != plain.keys():
            raise OutputError(f"{path} does not read back as it was written; check the disk")
        for name, tensor in plain.items():
            if not torch.equal(_bytes(back[name]), _bytes(tensor)):
                raise OutputError(f"{path}: {name} does not read back as it was written; check the disk")

    write_safetensors(path, plain, {_STATE: about, _DIGEST: digest}, check)
    files = checkpoint_files(directory)
    # What is later than this one could not be read when the run went on from an earlier one: it must neither count
    # among the last few, nor come first when the run goes on again.
    later = files[files.index(path) + 1 :]
    for other in (*later, *files[: files.index(path) + 1][:-keep]):
        remove_file(other)
    return path


def last_checkpoint(directory: Path, tell: Callable[[str], None] | None = None) -> tuple[Checkpoint, Path] | None:
    """Reads the newest checkpoint of a directory that can be read, or None if there is none.

    Args:
        directory: where checkpoints live.
        tell: called with a line about each newer one that cannot be read.

    Raises:
        AdapterError: there are files, and none can be read; all are named.
    """
    faults = []
    for path in reversed(checkpoint_files(directory)):
        try:
            found = _read(path)
        except AdapterError as error:
            faults.append(str(error))
            continue
        if tell is not None:
            for fault in faults:
                tell(f"{fault}; going back to {path.name}")
        return found, path
    if faults:
        raise FormatError(
            list_faults(
                f"no checkpoint in {directory} can be read", faults, "Start anew with --overwrite, or restore one."
            )
        )
    return None


def checkpoint_files(directory: Path) -> list[Path]:
    """Returns the checkpoints of a directory, oldest first."""
    return sorted(directory.glob("step-*.safetensors"))


def remove_checkpoints(directory: Path) -> None:
    """Removes every checkpoint of a directory, newest last, and the directory if nothing else is in it."""
    for path in checkpoint_files(directory):
        remove_file(path)
    if directory.is_dir() and not any(directory.iterdir()):
        os.rmdir(directory)


def remove_leftovers(directory: Path) -> None:
    """Removes what a run that was killed while it wrote left of unfinished files; only for who holds the directory."""
    for folder in (directory, directory / "checkpoints", directory / "best"):
        for path in folder.glob(".*.tmp"):
            if path.name.startswith(_WRITTEN):
                remove_file(path)


_WRITTEN = tuple(
    f".{name}"
    for name in ("step-", "adapter_config.json.", "adapter_model.", "pytorch_model.bin.", "loss.png.", "README.md.")
)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        digest.update(_bytes(tensors[name]).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> Checkpoint:
    tensors, metadata = read_safetensors(path)
    if _STATE in metadata and _DIGEST not in metadata:
        raise FormatError(
            f"{path} is of an early loralib, which wrote no checksum: whether it is as it was written cannot be told"
        )
    try:
        if metadata[_DIGEST] != _digest(metadata[_STATE], tensors):
            raise FormatError(f"{path} is damaged: its content does not have the checksum that it was written with")
        about = json.loads(metadata[_STATE])
        progress, settings = Progress(**about["progress"]), about["settings"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is no checkpoint of a training run: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {"parameter": {}, "initial": {}, "rng": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind not in parts:
            raise FormatError(f"{path} is no checkpoint of a training run: it holds {name!r}")
        parts[kind][rest] = tensor
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        number, _, rest = name.partition("/")
        optimizer.setdefault(int(number), {})[rest] = tensor
    return Checkpoint(progress, settings, parts["parameter"], parts["initial"], optimizer, parts["rng"])
