"""Whose sequence is next: by itself, and in a gateway."""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from access_kit import complete
from gateway_rig import Rig, start_rig, until

from crossdock.proto.steps import Yields
from crossdock.router.dispatch.line import Work
from crossdock.router.dispatch.turns import (
    BURST_CHUNKS,
    EXPECTED_FOR_S,
    EXPECTED_TOKENS,
    KEPT_TENANTS,
    OWED_TOKENS,
    Turns,
)
from crossdock.router.placement.busy import Busy

SMALL: Any = {"chunk_tokens": 32, "max_batch": 8}  # a pair that says how little it takes


class Tape:
    """Turns, and what was begun in which order."""

    def __init__(self, **options: Any) -> None:
        self.begun: list[Any] = []
        self.room = 0
        self.turns = Turns(self._has_room, self._begin, **options)
        self._orders = 0

    def _has_room(self, yields: Yields) -> bool:
        return self.room > 0

    def _begin(self, sequence: Any) -> None:
        self.room -= 1
        self.begun.append(sequence)

    def ask(
        self,
        tenant: str,
        count: int = 1,
        prompt: int = 100,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[Any]:
        """A request of so many sequences."""
        self._orders += 1
        request = SimpleNamespace(tenant=tenant, priority=priority, deadline=deadline)
        active = SimpleNamespace(request=request, order=self._orders)
        sampling = SimpleNamespace(max_tokens=10_000)
        made = [Sequence(active, i, prompt, sampling) for i in range(count)]
        for sequence in made:
            self.turns.add(sequence)  # type: ignore[arg-type]
        return made

    def begin(self, count: int = 1) -> list[str]:
        before = len(self.begun)
        self.room = count
        self.turns.pump()
        return [each.active.request.tenant for each in self.begun[before:]]


class Sequence(SimpleNamespace):
    def __init__(self, active: Any, index: int, prompt: int, sampling: Any) -> None:
        about = {"active": active, "index": index, "prompt_tokens": prompt, "sampling": sampling}
        super().__init__(**about, generated=0, yields=Yields.NOT, holders=set())

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_a_flood_does_not_go_before_who_asks_for_little() -> None:
    tape = Tape()
    tape.ask("flood", 500)
    tape.begin(50)
    tape.ask("little")
    assert "little" in tape.begin(2)
    assert len(tape.turns) == 449


def calls_in(run: Callable[[], object]) -> int:
    """Of functions, and turns of generators."""
    calls = 0

    def tally(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(tally)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("late", [False, True])
def test_a_look_at_all_who_wait_costs_each_tenant_alike_however_many_they_are(late: bool) -> None:
    """Quadratic, one of 1,000 tenants held the loop for 150 ms, and came every 20 ms."""

    def calls(tenants: int) -> int:
        tape = Tape(clock=lambda: 9.0, due=lambda _: 1.0, work_of=lambda _: Work(1.0, 1.0, 1.0))
        for i in range(tenants):
            tape.ask(f"{i}")
        if late:  # there is room, but not for any more that are late
            (begun, *_) = tape.begin() and tape.begun
            begun.holders, begun.placement = {"w"}, SimpleNamespace(uncached_tokens=100)
            return calls_in(lambda: tape.begin() and pytest.fail("it is late"))
        return calls_in(lambda: tape.begin(0))

    assert calls(400) < 5 * calls(100)


@pytest.mark.parametrize(("prompt", "at_once"), [(1, 32), (30_000, 3), (10**6, 1)])
def test_many_are_begun_in_several_turns_of_the_loop(prompt: int, at_once: int) -> None:
    due: list[Any] = []
    tape = Tape(later=lambda in_s, then: due.append(then))
    tape.ask("a", 100, prompt)
    tape.begin(100)
    while due:
        assert len(tape.begun) <= at_once
        tape.begun.clear()
        (then,) = due
        due.clear()
        then()
    assert not tape.turns


def test_tenants_get_equal_tokens_whatever_their_prompts() -> None:
    tape, rng = Tape(), random.Random(4)
    tokens = Counter[str]()
    for _ in range(400):
        tape.ask("long", prompt=2000 + rng.randrange(500))
        tape.ask("short", 5, prompt=50 + rng.randrange(100))
        tape.ask("one", 2, prompt=400)
    tape.begin(900)
    for sequence in tape.begun:
        tokens[sequence.active.request.tenant] += sequence.prompt_tokens + EXPECTED_TOKENS
    assert max(tokens.values()) - min(tokens.values()) < 4 * (2500 + EXPECTED_TOKENS), tokens


OWED = OWED_TOKENS // (100 + EXPECTED_TOKENS) + 1  # sequences of such prompts


def test_who_was_away_is_owed_a_little() -> None:
    tape = Tape()
    tape.ask("always", 1000)
    tape.begin(500)
    tape.ask("back", 400)
    begun = Counter(tape.begin(100))
    assert 0 < begun["back"] - begun["always"] <= OWED + 1


def test_a_floods_prompts_yield_while_one_who_asks_for_less_is_expected_back() -> None:
    now, room = 0.0, {Yields.NOT: 9, Yields.OF_MANY: 9}
    in_time, of_many = ("flood", Yields.NOT), ("flood", Yields.OF_MANY)
    little = ("little", Yields.NOT)
    tape, busy = Tape(), Busy(workers=2, chunk_tokens=300)

    def begin(sequence: Any) -> None:
        room[Yields.NOT] -= not sequence.yields
        room[Yields.OF_MANY] -= 1
        tape.begun.append(sequence)

    has_room = room.__getitem__
    tape.turns = Turns(lambda y: has_room(y) > 0, begin, clock=lambda: now, busy=lambda: busy)

    def begun(beside: int) -> list[tuple[str, Yields]]:
        room.update({Yields.NOT: 9, Yields.OF_MANY: beside})
        tape.begun.clear()
        tape.turns.pump()
        return [(each.active.request.tenant, each.yields) for each in tape.begun]

    tape.ask("flood", 200)
    assert begun(9) == 9 * [in_time], "nobody else is here"
    tape.ask("little")
    assert begun(3) == [little, of_many, of_many]
    tape.ask("little")
    assert begun(0) == [little], "what yields has no room, and keeps it from nobody"
    now = EXPECTED_FOR_S
    assert begun(1) == 9 * [in_time], "it has not come back"
    tape.ask("little")
    assert begun(1) == [little]
    while len(tape.turns) > 7:
        assert begun(1)[-1] == of_many
    assert begun(1) == [of_many, *6 * [in_time]], "what is left is no flood"


def test_who_floods_now_is_yielded_to_no_more() -> None:
    busy = Busy(workers=2, chunk_tokens=300)
    tape = Tape()

    def has_room(yields: Yields) -> bool:
        return not yields and tape.room > 0  # no worker takes more of those that yield

    tape.turns = Turns(has_room, tape._begin, busy=lambda: busy)
    tape.ask("little")
    tape.ask("other", 300)
    tape.begin(101)
    tape.ask("little", 300)
    begun = Counter(tape.begin(100))
    assert begun["little"] > begun["other"] > 30, "once it has had as much, it is behind no more"


def test_of_one_tenant_no_later_prompt_goes_before_those_that_yield() -> None:
    busy, tape = Busy(workers=2, chunk_tokens=300), Tape()
    tape.turns = Turns(tape._has_room, tape._begin, busy=lambda: busy)
    tape.ask("flood", 100)
    tape.begin(50)
    tape.ask("little")
    tape.begin(51)
    assert tape.begun[-1].yields is Yields.NOT, "what was left was not much"
    tape.ask("flood", 20)
    tape.ask("little")
    tape.begin(3)
    first = tape.begun[-1]
    assert first.yields is Yields.OF_MANY
    first.holders = {"p0"}
    tape.begin(18)
    assert tape.begun[-1].yields is Yields.OF_MANY and not tape.turns
    first.generated = 1
    tape.ask("flood")
    tape.begin()
    assert tape.begun[-1].yields is Yields.NOT
    for each in tape.begun:
        tape.turns.remove(each)
    assert not tape.turns._of_many, "nothing is kept of what has ended"


def test_who_is_late_comes_after_its_own_tenant_and_not_after_anothers_flood() -> None:
    tape, busy = Tape(), Busy(workers=2, chunk_tokens=300)
    late = Work(due=1.0, alone_s=9.0)

    def due(sequence: Any) -> float:
        return 1.0 if sequence.active.request.tenant == "little" else math.inf

    tape.turns = Turns(tape._has_room, tape._begin, due, lambda sequence: late, busy=lambda: busy)
    tape.ask("little")
    tape.begin(9)
    assert [each.yields for each in tape.begun] == [Yields.LATE]
    tape.turns.remove(tape.begun[0])
    tape.ask("flood", 100)
    tape.begin(50)
    tape.ask("little")
    assert tape.begin(1) == ["little"] and tape.begun[-1].yields is Yields.OF_MANY


def test_who_asks_for_less_than_its_share_has_a_burst_at_once() -> None:
    busy = Busy(workers=2, chunk_tokens=1000)
    tape = Tape()
    tape.turns = Turns(tape._has_room, tape._begin, busy=lambda: busy)
    tape.ask("flood", 1000)
    for _ in range(30):
        tape.ask("steady")
        tape.begin(5)
    burst = BURST_CHUNKS * 2000 // (100 + EXPECTED_TOKENS)
    tape.ask("steady", 2 * burst)
    tape.ask("new", 2 * burst)
    begun = Counter(tape.begin(2 * burst))
    assert begun["flood"] == 0
    assert abs(begun["steady"] - begun["new"]) <= OWED + 1, "who is new goes before nobody"


def test_of_tenants_that_come_once_few_are_remembered() -> None:
    tape = Tape()
    for i in range(3 * KEPT_TENANTS):
        tape.ask(f"{i}")
        tape.begin()
        assert len(tape.turns._finished) <= KEPT_TENANTS


def test_a_request_that_is_late_is_told_once() -> None:
    told: list[Any] = []

    def shed(sequence: Any, seconds: float) -> None:
        told.append(sequence)
        for each in asked:
            turns.remove(each)

    late = Work(due=1.0, alone_s=5.0, share_s=5.0)
    turns = Turns(lambda: False, lambda _: None, lambda _: 1.0, lambda _: late, shed=shed)
    tape = Tape()
    tape.turns = turns
    asked = tape.ask("a", 8, deadline=1.0)
    turns.pump()
    assert told == asked[:1] and not turns


def test_nothing_is_kept_of_a_late_one_that_has_ended() -> None:
    late = Work(due=1.0, alone_s=5.0, share_s=5.0)
    busy = Busy(workers=1, chunk_tokens=1000)
    tape = Tape()
    tape.turns = Turns(
        tape._has_room, tape._begin, lambda _: 1.0, lambda _: late, busy=lambda: busy
    )
    (asked,) = tape.ask("a")
    tape.begin()
    assert tape.begun == [asked] and asked in tape.turns._late._begun
    tape.turns.remove(asked)
    assert not tape.turns._late._begun


def test_who_takes_pauses_has_no_more_than_a_share() -> None:
    """One that comes with a sequence just as the one before was begun."""
    tape = Tape()
    tape.ask("always", 1000)
    begun = Counter[str]()
    for _ in range(100):
        tape.ask("again")
        begun += Counter(tape.begin(1))
        if not any(s.active.request.tenant == "again" for s in tape.turns):
            continue
        begun += Counter(tape.begin(1))
    assert begun["again"] <= begun["always"] + OWED + 2


def test_a_large_request_lets_later_ones_of_its_tenant_go_first() -> None:
    tape = Tape()
    large = tape.ask("t", 100)
    tape.begin(10)
    small = tape.ask("t")[0]
    tape.begin(1)
    assert tape.begun[-1] is large[1 + 9] or tape.begun[-1] is small
    tape.begin(1)
    assert small in tape.begun
    tape.begin(100)
    assert len(tape.begun) == 101, "and is not starved"


def test_priority_counts_within_a_tenant_alone() -> None:
    tape = Tape()
    tape.ask("a", 3)
    tape.ask("b", 3)
    urgent = tape.ask("a", priority=-1)[0]
    tape.begin(2)
    assert urgent in tape.begun
    assert Counter(s.active.request.tenant for s in tape.begun) == {"a": 1, "b": 1}


def test_another_tenants_flood_counts_until_it_has_had_as_much() -> None:
    turns = Turns(
        lambda yields: False, lambda sequence: None, work_of=lambda sequence: Work(share_s=0.1)
    )
    tape = Tape()
    tape.turns = turns
    tape.ask("flood", 100)
    assert turns.seconds_before("flood", 0, math.inf) == pytest.approx(10)
    assert turns.seconds_before("new", 0, math.inf) == 0
    tape.ask("new", 40)
    alone_s, both_s = 4.0, 8.0
    assert turns.seconds_before("new", 0, math.inf) == pytest.approx(both_s)
    assert turns.seconds_before("new", -1, math.inf) == 0
    assert turns.seconds_before("flood", 0, math.inf) == pytest.approx(10 + alone_s)
    tape.ask("light")
    assert turns.seconds_before("new", 0, math.inf) == pytest.approx(both_s + 0.1)


def test_what_ended_meanwhile_is_not_begun() -> None:
    tape = Tape()
    gone, kept = tape.ask("a", 3), tape.ask("b")
    for sequence in gone:
        tape.turns.remove(sequence)
        tape.turns.remove(sequence)
    assert tape.begin(9) == ["b"]
    assert tape.begun == kept
    assert not tape.turns._queues


# -- a gateway -------------------------------------------------------------------------------------


async def test_a_flood_waits_at_the_gateway(tiny_model: Path) -> None:
    """Another tenant's request is next after the few that the workers have."""
    async with start_rig(tiny_model, max_active=600, **SMALL) as rig:
        worker = rig.prefills[0]
        worker.gate.clear()
        flood = [
            asyncio.create_task(complete(rig, headers={"X-Crossdock-Tenant": "flood"}, n=4))
            for _ in range(10)
        ]
        await until(lambda: rig.metric("active_sequences") == 40)
        sent = len(worker.prefills)
        assert sent <= 3, "two chunks of 64 tokens are two prompts, and one that was before them"
        assert rig.metric("queued_sequences") >= 8
        little = asyncio.create_task(complete(rig, headers={"X-Crossdock-Tenant": "little"}))
        await until(lambda: rig.metric("active_sequences") == 41)
        worker.gate.set()
        assert (await little).status == 200
        assert sum(task.done() for task in flood) < 10, "it did not wait for the flood"
        assert [answer.status for answer in await asyncio.gather(*flood)] == [200] * 10
        assert rig.metric("queued_sequences") == 0


async def test_who_goes_away_waits_no_more(tiny_model: Path) -> None:
    async with start_rig(tiny_model, **SMALL) as rig:
        rig.prefills[0].gate.clear()
        tasks = [asyncio.create_task(complete(rig)) for _ in range(6)]
        await until(lambda: rig.metric("queued_sequences") >= 3)
        for task in tasks:
            task.cancel()
        await until(lambda: rig.idle)
        assert rig.metric("queued_sequences") == 0


async def test_one_request_cannot_have_the_room_of_all(rig: Rig) -> None:
    """32 prompts, 16 times each, were the whole of what all without a tenant had."""
    for worker in rig.workers:
        worker.gate.clear()
    refused = await complete(rig, prompt=[[5, 6, 7]] * 32, n=16)
    assert (refused.status, refused.error["param"]) == (400, "n")
    assert "at most 128" in refused.error["message"]
    held = asyncio.create_task(complete(rig, prompt=[[5, 6, 7]] * 8, n=16))
    await until(lambda: rig.metric("active_sequences") == 128)
    for worker in rig.workers:
        worker.gate.set()
    assert (await complete(rig)).status == 200
    assert (await held).status == 200
