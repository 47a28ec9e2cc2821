"""What the page asks for that OpenAI's API has not; errors have that API's shape."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ... import __version__
from ...errors import AdapterError, BusyServerError, LoraError
from ...generation import Sampling
from ...generation.streaming import Piece
from ...training import TrainConfig
from .. import tuning
from ..server import Server
from ..state import RequestError
from . import adapters
from .exports import TARGETS, Exports

__all__ = ["Exports", "router"]

router = APIRouter(prefix="/page-api", route_class=tuning.router.route_class, include_in_schema=False)


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


@router.get("/about")
def about(request: Request) -> dict[str, Any]:
    """Says what is served, and what the fields of a job begin with."""
    server = _server(request)
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    shown = ("num_epochs", "rank", "batch_size", "lora_dropout", "seed", "objective")
    return {
        "base": server.name,
        "version": __version__,
        "chat": bool(getattr(server.tokenizer, "chat_template", None)),
        "max_tokens": server.config.max_tokens,
        "max_jobs": server.config.max_jobs,
        "exports": list(TARGETS),
        "defaults": {name: defaults[name] for name in shown},
    }


# --- texts -----------------------------------------------------------------------------------------------------------


class Turn(BaseModel):
    """A turn of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class StreamRequest(BaseModel):
    """A text to write, with an adapter at a scale of its own."""

    model_config = ConfigDict(extra="forbid")

    adapter: str | None = None
    scale: Annotated[float, Field(ge=-10, le=10)] = 1.0
    prompt: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


@router.post("/stream")
async def stream(request: Request, body: StreamRequest) -> StreamingResponse:
    """Writes a text, as server-sent events; an event with `finish_reason` is the last."""
    server = _server(request)
    if body.max_tokens > server.config.max_tokens:
        raise RequestError(
            f"max_tokens is {body.max_tokens:,}, more than the {server.config.max_tokens:,} that this server allows "
            "(--max_tokens)",
            param="max_tokens",
        )
    prompt = _prompt(server, body)
    adapter = body.adapter
    if adapter is not None and body.scale != 1:
        adapter = f"{adapter}@{body.scale!r}"
    sampling = Sampling(max_new_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p, seed=body.seed)
    pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def listen(piece: Piece | BaseException) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    try:
        ticket = await run_in_threadpool(
            server.service.submit,
            prompt,
            sampling,
            adapter,
            listener=listen,
        )
    except BusyServerError as error:
        raise RequestError(str(error), 429, "busy") from error
    except AdapterError as error:
        raise RequestError(str(error), 404, "model_not_found", "adapter") from error
    except LoraError as error:
        raise RequestError(str(error), param="prompt") from error

    async def events() -> AsyncIterator[str]:
        tokens = 0
        try:
            while True:
                piece = await asyncio.wait_for(pieces.get(), server.config.max_seconds)
                if isinstance(piece, BaseException):
                    yield _event({"error": {"message": str(piece), "type": "server_error", "code": None}})
                    return
                tokens += len(piece.ids)
                yield _event({"text": piece.text, "tokens": tokens, "finish_reason": piece.finish_reason})
                if piece.finish_reason is not None:
                    return
        except asyncio.TimeoutError:  # on Python 3.10 not the built-in one
            words = f"nothing came for {server.config.max_seconds:g} seconds (--max_seconds)"
            yield _event({"error": {"message": words, "type": "server_error", "code": "timeout"}})
        finally:
            server.service.cancel(ticket)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _prompt(server: Server, body: StreamRequest) -> str | list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("expected either prompt or messages", param="prompt")
    if body.prompt is not None:
        return body.prompt
    tokenizer = server.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            f"{server.name} has no chat template. Write plain text, or start the server with --chat_template FILE.",
            param="messages",
        )
    turns = [turn.model_dump() for turn in body.messages or ()]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author
        raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


# --- training --------------------------------------------------------------------------------------------------------


class PreviewRequest(BaseModel):
    """A job that is thought about."""

    model_config = ConfigDict(extra="forbid")

    training_file: str
    loralib: dict[str, Any] = {}


@router.post("/preview")
def preview(request: Request, body: PreviewRequest) -> dict[str, Any]:
    """Says what a job would do: how its data are read, what is trained, memory and time."""
    found = _server(request).jobs.preview(body.training_file, body.loralib)
    result = {field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "config"}
    config = found.config.to_dict()
    chosen = ("lr", "rank", "lora_alpha", "num_epochs", "batch_size", "seq_len", "dtype", "warmup_steps", "schedule")
    examples = [dataclasses.asdict(example) for example in found.examples]
    return {**result, "examples": examples, "settings": {name: config.get(name) for name in chosen}}


# --- adapters --------------------------------------------------------------------------------------------------------


class NameRequest(BaseModel):
    """An adapter that is meant."""

    model_config = ConfigDict(extra="forbid")

    name: str


class ExportRequest(NameRequest):
    """A form to write an adapter in."""

    target: str


@router.get("/adapters")
def list_adapters(request: Request) -> dict[str, Any]:
    """Lists the adapters that are loaded or could be."""
    server = _server(request)
    known = adapters.sources(server)
    listed = [adapters.describe(server, found) for found in known.values()]
    listed += [
        {"name": name, "loaded": True, "job": None, "error": None, "r": None}
        for name in server.bank.names
        if name not in known
    ]
    return {"object": "list", "data": listed}


@router.get("/adapters/learned")
def learned(request: Request, name: str) -> dict[str, Any]:
    """Returns the norms of an adapter's updates by layer and kind of module."""
    server = _server(request)
    return adapters.heat_map(adapters.inspect(adapters.source(server, name)))


@router.get("/adapters/prompts")
def prompts(request: Request, name: str) -> dict[str, Any]:
    """Returns some of what an adapter was asked in training."""
    server = _server(request)
    return {"object": "list", "data": adapters.prompts(server, adapters.source(server, name))}


@router.post("/adapters/load")
def load(request: Request, body: NameRequest) -> dict[str, Any]:
    """Loads an adapter that the server knows."""
    adapters.load(_server(request), body.name)
    return {"name": body.name, "loaded": True}


@router.post("/adapters/unload")
def unload(request: Request, body: NameRequest) -> dict[str, Any]:
    """Forgets a loaded adapter; texts that are being written with it go on."""
    server = _server(request)
    try:
        server.service.call(lambda: server.bank.unload(body.name))
    except AdapterError as error:
        raise RequestError(str(error), 404, "adapter_not_found", "name") from error
    return {"name": body.name, "loaded": False}


def _exports(request: Request) -> Exports:
    exports: Exports = request.app.state.exports
    return exports


@router.post("/exports")
def create_export(request: Request, body: ExportRequest) -> dict[str, Any]:
    """Begins to write an adapter in another form."""
    return _exports(request).create(body.name, body.target).to_dict()


@router.get("/exports/{export_id}")
def get_export(request: Request, export_id: str) -> dict[str, Any]:
    """Says how far an export is."""
    return _exports(request).get(export_id).to_dict()


@router.get("/exports/{export_id}/content", response_class=FileResponse)
def export_content(request: Request, export_id: str) -> FileResponse:
    """Returns what an export has made."""
    export = _exports(request).get(export_id)
    if export.path is None:
        raise RequestError(f"the export is {export.status}; there is nothing to download", 409, "not_ready", "id")
    return FileResponse(export.path, media_type="application/octet-stream", filename=export.file_name)
