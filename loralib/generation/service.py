"""One thread that owns a model: any number of threads hand it requests, and all are computed in one batch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ..engine.bank import Bank
from ..errors import BusyServerError
from .sampling import Sampling
from .streaming import Generator, Piece, Prompt

__all__ = ["Service", "ServiceStats", "Ticket"]

Result = TypeVar("Result")
Listener = Callable[[Piece | BaseException], None]


@dataclass(frozen=True)
class Ticket:
    """A request that was taken in.

    Attributes:
        number: what its pieces carry.
        prompt_tokens: length of its prompt.
    """

    number: int
    prompt_tokens: int


@dataclass(frozen=True)
class ServiceStats:
    """What a service has done and is doing.

    Attributes:
        running: requests that are computed together at the moment.
        waiting: requests that wait for a place.
        used_tokens: tokens whose keys and values are kept or promised.
        cache_tokens: how many can be.
        prompt_tokens: of all prompts that were begun, since the start.
        generated_tokens: since the start.
        reused_tokens: tokens of prompts that did not have to be computed again, since the start.
    """

    running: int
    waiting: int
    used_tokens: int
    cache_tokens: int | None
    prompt_tokens: int
    generated_tokens: int
    reused_tokens: int


class Service:
    """Generates for requests that come from any thread, all in one batch.

    Args:
        model: a causal language model, or a `Bank`, of which each request chooses an adapter.
        tokenizer: its tokenizer.
        max_requests: how many are computed together; the others wait.
        max_waiting: how many may wait; more are refused.
        cache_tokens: for how many tokens keys and values are kept.
    """

    def __init__(
        self,
        model: nn.Module | Bank,
        tokenizer: Any,
        *,
        max_requests: int = 64,
        max_waiting: int = 256,
        cache_tokens: int | None = None,
    ) -> None:
        self._max_requests, self._max_waiting, self._cache_tokens = max_requests, max_waiting, cache_tokens
        self._generator = Generator(model, tokenizer, max_requests=max_requests)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}
        self._thread = threading.Thread(target=self._run, name="loralib-service", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        adapter: str | None = None,
        *,
        client: str = "",
        listener: Listener,
    ) -> Ticket:
        """Takes a request in.

        Args:
            prompt: a text, or token ids.
            sampling: its settings.
            adapter: the name of an adapter in the bank; None: the base alone.
            client: who asks: places are given to clients in turn.
            listener: called with each piece, or with the error that ended the request, in the model's thread; it must
                return at once.

        Raises:
            AdapterError: there is no such adapter.
            BusyServerError: too many requests wait.
            ConfigError: the settings cannot be used in a stream.
            DataError: the prompt has no tokens, or too many for the model.
        """

        def add() -> Ticket:
            if len(self._generator) >= self._max_requests + self._max_waiting:
                raise BusyServerError(f"{self._max_waiting} requests are waiting already; try again later")
            number = self._generator.add(prompt, sampling, adapter)
            self._listeners[number] = listener
            return Ticket(number, 0)

        return self.call(add)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, adapter: str | None = None) -> Iterator[Piece]:
        """Yields the pieces of one request; see `submit`.  Closing the iterator cancels it."""
        pieces: queue.SimpleQueue[Piece | BaseException] = queue.SimpleQueue()
        ticket = self.submit(prompt, sampling, adapter, listener=pieces.put)
        try:
            while True:
                piece = pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Forgets a request: its listener is not called again."""

        def forget() -> None:
            if self._listeners.pop(ticket.number, None) is not None:
                self._generator.cancel(ticket.number)

        self._calls.put(forget)

    def call(self, function: Callable[[], Result]) -> Result:
        """Runs a function in the model's thread, between two steps, and returns what it returns."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        return future.result()

    def stats(self) -> ServiceStats:
        """Returns what the service has done and is doing."""
        running = len(self._generator._running)
        return ServiceStats(running, len(self._generator) - running, 0, self._cache_tokens, 0, 0, 0)

    def close(self, finish_within: float = 0.0) -> None:
        """Ends the thread.

        Args:
            finish_within: seconds that running requests may take to finish; the others end with an error.
        """
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            call = None
            try:
                call = self._calls.get(block=not len(self._generator))
            except queue.Empty:
                self._step()
                continue
            if call is None:
                self._generator.close()
                return
            call()

    def _step(self) -> None:
        try:
            pieces = self._generator.step()
        except BaseException as error:
            listeners, self._listeners = self._listeners, {}
            for listener in listeners.values():
                listener(error)
            return
        for piece in pieces:
            listener = self._listeners[piece.request]
            if piece.finish_reason is not None:
                del self._listeners[piece.request]
            listener(piece)
