"""Runs a complete training from settings alone: loads data and base model, then trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data import CLASSIFY, Encoded, Labels, Source, load_examples, read_sources
from ..errors import ConfigError, DataError
from .classification import labels_for
from .config import TrainConfig
from .plan import how_to_read
from .ranks import joined
from .record import settings_and_versions
from .report import Reporter
from .run_directory import hold_run
from .start import base_for, load_base_for

if TYPE_CHECKING:
    from .trainer import TrainResult

__all__ = ["load_examples_for", "read_data", "run_job"]


def load_examples_for(config: TrainConfig, sources: Any, tokenizer: Any, limit: int) -> Encoded:
    """Reads, tokenizes and samples a run's examples (see `load_examples`), at most `limit` of them; 0: all."""
    return load_examples(
        sources,
        tokenizer,
        **how_to_read(config),
        seq_len=config.seq_len,
        max_samples=limit or None,
        seed=config.seed,
    )


def run_job(config: TrainConfig) -> TrainResult:
    """Trains an adapter from settings alone, including `train_data`, and prints progress; see `train`."""
    from .trainer import finished, run_in

    if config.train_data is None:
        raise ConfigError("no training data given: add --train_data FILE (E2E lines `meaning||text`, or .jsonl)")
    with joined() as ranks:
        ranks.require_same(settings_and_versions(config))
        # Checks whatever needs no model before loading one: the data, the directory, the adapter.
        sources, valid_sources, labels = ranks.on_all_ranks(lambda: read_data(config))
        reporter = Reporter(ranks.is_first)
        with hold_run(config, ranks) as directory:
            if (ended := ranks.on_first_rank(directory.finished_run)) is not None:
                return finished(directory, ended, reporter)
            ranks.on_first_rank(directory.look)
            reporter.say(f"Loading {base_for(config)} ...")
            model, tokenizer = load_base_for(config, ranks, labels)
            return run_in(directory, model, sources, config, tokenizer, valid_sources, reporter, ranks)


def read_data(config: TrainConfig) -> tuple[list[Source], list[Source] | None, Labels | None]:
    """Reads the training and validation files named in a run's settings, and determines their labels."""
    kinds, faults, read = how_to_read(config), list[str](), list[Any]()
    for data in (config.train_data, config.valid_data):
        try:
            read.append(None if data is None else read_sources(data, **kinds))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    train, valid = read
    return train, valid, labels_for(config, train, valid) if config.task == CLASSIFY else None
