"""The application: routes, put together over what is served."""

from __future__ import annotations

from fastapi import FastAPI

from .. import __version__
from . import adapters, page, text, tuning
from .server import Server

__all__ = ["create_app"]


def create_app(server: Server) -> FastAPI:
    """Returns the application, which serves but does not own `server`."""
    app = FastAPI(title="loralib", version=__version__)
    app.state.server = server
    app.include_router(text.router)
    app.include_router(adapters.router)
    app.include_router(tuning.router)
    if server.config.page:
        page.mount(app)

    @app.get("/health")
    def health() -> dict[str, str]:
        """Answers while the server can."""
        return {"status": "ok"}

    return app
