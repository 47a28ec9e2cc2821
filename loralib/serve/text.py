"""Routes that generate: completions and chats, streamed or not."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..data import prompt_ids
from ..engine.limits import context_length
from ..errors import DataError
from ..generation import Sampling
from ..generation.streaming import TextChunk, encode_prompts
from .errors import RequestError, body_of, fault_of
from .logprobs import Names, chat_logprobs, completion_logprobs
from .requests import ChatRequest, CompletionRequest, sampling_of
from .running import ClientGoneError, Run, unless_gone, until_gone
from .security import client_of
from .server import Server

__all__ = ["chat_prompt", "router"]

router = APIRouter()
_STREAMED: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The texts; with `stream`, server-sent events that end with `data: [DONE]`.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}


@router.post("/v1/completions", responses=_STREAMED)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues texts."""
    server: Server = request.app.state.server
    adapter = server.adapter_called(body.model)
    sampling = sampling_of(body, server.config.max_tokens)
    _check_count(server, len(body.prompts) * (body.n or 1))

    def encoded() -> list[list[int]]:
        tokenizer = server.tokenizer_of(adapter)
        rows = [prompt_ids(each, tokenizer) if isinstance(each, str) else each for each in body.prompts]
        return encode_prompts(server.bank.model, tokenizer, rows)

    rows = await run_in_threadpool(encoded)
    shape = _Completion(server, body, rows)
    return await _answer(request, body, _run(server, request, body, rows, adapter, sampling), shape)


@router.post("/v1/chat/completions", responses=_STREAMED)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Continues a chat."""
    server: Server = request.app.state.server
    adapter = server.adapter_called(body.model)
    sampling = sampling_of(body, server.config.max_tokens)
    _check_count(server, body.n or 1)
    ids = await run_in_threadpool(chat_prompt, server, body.turns, adapter)
    shape = _Chat(server, body)
    return await _answer(request, body, _run(server, request, body, [ids], adapter, sampling), shape)


def chat_prompt(server: Server, messages: Sequence[dict[str, str]], adapter: str | None) -> list[int]:
    """Returns the tokens of a chat up to the beginning of its next answer, with the template of its adapter or base.

    Raises:
        RequestError: there is no template, or it rejects this chat.
        DataError: it is too long for the model.
    """
    tokenizer = server.tokenizer_of(adapter)
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            f"{adapter or server.name} has no chat template, so it cannot take messages. Start the server with "
            "--chat_template FILE, or use /v1/completions.",
            400,
            "no_chat_template",
            "messages",
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs that raise errors of any type
        raise RequestError(f"the chat template rejects these messages: {error}"[:1000], param="messages") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template includes the start token
    try:
        [row] = encode_prompts(server.bank.model, tokenizer, [list(ids)])
    except DataError as error:
        raise RequestError(str(error), 400, "context_length_exceeded" if ids else None, "messages") from None
    return row


def _check_count(server: Server, count: int) -> None:
    most = server.config.max_choices
    if count > most:
        raise RequestError(
            f"{count} texts are requested, but this server allows at most {most} (--max_choices)", param="n"
        )


def _run(
    server: Server,
    request: Request,
    body: CompletionRequest | ChatRequest,
    rows: Sequence[list[int]],
    adapter: str | None,
    sampling: Sampling,
) -> Run:
    """Returns a run with n texts for each prompt; text i uses the seed + i."""
    prompts = [row for row in rows for _ in range(body.n or 1)]
    if body.max_tokens is None and isinstance(body, ChatRequest) and body.max_completion_tokens is None:
        # As many as fit in the model's context.
        context = context_length(server.bank.model)
        room = [] if context is None else [max(1, context + 1 - len(row)) for row in rows]
        sampling = replace(sampling, max_new_tokens=min([sampling.max_new_tokens, *room]))
    host = request.client.host if request.client else ""
    ends = {*server.ends_of(adapter), *(body.stop_token_ids or ())} if not body.ignore_eos else set()
    return Run(
        server.service,
        prompts,
        [replace(sampling, seed=sampling.seed + number) for number in range(len(prompts))],
        adapter,
        client=client_of(request.headers, host),
        ends=frozenset(ends),
        decode=server.decode,
        seconds=server.config.max_seconds,
        metrics=server.metrics,
    )


async def _answer(request: Request, body: CompletionRequest | ChatRequest, run: Run, shape: _Shape) -> Response:
    """Returns all texts in one response, or streams them."""
    try:
        await run_in_threadpool(run.submit)
        if body.stream:
            return _Events(run, shape, body.shows_usage)
        parts = asyncio.ensure_future(_collected(run))
        choices = shape.whole(await unless_gone(parts, request.receive))
    except ClientGoneError:
        run.cancel()
        return Response(status_code=499)  # for the metrics; nobody reads it
    except BaseException:
        run.cancel()
        raise
    return JSONResponse({**shape.head(whole=True), "choices": choices, "usage": run.usage()})


async def _collected(run: Run) -> list[list[TextChunk]]:
    chunks: list[list[TextChunk]] = [[] for _ in run.texts]
    async for number, chunk in run.chunks():
        chunks[number].append(chunk)
    return chunks


class _Events(Response):
    """Streams texts as server-sent events.  A client that disconnects, or reads too slowly, ends them."""

    def __init__(self, run: Run, shape: _Shape, shows_usage: bool) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._run, self._shape, self._shows_usage = run, shape, shows_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            # A send to a client that does not read may be blocked when time is up.
            seconds = max(0.0, self._run.deadline - time.monotonic()) + 5
            await asyncio.wait({writing, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._run.cancel()
            for task in (writing, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events()) as events:
            async for event in events:
                text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
                await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[dict[str, Any] | str, None]:
        head = self._shape.head(whole=False)
        usage: dict[str, Any] = {"usage": None} if self._shows_usage else {}
        try:
            for choice in self._shape.first(len(self._run.texts)):
                yield {**head, "choices": [choice], **usage}
            async with aclosing(self._run.chunks()) as chunks:
                async for number, chunk in chunks:
                    for choice in self._shape.parts(number, chunk):
                        yield {**head, "choices": [choice], **usage}
        except Exception as error:
            # The status has already been sent; clients look for errors in the events.
            yield body_of(fault_of(error))
            if fault_of(error).status == 500:
                raise
            yield "[DONE]"
            return
        if self._shows_usage:
            yield {**head, "choices": [], "usage": self._run.usage()}
        yield "[DONE]"


class _Shape:
    """The format of an endpoint's responses."""

    kind, whole_kind, prefix = "", "", ""

    def __init__(self, server: Server, body: CompletionRequest | ChatRequest) -> None:
        self._names = Names(server.tokenizer, bool(body.return_tokens_as_token_ids))
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def head(self, *, whole: bool) -> dict[str, Any]:
        """Returns the fields before the choices."""
        kind = self.whole_kind if whole else self.kind
        return {**self._head, "object": kind, "system_fingerprint": f"loralib-{__version__}"}

    def first(self, count: int) -> list[dict[str, Any]]:
        """Returns the initial choices of a stream."""
        raise NotImplementedError

    def parts(self, number: int, chunk: TextChunk) -> list[dict[str, Any]]:
        """Returns the choices of a stream for one chunk."""
        raise NotImplementedError

    def whole(self, texts: Sequence[Sequence[TextChunk]]) -> list[dict[str, Any]]:
        """Returns the choices of a response that is not streamed."""
        raise NotImplementedError


class _Completion(_Shape):
    kind = whole_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, server: Server, body: CompletionRequest, rows: Sequence[Sequence[int]]) -> None:
        super().__init__(server, body)
        self._logprobs, self._echo = body.logprobs, bool(body.echo)
        self._rows, self._n = rows, body.n or 1
        self._echoed = [
            each if isinstance(each, str) else server.decode(each) for each in (body.prompts if self._echo else ())
        ]
        self._offsets: dict[int, int] = {}

    def first(self, count: int) -> list[dict[str, Any]]:
        # With log-probabilities, the prompt is sent together with the first chunk, which contains them.
        if not self._echo or self._logprobs is not None:
            return []
        return [self._choice(number, self._echoed[number // self._n], None, None) for number in range(count)]

    def parts(self, number: int, chunk: TextChunk) -> list[dict[str, Any]]:
        text, logprobs = chunk.text, None
        if self._logprobs is not None:
            begins = number not in self._offsets
            echoes = self._echo and begins
            text = (self._echoed[number // self._n] if echoes else "") + text
            offset = self._offsets.get(number, 0 if self._echo else self._prompt_length(number))
            logprobs, self._offsets[number] = self._scores(number, [chunk], offset, echoes)
        if not text and chunk.finish_reason is None and not (logprobs and logprobs["tokens"]):
            return []
        return [self._choice(number, text, logprobs, chunk.finish_reason)]

    def whole(self, texts: Sequence[Sequence[TextChunk]]) -> list[dict[str, Any]]:
        choices = []
        for number, chunks in enumerate(texts):
            text = "".join(chunk.text for chunk in chunks)
            text = self._echoed[number // self._n] + text if self._echo else text
            logprobs = None
            if self._logprobs is not None:
                offset = 0 if self._echo else self._prompt_length(number)
                logprobs, _ = self._scores(number, chunks, offset, self._echo)
            choices.append(self._choice(number, text, logprobs, chunks[-1].finish_reason))
        return choices

    def _prompt_length(self, number: int) -> int:
        """Returns the length of the prompt's text, because offsets count from its start, as in OpenAI's API."""
        return len(self._names.text(self._rows[number // self._n]))

    def _scores(
        self, number: int, chunks: Sequence[TextChunk], offset: int, echoes: bool
    ) -> tuple[dict[str, Any], int]:
        prompt = chunks[0].prompt_logprobs if echoes else None
        scores = [score for chunk in chunks for score in chunk.logprobs]
        ids = self._rows[number // self._n] if echoes else []
        return completion_logprobs(self._names, ids, [*(prompt or ()), *scores], offset, bool(self._logprobs))

    def _choice(self, number: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}


class _Chat(_Shape):
    kind, whole_kind, prefix = "chat.completion.chunk", "chat.completion", "chatcmpl"

    def __init__(self, server: Server, body: ChatRequest) -> None:
        super().__init__(server, body)
        self._logprobs = bool(body.logprobs)

    def first(self, count: int) -> list[dict[str, Any]]:
        said = {"role": "assistant", "content": "", "refusal": None}
        return [{"index": n, "delta": said, "logprobs": None, "finish_reason": None} for n in range(count)]

    def parts(self, number: int, chunk: TextChunk) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = []
        if chunk.text or (self._logprobs and chunk.logprobs):
            scores = chat_logprobs(self._names, chunk.logprobs) if self._logprobs else None
            choices.append(
                {"index": number, "delta": {"content": chunk.text}, "logprobs": scores, "finish_reason": None}
            )
        if chunk.finish_reason is not None:
            choices.append({"index": number, "delta": {}, "logprobs": None, "finish_reason": chunk.finish_reason})
        return choices

    def whole(self, texts: Sequence[Sequence[TextChunk]]) -> list[dict[str, Any]]:
        choices = []
        for number, chunks in enumerate(texts):
            scores = [score for chunk in chunks for score in chunk.logprobs]
            message = {"role": "assistant", "content": "".join(chunk.text for chunk in chunks), "refusal": None}
            choices.append(
                {
                    "index": number,
                    "message": message,
                    "logprobs": chat_logprobs(self._names, scores) if self._logprobs else None,
                    "finish_reason": chunks[-1].finish_reason,
                }
            )
        return choices
