"""Training: `TrainConfig` says how, `train` does it."""

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
    """Trains the adapter of a model and saves it in ``config.output_dir``.

    Signal handlers and random generators belong to the whole process, so calls from several threads take turns.

    Args:
        model: a causal language model.  If it has no adapter, it gets the one that `config` describes.
        data: training files, examples, or token examples.
        config: the settings; see `TrainConfig`.
        tokenizer: required if data are files or text.
        valid_data: like `data`; the loss on it is measured before, during and after training.
        verbose: print what is trained, progress and results.

    Returns:
        Losses, speed, and where the adapter is.

    Raises:
        NothingLearnedError: no gradient reaches an adapted layer, or the adapter ends as it began.
        TrainingError: the loss is not finite or explodes, memory runs out, or an unfinished run is in the way.
        InterruptedRunError: a signal, such as Ctrl-C, stopped the run, which saved itself first.
        OutputError: output_dir cannot be written, or another run holds it.
    """
    from .trainer import run  # when it is called: the loop needs most of the package, `import loralib` does not

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
    """Trains several adapters at once over one base, and tells which is best.

    Runs of plain LoRA on linear layers share the base's passes: each has its own examples, optimiser, schedule and end,
    and the losses that it has by itself.  Other runs follow one after the other.  One that diverges is dropped, and
    the others go on.

    Args:
        model: a causal language model without an adapter; afterwards it is what it was.
        data: as for `train`.
        configs: the settings of each run.  What is read and loaded is the same for all of them.
        tokenizer: required if data are files or text.
        valid_data: like `data`.
        output_dir: gets a directory for each run, called after the settings that differ; ``best``, the adapter with
            the lowest validation loss (training loss, without validation data); sweep.json and sweep.png.
        verbose: print what happens.

    Returns:
        What has become of each run, and which is best.

    Raises:
        ConfigError: runs are the same, differ in what they must share, or need more memory than there is.
        TrainingError: all runs were dropped.
        InterruptedRunError: a signal stopped the sweep, whose runs saved themselves first.
    """
    from .many import train_all

    return train_all(model, data, configs, tokenizer, valid_data, output_dir, verbose)
