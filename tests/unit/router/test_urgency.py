"""Who goes first so that as many first tokens as can be are in time."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

from view_kit import connect, make_view, report

from crossdock.proto.types import Role
from crossdock.router.dispatch.turns import Turns
from crossdock.router.dispatch.urgency import OLDEST_EVERY, Urgency
from crossdock.router.placement.demand import Demand
from crossdock.router.placement.urgency import Due, in_time

TTFT_S = 2.0


def test_on_one_worker_no_other_choice_has_more_in_time() -> None:
    rng = random.Random(1)
    for _ in range(300):
        prompts = [Due(rng.uniform(0, 8), rng.uniform(0.1, 3)) for _ in range(7)]
        prompts.sort()
        kept = in_time(prompts, 0.0, 1)
        assert kept == sorted(kept) and all_in_time([prompts[place] for place in kept])
        most = max(
            count
            for count in range(8)
            for some in itertools.combinations(prompts, count)
            if all_in_time(some)
        )
        assert len(kept) == most


def all_in_time(prompts: Any) -> bool:
    ends = itertools.accumulate(prompt.seconds for prompt in prompts)
    return all(end <= prompt.by for end, prompt in zip(ends, prompts))


def test_the_longest_is_given_up_and_what_cannot_be_in_time_harms_nobody() -> None:
    prompts = [Due(2.0, 1.5), Due(2.0, 0.4), Due(2.0, 5.0), Due(2.0, 0.5)]
    assert in_time(prompts, 0.0, 1) == [1, 3]
    assert in_time(prompts, 0.0, 4) == [0, 1, 3]
    assert in_time(prompts, 1.8, 4) == []
    assert in_time([], 0.0, 2) == []


class Site:
    """Turns before one prefill worker of 1,000 tokens a second, or more of them."""

    def __init__(self, workers: int = 1) -> None:
        self.now, self.room, self.begun = 0.0, 0, list[Any]()
        view = make_view(d0=Role.DECODE)
        for i in range(workers):
            connect(view, f"p{i}", Role.PREFILL)
            report(view, f"p{i}")
        urgency = Urgency(view, lambda: self.now, TTFT_S, lambda s: Demand(s.prompt_tokens, (), 16))
        self.turns = Turns(lambda: self.room > 0, self._begin, urgency)

    def _begin(self, sequence: Any) -> None:
        self.room -= 1
        sequence.holders = {"p0": None}
        self.begun.append(sequence)

    def ask(self, tokens: int, generated: int = 0, tenant: str = "t") -> Any:
        request = SimpleNamespace(tenant=tenant, priority=0, received=self.now, deadline=None)
        sequence = Waiting(
            active=SimpleNamespace(request=request, order=len(self.turns)), index=0,
            prompt_tokens=tokens, generated=generated, holders={}, yields=False,
            sampling=SimpleNamespace(max_tokens=10),
        )  # fmt: skip
        self.turns.add(sequence)
        return sequence

    def begin(self, count: int = 1) -> list[Any]:
        self.begun.clear()
        self.room = count
        self.turns.pump()
        return list(self.begun)


class Waiting(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_what_would_be_late_lets_what_would_not_go_first() -> None:
    site = Site()
    long, *short = (site.ask(tokens) for tokens in (1900, 300, 200, 100))
    for each in short:
        assert site.begin() == [each] and not each.yields
        site.now += each.prompt_tokens / 1000
    assert site.begin() == [long] and long.yields, "it can no more"


def test_in_order_of_arrival_while_all_can_be_in_time() -> None:
    site = Site()
    asked = [site.ask(tokens) for tokens in (800, 100, 500)]
    assert site.begin(3) == asked


def test_late_ones_go_one_on_each_worker_the_shortest_first_and_now_and_then_the_oldest() -> None:
    site = Site(workers=2)
    lengths = (9000, 5000, 8000, 4000, 3000, 7000)
    asked = {tokens: site.ask(tokens) for tokens in lengths}
    assert site.begin(9) == [asked[3000], asked[4000]]
    assert site.begin(9) == [], "each worker has one"
    soon = site.ask(1000)
    assert site.begin(9) == [soon], "which is nothing to who is not late"
    order = []
    for _ in range(4):
        done = next(each for each in asked.values() if each.holders and not each.generated)
        done.generated = 1
        order += [each.prompt_tokens for each in site.begin(9)]
    assert OLDEST_EVERY == 4 and order == [5000, 9000, 7000, 8000]


def test_a_stream_that_is_prefilled_again_waits_for_nobody() -> None:
    site = Site()
    site.ask(100)
    again = site.ask(30_000, generated=7)
    assert site.begin() == [again] and not again.yields


def test_tokens_ahead_are_those_of_who_is_in_time() -> None:
    site = Site()
    for tokens in (50_000, 300, 200):
        site.ask(tokens)
    assert site.turns.tokens_of("t") == 500
    site.ask(50_000, tenant="other")
    assert site.turns.tokens_of("other") == 0
