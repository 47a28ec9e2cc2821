"""What a run keeps on disk: checkpoints, the best adapter, the results, and whether to resume what is there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import adapter_of
from ..data import TokenExample
from ..delta import dense
from ..errors import AdapterError, TrainingError
from ..files import remove_file
from ..formats import save_adapter, write_microsoft
from .checkpoint import Checkpoint, Progress, checkpoint_files, last_checkpoint, save_checkpoint
from .config import TrainConfig
from .report import plot_losses, write_card

__all__ = ["RunDirectory", "run_settings"]

# Settings that may differ when a run resumes: they change what is kept and shown, not what is computed.
_MAY_DIFFER = frozenset(
    "target output_dir resume overwrite keep_checkpoints report_to save_steps device train_data valid_data "
    "data_format".split()
)
# How the names of our temporary files begin, which a run leaves behind when it is killed while writing.
_TEMPORARY = tuple(
    f".{name}"
    for name in ("step-", "adapter_config.json.", "adapter_model.", "pytorch_model.bin.", "loss.png.", "README.md.")
)


class RunDirectory:
    """The output directory of one run, which must hold its lock (see `hold_directory`)."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.checkpoints, self.best = path, path / "checkpoints", path / "best"
        self._config = config
        for folder in (self.path, self.checkpoints, self.best):
            for file in folder.glob(".*.tmp"):
                if file.name.startswith(_TEMPORARY):
                    remove_file(file)

    def checkpoint_to_resume(
        self, settings: Mapping[str, Any], parameters: Mapping[str, Tensor], say: Callable[[str], None]
    ) -> Checkpoint | None:
        """Returns the checkpoint to resume from, or None to start anew, which removes the checkpoints there.

        Args:
            settings: see `run_settings`.
            parameters: the trained parameters by name.
            say: called with a line about each checkpoint that cannot be read.

        Raises:
            TrainingError: there is nothing to resume, or it is another run's; or an unfinished run would be lost.
            FormatError: no checkpoint can be read.
        """
        config = self._config
        if config.overwrite and not config.resume:
            self._remove_checkpoints()
            return None
        last = last_checkpoint(self.checkpoints, lambda fault: say(f"WARNING: {fault}"))
        if config.resume:
            if last is None:
                raise TrainingError(f"{self.path} holds no checkpoint to resume from; leave out --resume to start")
            last[0].require_same(settings, parameters, last[1])
            return last[0]
        if last is not None and not last[0].progress.finished:
            raise TrainingError(
                f"{self.path} holds a run that stopped after {last[0].progress.step} updates. Add --resume to "
                "continue it, --overwrite to discard it, or choose another --output_dir."
            )
        self._remove_checkpoints()
        return None

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint and removes old ones."""
        save_checkpoint(self.checkpoints, checkpoint, self._config.keep_checkpoints)

    def save_best(self, model: nn.Module) -> None:
        """Saves the adapter with the lowest validation loss so far."""
        save_adapter(model, self.best)

    def write_results(self, model: nn.Module, progress: Progress, example_count: int) -> int:
        """Writes what the run leaves, the adapter last; returns the size of the adapter's tensors in bytes."""
        adapter = adapter_of(model)
        write_microsoft(adapter, self.path / "pytorch_model.bin")
        base = getattr(model, "name_or_path", "") or self._config.model
        plot_losses(self.path / "metrics.jsonl", self.path / "loss.png", f"LoRA on {base}, r={adapter.config.r}")
        if not progress.valid_losses:  # `best` is then from an earlier run here
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                remove_file(self.best / name)
            _remove_if_empty(self.best)
        write_card(self.path, model, self._config, progress, example_count)
        save_adapter(model, self.path)
        return adapter.nbytes

    def divergence(self, fault: str, progress: Progress) -> TrainingError:
        """Returns the error for a loss or gradient that went wrong: what is saved, and what to try."""
        if progress.step == 0:
            return TrainingError(
                f"{fault}: the model itself produces it, nothing has been trained yet. Try --dtype fp32, and look at "
                "its weights."
            )
        best = progress.best_validation()
        saved = f" {self.best} holds the adapter of update {best[0]}." if best else ""
        lr, ratio = self._config.lr, self._config.loraplus_lr_ratio
        return TrainingError(
            f"{fault}. {self._saved()}{saved} Lower --lr (now {lr:g}) or --loraplus_lr_ratio (now {ratio:g}), raise "
            "--warmup_steps, or try --dtype fp32; then start anew with --overwrite."
        )

    def less_memory(self) -> str:
        """Returns what is saved, and what needs less memory."""
        return (
            f"{self._saved()} Lower --batch_size (now {self._config.batch_size}) and raise --grad_accum to make up "
            f"for it, lower --seq_len (now {self._config.seq_len}), or add --gradient_checkpointing."
        )

    def _saved(self) -> str:
        """A sentence for error messages: which checkpoint is intact."""
        try:
            last = last_checkpoint(self.checkpoints)
        except (OSError, AdapterError):
            last = None
        if last is None:
            return "There is no checkpoint yet."
        return f"The checkpoint of update {last[0].progress.step} is intact ({last[1]})."

    def _remove_checkpoints(self) -> None:
        """The newest last, so that a run killed meanwhile leaves a finished one."""
        for path in checkpoint_files(self.checkpoints):
            remove_file(path)
        _remove_if_empty(self.checkpoints)


def run_settings(
    model: nn.Module, config: TrainConfig, examples: Sequence[TokenExample], valid: Sequence[TokenExample]
) -> dict[str, Any]:
    """Returns what must be the same for a run to resume: settings that change results, the data, the frozen weights."""
    settings = {name: value for name, value in config.to_dict().items() if name not in _MAY_DIFFER}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}  # as in JSON
    data = {"training data": _hash_examples(examples), "validation data": _hash_examples(valid)}
    return {**plain, **data, "base model": _hash_frozen(model)}


def _hash_examples(examples: Iterable[TokenExample]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.ids, example.trained)).encode())
    return digest.hexdigest()[:16]


def _hash_frozen(model: nn.Module) -> str:
    """The dtypes of the frozen weights (--dtype auto may choose another one elsewhere), and a hash of samples."""
    digest, dtypes = hashlib.sha256(), set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            dtypes.add(str(parameter.dtype).removeprefix("torch."))
            flat = dense(parameter).detach().reshape(-1)
            samples = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(parameter.shape)} {samples.tolist()}\n".encode())
    return f"{' and '.join(sorted(dtypes))} {digest.hexdigest()[:16]}"


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):  # not there, or it holds the user's files
        directory.rmdir()
