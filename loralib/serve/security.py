"""Access control: hosts, origins, keys, and types and sizes of bodies are checked before a request reaches any route.

A page of another site can make a browser send requests here, so listening only on loopback is not enough.  But such a
page cannot omit `Origin`, it cannot send JSON without a preflight request, and if it makes its own name resolve to
127.0.0.1 (DNS rebinding), the `Host` header contains that name.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Fault, body_of

__all__ = ["Guard", "Rules", "client_of", "is_loopback"]

_SAFE: Final = ("GET", "HEAD", "OPTIONS")
_OPEN: Final = ("/health", "/")  # accessible without a key: for monitoring, and for the page, which asks for a key
_OPEN_BELOW: Final = "/page/"  # the page's own files
_UPLOADS: Final = ("/v1/files",)
_LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",  # prevents clickjacking
    "referrer-policy": "same-origin",
}


@dataclass(frozen=True)
class Rules:
    """Requirements for requests.

    Attributes:
        host: the address that the server is bound to.
        api_keys: each request must contain one of them; empty: none needed.
        origins: origins of other sites whose pages may use the server.
        max_body, max_upload: maximum sizes of a body and of an upload, in bytes.
        max_seconds: maximum time for a body to arrive.
    """

    host: str = "127.0.0.1"
    api_keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    max_body: int = 8_000_000
    max_upload: int = 512_000_000
    max_seconds: float = 600.0


def is_loopback(host: str) -> bool:
    """Tells whether an address is only reachable from this machine.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.com")]
    [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def client_of(headers: Headers, host: str) -> str:
    """Returns an identifier of the client, for taking turns: its address and its key, since neither alone is unique."""
    return f"{host} {hash(headers.get('authorization', ''))}"


class Guard:
    """Middleware that rejects requests which must not reach a route."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        fault = self._fault(scope, headers)
        if scope["type"] == "websocket":
            if fault is None:
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": fault.message[:100]})
            return
        origin = headers.get("origin")
        granted = origin if origin in self._rules.origins else None
        reply = self._send(send, granted)
        if fault is not None:
            await JSONResponse(body_of(fault), fault.status, dict(fault.headers or {}))(scope, receive, reply)
        elif granted and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            allowed = {
                "access-control-allow-methods": "GET, POST, PATCH, DELETE",
                "access-control-allow-headers": headers.get("access-control-request-headers", ""),
                "access-control-max-age": "600",
            }
            await Response(status_code=204, headers=allowed)(scope, receive, reply)
        else:
            await self._app(scope, self._receive(scope, receive), reply)

    def _fault(self, scope: Scope, headers: Headers) -> Fault | None:
        path = scope["path"]
        host = headers.get("host", "")
        if is_loopback(self._rules.host) and not self._is_known(host):
            return Fault(
                421, f"this server is not called {host[:100]!r}; use http://{self._rules.host}", "unknown_host"
            )
        changes = scope["type"] == "websocket" or scope["method"] not in _SAFE
        if changes and not self._is_own(headers, host):
            origin = headers.get("origin") or "another site"
            return Fault(
                403,
                f"pages from {origin[:100]} may not use this server (--allow_origin permits an origin)",
                "foreign_origin",
            )
        # A browser's preflight request does not contain the key.
        asks_first = scope.get("method") == "OPTIONS" and "access-control-request-method" in headers
        if self._rules.api_keys and not _is_open(path) and not asks_first and not self._has_key(headers):
            scheme = "Bearer" if _is_api(path) else 'Basic realm="loralib: the API key is the password"'
            words = "the API key is wrong" if "authorization" in headers else "this server needs an API key"
            return Fault(
                401, f"{words}: send `Authorization: Bearer KEY`", "invalid_api_key", None, {"www-authenticate": scheme}
            )
        return self._body_fault(scope, headers) if changes and scope["type"] == "http" else None

    def _body_fault(self, scope: Scope, headers: Headers) -> Fault | None:
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._most(scope["path"]):
            return Fault(413, self._too_large(scope["path"]), "body_too_large", None, {"connection": "close"})
        has_body = length not in ("", "0") or "transfer-encoding" in headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if has_body and _is_api(scope["path"]) and scope["path"] not in _UPLOADS and kind != "application/json":
            said = f"it is {kind[:60]}" if kind else "it has none"
            return Fault(415, f"the body must have the content type application/json ({said})", "not_json")
        return None

    def _is_known(self, host: str) -> bool:
        name = _host_name(host)
        known = {*_LOCAL_NAMES, self._rules.host.strip("[]").lower()}
        known |= {_host_name(urlsplit(origin).netloc) for origin in self._rules.origins}
        return name in known or is_loopback(name) or name.endswith(".localhost")

    def _is_own(self, headers: Headers, host: str) -> bool:
        origin = headers.get("origin")
        if origin is None:  # not a browser, or an old one with another header
            return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        return origin in self._rules.origins or urlsplit(origin).netloc.lower() == host.lower() != ""

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip()
        if scheme.lower() == "basic":  # used by browsers after asking for a password
            try:
                given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        # Compares with all keys, so that timing does not reveal which one nearly matched.
        same = [hmac.compare_digest(given.encode(), key.encode()) for key in self._rules.api_keys]
        return any(same)

    def _most(self, path: str) -> int:
        return self._rules.max_body if _is_api(path) and path not in _UPLOADS else self._rules.max_upload + 1_000_000

    def _too_large(self, path: str) -> str:
        return f"the request's body is larger than {self._most(path) / 1e6:g} MB"

    def _receive(self, scope: Scope, receive: Receive) -> Receive:
        """Limits the size of the body, and the time until it has arrived."""
        most, deadline = self._most(scope["path"]), time.monotonic() + self._rules.max_seconds
        received, is_whole = 0, False

        async def limited() -> Message:
            nonlocal received, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise HTTPException(408, "the body did not arrive in time", {"connection": "close"}) from None
            received += len(message.get("body", b""))
            is_whole = message["type"] != "http.request" or not message.get("more_body", False)
            if received > most:
                raise HTTPException(413, self._too_large(scope["path"]), {"connection": "close"})
            return message

        return limited

    def _send(self, send: Send, granted: str | None) -> Send:
        """Adds headers to every response."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if granted is not None:
                    headers["access-control-allow-origin"] = granted
                    headers.add_vary_header("Origin")
            await send(message)

        return sent


def _is_api(path: str) -> bool:
    return path.startswith(("/v1/", "/page-api/"))


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_BELOW)


def _host_name(host: str) -> str:
    """Returns a host without its port.

    >>> [_host_name(host) for host in ("localhost:8000", "[::1]:80", "a.b", "")]
    ['localhost', '::1', 'a.b', '']
    """
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
