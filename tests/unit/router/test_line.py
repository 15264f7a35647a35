"""Who of one tenant is next."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest

from crossdock.router.dispatch.line import LATE_PART, Line, Work, in_time


class Waiting:
    """A line, and one worker that computes what comes out of it."""

    def __init__(self) -> None:
        self.asked = 0
        self.line = Line(lambda each: each.due, self._work)
        self._count = itertools.count()

    def _work(self, sequence: Any) -> Work:
        self.asked += 1
        return Work(sequence.due, sequence.seconds, sequence.seconds)

    def add(self, name: str, due: float, seconds: float = 1.0, priority: int = 0) -> Any:
        request = SimpleNamespace(priority=priority)
        active = SimpleNamespace(request=request)
        made = Named(name=name, due=due, seconds=seconds, active=active)
        number = next(self._count)
        self.line.add(made, number, number)
        return made

    def served(self, now: float = 0.0) -> list[tuple[str, bool]]:
        """All of them, one after the other, and whether each was done when it was due."""
        found = []
        while self.line:
            sequence = self.line.pop(now)
            now += sequence.seconds
            found.append((sequence.name, now <= sequence.due))
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


def test_one_that_waits_alone_is_not_weighed() -> None:
    waiting = Waiting()
    waiting.add("a", 1.0)
    assert waiting.names() == ["a"]
    assert waiting.asked == 0


def test_what_cannot_be_met_makes_room() -> None:
    waiting = Waiting()
    waiting.add("hopeless", 2.0, seconds=5.0)
    for i in range(3):
        waiting.add(f"short{i}", 4.0 + i)
    assert waiting.served() == [
        ("short0", True), ("short1", True), ("short2", True), ("hopeless", False),
    ]  # fmt: skip


def test_the_longest_steps_aside_where_all_are_too_much() -> None:
    waiting = Waiting()
    waiting.add("long", 5.0, seconds=4.0)
    for i in range(4):
        waiting.add(f"short{i}", 5.0)
    served = waiting.served()
    assert sum(in_time for _, in_time in served) == 4
    assert served[-1][0] == "long"


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


def test_nobody_waits_for_ever() -> None:
    """As many as can be met come, for good, and one that is late is begun all the same."""
    waiting = Waiting()
    waiting.add("late", 0.0, seconds=4.0)
    now, names = 0.0, []
    while "late" not in names and now < 100:
        while len(waiting.line) < 3:
            waiting.add("timely", now + 10.0)
        names.append(waiting.line.pop(now).name)
        now += 1.0
    assert len(names) == pytest.approx(1 + 4 / LATE_PART, abs=1)


def test_one_that_leaves_is_not_begun() -> None:
    waiting = Waiting()
    gone = waiting.add("gone", 1.0)
    waiting.add("stays", 2.0)
    waiting.line.remove(gone)
    assert waiting.names() == ["stays"]
    assert not waiting.line
    with pytest.raises(ValueError):
        waiting.line.pop(0.0)
