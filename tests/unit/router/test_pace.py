"""How many requests begin in a turn of the event loop, and in which order."""

from __future__ import annotations

import asyncio

from crossdock.router.frontdoor.pace import AT_ONCE, Pace


class Began:
    """Requests that have begun, turn of the loop by turn."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.order: list[int] = []

    async def begin(self, number: int, party: str = "one") -> None:
        await self.pace.begin(party)
        self.order.append(number)

    async def by_turn(self, turns: int) -> list[int]:
        """How many more had begun after each of so many turns."""
        found = []
        for _ in range(turns):
            before = len(self.order)
            await asyncio.sleep(0)
            found.append(len(self.order) - before)
        return found


async def test_of_many_at_once_a_few_begin_in_each_turn_in_their_order() -> None:
    began = Began()
    many = 10 * AT_ONCE + 3
    tasks = [asyncio.create_task(began.begin(number)) for number in range(many)]
    turns = await began.by_turn(30)
    assert max(turns) == AT_ONCE and sum(turns) == many
    assert began.order == list(range(many))
    assert all(task.done() for task in tasks)


async def test_few_wait_for_nothing() -> None:
    began = Began()
    for number in range(AT_ONCE):
        await began.begin(number)
    assert await began.by_turn(1) == [0] and len(began.order) == AT_ONCE


async def test_who_comes_later_comes_after_those_that_wait() -> None:
    began = Began()
    first = [asyncio.create_task(began.begin(number)) for number in range(3 * AT_ONCE)]
    await asyncio.sleep(0)
    await began.begin(99)
    assert began.order[-1] == 99 and len(began.order) == 3 * AT_ONCE + 1
    await asyncio.gather(*first)


async def test_one_that_is_given_up_takes_no_place() -> None:
    began = Began()
    tasks = [asyncio.create_task(began.begin(number)) for number in range(3 * AT_ONCE)]
    await asyncio.sleep(0)
    for task in tasks[AT_ONCE : 2 * AT_ONCE]:
        task.cancel()
    turns = await began.by_turn(4)
    assert max(turns) == AT_ONCE
    assert began.order == [*range(AT_ONCE), *range(2 * AT_ONCE, 3 * AT_ONCE)]


async def test_it_rests_once_all_have_begun() -> None:
    began, loop = Began(), asyncio.get_running_loop()
    await asyncio.gather(*(began.begin(number) for number in range(2 * AT_ONCE)))
    await began.by_turn(5)
    assert not loop._ready  # type: ignore[attr-defined]  # nothing goes round for ever


async def test_who_asks_for_little_does_not_wait_behind_a_flood() -> None:
    began = Began()
    flood = [asyncio.create_task(began.begin(number)) for number in range(20 * AT_ONCE)]
    await asyncio.sleep(0)
    other = asyncio.create_task(began.begin(-1, "other"))
    await began.by_turn(3)
    assert other.done() and -1 in began.order[: 3 * AT_ONCE]
    await asyncio.gather(*flood)
    assert len(began.order) == 20 * AT_ONCE + 1
