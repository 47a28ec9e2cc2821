"""What a server holds: the base model, its adapters, the thread that generates, and the directories it may touch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bases import load_base
from ..engine.bank import Bank
from ..errors import ConfigError
from ..generation.service import Service
from .jobs import Jobs
from .settings import ServeConfig

__all__ = ["Server", "start"]


@dataclass
class Server:
    """What is served.

    Attributes:
        config: the settings.
        name: what the base model is called in the API.
        bank: the base with its adapters.
        tokenizer: the base's tokenizer.
        service: the thread that generates.
        jobs: training jobs, and the files that they train on.
    """

    config: ServeConfig
    name: str
    bank: Bank
    tokenizer: Any
    service: Service
    jobs: Jobs

    @property
    def state_dir(self) -> Path:
        """Where files and jobs are kept."""
        return Path(self.config.state_dir)

    def close(self) -> None:
        """Ends what runs."""
        self.jobs.close()
        self.service.close()


def start(config: ServeConfig) -> Server:
    """Loads the base and its adapters, and starts the thread that generates.

    Raises:
        LoraError: a model or adapter cannot be loaded.
    """
    name = config.model or "smollm2-135m"
    model, tokenizer = load_base(name, dtype=config.dtype, device=config.device)
    bank = Bank(model)
    for word in config.adapter:
        called, equals, directory = word.partition("=")
        if not equals:
            raise ConfigError(f"--adapter is {word!r}, expected NAME=DIR")
        bank.load(called, directory)
    service = Service(bank, tokenizer, max_requests=config.max_requests)
    jobs = Jobs(
        config.state_dir,
        max_jobs=config.max_jobs,
        model=name,
        base=(bank.model, tokenizer),
        on_finished=lambda job, adapter: service.call(lambda: bank.load(job.adapter_name, adapter, replace=True)),
    )
    return Server(config, name, bank, tokenizer, service, jobs)
