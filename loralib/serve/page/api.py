"""Routes for the page beyond the public API: previews, what adapters have learned, exports."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from pydantic import Field

from ... import __version__
from ...training import TrainConfig
from ..bodies import Body
from ..server import Server
from ..state import RequestError
from . import adapters
from .exports import TARGETS, Exports

__all__ = ["Exports", "router"]

router = APIRouter(prefix="/page-api", include_in_schema=False)


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


@router.get("/about")
def about(request: Request) -> dict[str, Any]:
    """Describes what is served, with default values for the fields of a job."""
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


# --- training --------------------------------------------------------------------------------------------------------


class PreviewRequest(Body):
    """A training job to preview: the id of its file, and settings of `TrainConfig`."""

    training_file: str
    loralib: dict[str, Any] = Field({})


@router.post("/preview")
def preview(request: Request, body: PreviewRequest) -> dict[str, Any]:
    """Describes what a job would do: how its data are read, what is trained, memory and time."""
    found = _server(request).jobs.planner.preview(body.training_file, body.loralib)
    result = {field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "config"}
    config = found.config.to_dict()
    chosen = ("lr", "rank", "lora_alpha", "num_epochs", "batch_size", "seq_len", "dtype", "warmup_steps", "schedule")
    examples = [dataclasses.asdict(example) for example in found.examples]
    return {**result, "examples": examples, "settings": {name: config.get(name) for name in chosen}}


# --- adapters --------------------------------------------------------------------------------------------------------


class NameRequest(Body):
    """The adapter to load or export, by its name in `GET /page-api/adapters`."""

    name: str


class ExportRequest(NameRequest):
    """The adapter to export, and the format: one of `exports` in `GET /page-api/about`."""

    target: str


@router.get("/adapters")
def list_adapters(request: Request) -> dict[str, Any]:
    """Lists the adapters that are loaded or can be loaded."""
    server = _server(request)
    known = adapters.sources(server)
    return {"object": "list", "data": [adapters.describe(server, found) for found in known.values()]}


@router.get("/adapters/learned")
def learned(request: Request, name: str) -> dict[str, Any]:
    """Returns the norms of an adapter's updates by layer and kind of module."""
    server = _server(request)
    return adapters.heat_map(adapters.inspect(adapters.source(server, name)))


@router.get("/adapters/prompts")
def prompts(request: Request, name: str) -> dict[str, Any]:
    """Returns some prompts from an adapter's training data."""
    server = _server(request)
    return {"object": "list", "data": adapters.prompts(server, adapters.source(server, name))}


@router.post("/adapters/load")
def load(request: Request, body: NameRequest) -> dict[str, Any]:
    """Loads an adapter that is known to the server."""
    adapters.load(_server(request), body.name)
    return {"name": body.name, "loaded": True}


def _exports(request: Request) -> Exports:
    exports: Exports = request.app.state.exports
    return exports


@router.post("/exports")
def create_export(request: Request, body: ExportRequest) -> dict[str, Any]:
    """Starts to export an adapter."""
    return _exports(request).create(body.name, body.target).to_dict()


@router.get("/exports/{export_id}")
def get_export(request: Request, export_id: str) -> dict[str, Any]:
    """Returns the status of an export."""
    return _exports(request).get(export_id).to_dict()


@router.get("/exports/{export_id}/content", response_class=FileResponse)
def export_content(request: Request, export_id: str) -> FileResponse:
    """Returns the result of an export."""
    export = _exports(request).get(export_id)
    if export.path is None:
        raise RequestError(f"the export is {export.status}; there is nothing to download", 409, "not_ready", "id")
    return FileResponse(export.path, media_type="application/octet-stream", filename=export.file_name)
