"""A whole training job from settings alone: read the data, load the base model, train."""

from __future__ import annotations

from ..data import read_sources
from ..errors import ConfigError
from . import train
from .config import TrainConfig
from .inputs import load_base_for
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
    Reporter().say(f"Loading {config.model} ...")
    model, tokenizer = load_base_for(config)
    return train(model, sources, config, tokenizer=tokenizer, valid_data=valid_sources)
