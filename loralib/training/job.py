"""A whole training job from settings alone: read the data, load the base model, train."""

from __future__ import annotations

from ..data import Encoded, read_sources
from ..errors import ConfigError
from . import train
from .config import TrainConfig
from .inputs import load_base_for, load_examples_for
from .reporter import Reporter
from .trainer import TrainResult

__all__ = ["run_job"]


def run_job(config: TrainConfig) -> TrainResult:
    """Trains an adapter from settings alone and prints what happens.

    Args:
        config: `train_data` must be given.

    Returns:
        Losses, speed, and where the adapter is.

    Raises:
        LoraError: whatever goes wrong, with a message for the user.
    """
    if config.train_data is None:
        raise ConfigError("no training data given: --train_data FILE (E2E lines `meaning||text`, or .jsonl)")
    # Data first: a wrong file should show before a model is loaded.
    sources = read_sources(config.train_data, config.data_format)
    valid_sources = None if config.valid_data is None else read_sources(config.valid_data, config.data_format)
    say = Reporter().say
    say(f"Loading {config.model} ...")
    model, tokenizer = load_base_for(config)
    training = load_examples_for(config, sources, tokenizer, config.max_train_samples)
    say(f"Loaded {len(training):,} training examples{_dropped(training)}")
    if valid_sources is None:
        return train(model, training.examples, config)
    valid = load_examples_for(config, valid_sources, tokenizer, config.max_valid_samples)
    say(f"Loaded {len(valid):,} validation examples{_dropped(valid)}")
    return train(model, training.examples, config, valid_data=valid.examples)


def _dropped(encoded: Encoded) -> str:
    return f" ({encoded.drop_note})" if encoded.drop_note else ""
