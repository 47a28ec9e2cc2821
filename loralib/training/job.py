"""From settings alone to a whole run: the data, the base model, the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data import Encoded, load_examples, read_sources
from ..errors import ConfigError
from ..files import hold_directory
from .config import TrainConfig
from .plan import how_to_read
from .report import Reporter
from .run_directory import RunDirectory
from .start import load_base_for

if TYPE_CHECKING:
    from .trainer import TrainResult

__all__ = ["load_base_for", "load_examples_for", "run_job"]


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


def run_job(config: TrainConfig) -> TrainResult:
    """Trains an adapter from settings alone, among them `train_data`, and prints what happens; see `train`."""
    from .trainer import finished, run_in

    if config.train_data is None:
        raise ConfigError("no training data given: --train_data FILE (E2E lines `meaning||text`, or .jsonl)")
    # What can be wrong without a model shows before one is loaded: the data, the directory, the adapter.
    sources = read_sources(config.train_data, **how_to_read(config))
    valid_sources = None if config.valid_data is None else read_sources(config.valid_data, **how_to_read(config))
    reporter = Reporter()
    with hold_directory(config.output_dir) as path:
        directory = RunDirectory(path, config)
        if (ended := directory.finished_run()) is not None:
            return finished(directory, ended, reporter)
        directory.look()
        reporter.say(f"Loading {config.model} ...")
        model, tokenizer = load_base_for(config)
        return run_in(directory, model, sources, config, tokenizer, valid_sources, reporter)
