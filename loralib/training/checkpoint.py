"""The file of a resumable training state: written aside, synced, read back and only then renamed into place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, FormatError, OutputError, TrainingError, list_faults
from ..files import remove_file
from ..formats.tensors import read_safetensors, write_safetensors
from .progress import Progress

__all__ = ["Checkpoint", "checkpoint_files", "last_checkpoint", "save_checkpoint"]

_STATE = "loralib.checkpoint"
_DIGEST = "loralib.sha256"  # safetensors has no checksum of its own: a flipped bit would go unnoticed


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
        _set_random_states(self.rng, _device(parameters))
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
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    elif device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type == "mps":
        torch.mps.set_rng_state(states["mps"])
    elif device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


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
    try:
        about = json.loads(metadata[_STATE])
        progress, settings = Progress(**about["progress"]), about["settings"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is not a checkpoint of a training run: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {"parameter": {}, "initial": {}, "rng": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind not in parts:
            raise FormatError(f"{path} is not a checkpoint of a training run: it holds {name!r}")
        parts[kind][rest] = tensor
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        number, _, rest = name.partition("/")
        optimizer.setdefault(int(number), {})[rest] = tensor
    return Checkpoint(progress, settings, parts["parameter"], parts["initial"], optimizer, parts["rng"])
