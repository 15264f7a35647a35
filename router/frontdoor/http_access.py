"""The gate at the HTTP server: a credential before the body, and what answers say of limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from crossdock.proto.errors import Forbidden, Unauthenticated
from crossdock.router.frontdoor.gate import Gate, Visit

OPEN = frozenset({"/health", "/ping", "/version"})
TENANT_HEADER = "X-Crossdock-Tenant"
RESPONSES = "/v1/responses/"  # workers are asked for each, whatever the method
VISIT = web.RequestKey("visit", Visit)
CHALLENGE = web.RequestKey("challenge", bool)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def visit_of(request: web.Request) -> Visit:
    """Who asks, as the guard let him in."""
    visit: Visit = request[VISIT]
    return visit


def guard(gate: Gate) -> Any:
    """The middleware that lets nobody past it without a credential, where there is to be one, but
    to say that it is well. What asks for work is a POST, or for a response, and counted."""
    settings = gate.authenticator.settings

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        open_metrics = request.path == "/metrics" and settings.metrics == "all"
        if request.path in OPEN or request.method == "OPTIONS" or open_metrics:
            return await handler(request)
        try:
            visit = gate.enter(request.headers, request.remote or "")
        except Unauthenticated:
            request[CHALLENGE] = True
            raise
        request[VISIT] = visit
        if request.path == "/metrics" and settings.required and not visit.principal.metrics:
            raise Forbidden("this credential may not read the figures of all tenants")
        if request.method == "POST" or request.path.startswith(RESPONSES):
            gate.count(visit)
        return await handler(request)

    return middleware


def with_limits(gate: Gate) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Puts x-ratelimit-* on every answer before its head is sent, and the challenge on a 401."""

    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        if CHALLENGE in request:
            response.headers["WWW-Authenticate"] = 'Bearer realm="crossdock"'
        if VISIT in request:
            response.headers.update(gate.headers(visit_of(request)))

    return prepare
