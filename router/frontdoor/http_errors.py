"""How HTTP answers an error: OpenAI's body, and KServe's under /v2."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from crossdock.proto.errors import (
    CrossdockError,
    Forbidden,
    InvalidRequest,
    NotFound,
    Overloaded,
    RateLimited,
    Unauthenticated,
    show,
)
from crossdock.router.frontdoor.access_errors import access_error_body

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Outcome = Callable[[CrossdockError], None]  # counts an error that is answered, once
KSERVE = "/v2"


class NoSuchRoute(NotFound):
    """Nothing is served under this path and method."""


class WrongMethod(NoSuchRoute):
    """Another method is served under this path."""

    http_status = 405

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class NotOffered(NoSuchRoute):
    """A route of OpenAI's that no text model answers."""


class ResponseNotFound(NoSuchRoute):
    """No response of this id is kept for this tenant. `param` names the field that asked for it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ExpectationFailed(InvalidRequest):
    """The client waits for what nobody will send."""

    http_status = 417


def error_body(error: CrossdockError) -> dict[str, Any]:
    """OpenAI's shape. `code` is the name of the error's class in Crossdock's own tree."""
    if isinstance(error, Unauthenticated | Forbidden | RateLimited):
        return access_error_body(error)
    kind, param = "server_error", None
    code = _snake(type(error).__name__)
    if isinstance(error, InvalidRequest | NotFound):
        kind = "invalid_request_error"
    elif isinstance(error, Overloaded):
        kind = "rate_limit_error"
    if isinstance(error, InvalidRequest):
        param = _plain(error.field)
    elif isinstance(error, ResponseNotFound):
        param = error.param
    elif isinstance(error, NotFound) and not isinstance(error, NoSuchRoute):
        param, code = "model", "model_not_found"
    return {"error": {"message": _plain(str(error)), "type": kind, "param": param, "code": code}}


def error_event(error: CrossdockError) -> bytes:
    """An error after the answer has begun, as a server-sent event."""
    return b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"


def error_response(error: CrossdockError, path: str = "") -> web.Response:
    """The answer to a request under `path`."""
    body = error_body(error)
    if path.startswith(KSERVE):  # whose clients take the text alone
        body = {"error": body["error"]["message"]}
    headers = {"X-Should-Retry": "true" if error.retriable else "false"}  # OpenAI's clients look
    if isinstance(error, Overloaded):
        headers["Retry-After"] = f"{error.retry_after_s:.0f}"
    elif error.retriable:
        headers["Retry-After"] = "1"
    elif isinstance(error, WrongMethod):
        headers["Allow"] = error.allowed
    return web.Response(
        body=msgspec.json.encode(body),
        status=error.http_status,
        headers=headers,
        content_type="application/json",
    )


async def answered(request: web.Request, handler: Handler, outcome: Outcome) -> web.StreamResponse:
    """The handler's answer, or that of its error, which `outcome` counts."""
    try:
        return await handler(request)
    except CrossdockError as error:
        return _told(request, error, outcome)
    except web.HTTPException as error:
        error.__traceback__ = None  # of frames that hold what it was found under
        return _told(request, _named(request, error), outcome)
    except ConnectionError:
        raise
    except Exception:
        log.exception("%s %s failed", request.method, show(request.path))
        hidden = CrossdockError("internal error; the gateway's log has it")
        return _told(request, hidden, outcome)


def _told(request: web.Request, error: CrossdockError, outcome: Outcome) -> web.Response:
    outcome(error)
    error.__traceback__ = None  # of frames that hold what raised it, which holds it
    return error_response(error, request.path)


def _named(request: web.Request, error: web.HTTPException) -> CrossdockError:
    """An error of aiohttp's own: it found no handler."""
    what = f"{error.reason}: {request.method} {show(request.path)}"
    if isinstance(error, web.HTTPMethodNotAllowed):
        return WrongMethod(what, error.headers["Allow"])
    return NoSuchRoute(what)


def _plain(text: str) -> str:
    """What UTF-8 can spell: messages quote what clients sent."""
    return text.encode("utf-8", "backslashreplace").decode()


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
