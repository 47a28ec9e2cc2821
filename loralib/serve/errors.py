"""Errors as responses in the format of OpenAI's API; one table maps errors to status codes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount

from ..errors import (
    AdapterError,
    BaseMismatchError,
    BaseModelError,
    BusyModelError,
    BusyServerError,
    ConfigError,
    DataError,
    LoraError,
    MissingDependencyError,
    OutputError,
    TargetError,
    UnsupportedModelError,
)
from .state import RequestError

__all__ = ["RESPONSES", "RETRY_AFTER", "Fault", "RequestError", "answer", "body_of", "fault_of", "install"]

RETRY_AFTER: Final = 1  # seconds; places become free whenever a text ends

# The first match applies: error, status, code.  Everything else is 500, with its message only in the log.
_STATUSES: Final[Sequence[tuple[type[LoraError], int, str | None]]] = (
    (BusyServerError, 429, "too_many_requests"),
    (BusyModelError, 503, "model_is_busy"),
    (BaseMismatchError, 422, "base_mismatch"),
    (AdapterError, 422, "adapter_refused"),
    (BaseModelError, 422, "adapter_refused"),
    (TargetError, 422, "adapter_refused"),
    (DataError, 400, None),
    (ConfigError, 400, None),
    (UnsupportedModelError, 400, "unsupported"),
    (MissingDependencyError, 501, "missing_dependency"),
)
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_METHODS: Final = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_WORDS: Final = {
    404: "there is nothing at this address",
    405: "this method is not allowed here",
    413: "the request's body is too large",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The response to a request that failed."""

    error: ErrorDetail


_ABOUT: Final = {
    400: "The request is invalid or cannot be fulfilled; the message says what to change.",
    401: "The API key is missing or wrong.",
    403: "The request came from a page of another origin, or what it asks for is not allowed.",
    404: "There is no such model, adapter, file or job.",
    408: "The body did not arrive in time.",
    409: "It already exists, or is in the wrong state.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    421: "The server is not known by this host name.",
    422: "The adapter cannot be used with this base.",
    429: "Too many requests are waiting.",
    500: "Internal server error.",
    501: "The server lacks an optional package.",
    503: "The server is shutting down, or the model is in use.",
    504: "The request took longer than the server allows.",
    507: "The server's disk is full.",
}
# For the OpenAPI schema: any route may return these.
RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorAnswer, "description": about} for status, about in _ABOUT.items()
}


@dataclass(frozen=True)
class Fault:
    """What a client is told about an error.

    Attributes:
        status: the HTTP status.
        message: a message for people.
        code: a code for programs.
        param: the field at fault.
        headers: additional headers.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] | None = None


def fault_of(error: BaseException) -> Fault:
    """Returns what a client is told about an error.

    >>> fault_of(BusyServerError("256 requests are waiting")).status
    429
    >>> fault_of(ZeroDivisionError("secret")).message
    'the server encountered an error; see its log'
    """
    if isinstance(error, RequestError):
        return Fault(error.status, str(error), error.code, error.param, _retry(error.status))
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        words = _WORDS.get(error.status_code) if not error.detail or error.detail.istitle() else None
        words = words or ("there is nothing at this address" if error.detail == "Not Found" else str(error.detail))
        words = _WORDS[405] if error.detail == "Method Not Allowed" else words
        return Fault(error.status_code, words, None, None, error.headers)
    if isinstance(error, OutputError):
        full = "disk is full" in str(error)
        return Fault(507 if full else 500, "the server cannot write its files", "disk_full" if full else None)
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            if kind is BusyServerError and "shutting down" in str(error):
                status, code = 503, "shutting_down"
            if kind is DataError and "context" in str(error):
                code = "context_length_exceeded"
            return Fault(status, str(error), code, None, _retry(status))
    return Fault(500, "the server encountered an error; see its log")


def body_of(fault: Fault) -> dict[str, Any]:
    """Returns the body of an error response.

    >>> body_of(Fault(404, "no such model", "model_not_found", "model"))["error"]["type"]
    'not_found_error'
    """
    kind = "server_error" if fault.status >= 500 else _TYPES.get(fault.status, "invalid_request_error")
    return {"error": {"message": fault.message, "type": kind, "param": fault.param, "code": fault.code}}


def answer(error: BaseException) -> JSONResponse:
    """Returns the response for a request that ended with an error."""
    fault = fault_of(error)
    return JSONResponse(body_of(fault), fault.status, dict(fault.headers or {}))


def install(app: FastAPI) -> None:
    """Makes an application use this format for all error responses."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, LoraError) and fault_of(error).status == 500:  # uvicorn logs other errors of status 500
            logging.getLogger("uvicorn.error").error("%s", error, exc_info=error)
        reply = answer(error)
        if reply.status_code == 405:
            reply.headers["allow"] = ", ".join(_allowed(request))
        return reply

    for kind in (LoraError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def _allowed(request: Request) -> list[str]:
    """Returns the methods available at a URL; the router itself only reports those of the first route there."""
    scope = {name: value for name, value in request.scope.items() if name != "method"}
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]
    found = [name for name in _METHODS if any(r.matches({**scope, "method": name})[0] is Match.FULL for r in routes)]
    return found or ["GET", "HEAD"]  # static files of the page


def _retry(status: int) -> dict[str, str] | None:
    return {"retry-after": str(RETRY_AFTER)} if status in (429, 503) else None


def _invalid(error: RequestValidationError) -> Fault:
    """Describes what is wrong with a request, one line per field.

    If a field may have several types, there is a fault for each of them.
    """
    faults: dict[str, list[str]] = {}
    for each in error.errors():
        own = each.get("ctx", {}).get("error")
        if isinstance(own, RequestError):  # raised by the validation of a field
            return fault_of(own)
        if each["type"] == "json_invalid":
            why = each.get("ctx", {}).get("error", "")
            return Fault(400, f"the body is not valid JSON: {why} (at character {each['loc'][-1]})", "invalid_json")
        where = list(each["loc"][1:])
        path = next(
            (n for n, step in enumerate(where) if isinstance(step, str) and not step.isidentifier()), len(where)
        )
        name = ".".join(map(str, where[:path])) if each["loc"][0] == "body" else str(where[0] if where else "")
        top = name.split(".")[0]
        message = _message(each)
        lines = faults.setdefault(top, [])
        line = message if name == top else f"{name}: {message}"
        if line not in lines:
            lines.append(line)
    words = [f"{name}: {' or: '.join(lines)}" if name else " or: ".join(lines) for name, lines in faults.items()]
    return Fault(400, "; ".join(words) or "the request is invalid", "invalid_request", next(iter(faults), None) or None)


def _message(each: Mapping[str, Any]) -> str:
    if each["type"] == "missing":
        return "it is missing"
    if each["type"] == "extra_forbidden":
        return "there is no such field"
    text = str(each["msg"]).removeprefix("Value error, ")
    value = each.get("input")
    shown = f" (it is {value!r:.60})" if isinstance(value, (bool, int, float, str)) else ""
    return text[:1].lower() + text[1:] + shown
