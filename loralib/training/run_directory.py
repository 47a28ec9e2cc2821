"""What a run keeps on disk: checkpoints, the best adapter, the results; and the decision whether to resume.

A checkpoint is written to a temporary file, synced, read back and only then renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..bases import save_tokenizer
from ..console import counted
from ..data import TokenExample
from ..delta import dense
from ..errors import AdapterError, ConfigError, FormatError, OutputError, TrainingError, first_line, list_faults
from ..files import hold_directory, remove_file, write_errors, write_text
from ..formats import TOKENIZER_FILES, beyond_microsoft, save_adapter, write_microsoft
from ..formats.tensors import read_safetensors, write_safetensors
from ..wrapping import is_spread
from .config import AUTOMATIC, TrainConfig
from .ranks import Ranks
from .record import RUN_FILE, SWEEP_FILE, hash_examples, read_record
from .report import Learned, is_our_card, plot_losses, write_card

__all__ = [
    "Checkpoint",
    "Progress",
    "RunDirectory",
    "checkpoint_files",
    "hash_tensors",
    "hold_run",
    "last_checkpoint",
    "move_file",
    "remove_if_empty",
    "remove_temporary",
    "run_settings",
    "save_checkpoint",
    "unused_directory",
    "updates_of",
]

# Settings that may change on resuming: they affect what is kept and shown, not what is computed.
_MAY_DIFFER = frozenset(
    "target output_dir resume overwrite keep_checkpoints report_to save_steps device shard train_data valid_data "
    "data_format columns as_chat chat_template compile".split()
)
# Prefixes of our temporary files, which a run leaves behind if it is killed while writing.
_TEMPORARY = tuple(
    f".{name}"
    for name in (
        *("step-", "ranks-", "adapter_config.json.", "adapter_model.", "pytorch_model.bin.", "loss.png.", "README.md."),
        *("run.toml.", "sweep.", *(f"{name}." for name in TOKENIZER_FILES)),
    )
)
# What a run leaves, and a later run in the same directory moves aside; the config comes last: it marks an adapter.
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin", *TOKENIZER_FILES, "adapter_config.json")
_LEFT = ("tensorboard", "metrics.jsonl", "loss.png", "README.md", "pytorch_model.bin", RUN_FILE, *_ADAPTER)
_FIRST, _LAST = 5, 10  # number of updates whose losses are compared, to tell an explosion from a hard batch
_LEAST = 2  # number of checkpoints to keep during a run: the newest may be damaged
_LENGTHS = frozenset(("num_epochs", "max_steps"))
_STATE = "loralib.checkpoint"
_RENAMED = {"lora_dim": "rank"}  # settings that have been renamed since some checkpoints were written
_DIGEST = "loralib.sha256"  # safetensors has no checksum of its own, so a flipped bit would go unnoticed


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: updates done.
        epoch: epochs done.
        update: updates done in the current epoch, i.e. the position in the data.
        examples, tokens, trained_tokens: number seen so far.
        epoch_loss, epoch_weight: weighted sum of the losses in the current epoch, and sum of the weights.
        train_losses: average training loss of each finished epoch.
        valid_losses: ``[step, loss]`` of each validation; at step 0 it is the loss before training.  If the best
            adapter is chosen by another metric, a third number is its negated value, of which the lowest is best.
        best: the lowest such loss (or third number) after any update.
        bad: number of validations since then.
        first_losses, last_losses: training losses of the first and the last few updates.
        metrics_bytes: length of metrics.jsonl; on resuming, anything that a crash left beyond it is cut off.
        finished: whether the run reached its end.
        ranks: number of processes that wrote this.
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
    first_losses: list[float] = field(default_factory=list)
    last_losses: list[float] = field(default_factory=list)
    metrics_bytes: int = 0
    finished: bool = False
    ranks: int = 1

    def end_epoch(self, complete: bool) -> float:
        """Closes an epoch, which may have ended early, and returns its average training loss."""
        average = self.epoch_loss / max(self.epoch_weight, 1e-9)
        self.train_losses.append(average)
        self.epoch_loss = self.epoch_weight = 0.0
        if complete:
            self.epoch, self.update = self.epoch + 1, 0
        return average

    @property
    def of_ranks(self) -> str:
        """Names the number of processes, if there were several, for use in a sentence."""
        return f" of {self.ranks} processes" if self.ranks > 1 else ""

    def result(self) -> dict[str, Any]:
        """Returns the outcome of the run, without what only its checkpoints need."""
        passing = "epoch_loss epoch_weight first_losses last_losses metrics_bytes finished bad ranks".split()
        return {name: value for name, value in asdict(self).items() if name not in passing}

    def add_loss(self, loss: float) -> None:
        """Records the training loss of an update."""
        self.first_losses = [*self.first_losses, loss][:_FIRST]
        self.last_losses = [*self.last_losses, loss][-_LAST:]

    def why_diverged(self, guessing: float = math.inf) -> str:
        """Returns why the last updates made the model useless, or "" if they did not.

        Some batches are harder than others, so this compares averages over updates with the highest of the first
        losses.  Validation losses are of the same examples, but also rise when a run learns its data by heart; they
        count once the training loss is above the base's.

        Args:
            guessing: the loss of a model for which all answers are equally likely.

        >>> progress = Progress(valid_losses=[[0, 2.5]], first_losses=[2, 3, 2, 3, 2], last_losses=[6] * 9)
        >>> progress.why_diverged()
        ''
        >>> progress.add_loss(20.0)
        >>> progress.why_diverged()
        'the training loss exploded: 7.4 over the last 10 updates'
        """
        if not self.last_losses:
            return ""
        average = sum(self.last_losses) / len(self.last_losses)
        before = [entry[1] for entry in self.valid_losses if entry[0] == 0]
        # Only the first loss is the base's own; the others may already have exploded.
        limit = min(2 * max(self.first_losses + before) + 1, max(2 * self.first_losses[0] + 1, 0.99 * guessing))
        if len(self.last_losses) == _LAST and average >= limit:
            return f"the training loss exploded: {average:.3g} over the last {_LAST} updates"
        if before and (last := self.valid_losses[-1][1]) >= 2 * before[0] + 1 and average > before[0]:
            return f"the validation loss exploded: {last:.3g}, and {before[0]:.3g} before training"
        return ""

    def add_validation(self, loss: float, score: float | None = None) -> bool:
        """Records a validation loss; returns whether it, or `score` if given, is the lowest so far after any update."""
        self.valid_losses.append([self.step, loss] if score is None else [self.step, loss, score])
        if self.step == 0:
            return False
        score = loss if score is None else score
        is_best = self.best is None or score < self.best
        self.best, self.bad = (score, 0) if is_best else (self.best, self.bad + 1)
        return is_best

    def is_due(self, every: int, last_step: int) -> bool:
        """Whether an action that runs every `every` updates (0: at the end of each epoch) is due."""
        return self.step == last_step or (self.step % every == 0 if every else self.update == 0)

    def owes_validation(self, every: int, last_step: int) -> bool:
        """Whether the initial validation is missing, or a signal prevented the one after the last update."""
        if not self.valid_losses:
            return self.step == 0
        return self.valid_losses[-1][0] < self.step and self.is_due(every, last_step)

    def best_validation(self) -> tuple[int, float] | None:
        """Returns (step, loss) of the best validation after any update, the earliest on a tie; None if there is none.

        >>> Progress(valid_losses=[[0, 1.0], [4, 2.0], [8, 1.5], [12, 1.5]]).best_validation()
        (8, 1.5)
        """
        best = min((entry for entry in self.valid_losses if entry[0]), key=lambda entry: entry[-1], default=None)
        return None if best is None else (int(best[0]), best[1])


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to continue as if it had never stopped.

    Attributes:
        progress: how far the run had come.
        settings: settings that must be the same on resuming.
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
        """Captures the current state of a run; tensors are not copied."""
        state = optimizer.state_dict()["state"].items()
        tensors = {number: {name: torch.as_tensor(value) for name, value in of.items()} for number, of in state}
        return cls(progress, settings, parameters, initial, tensors, _random_states(_device(parameters)))

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Restores parameters, optimiser and random generators; returns `initial` on the parameters' devices."""
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
            TrainingError: some differ; names every setting, or every parameter, that does.
        """
        require_same_settings(self.settings, settings, path)
        shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (self.parameters, parameters)]
        if faults := _differences(*shapes):
            raise TrainingError(
                list_faults(f"{path} belongs to a model with a different adapter", faults, "Inject the original one.")
            )


def require_same_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], path: Path, *, is_over: bool = False
) -> None:
    """Refuses settings that differ from those of the run in a file, except for settings that did not exist then.

    With a constant learning rate, a run may be extended, because no update depends on where the run ends.  A run that
    is over, however, has no checkpoint to continue from.
    """
    then = {name: then.get(name, value) for name, value in now.items()} | dict(then)
    faults = _differences(then, now)
    if not faults:
        return
    differ = {name for name in then if then[name] != now.get(name)}
    advice = "Resume with the original settings, or start over with --overwrite or another --output_dir."
    if differ <= _LENGTHS:
        if then.get("schedule") == "constant" and _is_longer(then, now) and not is_over:
            return
        advice = (
            f"The learning rate falls towards the end of a run ({then.get('schedule')}), so a longer run is a "
            "different one. Finish it with the original settings; then continue from its adapter, with --from_adapter "
            "DIR and another --output_dir. (With --schedule constant and --keep_checkpoints 1 from the start, a run "
            "can be extended.)"
        )
    raise TrainingError(list_faults(f"{path} belongs to a run with different settings", faults, advice))


def _is_longer(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    def length(settings: Mapping[str, Any]) -> tuple[int, int]:
        return (1, settings["max_steps"]) if settings["max_steps"] else (0, settings["num_epochs"])

    return length(now)[0] == length(then)[0] and length(now) > length(then)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {then.get(name, 'absent')!r} then, {now.get(name, 'absent')!r} now"
        for name in sorted({*then, *now})
        if then.get(name, "absent") != now.get(name, "absent")
    ]


def save_checkpoint(directory: Path, state: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint into a directory, removes all but the last `keep` there, and returns the file.

    Raises:
        OutputError: it cannot be written, or does not read back as written; older checkpoints are untouched.
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
    # Later files were unreadable when the run resumed from an earlier one: they must not count among the files to keep,
    # nor be tried first when it resumes again.
    later = files[files.index(path) + 1 :]
    for other in (*later, *files[: files.index(path) + 1][:-keep]):
        remove_file(other)
    return path


def last_checkpoint(
    directory: Path, tell: Callable[[str], None] | None = None, at_most: int | None = None
) -> tuple[Checkpoint, Path] | None:
    """Reads the newest readable checkpoint in a directory; None if there are no checkpoints.

    `tell` is called with a line about each newer one that cannot be read.  Checkpoints with more than `at_most` updates
    are ignored, if it is given.

    Raises:
        FormatError: there are checkpoints, but none can be read; all are named.
    """
    faults = []
    for path in reversed(checkpoint_files(directory)):
        if at_most is not None and updates_of(path) > at_most:
            continue
        try:
            checkpoint = _read(path)
        except AdapterError as error:
            faults.append(str(error))
            continue
        if tell is not None:
            for fault in faults:
                tell(f"{fault}; falling back to {path.name}")
        return checkpoint, path
    if faults:
        raise FormatError(
            list_faults(
                f"no checkpoint in {directory} can be read",
                faults,
                "Start over with --overwrite, or restore a checkpoint.",
            )
        )
    return None


def checkpoint_files(directory: Path) -> list[Path]:
    """Returns the checkpoints in a directory, oldest first."""
    return sorted(directory.glob("step-*.safetensors"))


def updates_of(checkpoint: Path) -> int:
    """Returns the number of updates in a checkpoint's file name.

    >>> updates_of(Path("step-00000040.safetensors"))
    40
    """
    return int(checkpoint.stem.removeprefix("step-"))


def _device(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Returns the states of the random generators that a run on this device uses."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(*_index(device))
    return states


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # Apple's only GPU has no number


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns a short hash of the values of some tensors."""
    return _digest("", {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})[:16]


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
        raise FormatError(f"{path} was written without a checksum by an early loralib, so damage would go unnoticed")
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


@contextmanager
def hold_run(config: TrainConfig, ranks: Ranks) -> Iterator[RunDirectory]:
    """Locks a run's output directory, on rank 0, and checks that all ranks see the same one.

    Raises:
        OutputError: see `hold_directory`.
        ConfigError: some rank sees another directory.
    """
    with ExitStack() as stack:
        path = ranks.on_first_rank(lambda: stack.enter_context(hold_directory(config.output_dir)))
        if ranks.size > 1:
            mark = ranks.on_first_rank(lambda: _mark(path))
            blind = [rank for rank, sees in enumerate(ranks.gather(mark.exists())) if not sees]
            ranks.on_first_rank(lambda: remove_file(mark))
            if blind:
                raise ConfigError(
                    f"output_dir {path} is not the same directory on rank {', '.join(map(str, blind))} as on rank 0: "
                    "choose a directory on a disk that all machines share"
                )
        yield RunDirectory(path, config, tidy=ranks.is_first)


def _mark(directory: Path) -> Path:
    mark = directory / f".ranks-{secrets.token_hex(8)}.tmp"
    write_text(mark, "")
    return mark


class RunDirectory:
    """The output directory of one run, whose lock the caller holds (see `hold_run`).

    Attributes:
        path, checkpoints: the directory, and the one for its checkpoints.
        best: where the adapter with the lowest validation loss so far is saved.
        config: the run's settings.
        tokenizer, chats: tokenizer to save beside the adapters, and whether they are trained on chats.
        resume_at: maximum number of updates in a checkpoint to resume from; None: any number.
        reference: where the reference of preferences is kept, which the runs of a sweep share.
        unit, shown: what the loss averages over, and which other metrics are plotted.

    Args:
        tidy: whether to remove temporary files left by a killed run.
    """

    def __init__(self, path: Path, config: TrainConfig, *, tidy: bool = True) -> None:
        self.path, self.checkpoints, self.best = path, path / "checkpoints", path / "best"
        self.config = config
        self.tokenizer: Any = None
        self.chats = False
        self.resume_at: int | None = None
        self.reference = self.checkpoints / "reference.safetensors"
        self.unit, self.shown = "token", tuple[str, ...]()
        self._then: Mapping[str, Any] | None = None
        for folder in (self.path, self.checkpoints, self.best) if tidy else ():
            remove_temporary(folder)

    def look(self) -> Mapping[str, Any]:
        """Checks existing files before anything is loaded; returns the settings of the run to resume, if any.

        Raises:
            TrainingError: an unfinished run would be lost.
            ConfigError: the directory is that of a sweep.
            FormatError: no checkpoint can be read.
        """
        if self._then is None:
            if (self.path / SWEEP_FILE).exists():
                raise ConfigError(f"{self.path} contains a sweep: choose another --output_dir for a single run")
            discards = self.config.overwrite and not self.config.resume
            last = None if discards else last_checkpoint(self.checkpoints)
            if last is not None and not last[0].progress.finished and not self.config.resume:
                raise TrainingError(
                    f"{self.path} contains a run{last[0].progress.of_ranks} that stopped after "
                    f"{counted(last[0].progress.step, 'update')}. Add --resume to continue it, with any number of "
                    "processes, add --overwrite to discard it, or choose another --output_dir."
                )
            self._then = last[0].settings if last is not None and self.config.resume else {}
        return self._then

    def finished_run(self) -> Progress | None:
        """Returns the outcome of the run to resume if nothing is left to do, else None; its checkpoints may be gone.

        Raises:
            TrainingError: it had other settings.
        """
        if not self.config.resume or checkpoint_files(self.checkpoints):
            return None
        settings, record = read_record(self.path)
        if "result" not in record or not (self.path / "adapter_config.json").exists():
            return None
        config, defaults = self.config.to_dict(), {spec.name: spec.default for spec in fields(TrainConfig)}
        left_open = {name for name in AUTOMATIC if config[name] is None}
        names = [name for name in config if name not in _MAY_DIFFER | left_open | {"model"}]
        then = {name: settings.get(name, defaults[name]) for name in names}
        require_same_settings(
            then, _as_json({name: config[name] for name in names}), self.path / RUN_FILE, is_over=True
        )
        return Progress(**{**record["result"], "finished": True})

    def checkpoint_to_resume(
        self, settings: Mapping[str, Any], parameters: Mapping[str, Tensor], say: Callable[[str], None]
    ) -> Checkpoint | None:
        """Returns the checkpoint to resume from; or clears the directory for a new run and returns None.

        Files of an earlier run are moved aside; `overwrite` discards them.  `settings` come from `run_settings`; `say`
        is called with a line about each unreadable checkpoint, and about where files were moved.

        Raises:
            TrainingError: the checkpoint belongs to another run.
            FormatError: no checkpoint can be read.
        """
        if self.config.resume:
            last = last_checkpoint(self.checkpoints, lambda fault: say(f"WARNING: {fault}"), self.resume_at)
            if last is not None:
                last[0].require_same(settings, parameters, last[1])
                return last[0]
        if not self.config.overwrite and (aside := self._move_aside()):
            say(f"The files of an earlier run were moved to {aside}")
        self._remove_checkpoints()
        return None

    def _move_aside(self) -> Path | None:
        """Moves what an earlier run left into a directory of its own; the user's other files stay."""
        if not (self.path / "adapter_config.json").exists():
            return None  # the run produced no adapter
        aside = unused_directory(self.path)
        self.move(aside)
        return aside

    def move(self, target: Path) -> None:
        """Moves what an earlier run left into another directory; the user's other files stay."""
        for source in self._left():
            move_file(source, target / source.relative_to(self.path))
        self._remove_empty_folders()

    def discard(self) -> None:
        """Removes what an earlier run left; the user's other files stay."""
        for path in self._left():
            if path.is_dir():
                with write_errors(path):
                    shutil.rmtree(path)
            else:
                remove_file(path)
        self._remove_empty_folders()

    def _remove_empty_folders(self) -> None:
        for folder in (self.best, self.checkpoints):
            remove_if_empty(folder)

    def _left(self) -> list[Path]:
        """Returns an earlier run's files, without a README.md of the user's or the tokenizer of a model stored here."""
        paths = [*self._own_reference, *checkpoint_files(self.checkpoints), *(self.best / name for name in _ADAPTER)]
        paths += [self.path / name for name in _LEFT]
        is_model, card = (self.path / "config.json").exists(), self.path / "README.md"
        foreign = {card} if card.exists() and not is_our_card(card) else set()
        foreign |= {self.path / name for name in TOKENIZER_FILES} if is_model else set()
        return [path for path in paths if path.exists() and path not in foreign]

    def keep_checkpoints(self) -> None:
        """Removes the checkpoints of a finished run, except those that were requested."""
        keep = self.config.keep_checkpoints
        files = checkpoint_files(self.checkpoints)
        for path in [*files[: len(files) - keep], *self._own_reference[: not keep]]:
            remove_file(path)
        remove_if_empty(self.checkpoints)

    def save(self, state: Checkpoint) -> None:
        """Writes a checkpoint and removes all but the last few."""
        save_checkpoint(self.checkpoints, state, max(_LEAST, self.config.keep_checkpoints))

    def write_reference(self, key: Mapping[str, Any], values: Tensor) -> None:
        """Saves the log-probabilities of pairs under the reference, for resuming; `key` identifies model and data."""
        write_safetensors(self.reference, {"log_probs": values}, {_STATE: json.dumps(key)})

    def read_reference(self, key: Mapping[str, Any]) -> Tensor | None:
        """Returns what `write_reference` saved under this key; None if there is nothing."""
        with suppress(AdapterError, OSError):
            tensors, metadata = read_safetensors(self.reference)
            if metadata.get(_STATE) == json.dumps(key):
                return tensors["log_probs"]
        return None

    @property
    def _own_reference(self) -> list[Path]:
        return [self.reference] if self.reference.parent == self.checkpoints else []

    def _remove_checkpoints(self) -> None:
        for path in checkpoint_files(self.checkpoints):  # oldest first: if killed here, the finished one remains
            remove_file(path)
        for path in self._own_reference:
            remove_file(path)
        remove_if_empty(self.checkpoints)

    def save_adapter(self, model: nn.Module, directory: Path, ranks: Ranks) -> None:
        """Saves the adapter, on rank 0; if the base is sharded, all ranks help to compute its fingerprint."""
        (ranks.on_all_ranks if is_spread(model) else ranks.on_first_rank)(
            lambda: save_adapter(model, directory) and None
        )

    def write_results(
        self,
        model: nn.Module,
        progress: Progress,
        data: Sequence[Mapping[str, Any]],
        say: Callable[[str], None],
        ranks: Ranks,
    ) -> int:
        """Writes a run's results, the adapter before any description of it; returns the size of its tensors."""
        learned = Learned.of(model, self.config.model)
        ranks.on_first_rank(lambda: self._write_microsoft(learned.adapter))
        self.save_adapter(model, self.path, ranks)
        ranks.on_first_rank(lambda: self._describe(learned, progress, data, say))
        return learned.adapter.nbytes

    def _write_microsoft(self, adapter: Adapter) -> None:
        if beyond_microsoft(adapter):  # Microsoft's loralib does not have this variant
            remove_file(self.path / "pytorch_model.bin")
        else:
            write_microsoft(adapter, self.path / "pytorch_model.bin")

    def _describe(
        self, learned: Learned, progress: Progress, data: Sequence[Mapping[str, Any]], say: Callable[[str], None]
    ) -> None:
        if self.tokenizer is not None:
            for place in [self.path, self.best] if progress.valid_losses and self.best.is_dir() else [self.path]:
                save_tokenizer(self.tokenizer, place, chats=self.chats)
        title = f"LoRA on {learned.base}, r={learned.adapter.config.r}"
        try:
            plot_losses(self.path / "metrics.jsonl", self.path / "loss.png", title, self.unit, self.shown)
        except Exception as error:  # any library error: a plot is not worth losing a run
            say(f"WARNING: {self.path / 'loss.png'} could not be drawn: {first_line(error)}")
        if not progress.valid_losses:  # then `best` stems from an earlier run
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                remove_file(self.best / name)
            remove_if_empty(self.best)
        write_card(self.path, learned, self.config, progress, data)

    def divergence(self, fault: str, progress: Progress) -> TrainingError:
        """Returns the error for a non-finite or exploding loss or gradient: what is saved, and what to try."""
        if progress.step == 0:
            return TrainingError(
                f"{fault}: the base model itself produces this, since nothing has been trained yet. "
                "Try --dtype fp32, and check the model's weights."
            )
        best = progress.best_validation()
        saved = f" {self.best} contains the adapter from update {best[0]}." if best else ""
        lr, ratio = self.config.peak_lr, self.config.loraplus_lr_ratio
        return TrainingError(
            f"{fault}. {self._saved()}{saved} Lower --lr (now {lr:g}) or --loraplus_lr_ratio (now {ratio:g}), raise "
            "--warmup_steps, or try --dtype fp32; then start over with --overwrite."
        )

    def less_memory(self) -> str:
        """Returns a message that says what is saved, and what reduces memory use."""
        return (
            f"{self._saved()} Lower --batch_size (now {self.config.batch_size}) and raise --grad_accum to make up "
            f"for it, lower --seq_len (now {self.config.seq_len}), or add --gradient_checkpointing."
        )

    def _saved(self) -> str:
        """Returns a sentence for error messages that says which checkpoint is intact."""
        try:
            last = last_checkpoint(self.checkpoints)
        except (OSError, AdapterError):
            last = None
        if last is None:
            return "No checkpoint has been written yet."
        return f"The checkpoint from update {last[0].progress.step} is intact ({last[1]})."


def remove_temporary(directory: Path) -> None:
    """Removes temporary files that a killed run left in a directory."""
    for file in directory.glob(".*.tmp"):
        if file.name.startswith(_TEMPORARY):
            remove_file(file)


def unused_directory(path: Path) -> Path:
    """Returns the first of previous-1, previous-2, ... that does not exist in a directory."""
    number = 1
    while (aside := path / f"previous-{number}").exists():
        number += 1
    return aside


def move_file(source: Path, target: Path) -> None:
    """Moves a file or directory, and creates the directory that it moves to."""
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(settings)))  # tuples become lists, as in checkpoints and TOML


def run_settings(
    model: nn.Module, config: TrainConfig, examples: Sequence[TokenExample], valid: Sequence[TokenExample]
) -> dict[str, Any]:
    """Returns what must be the same on resuming: settings that affect results, the data, the frozen weights."""
    settings = {name: value for name, value in config.to_dict().items() if name not in _MAY_DIFFER}
    data = {"training data": hash_examples(examples), "validation data": hash_examples(valid)}
    return {**_as_json(settings), **data, "base model": _hash_frozen(model)}


def _hash_frozen(model: nn.Module) -> str:
    """Returns the dtypes of the frozen weights (--dtype auto may choose others elsewhere), and a hash of samples."""
    digest, dtypes = hashlib.sha256(), set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            dtypes.add(str(parameter.dtype).removeprefix("torch."))
            flat = dense(parameter).detach().reshape(-1)
            samples = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(parameter.shape)} {samples.tolist()}\n".encode())
    return f"{' and '.join(sorted(dtypes))} {digest.hexdigest()[:16]}"


def remove_if_empty(directory: Path) -> None:
    """Removes a directory, unless it does not exist or holds the user's files."""
    with suppress(OSError):
        directory.rmdir()
