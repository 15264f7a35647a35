"""The limits of credentials: requests and tokens a minute, sequences at once, spend in a period.

Requests are counted as they come. Tokens are set aside when a request is admitted, its prompts and
the most that it may generate (where it does not say, what this credential's completions have had),
and corrected when it ends; what came out longer than expected is owed. So is cost.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from crossdock.proto.errors import BudgetSpent, InvalidRequest, RateLimited, Unavailable
from crossdock.router.config import KeyLimits, Price
from crossdock.router.frontdoor.principal import Principal
from crossdock.router.frontdoor.windows import Window

FIRST_EXPECTED = 256.0  # tokens of a completion, where none has ended yet
MEMORY = 0.9  # how much of that the completions before the newest are
KEPT_ACCOUNTS = 10_000
BUSY_RETRY_S = 1.0  # a sequence may end at any moment

Spent = Callable[[str, str], float]  # by account, since the day "2026-11-22": earlier lives' too


@dataclass(frozen=True)
class Work:
    """What a request asks for: tokens of all its prompts together, and of each completion the most
    that it may have."""

    prompt_tokens: int
    sequences: int
    max_tokens: int
    open_ended: bool = False  # it does not say how many, and max_tokens is what fits


@dataclass(eq=False)
class Grant:
    """What one request holds of its account until it is settled."""

    account: Account
    at: float
    sequences: int
    tokens: float
    cost: float
    price: Price
    settled: bool = False


@dataclass(eq=False)
class Account:
    """What one credential has used."""

    name: str
    limits: KeyLimits
    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    active: int = 0  # sequences
    expected: float = FIRST_EXPECTED
    period: str = ""  # the first day of the one that `spent` is of
    spent: float = 0.0
    reserved: float = 0.0  # cost of what is under way

    def idle(self, now: float) -> bool:
        """Whether forgetting it changes nothing but what it expects."""
        return not (self.active or self.requests.used(now) or self.tokens.used(now))


class Limiter:
    """All accounts of one gateway. The clocks are passed in: `clock` for windows, `wall` for
    periods."""

    def __init__(
        self,
        clock: Callable[[], float],
        wall: Callable[[], float],
        gateways: int = 1,
        spent: Spent = lambda account, since: 0.0,
    ) -> None:
        self._clock, self._wall, self._gateways, self._spent = clock, wall, gateways, spent
        self._accounts: dict[str, Account] = {}

    def count_request(self, principal: Principal) -> None:
        """One more request. Raises RateLimited, and then counts nothing."""
        limit = self._share(principal.limits.requests_per_minute)
        if not limit:
            return
        account, now = self._account(principal), self._clock()
        used = account.requests.used(now)
        if used + 1 > limit:
            wait_s = account.requests.wait_s(now, 1, limit)
            raise RateLimited(
                f"rate limit reached for requests per minute (RPM): limit {limit}, "
                f"used {used:.0f}; try again in {duration(wait_s)}",
                wait_s,
                "requests",
            )
        account.requests.add(now, 1)

    def admit(self, principal: Principal, work: Work, price: Price) -> Grant:
        """Sets aside what a request may use. Raises RateLimited or BudgetSpent, InvalidRequest
        where it is more than the whole limit, or Unavailable where a budget needs what was spent
        and that cannot be read; then nothing is set aside."""
        account, now = self._account(principal), self._clock()
        each = self._each(account, work)
        tokens = work.prompt_tokens + work.sequences * each
        cost = price.cost(work.prompt_tokens, 0, work.sequences * each)
        self._check_concurrent(account, work.sequences)
        self._check_tokens(account, now, tokens)
        self._check_budget(account, cost)
        account.active += work.sequences
        account.tokens.add(now, tokens)
        account.reserved += cost
        return Grant(account, now, work.sequences, tokens, cost, price)

    def settle(self, grant: Grant, prompt: int, cached: int, generated: int) -> float:
        """A request has ended and used so many tokens; returns what they cost. Once for each
        grant."""
        assert not grant.settled, "settled twice"
        grant.settled = True
        account = grant.account
        account.active -= grant.sequences
        account.tokens.correct(grant.at, self._clock(), prompt + generated - grant.tokens)
        account.reserved -= grant.cost
        cost = grant.price.cost(prompt, cached, generated)
        if account.limits.budget:
            with contextlib.suppress(Unavailable):  # it is read again when the account asks next
                self._begin_period(account)
        account.spent += cost
        if generated:
            newest = generated / grant.sequences
            account.expected = MEMORY * account.expected + (1 - MEMORY) * newest
        return cost

    def budget_left(self, principal: Principal) -> float:
        """The part of its budget that is neither spent nor set aside; 1.0 where it has none. Raises
        Unavailable where what was spent cannot be read."""
        account = self._account(principal)
        budget = account.limits.budget / self._gateways
        if not budget:
            return 1.0
        self._begin_period(account)
        return max(0.0, 1 - (account.spent + account.reserved) / budget)

    def headers(self, principal: Principal) -> dict[str, str]:
        """x-ratelimit-* as OpenAI sends them, of the limits that there are."""
        found: dict[str, str] = {}
        kinds = {
            "requests": principal.limits.requests_per_minute,
            "tokens": principal.limits.tokens_per_minute,
        }
        if not any(kinds.values()):
            return found
        account, now = self._account(principal), self._clock()
        for kind, limit in kinds.items():
            if limit:
                limit = self._share(limit)
                window: Window = getattr(account, kind)
                left = max(0, math.floor(limit - window.used(now)))
                found[f"x-ratelimit-limit-{kind}"] = str(limit)
                found[f"x-ratelimit-remaining-{kind}"] = str(left)
                found[f"x-ratelimit-reset-{kind}"] = duration(window.empty_s(now))
        return found

    # -----------------------------------------------------------------------------------------

    def _each(self, account: Account, work: Work) -> float:
        """Tokens of each completion that are set aside: where the request does not say, those that
        are expected, as far as the whole limit has room for them."""
        if not work.open_ended:
            return work.max_tokens
        each = min(work.max_tokens, account.expected)
        if limit := self._share(account.limits.tokens_per_minute):
            each = min(each, max(0, limit - work.prompt_tokens) / work.sequences)
        return each

    def _check_concurrent(self, account: Account, sequences: int) -> None:
        limit = self._share(account.limits.max_concurrent)
        if limit and sequences > limit:
            most = self._at_most(limit, account.limits.max_concurrent, "max_concurrent")
            raise InvalidRequest("n", f"{sequences} sequences (prompts × n)", most)
        if limit and account.active + sequences > limit:
            raise RateLimited(
                f"rate limit reached for concurrent sequences: limit {limit}, {account.active} "
                f"under way, {sequences} asked for",
                BUSY_RETRY_S,
                "sequences",
            )

    def _check_tokens(self, account: Account, now: float, tokens: float) -> None:
        limit = self._share(account.limits.tokens_per_minute)
        if not limit:
            return
        if tokens > limit:
            name = "tokens_per_minute, prompt and completion"
            most = self._at_most(limit, account.limits.tokens_per_minute, name)
            raise InvalidRequest("max_tokens", f"{tokens:.0f} tokens", most)
        used = account.tokens.used(now)
        if used + tokens > limit:
            wait_s = account.tokens.wait_s(now, tokens, limit)
            raise RateLimited(
                f"rate limit reached for tokens per minute (TPM): limit {limit}, used {used:.0f}, "
                f"requested {tokens:.0f}; try again in {duration(wait_s)}",
                wait_s,
                "tokens",
            )

    def _check_budget(self, account: Account, cost: float) -> None:
        budget = account.limits.budget / self._gateways
        if not budget:
            return
        self._begin_period(account)
        if account.spent + account.reserved + cost > budget:
            per = account.limits.budget_per
            raise BudgetSpent(
                f"you exceeded your current quota: {account.spent:.6g} of {budget:.6g} are spent "
                f"this {per}, and this request may cost {cost:.6g}",
                _period_left_s(per, self._wall()),
            )

    def _begin_period(self, account: Account) -> None:
        since = period_of(account.limits.budget_per, self._wall())
        if account.period != since:
            # Of all gateways, as the budget is: each goes on from its share of both.
            account.spent = self._spent(account.name, since) / self._gateways
            account.period = since

    def _account(self, principal: Principal) -> Account:
        account = self._accounts.get(principal.account)
        if account is None:
            account = self._accounts[principal.account] = Account(
                principal.account, principal.limits
            )
            if len(self._accounts) > KEPT_ACCOUNTS:
                now = self._clock()
                idle = [name for name, each in self._accounts.items() if each.idle(now)]
                for name in idle:
                    if name != principal.account:
                        del self._accounts[name]
        if account.limits is not principal.limits:  # the file of keys was read again
            account.limits = principal.limits
        return account

    def _share(self, limit: int) -> int:
        """This gateway's part of a limit, rounded up; 0 is no limit."""
        return -(-limit // self._gateways)

    def _at_most(self, share: int, limit: int, name: str) -> str:
        of = f", one of {self._gateways} gateways' share of {limit}" if share != limit else ""
        return f"at most {share}, this credential's {name}{of}"


def period_of(per: str, unix_s: float) -> str:
    """The first day (UTC, ISO) of the day or month that a moment is in."""
    when = datetime.fromtimestamp(unix_s, UTC)
    return when.strftime("%Y-%m-%d" if per == "day" else "%Y-%m-01")


def _period_left_s(per: str, unix_s: float) -> float:
    when = datetime.fromtimestamp(unix_s, UTC)
    midnight = when.replace(hour=0, minute=0, second=0, microsecond=0)
    if per == "day":
        return 86_400 - (when - midnight).total_seconds()
    months = when.year * 12 + when.month
    first = midnight.replace(year=months // 12, month=months % 12 + 1, day=1)
    return (first - when).total_seconds()


def duration(seconds: float) -> str:
    """As OpenAI writes times: 20ms, 6.5s, 1m30s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, left = divmod(math.ceil(seconds * 1000) / 1000, 60)
    return f"{minutes:.0f}m{left:g}s" if minutes else f"{left:g}s"
