"""Training: `TrainConfig` holds the settings, `train` carries them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .config import TrainConfig

if TYPE_CHECKING:
    from .plan import Data
    from .sweep_record import SweepResult
    from .trainer import TrainResult

__all__ = ["TrainConfig", "train", "train_many"]


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    tokenizer: Any = None,
    valid_data: Data | None = None,
    verbose: bool = True,
) -> TrainResult:
    """Trains a model's adapter and saves it in ``config.output_dir``.

    Signal handlers and random generators belong to the whole process, so calls from several threads take turns.

    Args:
        model: a causal language model.  If it has no adapter, it gets the one that `config` describes.
        data: training files, examples, or token examples.
        config: the settings; see `TrainConfig`.
        tokenizer: required if the data are files or text.
        valid_data: like `data`; the loss on it is measured before, during and after training.
        verbose: whether to print what is trained, progress and results.

    Returns:
        Losses, speed, and where the adapter is.

    Raises:
        NothingLearnedError: no gradient reaches an adapted layer, or the adapter is unchanged after training.
        TrainingError: the loss is not finite or explodes, memory runs out, or output_dir holds an unfinished run.
        InterruptedRunError: a signal, such as Ctrl-C, stopped the run, which saved its state first.
        OutputError: output_dir cannot be written, or another run has locked it.
    """
    from .trainer import run  # imported late: the loop needs most of the package, `import loralib` does not

    return run(model, data, config or TrainConfig(), tokenizer, valid_data, verbose)


def train_many(
    model: nn.Module,
    data: Data,
    configs: Sequence[TrainConfig],
    *,
    tokenizer: Any = None,
    valid_data: Data | None = None,
    output_dir: str = "lora_sweep",
    verbose: bool = True,
) -> SweepResult:
    """Trains several adapters on one base at the same time, and finds the best.

    Runs of plain LoRA on linear layers share forward and backward passes of the base, but each has its own examples,
    optimiser, schedule and end, and the same losses as on its own.  Other runs follow one after the other.  A run that
    diverges is dropped; the others continue.

    Args:
        model: a causal language model without an adapter; it is left unchanged.
        data: as for `train`.
        configs: the settings of each run.  Data and base model must be the same for all of them.
        tokenizer: required if the data are files or text.
        valid_data: like `data`.
        output_dir: receives a directory for each run, named after the settings that differ; ``best``, the adapter with
            the lowest validation loss (training loss, without validation data); sweep.json and sweep.png.
        verbose: whether to print progress and results.

    Returns:
        The outcome of each run, and which is best.

    Raises:
        ConfigError: runs are identical, differ in what they must share, or need more memory than is available.
        TrainingError: all runs were dropped.
        InterruptedRunError: a signal stopped the sweep, whose runs saved their states first.
    """
    from .many import train_all

    return train_all(model, data, configs, tokenizer, valid_data, output_dir, verbose)
