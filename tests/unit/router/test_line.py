"""Who of one tenant is next."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

from crossdock.router.dispatch.line import FRESH_S, OLDEST_EVERY, Late, Line, Work, in_time
from crossdock.router.placement.busy import Busy


class Waiting:
    """A line, and one worker that computes what comes out of it."""

    def __init__(self, late: int = 1) -> None:
        """So many that are late may be begun at once."""
        self.asked = 0
        self.line = Line(lambda each: each.due, self._work, Late(lambda: Busy(0.0, 0.0, late, 10)))
        self.made: list[Any] = []
        self._count = itertools.count()

    def _work(self, sequence: Any) -> Work:
        self.asked += 1
        return Work(sequence.due, sequence.seconds, sequence.seconds)

    def add(
        self,
        name: str,
        due: float,
        seconds: float = 1.0,
        priority: int = 0,
        generated: int = 0,
        prompt_tokens: int = 0,
    ) -> Any:
        request = SimpleNamespace(priority=priority, deadline=None)
        active = SimpleNamespace(request=request)
        made = Named(
            name=name, due=due, seconds=seconds, active=active, generated=generated,
            holders={}, yields=False, prompt_tokens=prompt_tokens,
            placement=SimpleNamespace(uncached_tokens=prompt_tokens or 10_000),
        )  # fmt: skip
        number = next(self._count)
        self.line.add(made, number, number)
        self.made.append(made)
        return made

    def served(self, now: float = 0.0) -> list[tuple[str, bool]]:
        """All of them, one after the other, and whether each was done when it was due."""
        found = []
        while self.line:
            sequence = self.line.pop(now)
            now += sequence.seconds
            found.append((sequence.name, now <= sequence.due))
            assert bool(sequence.yields) == (now > sequence.due)
        return found

    def names(self, now: float = 0.0) -> list[str]:
        return [name for name, _ in self.served(now)]


class Named(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_who_is_due_first_is_first() -> None:
    waiting = Waiting()
    for name, due in (("c", 30.0), ("a", 10.0), ("b", 20.0)):
        waiting.add(name, due)
    assert waiting.names() == ["a", "b", "c"]


def test_a_more_urgent_priority_goes_before_all() -> None:
    waiting = Waiting()
    waiting.add("late", 10.0)
    waiting.add("urgent", 99.0, priority=-1)
    assert waiting.names() == ["urgent", "late"]


def test_who_is_due_earlier_or_more_urgent_goes_before() -> None:
    waiting = Waiting()
    waiting.add("later", 9.0)
    waiting.add("earlier", 5.0)
    waiting.add("urgent", 99.0, priority=-1)
    waiting.add("can wait", 4.0, priority=1)

    def before(priority: int, due: float) -> set[str]:
        return {each.name for each, _ in waiting.line.before(priority, due, now=0.0)}

    assert before(0, 6.0) == {"earlier", "urgent"}
    assert before(0, 9.0) == {"earlier", "urgent", "later"}
    assert before(-1, 9.0) == set()
    assert before(1, 3.0) == {"earlier", "urgent", "later"}


def test_of_equal_ones_the_last_due_steps_aside() -> None:
    works = [Work(due=3.0, alone_s=1.0, share_s=1.0) for _ in range(5)]
    assert in_time(works, 0.0) == {0, 1, 2}
    assert in_time(works, 0.0, sharing=1.5) == {0, 1}


def test_only_those_with_a_deadline_are_told_to_be_late() -> None:
    waiting = Waiting()
    for i in range(3):
        waiting.add(f"aim{i}", 3.0)
    one = waiting.add("deadline", 3.0)
    assert waiting.line.late_ones(0.0) == []
    one.active.request.deadline = 3.0
    assert waiting.line.late_ones(0.0) == [(one, 4.0)]
    assert waiting.line.late_ones(0.0, part=0.7) == [], "it may be met, if all is quicker"
    assert waiting.line.late_ones(0.0, sharing=2.0, part=0.7) == [(one, 5.0)]


def test_those_beyond_their_aim_are_told_as_soon_as_not_all_of_them_can_meet_their_deadlines() -> (
    None
):
    waiting = Waiting()
    made = [waiting.add(str(i), 2.0) for i in range(6)]
    for each in made:
        each.active.request.deadline = 4.0
    assert waiting.line.late_ones(0.0) == [(made[4], 5.0), (made[5], 5.0)]
    for each in made[4:]:
        waiting.line.remove(each)
    assert waiting.line.late_ones(0.0) == []


def test_a_deadline_is_weighed_with_all_that_is_more_urgent_and_nothing_that_is_less() -> None:
    waiting = Waiting()
    less = waiting.add("less", 5.0, priority=1)
    urgent = waiting.add("urgent", 1.5)
    for each in (less, urgent):
        each.active.request.deadline = each.due
    assert waiting.line.late_ones(0.0) == []
    waiting.add("in time", 9.0, seconds=3.0)  # and late ones go before it as well
    waiting.add("late", -1.0, seconds=2.0)
    assert waiting.line.late_ones(0.0) == [(less, 7.0)]


def test_what_is_never_due_is_not_weighed() -> None:
    waiting = Waiting()
    for name in "ab":
        waiting.add(name, float("inf"))
    assert waiting.names() == ["a", "b"]
    assert waiting.asked == 0


def test_what_was_asked_of_a_sequence_is_asked_again_after_a_while() -> None:
    """Meanwhile more of its prompt may be cached."""
    waiting = Waiting(late=0)
    waiting.add("a", 0.0)
    assert [waiting.line.pop(now) for now in (0.0, FRESH_S / 2, FRESH_S)] == [None] * 3
    assert waiting.asked == 2


def begun(waiting: Waiting, now: float = 0.0) -> list[tuple[str, bool]]:
    """Who is next at once, and whether it yields, until nobody is."""
    found = []
    while (sequence := waiting.line.pop(now)) is not None:
        found.append((sequence.name, bool(sequence.yields)))
        sequence.holders["p0"] = None
        now += 0 if sequence.yields else sequence.seconds
    return found


def test_what_cannot_be_met_yields() -> None:
    waiting = Waiting()
    waiting.add("hopeless", 2.0, seconds=5.0)
    for i in range(2):
        waiting.add(f"short{i}", 4.0 + i)
    assert begun(waiting) == [("hopeless", True), ("short0", False), ("short1", False)]


def test_the_longest_steps_aside_where_all_are_too_much() -> None:
    waiting = Waiting()
    waiting.add("long", 5.0, seconds=4.0)
    for i in range(4):
        waiting.add(f"short{i}", 5.0)
    assert begun(waiting) == [("long", True), *((f"short{i}", False) for i in range(4))]


def test_work_before_them_counts() -> None:
    waiting = Waiting(late=0)
    for i in range(3):
        waiting.add(f"s{i}", 3.0, prompt_tokens=100)
    assert len(waiting.line.before(0, 3.0, now=0.0)) == 3
    assert len(waiting.line.before(0, 3.0, now=0.0, busy_s=0.5)) == 2
    assert waiting.line.pop(0.0, busy_s=2.5) is None


def test_so_many_that_are_late_are_begun_and_now_and_then_the_oldest() -> None:
    waiting = Waiting(late=2)
    for seconds in (9, 5, 8, 4, 3, 7):
        waiting.add(str(seconds), 1.0, seconds=seconds)
    assert begun(waiting) == [("3", True), ("4", True)]
    assert OLDEST_EVERY == 4
    order = []
    for _ in range(4):
        first = next(each for each in waiting.made if each.holders and not each.generated)
        first.generated = 1
        order += begun(waiting)
    assert [name for name, _ in order] == ["5", "9", "7", "8"]


def test_short_ones_that_are_late_fill_a_chunk_together() -> None:
    waiting = Waiting(late=2)
    for i in range(9):
        waiting.add(str(i), 0.0, prompt_tokens=3)
    assert len(begun(waiting)) == 7  # 20 tokens


def test_a_stream_that_is_prefilled_again_waits_for_nobody() -> None:
    waiting = Waiting()
    waiting.add("short", 5.0)
    waiting.add("again", 1.0, seconds=30.0, generated=7)
    assert begun(waiting)[0] == ("again", False)


def test_as_many_as_can_be_are_met() -> None:
    """Against every order of a few."""
    rng = random.Random(3)
    for _ in range(200):
        works = sorted(
            (
                Work(rng.uniform(0, 8), seconds, seconds)
                for seconds in (rng.uniform(0.1, 4) for _ in range(6))
            ),
            key=lambda work: work.due,
        )
        best = max(_met(order) for order in itertools.permutations(works))
        kept = in_time(works, 0.0)
        assert len(kept) == best
        assert _met([works[i] for i in sorted(kept)]) == best


def _met(works: Any) -> int:
    now, met = 0.0, 0
    for work in works:
        now += work.alone_s
        met += now <= work.due
    return met


def test_one_that_leaves_is_not_begun() -> None:
    waiting = Waiting()
    gone = waiting.add("gone", 1.0)
    waiting.add("stays", 2.0)
    waiting.line.remove(gone)
    assert waiting.names() == ["stays"]
    assert not waiting.line
    assert waiting.line.pop(0.0) is None
