"""What a server holds: the base model, its adapters, the generating thread, and the directories it may access."""

from __future__ import annotations

import contextlib
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
from .adapter_store import AdapterStore, adapter_directories, directory_below
from .errors import RequestError
from .jobs import Jobs
from .metrics import ServerMetrics
from .planner import Planner
from .settings import ServeConfig
from .state import State
from .supervisor import Supervisor

__all__ = ["Server", "start"]


@dataclass
class Server:
    """The state of a running server.

    Attributes:
        config: the settings.
        name: the base model's name in the API.
        bank: the base with its adapters.
        tokenizer: the base's tokenizer.
        service: the thread that generates.
        adapters: information on the adapters, and the way to load more.
        metrics: the metrics.
        jobs: training jobs, and the files that they train on.
        supervisor: the threads that run the jobs.
        is_closing: whether it is shutting down.
    """

    config: ServeConfig
    name: str
    bank: Bank
    tokenizer: Any
    service: Service
    adapters: AdapterStore
    metrics: ServerMetrics
    jobs: Jobs
    supervisor: Supervisor
    is_closing: bool = field(default=False)

    @property
    def state_dir(self) -> Path:
        """The directory for files and jobs."""
        return Path(self.config.state_dir)

    @property
    def models(self) -> list[str]:
        """The model names that clients may use."""
        return [self.name, *self.adapters.names]

    def adapter_called(self, model: str) -> str | None:
        """Returns the adapter that a model name stands for, ``NAME`` or ``NAME@SCALE``; None: the base alone.

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
            RequestError: no directory is configured, or the path leads outside of it.
        """
        return directory_below(self.adapters.root, name)

    def tokenizer_of(self, adapter: str | None) -> Any:
        """Returns the tokenizer that an adapter was trained with, including its chat template."""
        return self.tokenizer if adapter is None else self.adapters.get(self.bank.called(adapter)).tokenizer

    def ends_of(self, adapter: str | None) -> frozenset[int]:
        """Returns the tokens that end an adapter's texts, in addition to those of the base."""
        return frozenset() if adapter is None else self.adapters.get(self.bank.called(adapter)).ends

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, decoded as in generation."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def close(self, finish_within: float = 0.0) -> None:
        """Shuts down; texts get `finish_within` seconds to finish, and jobs save their state."""
        self.is_closing = True
        self.service.close(finish_within)
        self.supervisor.close()


def start(config: ServeConfig) -> Server:
    """Loads the base and its adapters, and starts the generating thread.

    Raises:
        LoraError: the base or some adapters cannot be loaded; all failing adapters are listed.
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
    adapters = AdapterStore(bank, tokenizer, name, root)
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
    with contextlib.ExitStack() as undo:
        service = Service(
            bank,
            tokenizer,
            max_requests=config.max_requests,
            max_waiting=config.max_waiting,
            cache_tokens=config.cache_tokens,
        )
        undo.callback(service.close)
        adapters.call = service.call
        metrics = ServerMetrics(service.stats, lambda: _in_memory(bank))
        state = undo.enter_context(contextlib.closing(State(config.state_dir)))
        template = tokenizer.chat_template if config.chat_template is not None else None
        base = (bank.model, tokenizer)
        planner = Planner(state, given, base, chat_template=template, quantize=config.quantize)
        jobs = Jobs(state, planner, name, config.max_jobs)
        supervisor = Supervisor(jobs, lambda job: adapters.load(job.adapter_name, job.run, replace=True))
        undo.pop_all()  # it has started
    return Server(config, name, bank, tokenizer, service, adapters, metrics, jobs, supervisor)


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
    """Returns names and paths of the adapters to load at startup.

    Raises:
        ConfigError: names are used twice.
    """
    named = [(name, Path(locate_adapter(directory))) for name, directory in config.named_adapters]
    below = [] if root is None else adapter_directories(root)
    given = {path.resolve() for _, path in named}
    # An adapter named by a flag has only that name.
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
