"""Every call of a client passes here: let in by its credential, counted, and accounted once when
it ends, however it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crossdock.proto.errors import CrossdockError
from crossdock.router.config import Price
from crossdock.router.dispatch.metrics import GatewayMetrics
from crossdock.router.dispatch.request import Ended
from crossdock.router.frontdoor.auth import Authenticator
from crossdock.router.frontdoor.limits import Grant, Limiter, Work
from crossdock.router.frontdoor.principal import Principal
from crossdock.router.frontdoor.usage import Usage


@dataclass(eq=False)
class Visit:
    """One call of one client, from its credential to its end."""

    principal: Principal
    client: str  # its address
    grant: Grant | None = None
    closed: bool = False


class Gate:
    """Who may come in, and what each is to have."""

    def __init__(
        self,
        authenticator: Authenticator,
        limiter: Limiter,
        metrics: GatewayMetrics,
        price: Price,
        usage: Usage,
    ) -> None:
        self.authenticator, self.limiter, self._usage = authenticator, limiter, usage
        self._metrics, self._price = metrics, price

    def enter(self, headers: Mapping[str, str], client: str) -> Visit:
        """A client at this address asks with these headers, in lower case or of any. Raises
        Unauthenticated."""
        try:
            return Visit(self.authenticator.authenticate(headers, client), client)
        except CrossdockError as error:
            self._metrics.outcome(error)
            raise

    def count(self, visit: Visit) -> None:
        """Counts a call that asks for work, before its body is read. Raises RateLimited."""
        try:
            self.limiter.count_request(visit.principal)
        except CrossdockError as error:
            self._metrics.outcome(error)
            self.refused(visit, error)
            raise

    def admit(self, visit: Visit, work: Work) -> None:
        """Sets aside what the request may use. Raises RateLimited or InvalidRequest."""
        visit.grant = self.limiter.admit(visit.principal, work, self._price)

    def refused(self, visit: Visit, error: BaseException) -> None:
        """A call ended before it became a request, or as it was to become one."""
        if not visit.closed:
            self._close(visit)

    def ended(self, visit: Visit, ended: Ended) -> None:
        """A request has ended, well or not."""
        cost = self._close(visit, ended.prompt_tokens, ended.cached_tokens, ended.generated_tokens)
        self._usage.add(visit.principal, ended, cost)

    def _close(self, visit: Visit, prompt: int = 0, cached: int = 0, generated: int = 0) -> float:
        """Gives back what it held; returns what it cost."""
        visit.closed = True
        if visit.grant is None:
            return 0.0
        return self.limiter.settle(visit.grant, prompt, cached, generated)

    def headers(self, visit: Visit) -> dict[str, str]:
        """What every answer says of the limits."""
        return self.limiter.headers(visit.principal)
