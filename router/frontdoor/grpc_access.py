"""The gate at the gRPC server: a credential before the message, and limits in trailing metadata."""

from __future__ import annotations

import urllib.parse
from typing import Any

from crossdock.router.frontdoor.gate import MODEL_HEADER, Gate, Visit, in_header

OPEN = "/grpc.health.v1.Health/"


def admit(gate: Gate, context: Any) -> None:
    """Lets no call in without a credential, where there is to be one, but for health. Raises
    Unauthenticated."""
    if not context.method.startswith(OPEN):
        gate.enter(metadata_of(context), "")


def metadata_of(call: Any) -> dict[str, str]:
    """The text of a call's metadata, by key in lower case."""
    return {key: value for key, value in call.invocation_metadata() if isinstance(value, str)}


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


def say_model(context: Any, visit: Visit) -> None:
    """Has the call's initial metadata say which model answers it."""
    context.set_initial_metadata(((MODEL_HEADER, in_header(visit.model)),))


def client_of(peer: str) -> str:
    """The address in what gRPC calls a peer: ipv4:HOST:PORT, ipv6:[HOST]:PORT, or unix: alone."""
    kind, _, rest = urllib.parse.unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind
