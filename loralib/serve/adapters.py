"""Routes for models and adapters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models")
def models(request: Request) -> dict[str, Any]:
    """Lists the base model and its adapters, as OpenAI's API does."""
    server = request.app.state.server
    names = [server.name, *server.bank.names]
    return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "loralib"} for name in names]}
