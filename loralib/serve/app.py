"""The application: all routes, behind the checks that every request passes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from .. import __version__
from . import adapters, page, text, tuning
from .errors import RESPONSES, install
from .metrics import Counting
from .security import Guard, Rules
from .server import Server

__all__ = ["create_app"]


def create_app(server: Server) -> FastAPI:
    """Returns the application, which uses but does not own `server`."""
    config = server.config
    # The interactive docs would fetch scripts from other sites; the schema is at /openapi.json.
    app = FastAPI(title="loralib", version=__version__, docs_url=None, redoc_url=None, responses=RESPONSES)
    app.state.server = server
    install(app)
    app.include_router(text.router)
    app.include_router(adapters.router)
    app.include_router(tuning.router)
    if config.page:
        page.mount(app)
    rules = Rules(
        config.host,
        config.api_key,
        config.allow_origin,
        int(config.max_body_mb * 1e6),
        int(config.max_upload_mb * 1e6),
        config.max_seconds,
    )
    app.add_middleware(Guard, rules=rules)
    app.add_middleware(Counting, metrics=server.metrics)

    @app.get("/health")
    def health() -> JSONResponse:
        """Tells whether the server accepts requests, and the model's thread is running."""
        if server.is_closing:
            return JSONResponse({"status": "shutting down"}, 503)
        if not server.service.is_alive:
            return JSONResponse({"status": "the model's thread has stopped; restart the server"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:
        """Returns metrics for Prometheus."""
        return Response(server.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    make_schema = app.openapi

    def schema() -> dict[str, Any]:
        made = make_schema()
        for path in made["paths"].values():
            for operation in path.values():
                # FastAPI's own response for invalid requests; here they get status 400 and OpenAI's format.
                said = operation.get("responses", {}).get("422", {})
                if "HTTPValidationError" in str(said):
                    operation["responses"]["422"] = operation["responses"].get("400", said)
        return made

    app.openapi = schema  # type: ignore[method-assign]
    return app
