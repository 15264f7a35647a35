"""How much a gateway takes on: bounds on what is active."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from crossdock.proto.errors import InvalidRequest, Overloaded
from crossdock.proto.settings import check_settings, setting
from crossdock.router.placement.view import ClusterView

LONGEST_RETRY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one gateway. Sequences are counted: a request with n = 4 is four."""

    max_active: int = setting(
        1024, "Sequences under way in one gateway; more are refused.", low=1, high=1_000_000
    )
    max_active_per_tenant: int = setting(512, "The same of one tenant.", low=1, high=1_000_000)
    max_request_share: float = setting(
        0.25,
        "The part of either that one request's sequences (prompts × n) may be; at least 1.",
        low=0,
        high=1,
    )
    worker_wait_s: float = setting(
        120.0, "How long a request waits for a worker where none is there.", low=0, high=3600
    )
    local_prompt_tokens: int = setting(
        128,
        "How many uncached prompt tokens a decode worker may compute itself, where it has more of "
        "the prompt cached than any prefill worker: the next turn of a chat. 0: none. Of policy "
        "predicted_latency alone.",
        low=0,
        high=65_536,
    )
    max_restarts: int = 5  # of a sequence, without a token gained in between
    max_losses: int = 2  # workers that may die or fail under one sequence before it is refused
    first_backoff_s: float = 0.05  # before a refused sequence is offered again; doubles

    def __post_init__(self) -> None:
        check_settings(self, "gateway.limits.")


class Admission:
    """Counts what is active. Every admit is followed by one release."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        room = min(limits.max_active, limits.max_active_per_tenant)
        self._most = max(1, int(limits.max_request_share * room))  # of one request
        self.active = 0
        self._by_tenant: Counter[str] = Counter()

    def admit(self, tenant: str, sequences: int, retry_after_s: Callable[[], float]) -> None:
        """Raises Overloaded, naming the bound and when to come again, or InvalidRequest for more
        sequences than are ever admitted, and then counts nothing."""
        limits, mine = self._limits, self._by_tenant[tenant]
        if sequences > self._most:
            share = f"{limits.max_request_share:g} of max_active and max_active_per_tenant"
            limit = f"at most {self._most}, max_request_share = {share}"
            raise InvalidRequest("n", f"{sequences} sequences (prompts × n)", limit)
        full = ""
        if self.active + sequences > limits.max_active:
            full = (
                f"{self.active} sequences are active and {sequences} more would pass "
                f"max_active = {limits.max_active}"
            )
        elif mine + sequences > limits.max_active_per_tenant:
            full = (
                f"tenant {tenant!r} has {mine} active sequences and {sequences} more would pass "
                f"max_active_per_tenant = {limits.max_active_per_tenant}"
            )
        if full:
            wait_s = retry_after_s()
            raise Overloaded(f"{full}; try again in {wait_s:.0f} s", wait_s)
        self.active += sequences
        self._by_tenant[tenant] += sequences

    def release(self, tenant: str, sequences: int) -> None:
        self.active -= sequences
        self._by_tenant[tenant] -= sequences
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]


def retry_after_s(view: ClusterView) -> float:
    """When a place is likely to be free: the shortest queue over how fast it goes."""
    waits = [worker.numbers.queue_s for worker in view.workers.values() if worker.queued_tokens]
    return min(LONGEST_RETRY_S, max(1.0, min(waits, default=1.0)))
