"""The web page: files for a browser, which use the server's own HTTP API and a few additional routes.

`api` offers what OpenAI's API does not: previews, what adapters have learned, exports.  The other files are sent to the
browser as they are, without a build step, and load nothing from other sites.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from .api import Exports, router

__all__ = ["mount"]

_FILES = Path(__file__).parent / "files"
_POLICY = {  # only scripts and connections of this server, and no framing
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    """Static files that a browser requests again after an update."""

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
