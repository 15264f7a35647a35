"""What a credential may use: windows and accounts on a virtual clock, and over both doors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from access_kit import Answer, Doors, bearer, call, complete, generate, start_doors
from gateway_rig import Rig, until
from prometheus_client import CollectorRegistry

from crossdock.proto.errors import BudgetSpent, InvalidRequest, RateLimited, Unavailable
from crossdock.router.config import KeyLimits, Price
from crossdock.router.frontdoor.limits import Limiter, Work, duration, period_of
from crossdock.router.frontdoor.principal import Principal
from crossdock.router.frontdoor.usage import Usage
from crossdock.router.frontdoor.windows import Window

NOON = 1_795_348_800.0  # 2026-11-22, 12:00 UTC
FREE = Price()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return NOON + self.now


def limiter(clock: Clock, **more: Any) -> Limiter:
    return Limiter(clock, clock.wall, **more)


def of(**limits: Any) -> Principal:
    return Principal("t", "k", limits=KeyLimits(**limits), account="key k")


# -- windows ---------------------------------------------------------------------------------------


def test_a_limit_holds_in_every_sixty_seconds() -> None:
    """Random arrivals at ten times the rate: no window of 60 s, wherever it begins, has more than
    the limit, and whenever one was refused the last 60 s had as many as the limit allows."""
    rng, clock, limit = random.Random(3), Clock(), 30
    limits, taken = limiter(clock), list[float]()
    for _ in range(3000):
        clock.now += rng.expovariate(5.0)
        recent = sum(1 for at in taken if at > clock.now - 60)
        try:
            limits.count_request(of(requests_per_minute=limit))
            taken.append(clock.now)
            assert recent < limit
        except RateLimited as refused:
            in_reach = sum(1 for at in taken if at > clock.now - 60.2)
            assert in_reach >= limit
            assert 1 <= refused.retry_after_s <= 61
    assert all(later - at >= 60 for at, later in zip(taken, taken[limit:]))
    assert len(taken) >= clock.now / 60.1 * limit - limit


def test_after_the_wait_that_is_told_it_fits() -> None:
    rng, clock, window = random.Random(5), Clock(), Window()
    for _ in range(2000):
        clock.now += rng.random() * 3
        amount = rng.randrange(1, 40)
        wait_s = window.wait_s(clock.now, amount, 100)
        fits = window.used(clock.now) + amount <= 100
        assert fits == (wait_s == 0.0)
        if fits:
            window.add(clock.now, amount)
        else:
            assert window.used(clock.now + wait_s) + amount <= 100
            break
    assert window.empty_s(clock.now) <= 60.2


def test_what_was_set_aside_too_much_is_given_back() -> None:
    window = Window()
    window.add(1.0, 50)
    window.add(20.0, 5)
    window.correct(1.0, 30.0, -40)
    assert window.used(30.0) == 15
    window.correct(1.0, 70.0, 10)
    assert window.used(70.0) == 15, "forgotten meanwhile: what is owed counts from now on"
    window.correct(1.0, 70.0, -10)
    assert window.used(70.0) == 15
    assert window.used(131.0) == 0


def test_windows_stay_small() -> None:
    window = Window()
    for i in range(100_000):
        window.add(i / 1000, 1)
    assert len(window._slots) <= 602


# -- accounts --------------------------------------------------------------------------------------


def test_tokens_are_set_aside_and_settled() -> None:
    clock = Clock()
    limits, who = limiter(clock), of(tokens_per_minute=1000)
    grant = limits.admit(who, Work(100, 2, 300), FREE)
    assert limits.headers(who)["x-ratelimit-remaining-tokens"] == "300"
    with pytest.raises(RateLimited, match=r"tokens per minute.*used 700, requested 400") as refused:
        limits.admit(who, Work(100, 1, 300), FREE)
    assert (refused.value.limit, refused.value.retry_after_s) == ("tokens", 61)
    limits.settle(grant, 100, 50, 20)
    assert limits.headers(who)["x-ratelimit-remaining-tokens"] == "880"
    limits.admit(who, Work(100, 1, 300), FREE)
    with pytest.raises(InvalidRequest, match=r"max_tokens: '1100 tokens'.* at most 1000"):
        limits.admit(who, Work(100, 1, 1000), FREE)


def test_a_request_that_says_no_length_is_expected_to_have_the_usual_one() -> None:
    clock = Clock()
    limits, who = limiter(clock), of(tokens_per_minute=100_000)
    for _ in range(60):
        limits.settle(limits.admit(who, Work(10, 1, 8000, open_ended=True), FREE), 10, 0, 20)
        clock.now += 61
    limits.admit(who, Work(10, 1, 8000, open_ended=True), FREE)
    left = int(limits.headers(who)["x-ratelimit-remaining-tokens"])
    assert 100_000 - 60 < left < 100_000 - 10


def test_a_longer_one_is_owed() -> None:
    limits, who = limiter(Clock()), of(tokens_per_minute=1000)
    grant = limits.admit(who, Work(10, 1, 8000, open_ended=True), FREE)
    limits.settle(grant, 10, 0, 5000)
    assert limits.headers(who)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited):
        limits.admit(who, Work(1, 1, 1), FREE)


def test_a_request_that_says_no_length_is_never_too_long_for_a_small_limit() -> None:
    """Whatever completions before it had."""
    clock = Clock()
    limits, who = limiter(clock), of(tokens_per_minute=100)
    for _ in range(3):
        limits.settle(limits.admit(who, Work(10, 2, 8000, open_ended=True), FREE), 10, 0, 5000)
        with pytest.raises(RateLimited):
            limits.admit(who, Work(10, 1, 8000, open_ended=True), FREE)
        clock.now += 61
    with pytest.raises(InvalidRequest, match="101 tokens"):
        limits.admit(who, Work(101, 1, 8000, open_ended=True), FREE)


def test_sequences_at_once() -> None:
    limits, who = limiter(Clock()), of(max_concurrent=4)
    first = limits.admit(who, Work(10, 3, 10), FREE)
    limits.admit(who, Work(10, 1, 10), FREE)
    with pytest.raises(RateLimited, match="limit 4, 4 under way, 1 asked for"):
        limits.admit(who, Work(10, 1, 10), FREE)
    limits.settle(first, 10, 0, 10)
    limits.admit(who, Work(10, 3, 10), FREE)
    with pytest.raises(InvalidRequest, match="at most 4"):
        limits.admit(who, Work(10, 5, 10), FREE)


def test_a_budget_is_never_passed_and_begins_anew() -> None:
    clock = Clock()
    price = Price(input=1e6, cached=1e5, output=2e6)  # 1, 0.1 and 2 a token
    limits, who = limiter(clock), of(budget=100, budget_per="day")
    grant = limits.admit(who, Work(20, 1, 30), price)
    with pytest.raises(BudgetSpent, match="0 of 100 are spent this day") as refused:
        limits.admit(who, Work(1, 1, 10), price)
    assert not refused.value.retriable
    assert refused.value.retry_after_s == 12 * 3600
    assert limits.settle(grant, 20, 10, 5) == pytest.approx(10 + 1 + 10)
    limits.settle(limits.admit(who, Work(9, 1, 30), price), 9, 0, 30)
    with pytest.raises(BudgetSpent, match="90 of 100"):
        limits.admit(who, Work(9, 1, 1), price)
    clock.now += 12 * 3600 + 1
    limits.admit(who, Work(20, 1, 40), price)


def test_what_an_earlier_life_spent_counts() -> None:
    asked = []

    def spent(account: str, since: str) -> float:
        asked.append((account, since))
        return 95.0

    limits = limiter(Clock(), spent=spent)
    with pytest.raises(BudgetSpent):
        limits.admit(of(budget=100), Work(10, 1, 0), Price(input=1e6))
    assert asked == [("key k", "2026-11-01")]


def test_gateways_that_start_again_share_what_is_left() -> None:
    """What all of them spent is not what each of them spent."""
    price, who = Price(input=1e6), of(budget=100)
    for limits in [limiter(Clock(), gateways=4, spent=lambda *_: 40.0) for _ in range(4)]:
        limits.admit(who, Work(15, 1, 0), price)
        with pytest.raises(BudgetSpent):
            limits.admit(who, Work(1, 1, 0), price)


def test_a_database_that_cannot_be_read_refuses_budgets_alone(tmp_path: Path) -> None:
    """What ends meanwhile is accounted for all the same."""
    (tmp_path / "usage.db").write_bytes(b"no database " * 500)
    usage = Usage(tmp_path / "usage.db", CollectorRegistry())
    limits, price = limiter(Clock(), spent=usage.spent), Price(input=1e6)
    free, bound = of(max_concurrent=1), of(budget=100)
    with pytest.raises(Unavailable, match="cannot be read"):
        limits.admit(bound, Work(1, 1, 0), price)
    for _ in range(2):
        assert limits.settle(limits.admit(free, Work(3, 1, 0), price), 3, 0, 0) == 3


def test_several_gateways_hold_their_shares() -> None:
    limits, who = limiter(Clock(), gateways=3), of(requests_per_minute=10)
    for _ in range(4):
        limits.count_request(who)
    with pytest.raises(RateLimited, match="limit 4"):
        limits.count_request(who)
    with pytest.raises(InvalidRequest, match=r"at most 4, .* one of 3 gateways' share of 10"):
        limits.admit(of(tokens_per_minute=10), Work(1, 1, 4), FREE)


def test_limits_that_change_keep_what_was_used() -> None:
    limits = limiter(Clock())
    for _ in range(5):
        limits.count_request(of(requests_per_minute=5))
    limits.count_request(of(requests_per_minute=6))
    with pytest.raises(RateLimited):
        limits.count_request(of(requests_per_minute=6))


def test_times_as_openai_writes_them() -> None:
    assert [duration(s) for s in (0, 0.0201, 6.5, 59.9999, 90, 3600)] == [
        *("0ms", "21ms", "6.5s", "1m0s", "1m30s", "60m0s")
    ]
    assert period_of("month", NOON) == "2026-11-01"
    assert period_of("day", NOON) == "2026-11-22"


# -- over the doors --------------------------------------------------------------------------------


@pytest.fixture
async def doors(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Doors]:
    async with start_doors(tiny_model, tmp_path) as made:
        yield made


async def key_of(doors: Doors, **limits: Any) -> str:
    key = doors.key("acme", limits=limits)
    await doors.known(key)
    return key


async def test_requests_a_minute_over_both_doors(doors: Doors) -> None:
    key = await key_of(doors, requests_per_minute=20)
    answers = await asyncio.gather(*(complete(doors.rig, key) for _ in range(15)))
    calls = await asyncio.gather(*(generate(doors.rig, key) for _ in range(15)))
    assert [answer.status for answer in answers] == [200] * 15
    served = [answer for answer, _ in calls if not isinstance(answer, grpc.aio.AioRpcError)]
    assert len(served) == 5
    refused = await complete(doors.rig, key)
    assert refused.status == 429
    assert refused.error["code"] == "rate_limit_exceeded"
    assert refused.error["type"] == "requests"
    assert 1 <= int(refused.headers["Retry-After"]) <= 61
    error, trailers = await generate(doors.rig, key)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 1 <= int(trailers["retry-after"]) <= 61
    assert trailers["x-ratelimit-remaining-requests"] == "0"
    assert doors.rig.metric("requests_total", outcome="rate_limited") == 12


async def test_every_answer_says_what_is_left(doors: Doors) -> None:
    key = await key_of(doors, requests_per_minute=20, tokens_per_minute=1000)
    whole = await complete(doors.rig, key)
    assert whole.headers["x-ratelimit-limit-requests"] == "20"
    assert whole.headers["x-ratelimit-limit-tokens"] == "1000"
    assert whole.headers["x-ratelimit-remaining-requests"] == "19"
    assert whole.headers["x-ratelimit-remaining-tokens"] == str(1000 - 42)
    assert whole.headers["x-ratelimit-reset-requests"].startswith(("59", "1m0"))
    streamed = await complete(doors.rig, key, stream=True)
    assert streamed.headers["x-ratelimit-remaining-requests"] == "18"
    wrong = await complete(doors.rig, key, top_p=7)
    assert (wrong.status, wrong.headers["x-ratelimit-remaining-requests"]) == (400, "17")
    _, trailers = await generate(doors.rig, key)
    assert trailers["x-ratelimit-remaining-requests"] == "16"
    free = await key_of(doors)
    assert not [name for name in (await complete(doors.rig, free)).headers if "ratelimit" in name]


async def test_a_context_of_its_own(doors: Doors) -> None:
    key = await key_of(doors, max_context_tokens=50)
    assert (await complete(doors.rig, key, max_tokens=10)).status == 200
    long = await complete(doors.rig, key, max_tokens=11)
    assert (long.status, long.error["param"]) == (400, "max_tokens")
    assert (await complete(doors.rig, key, prompt=[7] * 50)).status == 400
    chat = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    answer = await call(doors.rig, "POST", "/v1/chat/completions", key, chat)
    assert answer.body["usage"]["total_tokens"] == 50, "what is left open ends there"


async def test_sequences_at_once_over_http(doors: Doors) -> None:
    key = await key_of(doors, max_concurrent=2)
    doors.rig.prefills[0].gate.clear()
    first = asyncio.create_task(complete(doors.rig, key, n=2))
    await until(lambda: doors.rig.prefills[0].prefills)
    second = await complete(doors.rig, key)
    assert (second.status, second.error["type"]) == (429, "sequences")
    doors.rig.prefills[0].gate.set()
    assert (await first).status == 200
    assert (await complete(doors.rig, key)).status == 200


async def test_who_goes_away_uses_a_prompt_that_was_started_and_no_other(
    tiny_model: Path, tmp_path: Path, model: str
) -> None:
    prices = {model: Price(input=1e6, cached=0, output=1e6)}
    async with start_doors(tiny_model, tmp_path, prices=prices) as doors:
        key, rig = await key_of(doors, max_concurrent=1, tokens_per_minute=200), doors.rig
        rig.prefills[0].gate.clear()
        await gone_once(lambda: rig.prefills[0].prefills, rig, key)
        await rig.members(rig.decodes[0])  # nobody computes prompts now
        await gone_once(lambda: rig.only.dispatcher.waiting_sequences, rig, key)
        rig.prefills[0].gate.set()
        await rig.members()
        answer = await complete(rig, key, prompt=[7, 8], max_tokens=1)
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(200 - 40 - 3)
        assert (await complete(rig, key, prompt=[7, 8], max_tokens=140)).status == 200
        told = {"tenant": "acme", "model": model}
        assert rig.metric("tenant_prompt_tokens_total", **told) == 40 + 2 + 2
        assert rig.metric("tenant_cost_total", **told) == 40 + 3 + 2 + 140


async def gone_once(condition: Callable[[], object], rig: Rig, key: str) -> None:
    """A client with a prompt of 40 tokens goes away once that is so."""
    body = {"prompt": list(range(10, 50)), "max_tokens": 20}
    async with aiohttp.ClientSession(headers=bearer(key)) as session:
        gone = asyncio.create_task(session.post(f"{rig.url}/v1/completions", json=body))
        await until(condition)
        gone.cancel()
    await until(lambda: not rig.gateway.active_requests)


async def test_a_spent_budget(tiny_model: Path, tmp_path: Path, model: str) -> None:
    prices = {model: Price(input=1e6, cached=0, output=1e6)}
    async with start_doors(tiny_model, tmp_path, prices=prices) as doors:
        key = await key_of(doors, budget=50)
        assert (await complete(doors.rig, key)).status == 200
        refused: Answer = await complete(doors.rig, key)
        assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")
        assert refused.error["type"] == "insufficient_quota"


async def test_a_refused_request_holds_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Neither one that is refused after it was counted, nor one of a gateway that is full."""
    async with start_doors(tiny_model, tmp_path, max_active=2, max_request_share=1) as doors:
        key = await key_of(doors, max_concurrent=2, tokens_per_minute=200)
        other = await key_of(doors)
        doors.rig.prefills[0].gate.clear()
        full = asyncio.create_task(complete(doors.rig, other, n=2))
        await until(lambda: doors.rig.prefills[0].prefills)
        for _ in range(5):
            assert (await complete(doors.rig, key)).error["code"] == "overloaded"
        doors.rig.prefills[0].gate.set()
        assert (await full).status == 200
        last = await complete(doors.rig, key, n=2)
        assert last.status == 200
        assert last.headers["x-ratelimit-remaining-tokens"] == str(200 - 44)
