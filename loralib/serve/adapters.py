"""Routes for models and adapters."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from ..errors import LoraError
from .bodies import Body
from .errors import RequestError, fault_of
from .server import Server

__all__ = ["router"]

router = APIRouter()
_STARTED = int(time.time())
Name = Annotated[str, Field(min_length=1, max_length=200)]
Scale = Annotated[float, Field(ge=-1000, le=1000, description="factor by which its updates are scaled; 1: as trained")]


class AdapterRequest(Body):
    """An adapter to load: the name that requests will use for it, its directory and its scale."""

    name: Name
    path: Annotated[str, Field(min_length=1, max_length=1000)] | None = Field(
        None, description="a directory below --adapters; default: the one with that name"
    )
    scale: Scale = 1.0
    pin: bool = Field(False, description="always keep it in memory")


class ScaleRequest(Body):
    """The new scale of a loaded adapter."""

    scale: Scale


@router.get("/v1/models")
def list_models(request: Request) -> dict[str, Any]:
    """Lists the base model and its adapters, like OpenAI's API."""
    server: Server = request.app.state.server
    return {"object": "list", "data": [_model(server, name) for name in server.models]}


@router.get("/v1/models/{model:path}")
def get_model(request: Request, model: str) -> dict[str, Any]:
    """Describes the base model or an adapter."""
    server: Server = request.app.state.server
    server.adapter_called(model)
    return _model(server, model)


@router.get("/v1/adapters")
def list_adapters(request: Request) -> dict[str, Any]:
    """Lists adapters, and the directories of further ones that can be loaded."""
    server: Server = request.app.state.server
    store = server.adapters
    return {"object": "list", "data": _described(server), "unused": store.unused()}


@router.post("/v1/adapters", status_code=201)
def load_adapter(request: Request, body: AdapterRequest) -> dict[str, Any]:
    """Loads an adapter from a directory below the configured one."""
    server: Server = request.app.state.server
    source = server.adapter_directory(body.path or body.name)
    try:
        server.adapters.load(body.name, source, scale=body.scale, pin=body.pin)
    except RequestError:
        raise
    except LoraError as error:
        # The loader's own message, without the server's paths.
        fault = fault_of(error)
        raise RequestError(server.adapters.public(str(error)), fault.status, fault.code, "path") from error
    return server.adapters.describe(body.name)


@router.get("/v1/adapters/{name:path}")
def get_adapter(request: Request, name: str) -> dict[str, Any]:
    """Returns an adapter's rank, target modules, scale, memory and origin; it must be loaded."""
    server: Server = request.app.state.server
    return server.adapters.describe(name)


@router.patch("/v1/adapters/{name:path}")
def change_adapter(request: Request, name: str, body: ScaleRequest) -> dict[str, Any]:
    """Sets an adapter's scale, effective from the next token."""
    server: Server = request.app.state.server
    server.adapters.set_scale(name, body.scale)
    return server.adapters.describe(name)


@router.delete("/v1/adapters/{name:path}")
def unload_adapter(request: Request, name: str) -> dict[str, Any]:
    """Unloads an adapter; texts being generated with it continue to use it."""
    server: Server = request.app.state.server
    server.adapters.unload(name)
    return {"id": name, "object": "adapter", "deleted": True}


def _model(server: Server, name: str) -> dict[str, Any]:
    adapter = name if name != server.name else None
    created = _STARTED if adapter is None else server.adapters.get(adapter).created
    parent = {} if adapter is None else {"parent": server.name}
    return {"id": name, "object": "model", "created": created, "owned_by": "loralib", **parent}


def _described(server: Server) -> list[dict[str, Any]]:
    found = []
    for name in server.adapters.names:
        try:
            found.append(server.adapters.describe(name))
        except LoraError:  # unloaded meanwhile
            continue
    return found
