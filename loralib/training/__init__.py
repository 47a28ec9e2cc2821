"""Training: `TrainConfig` says how, `train` does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .config import TrainConfig

if TYPE_CHECKING:
    from .plan import Data
    from .trainer import TrainResult

__all__ = ["TrainConfig", "train"]


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
