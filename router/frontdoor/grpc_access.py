"""The gate at the gRPC server: a credential before the message, and limits in trailing metadata."""

from __future__ import annotations

import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc

from crossdock.proto.errors import CrossdockError, Unauthenticated
from crossdock.router.frontdoor.gate import Gate, Visit

OPEN = "/grpc.health.v1.Health/"
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Guard(grpc.aio.ServerInterceptor):
    """Lets no call past it without a credential, where there is to be one, but for health. A call
    that is refused is refused before its message is read."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's own handler, or one that refuses."""
        if not details.method.startswith(OPEN):
            try:
                self._gate.enter(metadata_of(details), "")
            except Unauthenticated as error:
                return _refusing(error)
        return await continuation(details)


def metadata_of(call: Any) -> dict[str, str]:
    """The text of a call's metadata, by key in lower case; of details or of a context."""
    given = call.invocation_metadata
    found = given() if callable(given) else given
    return {key: value for key, value in found or () if isinstance(value, str)}


def who(gate: Gate, context: Any) -> Visit:
    """Who calls. Raises Unauthenticated."""
    return gate.enter(metadata_of(context), client_of(context.peer()))


def enter(gate: Gate, context: Any) -> Visit:
    """Who calls for work, which is counted. Raises Unauthenticated or RateLimited."""
    visit = who(gate, context)
    try:
        gate.count(visit)
    finally:
        say_limits(gate, context, visit)
    return visit


def say_limits(gate: Gate, context: Any, visit: Visit) -> None:
    """Has the call's trailing metadata say how much is left now."""
    context.set_trailing_metadata(tuple(gate.headers(visit).items()))


def client_of(peer: str) -> str:
    """The address in what gRPC calls a peer: ipv4:HOST:PORT, ipv6:[HOST]:PORT, or unix: alone."""
    kind, _, rest = urllib.parse.unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind


def _refusing(error: CrossdockError) -> Any:
    """Of a stream, since one that takes a single message would read it first."""

    async def refuse(_: Any, context: Any) -> NoReturn:
        trailers = (("error-type", type(error).__name__), ("retriable", "false"))
        await context.abort(
            grpc.StatusCode[error.grpc_status], str(error), trailing_metadata=trailers
        )
        raise AssertionError("abort raises")

    return grpc.stream_stream_rpc_method_handler(refuse)
