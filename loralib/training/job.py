"""From settings to a training job: the base model, the token examples to train on, and the whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..bases import load_base
from ..data import Encoded, Example, Source, TokenExample, encode, load_examples, read_sources
from ..errors import ConfigError, DataError
from . import train
from .config import TrainConfig
from .report import Reporter

if TYPE_CHECKING:
    from .trainer import TrainResult

__all__ = ["Data", "load_base_for", "load_examples_for", "run_job", "token_examples"]

Data = str | Path | Sequence[str] | Sequence[Source] | Sequence[Example] | Sequence[TokenExample]


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
        format=config.data_format,
        columns=config.columns,
        as_chat=config.as_chat,
        seq_len=config.seq_len,
        objective=config.objective,
        max_samples=limit or None,
        seed=config.seed,
    )


def token_examples(
    data: Data, tokenizer: Any, config: TrainConfig, limit: int, name: str, say: Callable[[str], None]
) -> list[TokenExample]:
    """Turns whatever `loralib.train` accepts as data into token examples.

    Args:
        data: files (paths, or what `read_sources` read of them), `Example` (text) or `TokenExample`.
        tokenizer: for files and text.
        config: how to read and tokenize.
        limit: how many examples to draw from files; 0: all.
        name: "training" or "validation".
        say: called with how many examples there are, unless tokens were given.

    Raises:
        ConfigError: text without a tokenizer.
        DataError: no data, or data of another kind.
    """
    items: Sequence[Any] = [data] if isinstance(data, (str, Path)) else data
    if not items:
        raise DataError(f"{name} data is empty, expected at least one example")
    kinds = {type(item) for item in items}
    if kinds == {TokenExample}:
        return list(items)
    are_files = all(isinstance(item, (str, Path, Source)) for item in items)
    if not are_files and kinds != {Example}:
        raise DataError(
            f"{name} data holds {' and '.join(sorted(kind.__name__ for kind in kinds))}, expected Example (text: "
            "Example.of(prompt, completion)) or TokenExample, or the paths of files"
        )
    if tokenizer is None:
        kind = "a file" if are_files else "text"
        raise ConfigError(f"{name} data is {kind}, which needs a tokenizer: pass tokenizer=")
    if are_files:
        encoded = load_examples_for(config, items, tokenizer, limit)
    else:
        encoded = encode(items, tokenizer, config.seq_len, config.objective)
    dropped = f" ({encoded.drop_note})" if encoded.drop_note else ""
    say(f"Loaded {len(encoded):,} {name} examples{dropped}")
    return encoded.examples


def run_job(config: TrainConfig) -> TrainResult:
    """Trains an adapter from settings alone, among them `train_data`, and prints what happens; see `train`."""
    if config.train_data is None:
        raise ConfigError("no training data given: --train_data FILE (E2E lines `meaning||text`, or .jsonl)")
    # Data first: a wrong file should show before a model is loaded.
    sources = read_sources(config.train_data, config.data_format)
    valid_sources = None if config.valid_data is None else read_sources(config.valid_data, config.data_format)
    Reporter().say(f"Loading {config.model} ...")
    model, tokenizer = load_base_for(config)
    return train(model, sources, config, tokenizer=tokenizer, valid_data=valid_sources)
