"""The texts of one request as they are generated: chunks pass from the model's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from starlette.types import Message, Receive

from ..generation import Sampling
from ..generation.service import RequestHandle, Service
from ..generation.streaming import TextChunk
from .errors import RequestError
from .metrics import ServerMetrics

__all__ = ["ClientGoneError", "Run", "TextState", "unless_gone", "until_gone"]

Result = TypeVar("Result")
_MOST_UNREAD: Final = 4096  # maximum number of chunks waiting for a slow client; corresponds to minutes of a text


class ClientGoneError(Exception):
    """The client closed its connection, so the answer is no longer needed."""


@dataclass
class TextState:
    """The state of one text.

    Attributes:
        ids: the prompt's tokens.
        handle: the handle of its request.
        generated: the tokens generated so far.
        said: the number of characters sent so far.
        cached: number of prompt tokens that did not have to be computed.
        first: seconds until the first chunk; None: none yet.
        is_over: whether it has ended.
    """

    ids: Sequence[int]
    handle: RequestHandle | None = None
    generated: list[int] = field(default_factory=list)
    said: int = 0
    cached: int = 0
    first: float | None = None
    is_over: bool = False


class Run:
    """Several texts generated together for one request.

    Args:
        service: the model's thread.
        prompts: token ids of each prompt.
        samplings: settings of each text; their seeds differ.
        adapter: the adapter; None: the base alone.
        ends: additional tokens that end a text: from the adapter's own template, or the request.
        decode: converts ids to text.
        seconds: maximum time for all of them.
    """

    def __init__(
        self,
        service: Service,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        adapter: str | None,
        *,
        client: str,
        ends: frozenset[int],
        decode: Callable[[Sequence[int]], str],
        seconds: float,
        metrics: ServerMetrics,
    ) -> None:
        self.texts = [TextState(ids) for ids in prompts]
        self._service, self._samplings, self._adapter, self._client = service, samplings, adapter, client
        self._ends, self._decode, self._metrics = ends, decode, metrics
        self._began = time.monotonic()
        self.deadline = self._began + seconds
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, TextChunk | BaseException] | None] = asyncio.Queue()  # None: cancelled
        self._cancelled = False

    def submit(self) -> None:
        """Passes all texts to the model's thread; may be called from any thread.

        Raises:
            LoraError: one of them was refused; then none is generated.
        """
        try:
            for number, (text, sampling) in enumerate(zip(self.texts, self._samplings, strict=True)):
                listener = self._listener(number)
                text.handle = self._service.submit(
                    text.ids, sampling, self._adapter, client=self._client, listener=listener
                )
                if self._cancelled:
                    break
        except BaseException:
            self.cancel()
            raise
        if self._cancelled:
            self.cancel()

    async def chunks(self) -> AsyncGenerator[tuple[int, TextChunk], None]:
        """Yields chunks as they arrive, with the number of their text, until all texts are over or cancelled.

        Raises:
            RequestError: it took too long.
            LoraError: the generation of a text failed.
        """
        left = len(self.texts)
        while left:
            try:
                arrived = await asyncio.wait_for(self._arrived.get(), max(0.0, self.deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise RequestError(
                    "the request took longer than this server allows (--max_seconds)", 504, "timeout"
                ) from None
            if arrived is None:
                return
            number, chunk = arrived
            if isinstance(chunk, BaseException):
                raise chunk
            text = self.texts[number]
            if text.is_over:
                continue
            chunk = self._noted(text, chunk)
            if chunk.finish_reason is not None:
                text.is_over = True
                left -= 1
                if text.first is not None:
                    self._metrics.text(text.first, time.monotonic() - self._began, len(text.generated))
            yield number, chunk

    def cancel(self) -> None:
        """Ends all running texts, and `chunks`; may be called from any thread.

        On Python 3.11, `asyncio.wait_for` may lose a task's cancellation if a chunk arrives at the same moment, so the
        consumer of `chunks` is notified as well.
        """
        self._cancelled = True
        with suppress(RuntimeError):  # the loop is closed, so nobody is waiting
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, None)
        for text in self.texts:
            if text.handle is not None and not text.is_over:
                self._service.cancel(text.handle)

    def usage(self) -> dict[str, Any]:
        """Returns the numbers of tokens read and generated, in OpenAI's format."""
        # A prompt with several texts counts once.
        prompts = {id(text.ids): text for text in reversed(self.texts)}.values()
        read, written = sum(len(text.ids) for text in prompts), sum(len(text.generated) for text in self.texts)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(text.cached for text in prompts), "audio_tokens": 0},
        }

    def _listener(self, number: int) -> Callable[[TextChunk | BaseException], None]:
        def listen(chunk: TextChunk | BaseException) -> None:
            self._loop.call_soon_threadsafe(self._arrive, number, chunk)

        return listen

    def _arrive(self, number: int, chunk: TextChunk | BaseException) -> None:
        """Queues a chunk; if the client reads too slowly, ends its texts, to bound memory use."""
        if self._cancelled:
            return
        if self._arrived.qsize() < _MOST_UNREAD:
            self._arrived.put_nowait((number, chunk))
            return
        words = "the answer was read too slowly; read it as it arrives, or send the request without `stream`"
        self._arrived.put_nowait((number, RequestError(words, 408, "read_too_slowly")))
        self.cancel()

    def _noted(self, text: TextState, chunk: TextChunk) -> TextChunk:
        """Counts a chunk, and ends the text at an end token that the model's thread does not know."""
        if text.first is None:
            text.first = time.monotonic() - self._began
        text.cached = getattr(chunk, "cached_tokens", None) or text.cached
        end = next((at for at, token in enumerate(chunk.ids) if token in self._ends), None)
        if end is None:
            text.generated += chunk.ids
            text.said += len(chunk.text)
            return chunk
        text.generated += chunk.ids[:end]
        rest = self._decode(text.generated)[text.said :]  # includes text held back as a possible stop text
        if text.handle is not None:
            self._service.cancel(text.handle)
        return replace(chunk, text=rest, ids=chunk.ids[:end], logprobs=chunk.logprobs[:end], finish_reason="stop")


async def until_gone(receive: Receive) -> None:
    """Waits until the client closes its connection; ignores what it sends until then."""
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


async def unless_gone(work: asyncio.Task[Result], receive: Receive) -> Result:
    """Waits for a task, and cancels it if the client disconnects.

    Raises:
        ClientGoneError: the client disconnected.
    """
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGoneError
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
