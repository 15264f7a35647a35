"""Every error that Crossdock raises on purpose, with its gRPC and HTTP status.

CrossdockError                      INTERNAL              500
├── InvalidRequest                  INVALID_ARGUMENT      400   names field, value and limit
│   ├── ContextLengthExceeded       INVALID_ARGUMENT      400   prompt and answer do not fit
│   ├── RequestTooLarge             INVALID_ARGUMENT      413
│   ├── RequestStalled              DEADLINE_EXCEEDED     408   the body came too slowly
│   └── UnsupportedMediaType        INVALID_ARGUMENT      415
├── NotFound                        NOT_FOUND             404   unknown model, pool, worker
├── Unauthenticated                 UNAUTHENTICATED       401   no credential, or not a good one
├── Forbidden                       PERMISSION_DENIED     403   the credential does not allow it
├── Overloaded                      RESOURCE_EXHAUSTED    429   carries retry_after_s
│   └── RateLimited                                             a limit of the credential
│       └── BudgetSpent                                         not retriable
├── DeadlineExceeded                DEADLINE_EXCEEDED     504
├── Cancelled                       CANCELLED             499
├── Unavailable                     UNAVAILABLE           503   retriable
│   ├── WorkerLost
│   ├── TransferFailed                                          a pull failed or was refused
│   └── Draining
├── OfSequences                     INTERNAL              500   names the sequences
│   ├── NotFinite
│   └── GrammarFailed               INVALID_ARGUMENT      400   a grammar ran into its limits
├── LayoutMismatch                  FAILED_PRECONDITION   409   names both values
├── Overtaken                       ABORTED               409   another change came first
├── ConfigError                     INVALID_ARGUMENT      400   names file, line and field
└── ModelError                      FAILED_PRECONDITION   500   file missing, corrupt, …
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar


class CrossdockError(Exception):
    """Base of the tree above."""

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    retriable: ClassVar[bool] = False
    outcome: ClassVar[str] = "internal"  # how gateways count a request that ended so
    counted: bool = False  # by a gateway's metrics, once


class InvalidRequest(CrossdockError):
    """A request that can never be served: says which field, what it held and what it may hold."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    outcome = "invalid"

    def __init__(self, field: str, value: object, limit: str) -> None:
        field, limit = _clipped(field, MOST_FIELD), _clipped(limit, MOST_LIMIT)
        super().__init__(f"{field}: {show(value)} is not allowed; {limit}")
        self.field, self.value, self.limit = field, value, limit


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the model's context or a worker's KV pool."""


class RequestTooLarge(InvalidRequest):
    """The body, or what it inflates to, is over the gateway's limit."""

    http_status = 413


class RequestStalled(InvalidRequest):
    """The body did not come in the time that a gateway waits for one."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 408


class UnsupportedMediaType(InvalidRequest):
    """The body is said to be something else than what the route reads."""

    http_status = 415


class NotFound(CrossdockError):
    """No such model or resource; no retry finds it."""

    grpc_status = "NOT_FOUND"
    http_status = 404
    outcome = "not_found"


class Overloaded(CrossdockError):
    """There is no room now; `retry_after_s` seconds later there may be."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429
    outcome = "overloaded"
    retriable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """A limit of the client's credential is reached; others are served meanwhile. `limit` says
    which: requests, tokens or sequences."""

    outcome = "rate_limited"

    def __init__(self, message: str, retry_after_s: float = 1.0, limit: str = "requests") -> None:
        super().__init__(message, max(1.0, math.ceil(retry_after_s)))  # whole, as headers have it
        self.limit = limit


class BudgetSpent(RateLimited):
    """What the credential may spend in a day or a month is spent; no client waits that long."""

    retriable = False

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s, "budget")


class Unauthenticated(CrossdockError):
    """No credential, or one that is not known, not valid any more, or not of this cluster."""

    grpc_status = "UNAUTHENTICATED"
    http_status = 401
    outcome = "unauthenticated"

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing  # there was none at all


class Forbidden(CrossdockError):
    """The credential is good, and does not allow this. `param` names the field that asked."""

    grpc_status = "PERMISSION_DENIED"
    http_status = 403
    outcome = "forbidden"

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(f"{param}: {message}" if param else message)
        self.param = param


class DeadlineExceeded(CrossdockError):
    """The request's deadline passed before it had all its tokens."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504
    outcome = "deadline"


class Cancelled(CrossdockError):
    """The client, or who acts for it, gave the request up."""

    grpc_status = "CANCELLED"
    http_status = 499
    outcome = "cancelled"


class Unavailable(CrossdockError):
    """Nobody can serve this now; a retry may find somebody."""

    grpc_status = "UNAVAILABLE"
    http_status = 503
    outcome = "unavailable"
    retriable = True


class WorkerLost(Unavailable):
    """The worker died or was cut off while it held the sequence."""


class TransferFailed(Unavailable):
    """KV could not be read, or the fence refused what was read."""


class Draining(Unavailable):
    """The worker takes no new sequences; another does."""


class OfSequences(CrossdockError):
    """These sequences must not go on; the others of the step can be run without them."""

    def __init__(self, message: str, sequence_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.sequence_ids = frozenset(sequence_ids)  # where they are known: in the engine


class NotFinite(OfSequences):
    """A step gave these sequences a NaN or an infinity."""


class GrammarFailed(OfSequences):
    """What these sequences must match ran into the limits of time or memory while it was used:
    the request's own doing, so nothing is gained by sending it again."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    outcome = "invalid"


class LayoutMismatch(CrossdockError):
    """Two workers' KV is laid out differently, so neither may read the other's."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 409


class Overtaken(CrossdockError):
    """Another change of the cluster's spec came first: look at it, then ask again."""

    grpc_status = "ABORTED"
    http_status = 409


class ConfigError(CrossdockError):
    """A setting that cannot be: `where` is `file:line` where it is known."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400

    def __init__(self, field: str, message: str, where: str = "") -> None:
        super().__init__(f"{where}: {field}: {message}" if where else f"{field}: {message}")
        self.field, self.message, self.where = field, message, where

    def at(self, where: str) -> ConfigError:
        """The same error with the place it was found at."""
        return ConfigError(self.field, self.message, where)


class ModelError(CrossdockError):
    """A model's files are missing, damaged, or not supported."""

    grpc_status = "FAILED_PRECONDITION"


MOST_SHOWN = 120  # characters of a value in a message
MOST_ENTRIES = 8  # of a list or object in a message
MOST_FIELD, MOST_LIMIT = 256, 1000  # characters of what else may quote what was sent


def show(value: object, depth: int = 3) -> str:
    """A value as messages quote it: as JSON has it, and cut short before it is written out; what
    is nested more than `depth` deep is left out."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return _cut(repr(value[: 2 * MOST_SHOWN]), len(value))
    if isinstance(value, list | tuple | dict) and value and not depth:
        return "…"
    if isinstance(value, list | tuple):
        shown = [show(entry, depth - 1) for entry in value[:MOST_ENTRIES]]
        more = [f"… {len(value)} in all"] if len(value) > MOST_ENTRIES else []
        return _cut(f"[{', '.join(shown + more)}]")
    if isinstance(value, dict):
        entries = itertools.islice(value.items(), MOST_ENTRIES)
        shown = [f"{show(key)}: {show(entry, depth - 1)}" for key, entry in entries]
        more = [f"… {len(value)} in all"] if len(value) > MOST_ENTRIES else []
        return _cut(f"{{{', '.join(shown + more)}}}")
    return _cut(repr(value))


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _cut(shown: str, length: int | None = None) -> str:
    if len(shown) <= MOST_SHOWN:
        return shown
    return f"{shown[:100]}… ({length or len(shown)} characters)"
