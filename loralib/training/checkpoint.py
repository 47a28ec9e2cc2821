"""Resumable training state, and its file: written aside, synced, read back and only then renamed into place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, FormatError, OutputError, TrainingError, list_faults
from ..files import remove_file
from ..formats.tensors import read_safetensors, write_safetensors

__all__ = ["Checkpoint", "Progress", "checkpoint_files", "last_checkpoint", "save_checkpoint"]

_STATE = "loralib.checkpoint"
_RENAMED = {"lora_dim": "rank"}  # settings that checkpoints from before a new name hold under the old one
_DIGEST = "loralib.sha256"  # safetensors has no checksum of its own: a flipped bit would go unnoticed


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: updates done.
        epoch: epochs done.
        update: updates done in the current epoch, which is the position in the data.
        examples, tokens, trained_tokens: seen so far.
        epoch_loss, epoch_weight: weighted sum of the losses in the current epoch, and sum of the weights.
        train_losses: average training loss of each finished epoch.
        valid_losses: ``[step, loss]`` of each validation; at step 0 it is the loss before training.
        best: lowest validation loss after any update.
        bad: validations since then.
        metrics_bytes: length of metrics.jsonl; on resuming, whatever a crash left after it is cut off.
        finished: whether the run reached its end.
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

    def add_update(self, loss: float, weight: float) -> None:
        """Counts one update, whose loss enters the epoch's average with a weight."""
        self.step, self.update = self.step + 1, self.update + 1
        self.epoch_loss, self.epoch_weight = self.epoch_loss + loss * weight, self.epoch_weight + weight

    def end_epoch(self, complete: bool) -> float:
        """Closes an epoch, which may have stopped early, and returns its average training loss."""
        average = self.epoch_loss / max(self.epoch_weight, 1e-9)
        self.train_losses.append(average)
        self.epoch_loss = self.epoch_weight = 0.0
        if complete:
            self.epoch, self.update = self.epoch + 1, 0
        return average

    def add_validation(self, loss: float) -> bool:
        """Records a validation loss; returns whether it is the lowest one after any update."""
        self.valid_losses.append([self.step, loss])
        if self.step == 0:
            return False
        is_best = self.best is None or loss < self.best
        self.best, self.bad = (loss, 0) if is_best else (self.best, self.bad + 1)
        return is_best

    def is_stale(self, patience: int) -> bool:
        """Whether the last `patience` validations were no better than the best before (0: never)."""
        return 0 < patience <= self.bad

    def is_due(self, every: int, last_step: int) -> bool:
        """Whether something happens now that happens every so many updates (0: at the end of each epoch)."""
        return self.step == last_step or (self.step % every == 0 if every else self.update == 0)

    def owes_validation(self, every: int, last_step: int) -> bool:
        """Whether no validation was done yet, or a signal came before that of the last update."""
        if not self.valid_losses:
            return self.step == 0
        return self.valid_losses[-1][0] < self.step and self.is_due(every, last_step)

    def best_validation(self) -> tuple[int, float] | None:
        """(step, loss) of the earliest lowest validation loss after any update, or None.

        >>> Progress(valid_losses=[[0, 1.0], [4, 2.0], [8, 1.5], [12, 1.5]]).best_validation()
        (8, 1.5)
        """
        return min(((int(s), loss) for s, loss in self.valid_losses if s), key=lambda pair: pair[1], default=None)


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to continue as if it had never stopped.

    Attributes:
        progress: how far it came.
        settings: what must be the same when it resumes.
        parameters: the trained parameters by name.
        initial: their values before the first update, by name (to tell whether anything was learned).
        optimizer: the optimiser's state: ``{number: {name: tensor}}``.
        rng: states of the random generators by device.
    """

    progress: Progress
    settings: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    initial: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Tensor]]
    rng: Mapping[str, Tensor]

    @classmethod
    def capture(
        cls,
        progress: Progress,
        settings: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter],
        initial: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> Checkpoint:
        """Takes the state of a run as it is now; tensors are not copied."""
        state = optimizer.state_dict()["state"].items()
        tensors = {number: {name: torch.as_tensor(value) for name, value in of.items()} for number, of in state}
        return cls(progress, settings, parameters, initial, tensors, _random_states(_device(parameters)))

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Puts parameters, optimiser and random generators back; returns `initial` on the parameters' devices."""
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.parameters[name])
        state = {number: dict(values) for number, values in self.optimizer.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        torch.set_rng_state(self.rng["cpu"])
        device = _device(parameters)
        if device.type != "cpu" and device.type in self.rng:
            torch.get_device_module(device).set_rng_state(self.rng[device.type], *_index(device))
        return {name: tensor.to(parameters[name].device) for name, tensor in self.initial.items()}

    def require_same(self, settings: Mapping[str, Any], parameters: Mapping[str, Tensor], path: Path) -> None:
        """Refuses to resume with other settings or another adapter, which would be neither the old run nor a new one.

        Raises:
            TrainingError: names every setting, or every parameter, that differs.
        """
        if faults := _differences(self.settings, settings):
            raise TrainingError(
                list_faults(
                    f"{path} belongs to a run with other settings",
                    faults,
                    "Resume with the original settings, or start anew with --overwrite or another --output_dir.",
                )
            )
        shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (self.parameters, parameters)]
        if faults := _differences(*shapes):
            raise TrainingError(
                list_faults(f"{path} belongs to a model with another adapter", faults, "Inject the original one.")
            )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {then.get(name, 'absent')!r} then, {now.get(name, 'absent')!r} now"
        for name in sorted({*then, *now})
        if then.get(name, "absent") != now.get(name, "absent")
    ]


def save_checkpoint(directory: Path, state: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint and removes all but the last `keep`.

    Args:
        directory: holds the checkpoints.
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
        if metadata.get(_STATE) != about or _digest(about, back) != digest:
            raise OutputError(f"{path} does not read back as it was written; check the disk")

    write_safetensors(path, plain, {_STATE: about, _DIGEST: digest}, check)
    files = checkpoint_files(directory)
    # Later files could not be read when the run resumed from an earlier one: they must neither count among the last
    # few, nor come first when it resumes again.
    later = files[files.index(path) + 1 :]
    for other in (*later, *files[: files.index(path) + 1][:-keep]):
        remove_file(other)
    return path


def last_checkpoint(directory: Path, tell: Callable[[str], None] | None = None) -> tuple[Checkpoint, Path] | None:
    """Reads the newest readable checkpoint of a directory; None if there are no checkpoints.

    Args:
        directory: holds the checkpoints.
        tell: called with a line about each newer one that cannot be read.

    Raises:
        FormatError: there are files, and none can be read; all are named.
    """
    faults = []
    for path in reversed(checkpoint_files(directory)):
        try:
            checkpoint = _read(path)
        except AdapterError as error:
            faults.append(str(error))
            continue
        if tell is not None:
            for fault in faults:
                tell(f"{fault}; going back to {path.name}")
        return checkpoint, path
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


def _device(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators that a run on this device draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(*_index(device))
    return states


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # Apple's only GPU has no number


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> Checkpoint:
    tensors, metadata = read_safetensors(path)
    if _STATE not in metadata:
        raise FormatError(f"{path} is not a checkpoint of a training run")
    if _DIGEST not in metadata:
        raise FormatError(f"{path} was written by an early loralib without a checksum, so damage would go unnoticed")
    if metadata[_DIGEST] != _digest(metadata[_STATE], tensors):
        raise FormatError(f"{path} is damaged: its content does not match its checksum")
    parts: dict[str, dict[str, Tensor]] = {"parameter": {}, "initial": {}, "rng": {}}
    optimizer: dict[int, dict[str, Tensor]] = {}
    try:
        about = json.loads(metadata[_STATE])
        progress = Progress(**about["progress"])
        settings = {_RENAMED.get(name, name): value for name, value in about["settings"].items()}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                number, _, rest = rest.partition("/")
                optimizer.setdefault(int(number), {})[rest] = tensor
            else:
                parts[kind][rest] = tensor
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is not a checkpoint of a training run: {error}") from error
    return Checkpoint(progress, settings, parts["parameter"], parts["initial"], optimizer, parts["rng"])
