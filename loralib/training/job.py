"""From settings to a training job: the base model, the token examples to train on, and the whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..bases import load_base
from ..data import Encoded, TokenExample, load_examples, read_sources
from ..errors import ConfigError
from . import train
from .config import TrainConfig
from .report import Reporter

if TYPE_CHECKING:
    from .trainer import TrainResult

__all__ = ["Data", "load_base_for", "load_examples_for", "run_job", "token_examples"]

Data = Any  # whatever `read_sources` takes, or TokenExample values


def load_base_for(config: TrainConfig) -> tuple[nn.Module, Any]:
    """Loads the base model that a run trains on, and its tokenizer (see `load_base`)."""
    return load_base(
        config.model,
        dtype=None if config.dtype == "auto" else config.dtype,
        device=config.device,
        seed=config.seed,
        hidden_dim=config.hidden_dim,
        num_layers=config.num_layers,
    )


def load_examples_for(config: TrainConfig, sources: Any, tokenizer: Any, limit: int) -> Encoded:
    """Reads, tokenizes and draws a run's examples (see `load_examples`), at most `limit` of them; 0: all."""
    return load_examples(
        sources,
        tokenizer,
        **how_to_read(config),
        seq_len=config.seq_len,
        objective=config.objective,
        max_samples=limit or None,
        seed=config.seed,
    )


def how_to_read(config: TrainConfig) -> dict[str, Any]:
    """Returns a run's arguments for `read_sources`."""
    return {"format": config.data_format, "columns": config.columns, "as_chat": config.as_chat}


def token_examples(
    data: Data, tokenizer: Any, config: TrainConfig, limit: int, name: str, say: Callable[[str], None]
) -> list[TokenExample]:
    """Turns whatever `loralib.train` accepts as data into token examples.

    Args:
        data: whatever `read_sources` takes, or `TokenExample` values.
        tokenizer: for files and text.
        config: how to read and tokenize.
        limit: how many examples to draw; 0: all.
        name: "training" or "validation".
        say: called with how many examples there are, unless tokens were given.

    Raises:
        ConfigError: text without a tokenizer.
        DataError: no data, or data of another kind (see `read_sources`).
    """
    if isinstance(data, Sequence) and data and all(isinstance(item, TokenExample) for item in data):
        return list(data)
    sources = read_sources(data, **how_to_read(config), name=f"{name} data")
    if tokenizer is None:
        raise ConfigError(f"{name} data is text, which needs a tokenizer: pass tokenizer=")
    encoded = load_examples_for(config, sources, tokenizer, limit)
    for note in encoded.notes:
        say(note)
    say(f"Loaded {encoded.summary(name)}")
    if encoded.length_warning:
        say(f"warning: {encoded.length_warning}")
    return encoded.examples


def run_job(config: TrainConfig) -> TrainResult:
    """Trains an adapter from settings alone, among them `train_data`, and prints what happens; see `train`."""
    if config.train_data is None:
        raise ConfigError("no training data given: --train_data FILE (E2E lines `meaning||text`, or .jsonl)")
    # Data first: a wrong file should show before a model is loaded.
    sources = read_sources(config.train_data, **how_to_read(config))
    valid_sources = None if config.valid_data is None else read_sources(config.valid_data, **how_to_read(config))
    Reporter().say(f"Loading {config.model} ...")
    model, tokenizer = load_base_for(config)
    return train(model, sources, config, tokenizer=tokenizer, valid_data=valid_sources)
