"""Every call of a client passes here: let in by its credential, counted, and accounted once when
it ends, however it ends."""

from __future__ import annotations

import asyncio
import string
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from crossdock.proto.errors import CrossdockError
from crossdock.router.config import Price
from crossdock.router.dispatch.metrics import GatewayMetrics
from crossdock.router.dispatch.request import Ended, Request
from crossdock.router.frontdoor.audit import AuditLog
from crossdock.router.frontdoor.auth import Authenticator
from crossdock.router.frontdoor.limits import Grant, Limiter, Work
from crossdock.router.frontdoor.principal import Principal
from crossdock.router.frontdoor.usage import Usage

APPROVAL_HEADER = "x-approval-id"
MODEL_HEADER = "x-crossdock-model"
MAX_APPROVAL = 256
_VISIBLE = string.punctuation.replace("%", "")
FREE = Price()


@dataclass(eq=False)
class Visit:
    """One call of one client, from its credential to its end."""

    principal: Principal
    client: str  # its address
    received_unix: float
    approval: str = ""  # id that the client sends of whoever approved it
    request: Request | None = None  # once it is one
    grant: Grant | None = None
    closed: bool = False
    model: str = ""  # that serves it, once it is chosen
    asked_model: str = ""  # what the client called it
    route: str = ""  # why that model, where a route chose
    response: str = ""  # id that its answer has of its own, where that is not the request's
    answered_by: str = ""  # decode worker of the turn that this one goes on from

    def chose(self, model: str, asked: str, route: str = "") -> None:
        """The model of the call is known from now on."""
        self.model, self.asked_model, self.route = model, asked, route


class Gate:
    """Who may come in, and what each is to have."""

    def __init__(
        self,
        authenticator: Authenticator,
        limiter: Limiter,
        metrics: GatewayMetrics,
        prices: Mapping[str, Price],
        usage: Usage,
        audit: AuditLog | None,
        weights: Callable[[str], str],
    ) -> None:
        """`prices` and `weights` (their digest) are by model."""
        self._audit, self._weights = audit, weights
        self.authenticator, self.limiter, self._usage = authenticator, limiter, usage
        self._metrics, self._prices = metrics, prices
        self.only_model = ""  # of calls that were refused before theirs was known

    def enter(self, headers: Mapping[str, str], client: str) -> Visit:
        """A client at this address asks with these headers, in lower case or of any. Raises
        Unauthenticated."""
        try:
            principal = self.authenticator.authenticate(headers, client)
            approval = headers.get(APPROVAL_HEADER, "")[:MAX_APPROVAL]
            return Visit(principal, client, time.time(), approval)
        except CrossdockError as error:
            self._metrics.outcome(error)
            raise

    def count(self, visit: Visit) -> None:
        """Counts a call that asks for work, before its body is read. Raises RateLimited."""
        try:
            if self._audit is not None:
                self._audit.check()
            self.limiter.count_request(visit.principal)
        except CrossdockError as error:
            self._metrics.outcome(error)
            self.refused(visit, error)
            raise

    def admit(self, visit: Visit, work: Work) -> None:
        """Sets aside what the request may use. Raises RateLimited or InvalidRequest."""
        price = self._prices.get(visit.model, FREE)
        visit.grant = self.limiter.admit(visit.principal, work, price)

    def refused(self, visit: Visit, error: BaseException) -> None:
        """A call ended before it became a request, or as it was to become one."""
        if not visit.closed:
            self._close(visit)
            self._write(visit, error, None)
            visit.request = None  # which holds the visit

    def ended(self, visit: Visit, ended: Ended) -> None:
        """A request has ended, well or not."""
        outcome = ended.error.outcome if ended.error is not None else "ok"
        self._metrics.model_requests.inc(1, visit.model, outcome)
        cost = self._close(visit, ended.prompt_tokens, ended.cached_tokens, ended.generated_tokens)
        self._usage.add(visit.principal, visit.model, ended, cost)
        self._write(visit, ended.error, ended)
        visit.request = None  # which holds the visit

    def _close(self, visit: Visit, prompt: int = 0, cached: int = 0, generated: int = 0) -> float:
        """Gives back what it held; returns what it cost."""
        visit.closed = True
        if visit.grant is None:
            return 0.0
        return self.limiter.settle(visit.grant, prompt, cached, generated)

    def _write(self, visit: Visit, error: BaseException | None, ended: Ended | None) -> None:
        """The call's line of the audit log."""
        if self._audit is None:
            return
        model = visit.model or self.only_model
        outcome = "ok" if error is None else getattr(error, "outcome", "internal")
        if isinstance(error, asyncio.CancelledError):
            outcome = "cancelled"
        record = {
            "time": visit.received_unix,
            "tenant": visit.principal.tenant,
            "key": visit.principal.key_id,
            "client": visit.client,
            "outcome": outcome,
            "error": str(error) if error is not None else None,
            "approval": visit.approval,
            "model": model,
            "asked_model": visit.asked_model,
            "route": visit.route,
            "response": visit.response,
            "weights": self._weights(model),
            "request": visit.request,
            "ended": ended,
        }
        self._audit.add(record)

    def headers(self, visit: Visit) -> dict[str, str]:
        """What every answer says of the limits, and of the model that serves it."""
        found = self.limiter.headers(visit.principal)
        return found | {MODEL_HEADER: in_header(visit.model)} if visit.model else found


@lru_cache(256)
def in_header(name: str) -> str:
    """A model's name as metadata and headers can hold it: whatever is not visible ASCII, and "%",
    is percent-encoded, as gRPC has it in grpc-message."""
    return quote(name, safe=_VISIBLE)
