"""What a server holds: the base model, its adapters, the thread that generates, and the directories it may touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bases import common_base, load_base, with_chat_template
from ..engine.bank import Bank
from ..errors import AdapterError, ConfigError, LoraError, did_you_mean, list_faults
from ..formats import locate_adapter
from ..generation.service import Service
from ..generation.text import end_with_turns
from .errors import RequestError
from .jobs import Jobs
from .metrics import Metrics
from .settings import ServeConfig
from .shelf import Shelf, adapter_directories, directory_below

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
        adapters: what is known of the adapters, and how more are loaded.
        metrics: what is counted.
        jobs: training jobs, and the files that they train on.
        is_closing: whether it is being stopped.
    """

    config: ServeConfig
    name: str
    bank: Bank
    tokenizer: Any
    service: Service
    adapters: Shelf
    metrics: Metrics
    jobs: Jobs
    is_closing: bool = field(default=False)

    @property
    def state_dir(self) -> Path:
        """Where files and jobs are kept."""
        return Path(self.config.state_dir)

    @property
    def models(self) -> list[str]:
        """What clients may name as the model."""
        return [self.name, *self.adapters.names]

    def adapter_called(self, model: str) -> str | None:
        """Returns the adapter that a client means by a model, ``NAME`` or ``NAME@SCALE``; None: the base alone.

        Raises:
            RequestError: there is no such model.
        """
        if model == self.name:
            return None
        if self.bank.called(model) not in self.adapters:
            near = did_you_mean(model, self.models)
            words = f"there is no model {model[:200]!r}.{near or ' GET /v1/models lists them.'}"
            raise RequestError(words, 404, "model_not_found", "model")
        return model

    def adapter_directory(self, name: str) -> Path:
        """Returns a path below the configured directory of adapters.

        Raises:
            RequestError: there is none, or it leads elsewhere.
        """
        return directory_below(self.adapters.root, name)

    def tokenizer_of(self, adapter: str | None) -> Any:
        """Returns the tokenizer, with the chat template, that an adapter was trained with."""
        return self.tokenizer if adapter is None else self.adapters.get(self.bank.called(adapter)).tokenizer

    def ends_of(self, adapter: str | None) -> frozenset[int]:
        """Returns the tokens that end an adapter's texts besides those of the base."""
        return frozenset() if adapter is None else self.adapters.get(self.bank.called(adapter)).ends

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, as it is generated."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def close(self, finish_within: float = 0.0) -> None:
        """Ends what runs; texts may take so many seconds to finish, and jobs save themselves."""
        self.is_closing = True
        self.service.close(finish_within)
        self.jobs.close()


def start(config: ServeConfig) -> Server:
    """Loads the base and its adapters, and starts the thread that generates.

    Raises:
        LoraError: a model cannot be loaded, or adapters; all of these at once.
    """
    root = _root(config)
    wanted = _wanted(config, root)
    given = common_base(wanted, config.model)
    name = Path(given).name if Path(given).exists() else given
    model, tokenizer = load_base(given, dtype=config.dtype, device=config.device, quantize=config.quantize)
    if config.chat_template is not None:
        tokenizer = with_chat_template(tokenizer, config.chat_template)
    end_with_turns(model, tokenizer)
    memory = config.adapter_memory_mb
    bank = Bank(model, max_bytes=None if memory is None else int(memory * 1e6))
    adapters = Shelf(bank, tokenizer, name, root)
    faults = []
    for called, source in wanted:
        try:
            adapters.load(called, source)
        except LoraError as error:
            faults.append(f"{called} ({source}): {error}".replace("\n", "\n    "))
    if faults:
        raise AdapterError(
            list_faults("these adapters cannot be served", faults, "Fix or remove them; nothing was started.")
        )
    service = Service(
        bank,
        tokenizer,
        max_requests=config.max_requests,
        max_waiting=config.max_waiting,
        cache_tokens=config.cache_tokens,
    )
    adapters.call = service.call
    metrics = Metrics(service.stats, lambda: _in_memory(bank))
    try:
        jobs = Jobs(
            config.state_dir,
            max_jobs=config.max_jobs,
            model=given,
            name=name,
            base=(bank.model, tokenizer),
            chat_template=tokenizer.chat_template if config.chat_template is not None else None,
            quantize=config.quantize,
            on_finished=lambda job, adapter: adapters.load(job.adapter_name, adapter, replace=True),
        )
    except BaseException:
        service.close()
        raise
    return Server(config, name, bank, tokenizer, service, adapters, metrics, jobs)


def _root(config: ServeConfig) -> Path | None:
    if config.adapters is None:
        return None
    root = Path(config.adapters).expanduser()
    if not root.is_dir():
        raise ConfigError(
            f"--adapters is {config.adapters!r}, which is not a directory; create it, or leave out --adapters"
        )
    return root.resolve()


def _wanted(config: ServeConfig, root: Path | None) -> list[tuple[str, Path]]:
    """Returns names and places of the adapters to begin with.

    Raises:
        ConfigError: names are taken twice.
    """
    named = [(name, Path(locate_adapter(directory))) for name, directory in config.named_adapters]
    below = [] if root is None else adapter_directories(root)
    given = {path.resolve() for _, path in named}
    # One that is named by a flag has that name alone.
    found = [(path.relative_to(root).as_posix().removesuffix(".gguf"), path) for path in below
             if root is not None and path not in given]  # fmt: skip
    names = [name for name, _ in (*named, *found)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            list_faults("adapters have the same name", twice, "Give them different names: --adapter NAME=DIR")
        )
    return [*named, *found]


def _in_memory(bank: Bank) -> tuple[int, int, int]:
    told = [bank.describe(name) for name in bank.names]
    return len(told), sum(each.in_memory for each in told), bank.nbytes
