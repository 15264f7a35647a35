"""What every gRPC service of the front door does with a call: its arrival, message and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from crossdock.proto.errors import CrossdockError, InvalidRequest, Overloaded, RequestTooLarge
from crossdock.router.dispatch import tracing
from crossdock.router.frontdoor.frontend import Arrival, Frontend
from crossdock.router.frontdoor.grpc_access import enter, metadata_of, who
from crossdock.router.frontdoor.http2.call import Aborted
from crossdock.router.frontdoor.large_messages import INLINE_BYTES, Kind, undecodable

FOREVER_S = 10 * 365 * 86400.0
DOMAIN = "crossdock"  # of google.rpc.ErrorInfo
DETAILS_KEY = "grpc-status-details-bin"  # where every gRPC implementation looks for them


def arrival_of(frontend: Frontend, context: Any) -> Arrival:
    """By whom a call is, which counts, with its trace context and deadline. Raises Unauthenticated
    or RateLimited."""
    visit = enter(frontend.gate, context)
    headers = metadata_of(context)
    timeout_s = context.time_remaining()
    if timeout_s is not None and timeout_s > FOREVER_S:
        timeout_s = None
    return frontend.arrival(visit, tracing.context_of(headers), timeout_s)


def parser(parse: Callable[[bytes], Any], limit: int) -> Callable[[bytes], Any]:
    """`parse` for gRPC to call. An error in place of a message is for the handler to raise, see
    `checked`; large ones stay bytes, see `parsed`. limit: bytes of a message."""

    def parse_or_say_why(data: bytes) -> Any:
        if len(data) > limit:
            return RequestTooLarge("message", f"{len(data)} bytes", f"at most {limit} bytes")
        try:
            return parse(data) if len(data) <= INLINE_BYTES else data
        except DecodeError as error:
            return undecodable(data, error)

    return parse_or_say_why


async def parsed(given: Any, kind: Kind, frontend: Frontend, context: Any) -> Any:
    """What `parser` gave, parsed beside the loop where it is large: a message, or an error."""
    if not isinstance(given, bytes):
        return given
    try:
        party = who(frontend.gate, context).principal.party
        return await frontend.aside.read_message(party, given, kind)
    except CrossdockError as error:
        return error


def checked(message: Any) -> Any:
    """A message that `parser` or `parsed` gave. Raises the error that it gave instead."""
    if isinstance(message, CrossdockError):
        raise message
    return message


def refuse(context: Any, error: Exception) -> None:
    """Gives the call the error's status. Details travel in trailing metadata: as
    google.rpc.Status with ErrorInfo, BadRequest and RetryInfo, and as plain keys."""
    if not isinstance(error, CrossdockError):
        raise error
    trailers: list[tuple[str, str | bytes]] = list(context.trailing_metadata() or ())
    if isinstance(error, Overloaded):
        trailers.append(("retry-after", f"{error.retry_after_s:.0f}"))
    if isinstance(error, InvalidRequest):
        trailers.append(("error-field", _printable(error.field)))
    trailers.append(("error-type", type(error).__name__))
    trailers.append(("retriable", "true" if error.retriable else "false"))
    trailers.append((DETAILS_KEY, details_of(error).SerializeToString()))
    context.refuse(grpc.StatusCode[error.grpc_status], str(error), tuple(trailers))
    error.__traceback__ = None  # of frames that hold the error


async def abort(context: Any, error: CrossdockError) -> NoReturn:
    """Ends the call with the error's status: see `refuse`. Raises what ends its handler."""
    refuse(context, error)
    raise Aborted(str(error))


def details_of(error: CrossdockError) -> status_pb2.Status:
    """The error in google.rpc's terms: ErrorInfo names its class, BadRequest the field, RetryInfo
    when to try again."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_status), message=str(error))
    retriable = "true" if error.retriable else "false"
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(
            reason=type(error).__name__, domain=DOMAIN, metadata={"retriable": retriable}
        )
    )
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.limit
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retriable:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(1000 * getattr(error, "retry_after_s", 1.0)))
        status.details.add().Pack(retry)
    return status


def _printable(text: str) -> str:
    """What a trailer can hold."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)
