"""The texts that one request asked for, as they come: pieces cross from the model's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from starlette.types import Message, Receive

from ..generation import Sampling
from ..generation.service import Service, Ticket
from ..generation.streaming import Piece
from .errors import RequestError
from .metrics import Metrics

__all__ = ["ClientGoneError", "Run", "Text", "unless_gone", "until_gone"]

Result = TypeVar("Result")
_MOST_UNREAD: Final = 4096  # pieces that may wait for a client who does not read; minutes of a text


class ClientGoneError(Exception):
    """The client closed its connection, so nobody waits for the answer."""


@dataclass
class Text:
    """What has come of one text.

    Attributes:
        ids: the prompt's tokens.
        ticket: of its request.
        generated: the tokens that were.
        said: how many characters that is.
        cached: of the prompt's tokens, how many did not have to be computed.
        first: seconds to the first piece; None: none has come.
        is_over: whether nothing more comes.
    """

    ids: Sequence[int]
    ticket: Ticket | None = None
    generated: list[int] = field(default_factory=list)
    said: int = 0
    cached: int = 0
    first: float | None = None
    is_over: bool = False


class Run:
    """Several texts at once, for one request.

    Args:
        service: the model's thread.
        prompts: token ids of each prompt.
        samplings: settings of each text; their seeds differ.
        adapter: the adapter; None: the base alone.
        ends: more tokens that end a text: those of the adapter's own template, or of the request.
        decode: turns ids into text.
        seconds: how long all may take.
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
        metrics: Metrics,
    ) -> None:
        self.texts = [Text(ids) for ids in prompts]
        self._service, self._samplings, self._adapter, self._client = service, samplings, adapter, client
        self._ends, self._decode, self._metrics = ends, decode, metrics
        self._began = time.monotonic()
        self.deadline = self._began + seconds
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Piece | BaseException] | None] = asyncio.Queue()  # None: cancelled
        self._cancelled = False

    def submit(self) -> None:
        """Hands all texts to the model's thread; called from any thread.

        Raises:
            LoraError: one of them cannot be taken in; then none is.
        """
        try:
            for number, (text, sampling) in enumerate(zip(self.texts, self._samplings, strict=True)):
                listener = self._listener(number)
                text.ticket = self._service.submit(
                    text.ids, sampling, self._adapter, client=self._client, listener=listener
                )
                if self._cancelled:
                    break
        except BaseException:
            self.cancel()
            raise
        if self._cancelled:
            self.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yields what comes, with the number of its text, until all are over or cancelled.

        Raises:
            RequestError: it took too long.
            LoraError: a text ended with it.
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
            number, piece = arrived
            if isinstance(piece, BaseException):
                raise piece
            text = self.texts[number]
            if text.is_over:
                continue
            piece = self._noted(text, piece)
            if piece.finish_reason is not None:
                text.is_over = True
                left -= 1
                if text.first is not None:
                    self._metrics.text(text.first, time.monotonic() - self._began, len(text.generated))
            yield number, piece

    def cancel(self) -> None:
        """Ends whatever still runs, and `pieces`; called from any thread.

        On Python 3.11 `asyncio.wait_for` may lose a task's cancellation when a piece comes at that moment, so that
        whoever waits for pieces has to be told as well.
        """
        self._cancelled = True
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, None)
        for text in self.texts:
            if text.ticket is not None and not text.is_over:
                self._service.cancel(text.ticket)

    def usage(self) -> dict[str, Any]:
        """Returns how many tokens were read and written, in OpenAI's shape."""
        # A prompt of which several texts were asked for counts once.
        prompts = {id(text.ids): text for text in reversed(self.texts)}.values()
        read, written = sum(len(text.ids) for text in prompts), sum(len(text.generated) for text in self.texts)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(text.cached for text in prompts), "audio_tokens": 0},
        }

    def _listener(self, number: int) -> Callable[[Piece | BaseException], None]:
        def listen(piece: Piece | BaseException) -> None:
            self._loop.call_soon_threadsafe(self._arrive, number, piece)

        return listen

    def _arrive(self, number: int, piece: Piece | BaseException) -> None:
        """Takes a piece in; a client that reads too slowly has its texts ended, so that memory is bounded."""
        if self._cancelled:
            return
        if self._arrived.qsize() < _MOST_UNREAD:
            self._arrived.put_nowait((number, piece))
            return
        words = "the answer was read too slowly; read it as it arrives, or make the request without stream"
        self._arrived.put_nowait((number, RequestError(words, 408, "read_too_slowly")))
        self.cancel()

    def _noted(self, text: Text, piece: Piece) -> Piece:
        """Counts a piece, and cuts the text where a token ends it that the model's thread does not know as an end."""
        if text.first is None:
            text.first = time.monotonic() - self._began
        text.cached = getattr(piece, "cached_tokens", None) or text.cached
        end = next((at for at, token in enumerate(piece.ids) if token in self._ends), None)
        if end is None:
            text.generated += piece.ids
            text.said += len(piece.text)
            return piece
        text.generated += piece.ids[:end]
        rest = self._decode(text.generated)[text.said :]  # with what was held back, as the beginning of a stop
        if text.ticket is not None:
            self._service.cancel(text.ticket)
        return replace(piece, text=rest, ids=piece.ids[:end], logprobs=piece.logprobs[:end], finish_reason="stop")


async def until_gone(receive: Receive) -> None:
    """Waits until a client closes its connection; what it sends until then is dropped."""
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


async def unless_gone(work: asyncio.Task[Result], receive: Receive) -> Result:
    """Waits for work, and cancels it if the client goes away.

    Raises:
        ClientGoneError: it did.
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
