"""Routes that generate: completions and chats, streamed or whole."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from ..generation import Sampling

__all__ = ["router"]

router = APIRouter()


class CompletionRequest(BaseModel):
    """What a client asks for."""

    model: str
    prompt: str
    max_tokens: int = 16
    temperature: float = 1.0
    seed: int = 0


@router.post("/v1/completions")
def completions(request: Request, body: CompletionRequest) -> dict[str, Any]:
    """Continues a text."""
    server = request.app.state.server
    sampling = Sampling(max_new_tokens=body.max_tokens, temperature=body.temperature, seed=body.seed)
    adapter = None if body.model == server.name else body.model
    pieces = list(server.service.stream(body.prompt, sampling, adapter))
    choice = {"index": 0, "text": "".join(piece.text for piece in pieces), "finish_reason": pieces[-1].finish_reason}
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "choices": [choice],
    }
