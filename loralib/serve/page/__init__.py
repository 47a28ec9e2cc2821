"""The page for people: files for a browser, which do everything over the server's own HTTP API, and a few routes more.

`api` has what OpenAI's API does not: texts that stream at a scale of their own, previews, what adapters have learned,
exports.  The other files are what the browser gets; they are not built, and fetch nothing from elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from .api import Exports, router

__all__ = ["mount"]

_FILES = Path(__file__).parent / "files"
_POLICY = {  # scripts and connections of this server alone, and nobody frames it
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    """Files that a browser asks for again after an update."""

    def file_response(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers.update({name: _POLICY[name] for name in ("Cache-Control", "X-Content-Type-Options")})
        return response


def mount(app: FastAPI) -> None:
    """Adds the page to an application whose ``state.server`` is set."""
    app.state.exports = Exports(app.state.server)
    app.include_router(router)
    app.mount("/page", _Files(directory=_FILES), "page")

    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(_FILES / "index.html", headers=_POLICY)
