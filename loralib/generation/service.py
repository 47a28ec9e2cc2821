"""A thread that owns a model: other threads hand it requests, which are all computed in one batch."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from torch import nn

from ..budget import cache_per_token, free_on
from ..engine.bank import Bank, bank_and_base
from ..engine.forward import device_of
from ..engine.limits import context_length
from ..engine.threads import release_threads
from ..errors import BusyServerError, UnsupportedModelError
from .pages import PAGE
from .sampling import Sampling
from .streaming import Generator, Prompt, TextChunk

__all__ = ["RequestHandle", "Service", "ServiceStats", "default_cache_tokens"]

Result = TypeVar("Result")
Listener = Callable[[TextChunk | BaseException], None]

# Number of prompt tokens per step; bounds how long running requests wait for their next token.
_PROMPT_TOKENS: Final = 512
# Used if neither the free memory nor the model's sizes are known.
_SOME_TOKENS: Final = 65_536


@dataclass(frozen=True)
class RequestHandle:
    """Identifies a request that was accepted, to cancel it.

    Attributes:
        number: the number that its chunks carry.
        prompt_tokens: length of its prompt.
    """

    number: int
    prompt_tokens: int


@dataclass(frozen=True)
class ServiceStats:
    """The current state of a service, and totals since it started.

    Attributes:
        running: number of requests being computed together.
        waiting: number of requests waiting for a place.
        used_tokens: number of tokens whose keys and values are cached or reserved.
        cache_tokens: maximum of used_tokens.
        prompt_tokens: total length of all prompts begun since the start.
        generated_tokens: tokens generated since the start.
        reused_tokens: prompt tokens since the start that did not have to be computed again.
    """

    running: int
    waiting: int
    used_tokens: int
    cache_tokens: int
    prompt_tokens: int
    generated_tokens: int
    reused_tokens: int


class Service:
    """Generates for requests from any thread, all in one batch.

    Keys and values of up to `cache_tokens` tokens are cached.  A request joins when its prompt and everything that it
    may generate fit in the cache, so that none fails halfway; the remaining room keeps the texts of earlier requests,
    and a request with the same prefix and adapter continues from there.  Clients take turns; a large request is
    overtaken by at most 16 others.

    Args:
        model: a causal language model, or a `Bank`, from which each request chooses an adapter.
        tokenizer: its tokenizer.
        max_requests: number of requests computed together; others wait.
        max_waiting: number of further requests that are accepted; others are refused.
        cache_tokens: number of tokens whose keys and values are cached; default: as many as fit in half of the free
            memory, but no more than `max_requests` texts that fill the model's context.
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
        self._most, self._max_waiting = max_requests + max_waiting, max_waiting
        self._cache_tokens = cache_tokens or default_cache_tokens(bank_and_base(model)[1], max_requests)
        self._generator = Generator(
            model,
            tokenizer,
            max_requests=max_requests,
            max_prompt_tokens=_PROMPT_TOKENS,
            cache_tokens=self._cache_tokens,
            reuse=True,
            on_error=self._end_with,
        )
        self._lock = threading.Lock()
        self._encoding = threading.Lock()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}
        self._closing = False
        self._deadline = 0.0
        release_threads()  # those of the caller, who loaded the model, would slow this thread down
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
    ) -> RequestHandle:
        """Accepts a request, without waiting for the model.

        Args:
            prompt: a text, or token ids.
            sampling: its settings.
            adapter: the name of an adapter in the bank; None: only the base.
            client: who makes the request: clients take turns.
            listener: called with each chunk, or with the error that ended the request, in the model's thread, possibly
                before this method returns; it must return immediately.  If it raises, it is not called again.

        Raises:
            AdapterError: there is no such adapter.
            BusyServerError: too many requests are waiting, or the service is shutting down.
            ConfigError: the settings cannot be used in a stream.
            DataError: the prompt has no tokens, too many for the model, or more than fit in the cache.
            MissingDependencyError: a JSON schema needs llguidance.
        """
        self._refuse_more()  # before doing any work
        with self._encoding:
            request = self._generator.prepared(prompt, sampling, adapter)
        with self._lock:
            self._refuse_more()
            self._listeners[request.number] = listener
            self._calls.put(lambda: self._generator.queue(request, client))
        return RequestHandle(request.number, len(request.ids))

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, adapter: str | None = None, *, client: str = ""
    ) -> Iterator[TextChunk]:
        """Yields the chunks of one request; see `submit`.  Closing the iterator cancels it."""
        chunks: queue.SimpleQueue[TextChunk | BaseException] = queue.SimpleQueue()
        handle = self.submit(prompt, sampling, adapter, client=client, listener=chunks.put)
        try:
            while True:
                chunk = chunks.get()
                if isinstance(chunk, BaseException):
                    raise chunk
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self.cancel(handle)

    def cancel(self, handle: RequestHandle) -> None:
        """Cancels a request, unless it has ended: its listener receives at most a chunk that is already on its way."""
        with self._lock:
            if self._listeners.pop(handle.number, None) is not None:
                self._calls.put(lambda: self._generator.cancel(handle.number))

    def call(self, function: Callable[[], Result]) -> Result:
        """Runs a function in the model's thread, between two steps, and returns its result.

        Raises:
            BusyServerError: the service is shutting down.
        """
        if threading.current_thread() is self._thread:
            return function()
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self._refuse_if_closing()
            self._calls.put(run)
        return future.result()

    @property
    def is_alive(self) -> bool:
        """Whether the model's thread is running; without it no request is answered."""
        return self._thread.is_alive()

    def stats(self) -> ServiceStats:
        """Returns the current state of the service, and totals since it started."""
        counts, running = self._generator.counts, self._generator.running
        return ServiceStats(
            running,
            max(len(self._listeners) - running, 0),
            self._generator.used_tokens,
            self._cache_tokens,
            counts.prompt_tokens,
            counts.generated_tokens,
            counts.reused_tokens,
        )

    def close(self, finish_within: float = 0.0) -> None:
        """Stops accepting requests, and ends the thread.

        Args:
            finish_within: seconds that requests get to finish; the remaining ones receive a BusyServerError.
        """
        with self._lock:
            if not self._closing:
                self._closing, self._deadline = True, time.monotonic() + finish_within
                self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _refuse_more(self) -> None:
        self._refuse_if_closing()
        if len(self._listeners) >= self._most:
            raise BusyServerError(
                f"{len(self._listeners)} requests are already running or waiting, and at most {self._max_waiting} may "
                "wait. Try again later."
            )

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise BusyServerError("the server is shutting down")

    # Methods that run in the model's thread.

    def _run(self) -> None:
        while not (self._closing and (time.monotonic() >= self._deadline or not self._listeners)):
            with contextlib.suppress(queue.Empty):
                call = self._calls.get(block=not len(self._generator))
                if call is not None:
                    call()
                continue
            self._step()
        while not self._calls.empty():  # nobody must wait forever; requests queued here are cancelled below
            call = self._calls.get()
            if call is not None:
                call()
        self._end_all(BusyServerError("the server is shutting down"))

    def _step(self) -> None:
        try:
            chunks = self._generator.step()
        except Exception as error:  # errors that concern a single request arrive through `_end_with`
            self._end_all(error)
            return
        for chunk in chunks:
            self._tell(chunk.request, chunk, last=chunk.finish_reason is not None)

    def _end_with(self, number: int, error: Exception) -> None:
        self._tell(number, error, last=True)

    def _end_all(self, error: Exception) -> None:
        self._generator.close()
        for number in list(self._listeners):
            self._tell(number, error, last=True)

    def _tell(self, number: int, chunk: TextChunk | BaseException, *, last: bool) -> None:
        with self._lock:
            listener = self._listeners.pop(number, None) if last else self._listeners.get(number)
        if listener is None:  # cancelled
            return
        try:
            listener(chunk)
        except Exception:
            if not last:
                with self._lock:
                    self._listeners.pop(number, None)
                self._generator.cancel(number)


def default_cache_tokens(model: nn.Module, texts: int) -> int:
    """Returns the number of tokens whose keys and values to cache: as many as fit in half of the free memory.

    The result is at most the number that `texts` texts need that fill the model's context, and enough for at least one.
    """
    context, free, tokens = context_length(model), free_on(device_of(model)), _SOME_TOKENS
    if free is not None:
        with contextlib.suppress(UnsupportedModelError):  # the config does not tell how large they are
            tokens = int(free / 2 / cache_per_token(model))
    return tokens if context is None else max(context + PAGE, min(tokens, texts * context))
